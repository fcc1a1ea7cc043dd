"""The quick parser of headers says the same as the client's own."""

from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client

from bacalhau.nats.connection import _Client

NAMES = st.text("abcXYZ-", min_size=1, max_size=12)
VALUES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20)


@given(st.lists(st.tuples(NAMES, VALUES), max_size=6), st.sampled_from([": ", ":", ":\t"]))
def test_headers(pairs: list[tuple[str, str]], separator: str) -> None:
    block = "".join(f"{name}{separator}{value}\r\n" for name, value in pairs) + "\r\n"
    raw = block.encode()
    assert _strip(_Client._parse_header_lines(raw)) == _strip(Client._parse_header_lines(raw))


def _strip(headers: dict[str, str]) -> dict[str, str]:
    # Of odd white space at the ends, the two do not strip the same; ours never is there.
    return {name: value.strip() for name, value in headers.items()}


def test_odd_blocks() -> None:
    for raw in (b"\r\n", b"", b"nothing\r\n\r\n", b": x\r\n\r\n", b"A: \xff\r\n\r\n"):
        assert _Client._parse_header_lines(raw) == {
            name: value for name, value in Client._parse_header_lines(raw).items() if name
        }
