"""Plug parameters: any letter case, and errors that name parameter, value and remedy."""

import pytest

from bacalhau.params import read_params
from bacalhau_api.base import Model
from bacalhau_api.errors import TerminalError


class Params(Model):
    """A sample."""

    source_path: str
    count: int = 1
    words: tuple[str, ...] = ()


def read(params: dict[str, object]) -> Params:
    return read_params(Params, params, what="source sample", reason="InvalidInput")


@pytest.mark.parametrize("key", ["sourcePath", "SourcePath", "source_path", "SOURCEPATH"])
def test_any_letter_case(key: str) -> None:
    assert read({key: "/x", "Words": ["a"]}) == Params(source_path="/x", words=("a",))


def test_null_means_absent() -> None:
    assert read({"sourcePath": "/x", "count": None}).count == 1


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({}, "params.sourcePath: field required"),
        ({"sourcePaht": "/x"}, "params.sourcePaht: is not known; did you mean sourcePath?"),
        ({"zzz": 1}, "params.zzz: is not known; known: count, sourcePath, words"),
        ({"sourcePath": 5}, "params.sourcePath: .*string .got 5."),
        ({"sourcePath": "/x", "count": "1"}, 'params.count: .*integer .got "1".'),
        ({"sourcePath": "/x", "words": ["a", 1]}, r"params.words.1: "),
        ({"sourcePath": "/x", "words": "a" * 500}, r"\.\.\.\)"),
    ],
)
def test_problems(params: dict[str, object], words: str) -> None:
    with pytest.raises(TerminalError, match=words) as caught:
        read(params)
    assert caught.value.message.startswith("source sample: ")
    assert caught.value.reason == "InvalidInput"


def test_all_problems_at_once() -> None:
    with pytest.raises(TerminalError, match=r"params\.count.*params\.words") as caught:
        read({"sourcePath": "/x", "count": "1", "words": 2})
    assert caught.value.message.count("params.") == 2
