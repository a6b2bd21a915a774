"""The report: whatever state a run is in, one file that shows it."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nfscale.driver import open_run
from nfscale.media import pictures
from nfscale.pool import InProcessPool
from nfscale.review import make_report
from nfscale.store import open_weights
from nfscale.store.history import quality_quantiles
from nfscale.store.run_folder import CONVERGENCE, REPORT
from tests.jobs import Recorder, encode_in_process, tiny_job


def test_a_report_of_a_finished_run(tmp_path):
    folder, _ = encode_in_process(tiny_job(tmp_path / "run"))
    summary = make_report(folder)
    quality = open_weights(folder.files.path).to_arrow(["quality"])["quality"].to_numpy()
    assert summary["quality_median"] == pytest.approx(np.median(quality))
    text = (folder.files.path / REPORT).read_text()
    assert "48 of 48 data" in text
    assert text.count("<svg") == 9, "quality, convergence, difficulty, labels, work: two each but for one of labels"
    assert text.count('src="data:image/png') == 2 + 3 * 18, "the mosaic's two sides, three pictures of 18 data"
    convergence = pq.read_table(folder.files.path / CONVERGENCE)
    assert convergence.num_rows == 48
    assert "weights" not in convergence.schema.names
    assert (folder.files.path / "review" / "worst.csv").read_text().count("\n") == 49


def test_a_report_of_a_run_that_goes_on(tmp_path):
    class Dies(Recorder):
        def on_commit(self, commit):
            raise KeyboardInterrupt

    job = tiny_job(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        encode_in_process(job, Dies())
    folder, _ = open_run(job)
    assert make_report(folder)["fields"] == 16
    assert "the run is not complete" in (folder.files.path / REPORT).read_text()


def test_a_report_of_a_run_without_a_commit(tmp_path):
    folder, _ = open_run(tiny_job(tmp_path / "run"))
    assert make_report(folder)["fields"] == 0
    assert InProcessPool(folder).idle()


def test_tiles_are_put_together_to_whole_pictures(tmp_path):
    dataset = {"kind": "photos", "tile": 64, "limit": 12}
    job = tiny_job(tmp_path / "run", "fit.max_steps=20", "fit.samples=16", "optimizer.kind=adam", dataset=dataset)
    folder, _ = encode_in_process(job)
    make_report(folder)
    labels = set(open_weights(folder.files.path).to_arrow(["label"])["label"].to_pylist())
    made = {p.name for p in (folder.files.path / "review").glob("*.webp")}
    assert made == {f"{label}-{side}.webp" for label in labels for side in ("original", "rebuilt")}


def test_quantiles_carry_the_best_quality_of_a_field_that_has_stopped():
    histories = pa.table({"history_step": [[0, 10], [0, 10, 20]], "history_quality": [[1.0, 5.0], [2.0, 9.0, 7.0]]})
    grid, median = quality_quantiles(histories, [50])
    assert grid.tolist() == [0, 10, 20]
    assert median.tolist() == [1.5, 7.0, 7.0]


def test_tiles_in_their_places():
    red, blue = (np.full((2, 2, 3), colour, dtype=np.uint8) for colour in ([255, 0, 0], [0, 0, 255]))
    canvas = pictures.assembled({(0, 1): red, (1, 0): blue}, 2)
    assert canvas.shape == (4, 4, 4)
    assert canvas[0, 2].tolist() == [255, 0, 0, 255]
    assert canvas[2, 0].tolist() == [0, 0, 255, 255]
    assert canvas[0, 0, 3] == 0, "a missing tile is transparent"
