"""Names as tokens of subjects."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau.nats.subjects import (
    TOKEN_LENGTH_MAX,
    agent_subject,
    decode_token,
    encode_token,
    node_inbox,
    node_subject,
)
from bacalhau_api.errors import InvalidError


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_every_name_comes_back(name: str) -> None:
    token = encode_token(name)
    assert decode_token(token) == name
    assert token
    assert token.isascii()
    assert not set(token) & set(" .*>\t\r\n")


@given(st.lists(st.text(max_size=3), min_size=2, max_size=2, unique=True))
def test_two_names_never_share_a_token(names: list[str]) -> None:
    try:
        tokens = {encode_token(name) for name in names}
    except UnicodeEncodeError:  # half a surrogate pair is not a name
        return
    assert len(tokens) == 2


@pytest.mark.parametrize(
    ("name", "token"),
    [("edge-1", "edge-1"), ("a.b", "a=2Eb"), ("", "="), ("=", "=3D"), ("a_b", "a_b"), ("*", "=2A")],
)
def test_tokens(name: str, token: str) -> None:
    assert encode_token(name) == token


@pytest.mark.parametrize("name", ["x" * (TOKEN_LENGTH_MAX + 1), "." * 400])
def test_names_that_are_too_long_are_neither_encoded_nor_kept(name: str) -> None:
    kept = encode_token.cache_info().currsize
    with pytest.raises(InvalidError, match="longer than that of any object"):
        encode_token(name)
    assert encode_token.cache_info().currsize == kept


def test_subjects_of_nodes() -> None:
    assert node_subject("a.b", "hello") == "node.a=2Eb.hello"
    assert node_subject("*", "beat") == "node.*.beat"
    assert agent_subject("a", ">") == "agent.a.>"
    assert node_inbox("a.b") == "_INBOX_a=2Eb"
