"""The registered model, loaded where nothing but mlflow, torch, numpy and pyarrow can be imported, and served."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest

from nfscale.store import open_weights
from nfscale.track import Tracker, tracking_uri
from tests.jobs import encode_in_process, tiny_job

mlflow = pytest.importorskip("mlflow")

LOADED_WITH_LITTLE = """
import sys

ABSENT = {"ray", "pydantic_settings", "typer", "rich", "obstore", "PIL", "skimage", "sklearn", "matplotlib", "jinja2"}
ABSENT |= {"triton", "soundfile", "trimesh", "igl", "jax", "ninja", "psutil"}
sys.path[:] = [entry for entry in sys.path if entry != sys.argv[3]]


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ImportError(f"{name} is not installed here")
        return None


sys.meta_path.insert(0, Absent())
import numpy, pandas, mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
import nfscale
assert "code" in nfscale.__file__, nfscale.__file__
ids = sys.argv[2].split(",")
given = pandas.DataFrame({"datum_id": ids, "shape": [None, "6x5"]})
first, second = model.predict(given)
print(first.shape, second.shape, first.dtype, float(first.sum()))
"""


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """A run with its model: its folder, the files of the model, its store."""
    home = tmp_path_factory.mktemp("registered")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        folder, _ = encode_in_process(tiny_job(home / "runs" / "tiny", "fit.max_steps=20"))
        tracker = Tracker(folder, folder.plan(), pytest.fail)
        tracker.on_start(folder, folder.plan(), folder.commits())
        tracker.log_review()
        tracker.close("FINISHED")
        uri = tracking_uri(folder)
    (version,) = mlflow.MlflowClient(uri).search_model_versions("name='nfscale-tiny'")
    (path,) = (home / "runs" / "mlartifacts").rglob("MLmodel")
    return folder, path.parent, uri, version


def test_it_is_registered_with_signature_and_example(registered):
    _, path, _, version = registered
    model = mlflow.models.Model.load(path)
    assert [column.name for column in model.signature.inputs] == ["datum_id", "shape"]
    assert "Array(float)" in str(model.signature.outputs)
    assert model.load_input_example(str(path))["datum_id"].tolist()
    assert version.run_id == model.run_id
    needed = (path / "requirements.txt").read_text().splitlines()
    assert [line.partition("==")[0] for line in needed] == ["mlflow", "torch", "numpy", "pyarrow"]


def test_it_loads_and_decodes_where_little_is_installed(registered, tmp_path):
    folder, path, uri, _ = registered
    table = open_weights(folder.files.path)
    ids = table.to_arrow(["datum_id"])["datum_id"].to_pylist()[:2]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADED_WITH_LITTLE, str(path), ",".join(ids), os.getcwd()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment | {"MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    total = float(table.decode(ids)[0].sum())
    assert done.stdout.startswith("(8, 8, 1) (6, 5, 1) float32")
    assert float(done.stdout.split()[-1]) == pytest.approx(total, rel=1e-5)


def test_a_run_that_moved_is_named_anew(registered, tmp_path):
    folder, path, _, _ = registered
    moved = tmp_path / "moved"
    shutil.copytree(folder.files.path, moved)
    model = mlflow.pyfunc.load_model(str(path), model_config={"run": str(moved)})
    assert model.unwrap_python_model().table.folder.files.path == moved


@pytest.mark.slow
def test_a_server_of_it_answers(registered, tmp_path):
    folder, path, uri, _ = registered
    table = open_weights(folder.files.path)
    (datum,) = table.to_arrow(["datum_id"])["datum_id"].to_pylist()[:1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["models", "serve", "-m", str(path), "--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)]
    with (tmp_path / "serve.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *command, "--workers", "1"],
            stdout=log,
            stderr=log,
            env=os.environ
            | {"MLFLOW_TRACKING_URI": uri, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"},
            start_new_session=True,
        )
    try:
        asked = {"dataframe_split": {"columns": ["datum_id", "shape"], "data": [[datum, "4x6"], [datum, None]]}}
        answer = _answer(port, asked, server)
    finally:
        os.killpg(server.pid, 15)
        server.wait(60)
    small, whole = (np.array(one) for one in answer["predictions"])
    assert small.shape == (4, 6, 1)
    assert whole == pytest.approx(table.decode([datum])[0], abs=1e-6)


def _answer(port, asked, server):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    until = time.monotonic() + 240
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)
        except (ConnectionError, urllib.error.URLError):
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < until, "no answer"
            time.sleep(1)
