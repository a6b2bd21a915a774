"""`nfscale encode --shards i/n`: several drivers without a head, each with its share of one run."""

import json
import subprocess
import sys

import pytest
import yaml

from nfscale.driver import Share, open_run, serve
from nfscale.errors import CallerError, SupersededError
from nfscale.pool import InProcessPool
from nfscale.store import open_weights
from nfscale.store.run_folder import RunFolder, Shard
from nfscale.verify import verify
from tests.jobs import Recorder, encode_in_process, tiny_job, tiny_settings

SHARES = [Share(0, 3), Share(1, 3), Share(2, 3)]


def serve_share(job, share, **options):
    folder, plan = open_run(job)
    return folder, serve(folder, plan, InProcessPool(folder), [], share=share, **options)


def test_shares_one_after_the_other_make_the_run_that_one_driver_makes(tmp_path):
    job = tiny_job(tmp_path / "shared", store={"shard_fields": 6})  # 8 shards: 3, 3 and 2
    completed, fitted = [], []
    for share in (SHARES[1], SHARES[0], SHARES[2]):
        folder, summary = serve_share(job, share)
        completed.append(summary.completed)
        fitted.append(summary.fitted_here)
        assert folder.driver() is None
    assert completed == [False, False, True], "_SUCCESS is of whoever commits the last shard"
    assert fitted == [18, 18, 12]
    assert folder.is_complete
    assert not verify(folder).mismatches
    alone, _ = encode_in_process(tiny_job(tmp_path / "alone", store={"shard_fields": 6}))
    assert (open_weights(str(folder)).weights() == open_weights(str(alone)).weights()).all()
    orders = [commit.order for commit in folder.commits()]
    assert len(set(orders)) == 8, "lease numbers are unique in the run, which MLflow's points rely on"
    assert {commit.index % 3: commit.order % 3 for commit in folder.commits()} == {0: 0, 1: 1, 2: 2}


def test_a_share_that_is_done_does_nothing_and_a_later_driver_does_the_rest(tmp_path):
    job = tiny_job(tmp_path / "run", store={"shard_fields": 6})
    serve_share(job, SHARES[0])
    _, again = serve_share(job, SHARES[0])
    assert (again.fitted_here, again.completed) == (0, False)
    folder, rest = encode_in_process(job)
    assert rest.fitted_here == 30
    assert folder.is_complete
    assert len({commit.order for commit in folder.commits()}) == 8


def test_a_driver_of_the_whole_run_takes_shares_over(tmp_path):
    job = tiny_job(tmp_path / "run", store={"shard_fields": 6})

    class TakesOver(Recorder):
        def on_commit(self, commit):
            super().on_commit(commit)
            RunFolder(tmp_path / "run").take_over()

    folder, plan = open_run(job)
    seen = TakesOver()
    with pytest.raises(SupersededError, match="another driver took over"):
        serve(folder, plan, InProcessPool(folder), [seen], share=SHARES[0])
    assert len(folder.commits()) == len(seen.commits) == 1


def test_shares_at_the_same_time(tmp_path):
    settings = tiny_settings(tmp_path / "run", store={"shard_fields": 6})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "nfscale", "encode", str(tmp_path / "job.yaml"), "--shards"]
    running = [
        subprocess.Popen([*command, str(share), "--json", str(tmp_path / f"{share.index}.json")], text=True)
        for share in SHARES[:2]
    ]
    assert [one.wait(timeout=200) for one in running] == [0, 0]
    folder = RunFolder(tmp_path / "run")
    assert not folder.is_complete
    assert not folder.has_report
    assert folder.tracking == {}, "the run in MLflow is of whoever completes it"
    figures = json.loads((tmp_path / "0.json").read_text())
    assert (figures["shards"], figures["fitted_here"], figures["completed"]) == ("0/3", 18, False)
    last = subprocess.run([*command, "2/3"], capture_output=True, text=True, timeout=200)
    assert last.returncode == 0, last.stderr
    assert "rows      48" in last.stdout
    assert folder.is_complete
    assert folder.has_report
    assert folder.is_tracked
    assert not verify(folder).mismatches


def test_which_shards_a_share_holds():
    held = [[index for index in range(8) if share.holds(Shard(index, 0, 1))] for share in SHARES]
    assert held == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert Share(2, 3).holds(Shard(5, 0, 1, "ab")), "a part belongs to the share of the whole"
    assert [Share(2, 5).first_lease(used) for used in (0, 2, 3, 7, 8)] == [2, 2, 7, 7, 12]


@pytest.mark.parametrize("text", ["3", "3/3", "-1/3", "1/0", "a/b", "1/2/3", "/", "1.0/2"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(CallerError, match="write i/n with i from 0 to n - 1"):
        Share.parsed(text)
    assert str(Share.parsed("3/16")) == "3/16"
