"""An S3 server on loopback, in a process of its own: moto, answering one request after the other.

One after the other, because moto looks whether an object exists and then writes it; with threads in between
its conditional put would not be atomic, which that of S3 is.
"""

import contextlib
import http.client
import os
import subprocess
import sys
from collections.abc import Iterator

BUCKET = "encoded"

_SERVER = """
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=False)
print(server.server_port, flush=True)
server.serve_forever()
"""


@contextlib.contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """The environment in which `s3://encoded/...` is the bucket of a new, empty server."""
    log = subprocess.DEVNULL
    server = subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("PUT", f"/{BUCKET}")
        assert connection.getresponse().status == 200
        connection.close()
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }
    finally:
        server.terminate()
        server.stdout.close()  # type: ignore[union-attr]
        server.wait(timeout=30)


@contextlib.contextmanager
def s3_environment() -> Iterator[dict[str, str]]:
    """An S3 server whose environment is this process's while the block runs."""
    with s3_server() as settings:
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            yield settings
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
