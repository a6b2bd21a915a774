"""The stranger's decoder says what ours says, for every activation it names and every dtype, with numpy alone."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nfscale.learn import numpy_decoder
from nfscale.store import open_weights
from tests.jobs import encode_in_process, tiny_job

SOURCE = Path(numpy_decoder.__file__)
SMALL = ("dataset.limit=8", "fit.max_steps=20", "optimizer.kind=adam")


@pytest.mark.parametrize("activation", numpy_decoder.ACTIVATIONS)
def test_it_decodes_what_we_decode(tmp_path, activation):
    dtype = "delta_float16" if activation == "sine" else "float32"
    job = tiny_job(tmp_path / "run", *SMALL, f"field.activation={activation}", f"store.dtype={dtype}")
    encode_in_process(job)
    table = open_weights(tmp_path / "run")
    ids = table.to_arrow(["datum_id"])["datum_id"].to_pylist()[:3]
    ours, theirs = table.decode(ids), numpy_decoder.decode(tmp_path / "run", ids)
    assert np.abs(ours - np.stack(theirs)).max() < 1e-3
    assert np.ptp(ours) > 0.05, "the comparison can fail"


def test_it_stands_alone(tmp_path):
    """Under 100 lines, and runs in a process that has no torch and no nfscale."""
    assert len(SOURCE.read_text().splitlines()) < 100
    encode_in_process(tiny_job(tmp_path / "run", *SMALL))
    table = open_weights(tmp_path / "run")
    (name,) = table.to_arrow(["datum_id"])["datum_id"].to_pylist()[:1]
    without = "import sys, runpy; sys.modules['torch'] = sys.modules['nfscale'] = None; "
    code = without + "runpy.run_path(sys.argv.pop(1), {}, '__main__')"
    place = [str(SOURCE), str(tmp_path / "run"), name, str(tmp_path / "out.npy")]
    subprocess.run([sys.executable, "-c", code, *place], check=True, cwd=tmp_path, timeout=100)
    assert np.abs(np.load(tmp_path / "out.npy") - table.decode([name])[0]).max() < 1e-4
