"""Packing gives the same bytes each time, and reads back as what it was."""

import gzip
import hashlib
import os
from pathlib import Path

import pytest

from bacalhau.archive import extract
from bacalhau.publishers.packing import packed, tar_pieces
from bacalhau_api.errors import TransientError
from tests.support.inputs import tree
from tests.support.outputs import make_outputs


def test_equal_outputs_give_equal_bytes(tmp_path: Path) -> None:
    extra = {"ü/ß": b"x" * 3_000_000, "long/" + "d" * 200 + "/" + "f" * 200: os.urandom(2_000_000)}
    one = make_outputs(tmp_path / "one", extra)
    two = make_outputs(tmp_path / "two", dict(reversed(extra.items())))
    os.utime(two / "stdout", (1, 1))
    digests = {hashlib.sha256(b"".join(packed(place))).hexdigest() for place in (one, two)}
    assert len(digests) == 1
    (tmp_path / "back").mkdir()
    (tmp_path / "x.tar.gz").write_bytes(b"".join(packed(one)))
    with (tmp_path / "x.tar.gz").open("rb") as file:
        extract(file, tmp_path / "back")
    assert tree(tmp_path / "back") == tree(one)
    plain = gzip.decompress((tmp_path / "x.tar.gz").read_bytes())
    assert plain == b"".join(tar_pieces(one))
    assert len(plain) % 10240 == 0


def test_an_empty_directory(tmp_path: Path) -> None:
    assert gzip.decompress(b"".join(packed(tmp_path))) == bytes(10240)


def test_a_file_that_gets_shorter_meanwhile(tmp_path: Path) -> None:
    outputs = make_outputs(tmp_path / "o", {"big": bytes(1_000_000)})
    pieces = tar_pieces(outputs)
    next(pieces)
    os.truncate(outputs / "big", 1000)
    with pytest.raises(TransientError, match="big changed"):
        list(pieces)
