"""Good archives come out as they went in; hostile ones change and leave nothing."""

import gzip
import io
import os
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bacalhau.archive import ArchiveError, ArchiveLimits, TarEntry, extract, stream_tar

MIB = 1024 * 1024


class Maker:
    """Builds archives entry by entry, including those that no tool would make."""

    def __init__(self) -> None:
        self.blocks: list[bytes] = []

    def add(
        self,
        name: str,
        data: bytes = b"",
        kind: bytes = tarfile.REGTYPE,
        link: str = "",
        mode: int = 0o644,
        size: int | None = None,
        pax: dict[str, str] | None = None,
    ) -> "Maker":
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.mode = kind, link, mode
        info.size = len(data) if size is None else size
        info.pax_headers = pax or {}
        self.blocks.append(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
        self.blocks.append(data + bytes(-len(data) % 512))
        return self

    def raw(self, data: bytes) -> "Maker":
        self.blocks.append(data)
        return self

    def patched(self, name: str, at: int, data: bytes, body: bytes = b"") -> "Maker":
        """A regular file's header with some bytes replaced and the checksum made right again."""
        info = tarfile.TarInfo(name)
        block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
        block[at : at + len(data)] = data
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        return self.raw(bytes(block)).raw(body + bytes(-len(body) % 512))

    def plain(self) -> bytes:
        return b"".join(self.blocks) + bytes(1024)

    def gzip(self) -> bytes:
        return gzip.compress(self.plain(), 9)


def header(kind: bytes, size: int, name: str = "x") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(text: bytes) -> bytes:
    """A PAX header with the given records as they are."""
    return header(tarfile.XHDTYPE, len(text)) + text + bytes(-len(text) % 512)


def record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode("utf-8", "surrogateescape")
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


def m() -> Maker:
    return Maker()


SYM, LNK, DIR = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE
SMALL = ArchiveLimits(entries_max=1000, size_bytes_max=64 * MIB)

HOSTILE: dict[str, Callable[[], bytes]] = {
    "absolute": lambda: m().add("/outside/new", b"x").plain(),
    "absolute by pax": lambda: m().add("a", b"x", pax={"path": "/outside/new"}).plain(),
    "absolute by longname": lambda: (
        m().raw(header(b"L", 13) + b"/outside/new\0" + bytes(499)).add("a", b"x").plain()
    ),
    "double slash": lambda: m().add("//outside/new", b"x").plain(),
    "climb": lambda: m().add("../outside/new", b"x").plain(),
    "climb in the middle": lambda: m().add("a/../../outside/new", b"x").plain(),
    "climb at the end": lambda: m().add("a/..", b"", DIR).plain(),
    "climb that stays inside": lambda: m().add("a/../b", b"x").plain(),
    "climb by pax": lambda: m().add("a", b"x", pax={"path": "../outside/new"}).plain(),
    "climb by prefix field": lambda: m().patched("new", 345, b"../outside").plain(),
    "directory climbs": lambda: m().add("../outside/sub", b"", DIR).plain(),
    "backslash climb": lambda: m().add("..\\outside\\new", b"x").plain(),
    "drive letter": lambda: m().add("C:/new", b"x").plain(),
    "link to absolute": lambda: m().add("l", kind=SYM, link="/outside").plain(),
    "link climbs": lambda: m().add("l", kind=SYM, link="../outside").plain(),
    "link climbs from a directory": lambda: m().add("a/l", kind=SYM, link="../../outside").plain(),
    "link climbs later": lambda: m().add("l", kind=SYM, link="a/../../outside").plain(),
    "link to nothing": lambda: m().add("l", kind=SYM, link="").plain(),
    "link with control characters": lambda: m().add("l", kind=SYM, link="a\x1b[2J").plain(),
    "write through a link": lambda: (
        m().add("l", kind=SYM, link="/outside").add("l/new", b"x").plain()
    ),
    "write through a link inside": lambda: (
        m().add("d", kind=DIR).add("l", kind=SYM, link="d").add("l/new", b"x").plain()
    ),
    "link replaced by a file": lambda: (
        m().add("f", b"x").add("l", kind=SYM, link="f").add("l", b"changed").plain()
    ),
    "directory replaced by a link": lambda: (
        m().add("d", kind=DIR).add("d", kind=SYM, link=".").plain()
    ),
    "link chain that climbs": lambda: (
        m().add("s", kind=SYM, link=".").add("t", kind=SYM, link="s/../outside").plain()
    ),
    "link chain past the path limit": lambda: (
        m().add("d" * 247 + "/" + "l", kind=SYM, link="../" * 2000 + "outside").plain()
    ),
    "hard link out": lambda: m().add("h", kind=LNK, link="../outside/secret").plain(),
    "hard link to absolute": lambda: m().add("h", kind=LNK, link="/etc/passwd").plain(),
    "hard link to a link": lambda: (
        m().add("l", kind=SYM, link="x").add("h", kind=LNK, link="l").plain()
    ),
    "hard link through a link": lambda: (
        m().add("d/f", b"x").add("l", kind=SYM, link="d").add("h", kind=LNK, link="l/f").plain()
    ),
    "hard link to what was there": lambda: m().add("h", kind=LNK, link="existing").plain(),
    "hard link to a later file": lambda: m().add("h", kind=LNK, link="f").add("f", b"x").plain(),
    "hard link with contents": lambda: (
        m().add("f", b"x").add("h", b"changed", kind=LNK, link="f").plain()
    ),
    "overwrites what was there": lambda: m().add("existing", b"changed").plain(),
    "same file twice": lambda: m().add("a", b"1").add("a", b"2").plain(),
    "file as directory": lambda: m().add("a", b"1").add("a/b", b"2").plain(),
    "root replaced by a link": lambda: m().add(".", kind=SYM, link="x").plain(),
    "root replaced by a file": lambda: m().add("./", b"x").plain(),
    "character device": lambda: m().add("dev", kind=tarfile.CHRTYPE).plain(),
    "block device": lambda: m().add("dev", kind=tarfile.BLKTYPE).plain(),
    "fifo": lambda: m().add("pipe", kind=tarfile.FIFOTYPE).plain(),
    "unknown type": lambda: m().add("u", kind=b"Z").plain(),
    "gnu sparse": lambda: m().add("s", kind=tarfile.GNUTYPE_SPARSE).plain(),
    "pax sparse": lambda: m().add("s", b"x", pax={"GNU.sparse.major": "1"}).plain(),
    "gnu multi-volume": lambda: m().add("v", kind=b"M").plain(),
    "huge size": lambda: m().add("a", size=8 * 1024**6, pax={"size": str(8 * 1024**6)}).plain(),
    "negative size": lambda: m().patched("a", 124, b"\xff" * 12).plain(),
    "negative size by pax": lambda: m().add("a", b"x", pax={"size": "-512"}).plain(),
    "size that is no number": lambda: m().add("a", b"x", pax={"size": "1e3"}).plain(),
    "huge pax header": lambda: m().raw(header(tarfile.XHDTYPE, 1 << 33)).plain(),
    "huge longname": lambda: m().raw(header(b"L", 1 << 33)).plain(),
    "pax length too long": lambda: m().raw(pax(b"999 path=a\n")).add("a").plain(),
    "pax length zero": lambda: m().raw(pax(b"0 path=a\n" * 50)).add("a").plain(),
    "pax without length": lambda: m().raw(pax(b"path=a\n")).add("a").plain(),
    "pax with a newline missing": lambda: m().raw(pax(b"8 path=a")).add("a").plain(),
    "global path": lambda: _global("path", "b"),
    "newline in a name": lambda: m().add("a\nb", b"x").plain(),
    "escape in a name": lambda: m().add("\x1b[2J", b"x").plain(),
    "c1 control in a name": lambda: m().add("a\x9bb", b"x").plain(),
    "name that is not utf-8": lambda: m().add("a\udcffb", b"x").plain(),
    "nul in a name by pax": lambda: m().raw(pax(record("path", "a\0b"))).add("x").plain(),
    "long component": lambda: m().add("n" * 300, b"x").plain(),
    "long path": lambda: m().add("/".join(["n" * 200] * 30), b"x").plain(),
    "deep path": lambda: m().add("/".join("n" * 100), b"x").plain(),
    "letter case": lambda: m().add("File", b"1").add("fILE", b"2").plain(),
    "letter case of a directory": lambda: m().add("Dir/a", b"1").add("dir/b", b"2").plain(),
    "unicode form": lambda: m().add("\u00e9", b"1").add("e\u0301", b"2").plain(),
    "sharp s": lambda: m().add("stra\u00dfe", b"1").add("STRASSE", b"2").plain(),
    "too many entries": lambda: _many(2000),
    "too many directories": lambda: _many(2000, DIR),
    "too many bytes": lambda: m().add("a", bytes(65 * MIB)).plain(),
    "too many bytes together": lambda: _many(70, size=MIB),
    "gzip bomb": lambda: m().add("a", bytes(60 * MIB)).gzip(),
    "gzip bomb in a header": lambda: gzip.compress(header(b"L", 60 * MIB) + bytes(60 * MIB)),
    "data after the end": lambda: m().add("a", b"x").plain() + b"more" * 200,
    "much after the end": lambda: m().add("a", b"x").plain() + bytes(2 * MIB),
    "many extension headers": lambda: (
        m().raw(pax(record("path", "a")) * 1000).add("a", b"x").plain()
    ),
    "ends in a header": lambda: m().add("a", b"x").plain()[:300],
    "ends in a file": lambda: m().add("a", bytes(5000)).plain()[:2000],
    "ends without an end": lambda: m().add("a", b"x").plain()[:1024],
    "nothing": lambda: b"",
    "no archive": lambda: b"just text" * 500,
    "wrong checksum": lambda: m().add("a", b"x").plain().replace(b"0000644", b"0000777", 1),
    "gzip that is cut off": lambda: m().add("a", os.urandom(5000)).gzip()[:-2000],
    "gzip that is damaged": lambda: _damaged(m().add("a", os.urandom(5000)).gzip()),
    "gzip of no archive": lambda: gzip.compress(b"just text" * 500),
    "zip": lambda: b"PK\x03\x04" + bytes(1000),
    "good, then hostile": lambda: (
        m().add("d/e/f", b"x").add("s", kind=SYM, link="d").add("../outside/new", b"x").plain()
    ),
}


def _global(key: str, value: str) -> bytes:
    text = record(key, value)
    block = header(tarfile.XGLTYPE, len(text)) + text + bytes(-len(text) % 512)
    return m().raw(block).add("a", b"x").plain()


def _many(count: int, kind: bytes = tarfile.REGTYPE, size: int = 0) -> bytes:
    maker = m()
    for number in range(count):
        maker.add(f"n{number}", bytes(size), kind)
    return maker.plain()


def _damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(b ^ 0xFF for b in data[middle : middle + 50]) + data[middle + 50 :]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory `root` to unpack into, beside things that must not change."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "existing").write_text("was here")
    (tmp_path / "outside").mkdir(mode=0o750)
    (tmp_path / "outside" / "secret").write_text("secret")
    return root


def census(top: Path) -> list[tuple[object, ...]]:
    """All below a directory: names, kinds, modes, sizes, times, links, contents."""
    found: list[tuple[object, ...]] = []
    for path in sorted([top, *top.rglob("*")]):
        s = path.lstat()
        body: object = None
        if stat.S_ISLNK(s.st_mode):
            body = os.readlink(path)
        elif stat.S_ISREG(s.st_mode):
            body = path.read_bytes()
        found.append((str(path), s.st_mode, s.st_nlink if body else 0, body))
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_change_nothing(place: Path, name: str) -> None:
    data = HOSTILE[name]()
    before = census(place.parent)
    outside = (place.parent / "outside").stat().st_mtime_ns
    began = time.process_time()
    with pytest.raises(ArchiveError) as caught:
        extract(io.BytesIO(data), place, SMALL)
    assert census(place.parent) == before
    assert (place.parent / "outside").stat().st_mtime_ns == outside
    assert caught.value.message.isprintable()
    assert time.process_time() - began < 5.0


def test_there_are_many_hostile_archives() -> None:
    assert len(HOSTILE) >= 60


BOMB = """
import io, resource, sys, zlib
from pathlib import Path
from bacalhau.archive import ArchiveError, ArchiveLimits, extract

packed = zlib.compressobj(9, wbits=31)
data = packed.compress(bytes.fromhex(sys.stdin.read())) + packed.compress(bytes(256 << 20))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    extract(io.BytesIO(data), Path(sys.argv[1]), ArchiveLimits(ratio_max=10**9))
except ArchiveError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_bombs_take_little_memory(tmp_path: Path) -> None:
    """In a process of its own, because a peak never goes down."""
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(str(root / part) for part in ("", "api", "controllers"))
    done = subprocess.run(
        [sys.executable, "-c", BOMB, str(tmp_path)],
        input=header(tarfile.REGTYPE, 4 << 30).hex(),
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    assert int(done.stdout) < 64 * 1024
    assert list(tmp_path.iterdir()) == []


def test_good_archive(place: Path) -> None:
    data = (
        m()
        .add(".", kind=DIR)
        .add("./dir/", kind=DIR, mode=0o777)
        .add("./dir/file", b"content", mode=0o6777)
        .add("empty", b"", mode=0o000)
        .add("script", b"#!", mode=0o755)
        .add("dir/up", kind=SYM, link="../script")
        .add("down", kind=SYM, link="dir/file")
        .add("here", kind=SYM, link="dir")
        .add("same", kind=LNK, link="dir/file")
        .add("a/b/c/deep", bytes(100_000))
        .add("n" * 250 + "/ünïcode " + "x" * 200, b"long")
        .plain()
    )
    done = extract(io.BytesIO(data), place)
    assert (done.entries, done.size_bytes) == (11, 7 + 2 + 100_000 + 4)
    assert (place / "dir" / "file").read_bytes() == b"content"
    assert (place / "dir" / "up").read_bytes() == b"#!"
    assert (place / "down").read_bytes() == b"content"
    assert (place / "here" / "file").samefile(place / "same")
    assert (place / ("n" * 250) / ("ünïcode " + "x" * 200)).read_bytes() == b"long"
    modes = {p: (place / p).stat().st_mode & 0o7777 for p in ("dir/file", "empty", "script", "dir")}
    assert modes == {"dir/file": 0o755, "empty": 0o600, "script": 0o755, "dir": 0o755}
    assert (place / "existing").read_text() == "was here"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_of_the_usual_tools(tmp_path: Path, format: int) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "sub").mkdir(parents=True)
    target.mkdir()
    (source / "sub" / ("long" * 20)).write_bytes(b"1")
    (source / "text").write_text("two")
    (source / "link").symlink_to("sub")
    os.link(source / "text", source / "again")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", format=format) as tar:
        tar.add(source, ".")
    with (tmp_path / "a.tar.gz").open("rb") as file:
        extract(file, target)
    names = sorted(str(p.relative_to(source)) for p in source.rglob("*"))
    assert sorted(str(p.relative_to(target)) for p in target.rglob("*")) == names
    assert (target / "sub" / ("long" * 20)).read_bytes() == b"1"
    assert (target / "again").read_text() == "two"


def test_gzip_of_several_members(place: Path) -> None:
    data = m().add("a", bytes(10_000)).plain()
    extract(io.BytesIO(gzip.compress(data[:3000]) + gzip.compress(data[3000:])), place)
    assert (place / "a").stat().st_size == 10_000


def test_names_that_differ_in_case_where_that_is_right(place: Path) -> None:
    data = m().add("File", b"1").add("fILE", b"2").plain()
    extract(io.BytesIO(data), place, ArchiveLimits(may_differ_in_case=True))
    assert ((place / "File").read_bytes(), (place / "fILE").read_bytes()) == (b"1", b"2")


def test_second_archive_into_the_same_tree(place: Path) -> None:
    extract(io.BytesIO(m().add("d/a", b"1").plain()), place)
    extract(io.BytesIO(m().add("d/b", b"2").plain()), place)
    with pytest.raises(ArchiveError, match="exists already"):
        extract(io.BytesIO(m().add("d/c", b"3").add("d/a", b"4").plain()), place)
    assert sorted(p.name for p in (place / "d").iterdir()) == ["a", "b"]
    assert (place / "d" / "a").read_bytes() == b"1"


def test_link_that_lies_in_the_way_is_not_followed(place: Path) -> None:
    (place / "d").symlink_to("../outside")
    with pytest.raises(ArchiveError, match="not a directory"):
        extract(io.BytesIO(m().add("d/new", b"x").plain()), place)
    assert sorted(p.name for p in (place.parent / "outside").iterdir()) == ["secret"]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=3000), st.integers(0, 2500))
def test_any_bytes_end_in_archive_error_or_success(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int
) -> None:
    """A good archive overwritten somewhere by anything."""
    data = bytearray(m().add("a", b"x" * 600).add("b", kind=SYM, link="a").plain())
    data[at : at + len(noise)] = noise
    place = tmp_path_factory.mktemp("any")
    try:
        extract(io.BytesIO(bytes(data)), place, SMALL)
    except ArchiveError:
        assert list(place.iterdir()) == []


# The writer


def chunks(*parts: bytes) -> Callable[[], AsyncIterator[bytes]]:
    async def give() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    return give


async def packed(*entries: TarEntry) -> bytes:
    return b"".join([part async for part in stream_tar(entries)])


async def test_written_archives_are_read_by_all(tmp_path: Path) -> None:
    data = await packed(
        TarEntry("stdout", 5, chunks(b"he", b"llo")),
        TarEntry(
            "outputs/ü" + "x" * 200 + "/part-0.csv", 600, chunks(bytes(600)), mtime=1_700_000_000
        ),
        TarEntry("empty", 0, chunks()),
    )
    assert len(data) % 10240 == 0
    extract(io.BytesIO(data), tmp_path)
    assert (tmp_path / "stdout").read_bytes() == b"hello"
    assert (tmp_path / ("outputs/ü" + "x" * 200) / "part-0.csv").stat().st_mtime == 1_700_000_000
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [i.name for i in tar] == ["stdout", "outputs/ü" + "x" * 200 + "/part-0.csv", "empty"]
        assert {(i.uid, i.gid, i.uname, i.gname) for i in tar} == {(0, 0, "", "")}


async def test_equal_entries_give_equal_bytes() -> None:
    one = await packed(TarEntry("ä/b", 4, chunks(b"data")))
    other = await packed(TarEntry("ä/b", 4, chunks(b"da", b"", b"ta")))
    assert one == other


async def test_entries_may_come_one_by_one() -> None:
    async def entries() -> AsyncIterator[TarEntry]:
        for number in range(3):
            yield TarEntry(f"f{number}", 1, chunks(b"x"))

    data = b"".join([part async for part in stream_tar(entries())])
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() == ["f0", "f1", "f2"]


async def test_large_files_are_not_held_in_memory() -> None:
    async def give() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield bytes(MIB)

    largest = 0
    async for part in stream_tar([TarEntry("big", 100 * MIB, give)]):
        largest = max(largest, len(part))
    assert largest == MIB


@pytest.mark.parametrize("parts", [[b"1"], [b"1", b"23"], []])
async def test_contents_of_another_length_are_an_error(parts: list[bytes]) -> None:
    with pytest.raises(ArchiveError, match="changed meanwhile"):
        await packed(TarEntry("f", 2, chunks(*parts)))


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../b", "", ".", "a\nb", "a\\b"])
async def test_paths_that_could_not_be_unpacked_are_not_packed(path: str) -> None:
    with pytest.raises(ArchiveError):
        await packed(TarEntry(path, 0, chunks()))
