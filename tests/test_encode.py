"""A run in one process: rows, determinism, resume, hostile data, verification."""

import errno
import json
import os
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image as Pillow

from nfscale.coordinator import Failure, Lease
from nfscale.driver import open_run, remaining, serve
from nfscale.encode import ShardReport, encode_shard
from nfscale.errors import CallerError, EncodeError, MismatchError, SupersededError
from nfscale.optim import SOLVERS
from nfscale.planner import make_plan
from nfscale.pool import InProcessPool
from nfscale.run import OpenRun
from nfscale.signals import Image
from nfscale.store import open_weights
from nfscale.store.run_folder import Commit, Plan, Shard
from nfscale.store.schema import write_parquet
from nfscale.verify import _difference, verify
from tests.jobs import Recorder, encode_in_process, tiny_job


def test_every_datum_has_one_row_and_the_observer_hears_of_it(tmp_path):
    seen = Recorder()
    folder, summary = encode_in_process(tiny_job(tmp_path / "run"), seen)
    table = open_weights(folder.files.path).to_arrow()
    assert table.num_rows == summary.fields == seen.fields == 48
    assert len(set(table["datum_id"].to_pylist())) == 48
    assert folder.is_complete
    assert [c.shard for c in seen.commits] == ["shard-00000", "shard-00001", "shard-00002"]
    assert [c.order for c in folder.commits()] == [1, 2, 3], "the calibration had the first lease"
    row = table.slice(0, 1).to_pylist()[0]
    assert row["history_step"][0] == 0
    assert row["history_step"][-1] == row["steps"]
    assert max(row["history_quality"]) == pytest.approx(row["quality"], rel=1e-5), "steps agree to rounding"
    assert dict(row["metrics"])["height"] == 8
    assert row["wall_seconds"] > 0
    assert isinstance(row["label"], int)


@pytest.mark.parametrize(
    "optimizer",
    [{"kind": "esgd", "calibration_data": 8}, {"kind": "adam"}, {"kind": "lbfgs"}, {"kind": "gauss_newton"}],
)
def test_weights_do_not_depend_on_batch_or_shards(tmp_path, optimizer):
    one, _ = encode_in_process(tiny_job(tmp_path / "one", optimizer=optimizer))
    other, _ = encode_in_process(
        tiny_job(tmp_path / "other", "fit.batch=3", "store.shard_fields=7", optimizer=optimizer)
    )
    assert (open_weights(one.files.path).weights() == open_weights(other.files.path).weights()).all()


@pytest.mark.parametrize("kind", SOLVERS)
def test_solvers_encode_a_dataset(tmp_path, kind):
    folder, summary = encode_in_process(tiny_job(tmp_path / "run", f"optimizer.kind={kind}", "dataset.limit=6"))
    assert summary.fields == 6
    assert not folder.has_calibration
    assert (open_weights(folder.files.path).to_arrow()["quality"].to_numpy() > 20).all()


def test_a_system_that_is_too_large_is_refused_with_the_plan(tmp_path):
    job = tiny_job(tmp_path / "run", "optimizer.kind=gauss_newton", "optimizer.largest_system=50")
    with pytest.raises(CallerError, match=r"optimizer.kind=gauss_newton cannot be used: .* 64 x 64 for every field"):
        make_plan(job)


def test_fields_may_start_from_draws_of_their_own(tmp_path):
    job = tiny_job(tmp_path / "run", "optimizer.kind=adam", "field.init=per_datum", "fit.max_steps=20")
    folder, _ = encode_in_process(job)
    table = open_weights(folder.files.path)
    assert table.theta0 is None
    assert not folder.has_calibration
    assert len(np.unique(table.weights()[:, 0])) == 48


def test_a_driver_that_dies_costs_the_shards_in_flight(tmp_path):
    job = tiny_job(tmp_path / "run")

    class Dies(Recorder):
        def on_commit(self, commit: Commit) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_in_process(job, Dies())
    resumed = Recorder()
    folder, summary = encode_in_process(job, resumed)
    assert [c.shard for c in resumed.before] == ["shard-00000"]
    assert summary.fitted_here == 32
    undisturbed, _ = encode_in_process(tiny_job(tmp_path / "undisturbed"))
    assert (open_weights(folder.files.path).weights() == open_weights(undisturbed.files.path).weights()).all()


def test_the_second_attempt_at_a_shard_loses_and_leaves_nothing(tmp_path):
    folder, _ = encode_in_process(tiny_job(tmp_path / "run"))
    before = sorted(p.name for p in (folder.files.path / "data").iterdir())
    run = OpenRun(folder)
    *_, report = encode_shard(run, run.plan.shards()[0], attempt="late", order=99, worker="zombie")
    assert isinstance(report, ShardReport)
    assert not report.won
    assert sorted(p.name for p in (folder.files.path / "data").iterdir()) == before


def test_a_shard_that_was_cut_stays_cut():
    shards = [Shard(0, 0, 8), Shard(1, 8, 16)]
    commit = {"index": 0, "file": "", "rows": 0, "bytes": 0, "sha256": "", "attempt": "", "worker": "", "seconds": 0.0}
    commit |= {"committed_at": 0.0, "fit_seconds": 0.0, "counts": {}, "quality": {}, "steps_mean": 0.0, "start": 0}
    names = ["shard-00000-a", "shard-00000-ba"]
    done = [Commit(shard=name, order=order, stop=0, **commit) for order, name in enumerate(names)]
    assert [s.name for s in remaining(shards, done)] == ["shard-00000-bb", "shard-00001"]
    assert remaining(shards, [])[0].name == "shard-00000"


def test_a_shard_that_is_cut_commits_as_its_parts_alone(tmp_path):
    folder, plan = open_run(tiny_job(tmp_path / "run", "optimizer.kind=adam", "fit.max_steps=20"))
    shard, run = plan.shards()[0], OpenRun(folder)
    late = encode_shard(run, shard, attempt="late", order=0, worker="zombie")
    assert folder.cut(shard)
    assert folder.cut(shard), "whoever cut it"
    *_, report = late
    assert (report.won, report.cut) == (False, True)
    assert folder.uncommitted() == []
    assert folder.commits() == []
    assert folder.commit_of(shard) is None
    assert [s.name for s in remaining(plan.shards(), *folder.commits_and_cuts())][:3] == [
        *("shard-00000-a", "shard-00000-b", "shard-00001")
    ]
    serve(folder, plan, InProcessPool(folder), [])
    assert not verify(folder).mismatches
    assert not folder.cut(plan.shards()[1]), "it is committed"
    assert {c.shard for c in folder.commits()} == {
        *("shard-00000-a", "shard-00000-b", "shard-00001", "shard-00002"),
    }


def test_the_last_shards_of_a_plan_are_smaller_and_together_they_are_all_data(tmp_path):
    plan = replace(make_plan(tiny_job(tmp_path / "run")), data_count=1146, shard_fields=50, last_fields=12)
    shards = plan.shards()
    assert [shard.index for shard in shards] == list(range(28))
    assert [len(shard) for shard in shards] == [50] * 19 + [49, 37, 28, 21, 16, 12, 12, 12, 9]
    assert [shard.start for shard in shards[1:]] == [shard.stop for shard in shards[:-1]]
    assert (shards[0].start, shards[-1].stop) == (0, 1146)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))).shards() == shards


def test_shards_of_a_plan_made_before_they_shrank_stay_what_they_were(tmp_path):
    plan = replace(make_plan(tiny_job(tmp_path / "run")), data_count=46, shard_fields=20, last_fields=5)
    content = plan.to_json()
    del content["last_fields"]
    assert [(s.start, s.stop) for s in Plan.from_json(content).shards()] == [(0, 20), (20, 40), (40, 46)]


@pytest.mark.parametrize(("size", "device", "last"), [("auto", "cpu", 4), ("auto", "cuda", None), (16, "cpu", None)])
def test_shards_shrink_on_a_cpu_where_the_plan_chooses_their_size(tmp_path, size, device, last):
    job = tiny_job(tmp_path / "run", store={"shard_fields": size})
    assert make_plan(job, device).last_fields == last


def test_a_driver_that_was_superseded_commits_nothing_and_says_who_took_over(tmp_path):
    job = tiny_job(tmp_path / "run", "fit.max_steps=20")
    folder, plan = open_run(job)
    older = folder.take_over()
    assert older == 1
    folder.refuse_superseded(older)
    attempt = encode_shard(OpenRun(folder), plan.shards()[0], attempt="a", order=0, worker="w", epoch=older)
    folder.write_calibration([0], np.ones(1), np.ones((1, plan.layout.size)))
    assert folder.take_over() == 2
    with pytest.raises(SupersededError, match=rf"another driver took over .*run \(process {os.getpid()} on ") as caught:
        list(attempt)
    assert caught.value.exit_code == 4
    assert folder.commits() == []
    assert folder.uncommitted() == []


def test_a_newer_driver_takes_over_and_finishes(tmp_path):
    job = tiny_job(tmp_path / "run", "fit.max_steps=20")
    newer = []

    class TakesOver(Recorder):
        def on_commit(self, commit):
            if not newer:
                newer.append(encode_in_process(job)[1])

    with pytest.raises(SupersededError):
        encode_in_process(job, TakesOver())
    assert newer[0].fitted_here == 32, "what the older one had committed stays"
    folder = open_run(job)[0]
    assert folder.is_complete
    assert not verify(folder).mismatches


def test_a_folder_of_another_job_is_refused_and_left_alone(tmp_path):
    folder, _ = encode_in_process(tiny_job(tmp_path / "run"))
    before = {p: p.stat().st_mtime_ns for p in folder.files.path.rglob("*")}
    with pytest.raises(CallerError, match=r"belongs to another job: they differ in fit.max_steps \(60 .* 80 now\)"):
        open_run(tiny_job(tmp_path / "run", "fit.max_steps=80"))
    assert {p: p.stat().st_mtime_ns for p in folder.files.path.rglob("*")} == before


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CallerError, match="not empty and not a run folder"):
        open_run(tiny_job(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_options_that_change_no_result_resume_the_run(tmp_path):
    encode_in_process(tiny_job(tmp_path / "run"))
    folder, plan = open_run(
        tiny_job(tmp_path / "run", "workers=3", "store.shard_fields=5", "fit.batch=2", "name=other")
    )
    assert plan.shard_fields == 16
    assert folder.is_complete


@pytest.fixture
def photographs(tmp_path):
    """Twelve good images of two sizes and five bad ones."""
    root = tmp_path / "images"
    root.mkdir()
    rng = np.random.default_rng(0)
    for index in range(12):
        shape = (8, 8, 3) if index % 2 else (4, 12, 3)
        Pillow.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(root / f"good-{index:02d}.png")
    Pillow.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(root / "bad-grey.png")
    (root / "bad-empty.png").write_bytes(b"")
    (root / "bad-text.png").write_text("hello")
    (root / "bad-cut.png").write_bytes((root / "good-00.png").read_bytes()[:80])
    (root / "bad-gone.png").symlink_to(root / "nowhere")
    return root


def _folder_job(tmp_path, root, name):
    dataset = {"kind": "folder", "path": str(root), "pattern": None}
    return tiny_job(tmp_path / name, "optimizer.kind=adam", "signal.channels=3", dataset=dataset)


def test_bad_data_are_rows_and_cost_no_neighbour(tmp_path, photographs):
    folder, summary = encode_in_process(_folder_job(tmp_path, photographs, "with"))
    rows = {row["datum_id"]: row for row in open_weights(folder.files.path).to_arrow().to_pylist()}
    bad = {name: row for name, row in rows.items() if name.startswith("bad")}
    assert set(bad) == {"bad-grey.png", "bad-empty.png", "bad-text.png", "bad-cut.png", "bad-gone.png"}
    for row in bad.values():
        assert row["status"] == "decode_error"
        assert row["reason"]
        assert np.isnan(row["weights"]).all()
    assert "1 channels" in bad["bad-grey.png"]["reason"]
    assert summary.failed == 5
    assert not verify(folder).mismatches
    for path in photographs.glob("bad*"):
        path.unlink()
    without, _ = encode_in_process(_folder_job(tmp_path, photographs, "without"))
    table = open_weights(without.files.path)
    good = {row["datum_id"]: row for row in table.to_arrow().to_pylist()}
    decoded = table.decode(["good-01.png", "good-00.png", "good-03.png"])
    assert [image.shape for image in decoded] == [(8, 8, 3), (4, 12, 3), (8, 8, 3)], "each at its own size"
    assert (decoded[1] == table.decode(["good-00.png"])[0]).all()
    assert {n: r["weights"] for n, r in rows.items() if n in good} == {n: r["weights"] for n, r in good.items()}


def test_a_dataset_that_changed_since_the_plan_is_refused(tmp_path, photographs):
    folder, _ = encode_in_process(_folder_job(tmp_path, photographs, "run"))
    (photographs / "good-00.png").unlink()
    with pytest.raises(CallerError, match="its dataset has other ids now"):
        open_run(_folder_job(tmp_path, photographs, "run"))
    with pytest.raises(EncodeError, match="other ids than when the run was planned"):
        verify(folder)


def test_a_quarantined_datum_is_a_row_that_was_not_read(tmp_path, photographs):
    folder, _ = open_run(_folder_job(tmp_path, photographs, "run"))
    pool = InProcessPool(folder)
    shard = Shard(0, 3, 4, "aab")
    pool.start(Lease(0, shard, "in-process", quarantine="crash in each attempt: the worker process died"))
    (event,) = pool.poll(0)
    row = pq.read_table(folder.files.path / event.report.commit.file).to_pylist()[0]
    assert row["status"] == "crashed"
    assert row["reason"].startswith("crash in each attempt")


def test_an_error_of_a_lease_is_told_and_not_raised(tmp_path):
    folder, _ = open_run(tiny_job(tmp_path / "run"))
    pool = InProcessPool(folder)
    pool.start(Lease(0, Shard(0, 0, 16), "in-process"))  # before the calibration: its file is missing
    (event,) = pool.poll(0)
    assert event.failure is Failure.TASK
    assert "calibration.parquet" in event.message
    assert pool.idle() == ["in-process"]


def test_verify_measures_what_was_recorded(tmp_path):
    folder, _ = encode_in_process(tiny_job(tmp_path / "run"))
    found = verify(folder)
    assert (found.files, found.rows, found.decoded, found.mismatches) == (3, 48, 48, [])
    assert found.largest_difference < 1e-3


def test_verify_lets_float32_round_what_is_represented_to_its_last_bits(tmp_path):
    """Two evaluations of a field at 130 dB differ by decibels; at 99 dB they may not."""
    keys = {"kind": "adam", "learning_rate": 2e-3}
    job = tiny_job(tmp_path, "fit.max_steps=600", "fit.check_every=100", "field.width=32", optimizer=keys)
    folder, _ = encode_in_process(job)
    recorded = np.array(open_weights(tmp_path).to_arrow(columns=["quality"])["quality"].to_pylist())
    assert recorded.min() > 100, "fits so good are what this is about"
    assert verify(folder).mismatches == []
    assert _difference(99.0, 101.0, "psnr_db") == 2.0
    assert _difference(131.0, 154.0, "psnr_db") == 0.0
    assert _difference(0.99, 0.5, "iou") == pytest.approx(0.49)


def test_verify_names_a_flipped_byte(tmp_path):
    folder, _ = encode_in_process(tiny_job(tmp_path / "run"))
    path = folder.files.path / folder.commits()[1].file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (mismatch,) = verify(folder).mismatches
    assert mismatch.startswith("shard-00001: ")
    assert "its bytes have changed" in mismatch


def test_verify_sees_weights_that_do_not_decode_to_their_quality(tmp_path):
    folder, _ = encode_in_process(tiny_job(tmp_path / "run"))
    commit = folder.commits()[0]
    path = folder.files.path / commit.file
    table = pq.read_table(path)
    quality = table["quality"].to_numpy().copy()
    quality[3] += 0.2
    position = table.schema.get_field_index("quality")
    import pyarrow as pa

    write_parquet(table.set_column(position, table.schema.field(position), pa.array(quality)), path)
    record = folder.files.path / "commits" / f"{commit.shard}.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"sha256": folder.files.sha256(commit.file)}))
    (mismatch,) = verify(folder).mismatches
    assert "decodes to" in mismatch


def test_verify_misses_a_commit(tmp_path):
    folder, _ = encode_in_process(tiny_job(tmp_path / "run"))
    (folder.files.path / "commits" / "shard-00002.json").unlink()
    assert any("32 rows are committed of 48" in m for m in verify(folder).mismatches)


def test_a_calibration_that_diverges_says_what_to_change(tmp_path):
    with pytest.raises(EncodeError, match="the calibration failed: the calibration diverged"):
        encode_in_process(tiny_job(tmp_path / "run", "optimizer.learning_rate=1e30", "optimizer.clip=null"))


@pytest.mark.parametrize(("dtype", "most_lost"), [("float16", 1.0), ("delta_float16", 0.05)])
def test_rounded_weights_have_the_quality_that_is_recorded(tmp_path, dtype, most_lost):
    exact, _ = encode_in_process(tiny_job(tmp_path / "exact"))
    folder, _ = encode_in_process(tiny_job(tmp_path / dtype, f"store.dtype={dtype}"))
    assert not verify(folder).mismatches
    tables = [open_weights(f.files.path) for f in (exact, folder)]
    qualities = [t.to_arrow(["quality"])["quality"].to_numpy() for t in tables]
    assert np.median(qualities[0] - qualities[1]) <= most_lost
    assert np.abs(tables[0].weights() - tables[1].weights()).max() < 0.01
    assert tables[1].schema.field("weights").type.value_type == "halffloat"
    sizes = [sum(c.bytes for c in t.commits) for t in tables]
    assert sizes[1] < 0.75 * sizes[0]


def test_differences_from_theta0_need_a_theta0(tmp_path):
    with pytest.raises(CallerError, match=r"use field.init=shared or store.dtype=float16"):
        tiny_job(tmp_path, "store.dtype=delta_float16", "field.init=per_datum", "optimizer.kind=adam")


def test_failed_data_are_fitted_anew_and_the_others_kept(tmp_path, photographs):
    job = _folder_job(tmp_path, photographs, "run")
    folder, _ = encode_in_process(job)
    before = {row["datum_id"]: row for row in open_weights(folder.files.path).to_arrow().to_pylist()}
    Pillow.fromarray(np.full((8, 8, 3), 99, dtype=np.uint8)).save(photographs / "bad-text.png")
    summary = serve(folder, folder.plan(), InProcessPool(folder), [], retry_failed=True)
    assert summary.fitted_here == 16, "the one shard that held failures"
    after = {row["datum_id"]: row for row in open_weights(folder.files.path).to_arrow().to_pylist()}
    assert after["bad-text.png"]["status"] != "decode_error"
    assert after["bad-empty.png"]["status"] == "decode_error"
    assert after.keys() == before.keys()
    kept = [name for name in before if name.startswith("good")]
    assert all(after[name] == before[name] for name in kept)
    assert folder.uncommitted() == []
    assert not verify(folder).mismatches


def test_a_running_driver_says_so_and_leaves_in_good_order(tmp_path):
    states = []

    class Looks(Recorder):
        def on_tick(self):
            states.append(folder.driver())

    folder, plan = open_run(tiny_job(tmp_path / "run"))
    serve(folder, plan, InProcessPool(folder), [Looks()])
    assert states[0]["pid"] == os.getpid()
    assert folder.driver() is None


def test_what_no_commit_names_is_found(tmp_path):
    folder, _ = encode_in_process(tiny_job(tmp_path / "run"))
    assert folder.uncommitted() == []
    left = folder.files.path / "data" / "shard-00001.deadbeef0000.parquet"
    left.write_bytes(b"half a fi")
    temporary = folder.files.path / "commits" / f".shard-00001.json.{'0' * 32}"
    temporary.write_bytes(b"{")
    assert set(folder.uncommitted()) == {p.relative_to(folder.files.path).as_posix() for p in (left, temporary)}


def test_a_commit_that_is_no_json_is_named(tmp_path):
    folder, _ = encode_in_process(tiny_job(tmp_path / "run"))
    (folder.files.path / "commits" / "shard-00001.json").write_text("{")
    with pytest.raises(MismatchError, match=r"shard-00001.json is not a commit .* remove it, and the same encode"):
        folder.commits()


def test_a_committed_file_that_is_gone_is_named(tmp_path):
    folder, _ = encode_in_process(tiny_job(tmp_path / "run"))
    (folder.files.path / folder.commits()[1].file).unlink()
    with pytest.raises(MismatchError, match="is missing, and shard-00001 is committed"):
        open_weights(folder.files.path).to_arrow(["quality"])
    assert any("is missing" in m for m in verify(folder).mismatches)


def test_a_run_of_another_format_is_refused(tmp_path):
    folder, _ = open_run(tiny_job(tmp_path / "run"))
    path = folder.files.path / "job.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(CallerError, match="has format 99, this nfscale reads format 1"):
        open_weights(folder.files.path)


def test_an_output_that_cannot_be_written_ends_the_run_and_a_repeat_completes_it(tmp_path, monkeypatch):
    job, written = tiny_job(tmp_path / "run"), []

    def full(table, stream):
        written.append(stream)
        if len(written) == 2:
            stream.write(b"half a fi")
            raise OSError(errno.ENOSPC, "No space left on device")
        write_parquet(table, stream)

    monkeypatch.setattr("nfscale.encode.write_parquet", full)
    with pytest.raises(EncodeError, match=r"cannot write .*: No space left on device; what is committed stays"):
        encode_in_process(job)
    folder, plan = open_run(job)
    assert [commit.shard for commit in folder.commits()] == ["shard-00000"]
    assert folder.uncommitted() == [], "the half file is gone"
    monkeypatch.setattr("nfscale.encode.write_parquet", write_parquet)
    serve(folder, plan, InProcessPool(folder), [])
    assert folder.is_complete
    assert not verify(folder).mismatches


def test_a_complete_run_whose_commits_were_removed_is_completed_again(tmp_path):
    job = tiny_job(tmp_path / "run", "fit.max_steps=20")
    folder, _ = encode_in_process(job)
    before = open_weights(str(folder)).weights()
    (folder.files.path / "commits" / "shard-00001.json").unlink()
    folder, summary = encode_in_process(job)
    assert summary.fitted_here == 16
    assert folder.is_complete
    assert (open_weights(str(folder)).weights() == before).all()


def test_a_complete_run_whose_files_are_gone_says_so_and_what_to_do(tmp_path):
    job = tiny_job(tmp_path / "run", "fit.max_steps=20")
    folder, _ = encode_in_process(job)
    commit = folder.commits()[1]
    (folder.files.path / commit.file).unlink()
    with pytest.raises(MismatchError, match=r"1 files that are committed are missing.*commits/shard-0000\d.json"):
        open_run(job)
    (folder.files.path / "commits" / f"{commit.shard}.json").unlink()
    encode_in_process(job)
    assert not verify(folder).mismatches


def test_the_centroid_of_winner_is_measured_in_the_first_data_and_stays_with_the_run(tmp_path):
    job = tiny_job(tmp_path, "field.initialization=winner")
    plan = make_plan(job)
    centroid = plan.forward["field"]["keys"]["spectral_centroid"]
    dataset, signal = job.open_dataset(), Image(1)
    rows = [np.abs(np.fft.rfft(signal.original(dataset.read(n).content)[:, :, 0] - 0.5, axis=1)) for n in range(8)]
    shares = np.arange(5) / 4  # of the Nyquist frequency, of 8 pixels
    assert centroid == pytest.approx(np.median([((r @ shares) / r.sum(axis=1)).mean() for r in rows]), abs=1e-4)
    assert plan.job["field"]["spectral_centroid"] == centroid
    given = make_plan(tiny_job(tmp_path, "field.initialization=winner", "field.spectral_centroid=0.9"))
    assert given.forward["field"]["keys"]["spectral_centroid"] == 0.9
    with pytest.raises(CallerError, match="constants for 1 and 2 coordinates"):
        tiny_job(tmp_path, "field.initialization=winner", "signal.kind=occupancy", "dataset.kind=shapes")


WORDS = ["fit.samples=16", "signal.kind=audio", "dataset.kind=speech", "dataset.limit=4"]


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        (["fit.samples=16", "fit.target=40"], "adam"),
        (["fit.samples=16", "fit.target=60"], "muon"),
        (["fit.samples=full", "fit.target=40"], "adam"),  # a search would cost more than it saves
        (["fit.samples=full", "fit.target=40", "field.width=256", "field.depth=4"], "lbfgs"),
        (["fit.samples=16", "fit.target=40", "field.width=256", "field.depth=4"], "adam"),
        (["fit.samples=16", "fit.target=60", "field.depth=1"], "adam"),
        (["fit.samples=16", "fit.target=60", "field.kind=hash_grid"], "adam"),
        (["fit.samples=16"], "adam"),
        ([*WORDS, "fit.target=30"], "esgd"),
        ([*WORDS, "fit.target=30", "fit.check_every=15"], "adam"),  # with which ESGD's probes every 10 steps do not go
    ],
)
def test_an_automatic_optimiser_is_decided_with_the_first_data_and_stays_with_the_run(tmp_path, overrides, kind):
    job = tiny_job(tmp_path, *overrides, optimizer={"kind": "auto"})
    plan = make_plan(job)
    assert plan.job["optimizer"]["kind"] == kind
    assert plan.fingerprint == make_plan(job).fingerprint
    named = tiny_job(tmp_path, *overrides, optimizer={"kind": kind})
    assert plan.job == make_plan(named).job | {"output": job.output}


def test_an_automatic_optimiser_fits_and_has_no_keys_of_its_own(tmp_path):
    folder, summary = encode_in_process(tiny_job(tmp_path, optimizer={"kind": "auto"}))
    assert summary.failed == 0
    assert verify(folder).mismatches == []
    with pytest.raises(CallerError, match=r"unknown key optimizer.learning_rate; accepted: kind"):
        tiny_job(tmp_path, "optimizer.learning_rate=1", optimizer={"kind": "auto"})


def test_a_selection_by_error_needs_data_that_are_checked_on_what_is_fitted(tmp_path):
    with pytest.raises(CallerError, match=r"fit.sampling=error goes by the errors that checks see"):
        make_plan(
            tiny_job(tmp_path, "fit.sampling=error", "fit.samples=64", "signal.kind=occupancy", "dataset.kind=shapes")
        )
    folder, summary = encode_in_process(tiny_job(tmp_path / "digits", "fit.sampling=error", "fit.samples=16"))
    assert summary.failed == 0
    assert verify(folder).mismatches == []


def test_moved_pixels_decode_at_the_size_of_their_fit_alone(tmp_path):
    encode_in_process(tiny_job(tmp_path, "signal.transform=permutation"))
    table = open_weights(tmp_path)
    assert verify(table.folder).mismatches == []
    ids = table.to_arrow(columns=["datum_id"])["datum_id"].to_pylist()[:1]
    (digit,) = table.decode(ids)
    assert digit.shape == (8, 8, 1)
    assert np.array_equal(table.decode(ids, (8, 8))[0], digit)
    for shape in ("16x16", (16, 16)):
        with pytest.raises(
            CallerError, match=r"moved pixels, which decode at the size of their fit alone \(\(8, 8\)\)"
        ):
            table.decode(ids, shape)


@pytest.mark.parametrize(("objective", "wanted"), [("fit", 2.0), ("interpolate", 1.0)])
def test_an_automatic_weight_scale_is_decided_once_and_stays_with_the_run(tmp_path, objective, wanted):
    overrides = ("field.weight_scale=auto", f"fit.objective={objective}", "field.omega_0=9", "field.depth=2")
    job = tiny_job(tmp_path, *overrides)
    plan = make_plan(job)
    scale = plan.job["field"]["weight_scale"]
    axis = 8 / (1 - 1 / 8)  # the digits' pixels, whose centres span less than [-1, 1]
    assert scale == pytest.approx((wanted * axis / 9) ** 0.5, abs=1e-3)
    assert plan.forward["field"]["keys"]["weight_scale"] == scale
    assert plan.fingerprint == make_plan(job).fingerprint
    assert plan.fingerprint != make_plan(tiny_job(tmp_path, *overrides, f"field.weight_scale={scale}")).fingerprint
