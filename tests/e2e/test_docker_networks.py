"""Networks of docker jobs, with a node that lives in the same network namespace as its engine, as
it does outside of tests."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.e2e.cluster import Cluster
from tests.e2e.test_docker import apply, executions, job, wait_until
from tests.support.dockerd import Dockerd, running_dockerd

NODE = "net-1"
SERVER = """
import http.server, sys
class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"reached " + self.path.encode())
    def log_message(self, *words): pass
http.server.ThreadingHTTPServer(("0.0.0.0", int(sys.argv[1])), Hello).serve_forever()
"""
PORT = 8099
OUTSIDE = "198.51.100.7"
"""An address that stands for a server in the internet: on its loopback."""


@pytest.fixture(scope="module")
def engine() -> Iterator[Dockerd]:
    """An engine, with a server at another address and at all of the host's."""
    with running_dockerd() as made:
        inside = [*made.inside]
        subprocess.run([*inside, "ip", "address", "add", f"{OUTSIDE}/32", "dev", "lo"], check=True)
        server = subprocess.Popen([*inside, sys.executable, "-c", SERVER, str(PORT)])
        try:
            yield made
        finally:
            server.kill()
            server.wait(10)


@pytest.fixture(scope="module")
def cluster(engine: Dockerd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An orchestrator and a node, all in the engine's network namespace."""
    fleet = Cluster(tmp_path_factory.mktemp("nets"), wrap=engine.inside)
    fleet.start()
    networks = ("bridge", "host", "http")
    allowed = [word for name in networks for word in ("--allow-network", name)]
    fleet.add_agent(
        NODE,
        args=["--docker-host", engine.host, *allowed, "--allow-private-urls", "--on-exit", "stop"],
    )
    yield fleet
    assert fleet.close() == []


def networks(engine: Dockerd) -> list[str]:
    """Those of ours that the engine has."""
    with engine.api() as api:
        return [n["Name"] for n in api.networks() if n["Name"].startswith("bacalhau-")]


def rules(engine: Dockerd) -> list[str]:
    """Our rules in the host's firewall."""
    done = subprocess.run(
        [*engine.inside, "iptables", "-S", "INPUT"], check=True, capture_output=True, text=True
    )
    return [line for line in done.stdout.splitlines() if " bh-" in line]


def test_http_reaches_listed_domains_and_nothing_else(cluster: Cluster, engine: Dockerd) -> None:
    """By the proxy to what is listed; not directly, and not to the services of the host, which an
    internal network alone would leave open."""
    script = f"""
        proxy=${{http_proxy#http://}}; host=${{proxy%:*}}; port=${{proxy#*:}}
        ask() {{ printf "GET $1 HTTP/1.0\\r\\nHost: x\\r\\n\\r\\n" | nc -w 5 $2 $3 2>&1; }}
        echo "listed: $(ask http://{OUTSIDE}:{PORT}/yes $host $port | tail -1)"
        echo "other: $(ask http://192.0.2.1:{PORT}/no $host $port | head -1)"
        echo "gateway: $(ask / $host {PORT} | tail -1)"
        echo "direct: $(ask / {OUTSIDE} {PORT} | tail -1)"
    """
    manifest = job("fetch", script)
    manifest["spec"]["tasks"][0]["network"] = {"type": "HTTP", "domains": [OUTSIDE]}
    apply(cluster, manifest)
    cluster.run("wait", "fetch", "--timeout", "90")
    text = cluster.run("logs", "fetch").stdout
    assert "listed: reached /yes" in text
    assert "other: HTTP/1.1 403" in text
    for what in ("gateway", "direct"):
        line = next(x for x in text.splitlines() if f"{what}:" in x)
        assert "reached" not in line, line
    wait_until(lambda: not networks(engine) and not rules(engine), "network and rules are removed")


def test_a_bridge_with_ports(cluster: Cluster, engine: Dockerd) -> None:
    """The port answers on the host, under the number that the job chose; two jobs on the bridge do
    not see each other."""
    serve = (
        "echo serving on $BACALHAU_PORT_web from $BACALHAU_HOST_PORT_web; "
        "while :; do echo hello | nc -l -p $BACALHAU_PORT_web; done"
    )
    manifest = job("web", serve, type="service")
    manifest["spec"]["tasks"][0]["network"] = {
        "type": "Bridge", "ports": [{"name": "web", "static": 25123, "target": 80}],
    }  # fmt: skip
    apply(cluster, manifest)
    cluster.run("wait", "web", "--for", "running", "--timeout", "60")
    ask = [*engine.inside, "busybox", "nc", "-w", "5", "127.0.0.1", "25123"]

    def answer() -> str:
        done = subprocess.run(ask, check=False, input="", capture_output=True, text=True)
        return done.stdout

    wait_until(lambda: answer() == "hello\n", "the service answers")
    with engine.api() as api:
        found = next(c for c in api.containers() if "-web-" in c["Names"][0])
    address = next(iter(found["NetworkSettings"]["Networks"].values()))["IPAddress"]
    probe = job("probe", f"nc -w 3 {address} 80 </dev/null; echo code $?")
    probe["spec"]["tasks"][0]["network"] = {"type": "Bridge"}
    apply(cluster, probe)
    cluster.run("wait", "probe", "--timeout", "60")
    text = cluster.run("logs", "probe").stdout
    assert "hello" not in text
    assert "code 1" in text
    assert "serving on 80 from 25123" in cluster.run("logs", "web").stdout
    cluster.run("stop", "web")


def test_ports_that_the_node_chooses_differ(cluster: Cluster) -> None:
    script = "echo port $BACALHAU_PORT_a $BACALHAU_PORT_b $BACALHAU_HOST_PORT_a"
    manifest = job("open", script, count=2)
    manifest["spec"]["tasks"][0]["network"] = {
        "type": "Host", "ports": [{"name": "a"}, {"name": "b"}],
    }  # fmt: skip
    apply(cluster, manifest)
    cluster.run("wait", "open", "--timeout", "60")
    lines = [x for x in cluster.run("logs", "open").stdout.splitlines() if "port" in x]
    assert len(lines) == 2
    for line in lines:
        a, b, host = line.split("port ")[1].split()
        assert a == host
        assert a != b
        assert 20000 <= int(a) <= 32000


def test_a_port_that_is_taken_is_said(cluster: Cluster) -> None:
    manifest = job("taken", "true", retry={"attempts": 1})
    manifest["spec"]["tasks"][0]["network"] = {
        "type": "Bridge", "ports": [{"name": "web", "static": PORT, "target": 80}],
    }  # fmt: skip
    apply(cluster, manifest)
    deadline = time.monotonic() + 60
    while True:
        found = json.dumps([e["status"] for e in executions(cluster, "taken")])
        if f"port {PORT} (web) is in use" in found:
            break
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    cluster.run("delete", "job", "taken")
