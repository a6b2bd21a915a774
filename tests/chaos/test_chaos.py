"""The tools of chaos do what they say, and a short chaos ends well. The long one is `make chaos`."""

import http.client
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from nfscale.engine import loop
from tests.chaos.digits import steps_run
from tests.chaos.proxy import FaultyStore
from tests.jobs import encode_in_process, tiny_job

ROOT = Path(__file__).parents[2]


class Echo(BaseHTTPRequestHandler):
    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append(body)
        self.send_response(200)
        self.send_header("ETag", "x")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_): ...


@pytest.fixture
def store():
    server = HTTPServer(("127.0.0.1", 0), Echo)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    proxy = FaultyStore(server.server_port, seconds_slow=0.3)
    yield proxy, server.seen
    proxy.close()
    server.shutdown()
    server.server_close()


def put(store: FaultyStore, body: bytes) -> tuple[int, bytes, str | None]:
    connection = http.client.HTTPConnection("127.0.0.1", store.port, timeout=20)
    try:
        connection.request("PUT", "/bucket/key", body)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.getheader("ETag")
    finally:
        connection.close()


def test_a_store_that_is_well_is_handed_through(store):
    assert put(store[0], b"content") == (200, b"content", "x")


def test_a_slow_store_is_slow(store):
    store[0].mood = "slow"
    before = time.monotonic()
    assert put(store[0], b"content")[0] == 200
    assert time.monotonic() - before >= 0.3
    assert store[0].delayed == 1


def test_an_erring_store_refuses_some_and_leaves_some_unanswered_that_it_did(store):
    proxy, seen = store
    proxy.mood = "erring"
    statuses = []
    for number in range(6):
        try:
            statuses.append(put(proxy, b"%d" % number)[0])
        except http.client.RemoteDisconnected:
            statuses.append(0)
    assert statuses == [503, 200, 503, 200, 503, 0]
    assert seen == [b"1", b"3", b"5"], "the unanswered one was carried out"
    assert (proxy.refused, proxy.unanswered) == (3, 1)


def test_steps_are_counted_as_the_rows_say(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "Check", loop.Check)  # set back afterwards
    log = tmp_path / "steps"
    dataset = {"kind": "function", "target": "tests.chaos.digits:Digits", "arguments": {"log": str(log), "count": 20}}
    folder, _ = encode_in_process(tiny_job(tmp_path / "run", dataset=dataset, optimizer={"kind": "adam"}))
    from nfscale.store import open_weights

    kept = sum(open_weights(str(folder)).to_arrow(["steps"])["steps"].to_pylist())
    assert kept > 0
    assert steps_run(log) == kept, "nothing was thrown away"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(1500)
def test_a_short_chaos_ends_well(tmp_path):
    figures = tmp_path / "chaos.json"
    command = [
        sys.executable,
        "-m",
        "tests.chaos.run",
        "--seed",
        "3",
        "--minutes",
        "1.5",
        "--fields",
        "600",
        "--json",
        str(figures),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert found["ok"]
    assert found["faults"] >= 3
    assert all(one["rows"] == 600 for one in found["encodes"])
