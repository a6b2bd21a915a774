"""A proxy on loopback that makes an object store slow, or refuse, while it is told to."""

import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Mood = Literal["well", "slow", "erring"]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no news here."""


class FaultyStore:
    """Hands requests on to the server at `port`, and answers to `self.port`.

    `slow` waits `seconds_slow` before each request. `erring` answers every other one with 503 and does not hand it on,
    and of those that are left it hands every third one on and does not answer: nobody knows then what happened.
    """

    def __init__(self, port: int, seconds_slow: float = 1.0) -> None:
        self.mood: Mood = "well"
        self.seconds_slow = seconds_slow
        self.delayed = self.refused = self.unanswered = 0
        self._lock, self._seen = threading.Lock(), 0
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fate = store._fate()
                if fate == "refuse":
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                try:
                    upstream.request(self.command, self.path, body, dict(self.headers))
                    answer = upstream.getresponse()
                    content = answer.read()
                finally:
                    upstream.close()
                if fate == "leave unanswered":
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length", "server", "date"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", length or str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815 (the base class's names)

            def log_message(self, *_: object) -> None: ...

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, name="faulty-store", daemon=True).start()

    def _fate(self) -> str:
        mood = self.mood
        if mood == "slow":
            self.delayed += 1
            time.sleep(self.seconds_slow)
        if mood == "erring":
            with self._lock:
                self._seen += 1
                if self._seen % 2:
                    self.refused += 1
                    return "refuse"
                if self._seen % 6 == 0:
                    self.unanswered += 1
                    return "leave unanswered"
        return "hand on"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
