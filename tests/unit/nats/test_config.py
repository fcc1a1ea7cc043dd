"""What the embedded server is told."""

import json
import re
from pathlib import Path

import pytest

from bacalhau.nats.config import (
    NatsSettings,
    NodeUser,
    Runtime,
    TlsFiles,
    render_config,
    sift_nodes,
)
from bacalhau.nats.keys import check_public_key, load_or_make_seed, new_seed, public_key
from bacalhau_api.errors import InvalidError, TerminalError

KEY_A, KEY_B, KEY_C, KEY_S, KEY_Z = (public_key(new_seed()) for _ in range(5))
RUNTIME = Runtime(port=4222, monitor_port=8222, controller_key=KEY_C, system_key=KEY_S)
# Its checksum is right, and it is too short by four bytes.
PADDED = "UB4HQ6DYPB4HQ6DYPB4HQ6DYPB4HQ6DYPB4HQ6DYPB4HQ6FVTY======"


def rendered(*nodes: NodeUser, **settings: object) -> dict[str, object]:
    options = NatsSettings(Path("/data"), **settings)  # type: ignore[arg-type]
    loaded: dict[str, object] = json.loads(render_config(options, RUNTIME, nodes))
    return loaded


def test_writes_are_synced_unless_asked_otherwise() -> None:
    assert rendered()["jetstream"]["sync_interval"] == "always"  # type: ignore[index]
    assert rendered(relaxed=True)["jetstream"]["sync_interval"] == "1s"  # type: ignore[index]


def test_only_controllers_have_jetstream() -> None:
    accounts = rendered(NodeUser("a", KEY_A))["accounts"]
    assert accounts["CP"]["jetstream"] == "enabled"  # type: ignore[index]
    assert "jetstream" not in accounts["NODES"]  # type: ignore[index]
    assert accounts["CP"]["users"] == [{"nkey": KEY_C}]  # type: ignore[index]


def test_a_node_may_use_its_own_subjects_only() -> None:
    (user,) = rendered(NodeUser("a.b", KEY_A))["accounts"]["NODES"]["users"]  # type: ignore[index]
    assert user["nkey"] == KEY_A
    assert user["permissions"]["publish"] == ["node.a=2Eb.>"]
    assert user["permissions"]["subscribe"] == ["agent.a=2Eb.>", "_INBOX_a=2Eb.>"]


def test_the_monitor_is_on_loopback_whatever_the_host() -> None:
    config = rendered(host="0.0.0.0")
    assert config["host"] == "0.0.0.0"
    assert config["http"] == "127.0.0.1:8222"


def test_tls() -> None:
    files = TlsFiles(Path("/c"), Path("/k"), Path("/ca"))
    tls = rendered(tls=files)["tls"]
    assert tls == {
        "cert_file": "/c", "key_file": "/k", "ca_file": "/ca", "verify": True, "timeout": 10,
    }  # fmt: skip
    assert "tls" not in rendered()


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        pytest.param([NodeUser("a", "UBAD")], "node a: publicKey", id="malformed key"),
        pytest.param(
            [NodeUser("a", KEY_A[:20] + KEY_B[20:30] + KEY_A[30:])], "checksum", id="misspelt key"
        ),
        pytest.param([NodeUser("a", PADDED)], "other letters", id="padded key"),
        pytest.param(
            [NodeUser("a", KEY_A), NodeUser("b", KEY_A)], "node b: .* of node a", id="shared key"
        ),
        pytest.param([NodeUser("a", KEY_A), NodeUser("a", KEY_B)], "second", id="same name"),
        pytest.param([NodeUser("a", KEY_C)], "of the controllers", id="the controllers' key"),
        pytest.param([NodeUser("a", KEY_S)], "of the system", id="the system's key"),
    ],
)
def test_bad_nodes_are_named_and_left_out(nodes: list[NodeUser], message: str) -> None:
    """One key that it does not take would have the server refuse all of its configuration."""
    with pytest.raises(InvalidError, match=message):
        rendered(*nodes)
    good, (problem,) = sift_nodes([*nodes, NodeUser("z", KEY_Z)], RUNTIME)
    assert re.search(message, str(problem))
    assert good == [*nodes[:-1], NodeUser("z", KEY_Z)]


def test_the_same_input_renders_the_same() -> None:
    nodes = (NodeUser("a", KEY_A), NodeUser("b", KEY_B))
    assert rendered(*nodes) == rendered(*nodes)


def test_keys() -> None:
    seed = new_seed()
    assert check_public_key(public_key(seed)) == public_key(seed)
    misspelt = seed[:30] + ("B" if seed[30] == "A" else "A") + seed[31:]
    for wrong in ("", "SUXXXX", public_key(seed), seed[:-2], misspelt):
        with pytest.raises(ValueError, match=r"seed|NKey"):
            public_key(wrong)


def test_a_seed_is_made_once_and_kept_private(tmp_path: Path) -> None:
    path = tmp_path / "own.nk"
    seed = load_or_make_seed(path, "")
    assert load_or_make_seed(path, "") == seed
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kept", [b"", b"rubbish\n", b"\x83\xff\n", new_seed()[:-1].encode()])
def test_a_damaged_seed_is_said_with_its_remedy_and_kept(tmp_path: Path, kept: bytes) -> None:
    path = tmp_path / "own.nk"
    path.write_bytes(kept)
    with pytest.raises(TerminalError, match=f"the key in {path} is not") as caught:
        load_or_make_seed(path, "put a copy back")
    assert caught.value.hint == "put a copy back"
    assert path.read_bytes() == kept
