"""Jobs sent to a cluster: what is sent, what is refused here, and what is sent again. The cluster is a made-up one."""

import json
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from nfscale.distributed.job_api import RayCluster, SubmittedJob, UnreachableError, dashboard_address, is_loopback
from nfscale.distributed.submission import Submission, exit_code_of, free_id, prepared, run_attempts, send
from nfscale.errors import CallerError, ExitCode
from tests.jobs import tiny_settings

LOCAL, REMOTE = "http://127.0.0.1:8265", "http://head.example:8265"
SUBMISSION = Submission("tiny", "/shared/tiny", "exec true")


class FakeCluster:
    """Jobs that end as they are told to: with a code, by a signal, lost with their node, or with the whole cluster."""

    def __init__(self, *endings: int | str) -> None:
        self.endings = list(endings)
        self.known: dict[str, SubmittedJob] = {}
        self.connections = 0
        self.skipped: list[int] = []

    def connect(self):
        self.connections += 1
        if self.endings and self.endings[0] == "down":
            self.endings.pop(0)
            raise UnreachableError("down")
        return self

    def jobs(self):
        return list(self.known.values())

    def job(self, job_id):
        return self.known[job_id]

    def submit(self, job_id, entrypoint, runtime_env, metadata):
        assert job_id not in self.known
        self.known[job_id] = SubmittedJob(job_id, "RUNNING", output=metadata["nfscale.output"])

    def follow(self, job_id, skip=0):
        self.skipped.append(skip)
        ending = self.endings.pop(0)
        yield "some "[skip:]
        if ending == "head killed":  # a new one begins its list anew
            self.known.clear()
            raise UnreachableError("no longer answers")
        if ending == "connection lost":
            raise UnreachableError("no longer answers")
        yield "lines\n"
        status = {0: "SUCCEEDED", "stopped": "STOPPED"}.get(ending, "FAILED")
        code = ending if isinstance(ending, int) else None
        self.known[job_id] = SubmittedJob(job_id, status, code, output=self.known[job_id].output)


def attempts_at(cluster, retries=3):
    printed, said, slept = [], [], []
    ids, job = run_attempts(cluster.connect, SUBMISSION, retries, printed.append, said.append, slept.append)
    return ids, job, "".join(printed), said, slept


def test_a_job_that_succeeds_is_sent_once():
    ids, job, printed, _, slept = attempts_at(FakeCluster(0))
    assert ids == ["tiny-a0"]
    assert exit_code_of(job) is ExitCode.DONE
    assert printed == "some lines\n"
    assert slept == []


@pytest.mark.parametrize("ending", [1, -9, 137, 143, "node lost"])
def test_an_attempt_that_failed_on_the_way_is_sent_again_under_the_next_id(ending):
    ids, job, _, said, slept = attempts_at(FakeCluster(ending, ending, 0))
    assert ids == ["tiny-a0", "tiny-a1", "tiny-a2"]
    assert exit_code_of(job) is ExitCode.DONE
    assert slept == [5.0, 10.0], "longer each time"
    assert "submitted tiny-a1, which resumes" in said


@pytest.mark.parametrize(("ending", "code"), [(2, 2), (3, 3), (4, 4), (5, 5), ("stopped", 143)])
def test_what_another_attempt_would_end_with_again_is_not_repeated(ending, code):
    ids, job, *_ = attempts_at(FakeCluster(ending))
    assert ids == ["tiny-a0"]
    assert exit_code_of(job) == code


@pytest.mark.parametrize(("ending", "code"), [(1, 1), (-9, 1), (127, 1), (143, 143), ("node lost", 1)])
def test_without_retries_left_the_code_is_that_of_the_encode(ending, code):
    ids, job, *_ = attempts_at(FakeCluster(ending, ending), retries=1)
    assert len(ids) == 2
    assert exit_code_of(job) == code


def test_a_lost_connection_is_not_a_lost_job():
    cluster = FakeCluster("connection lost", 0)
    ids, job, printed, *_ = attempts_at(cluster)
    assert ids == ["tiny-a0"], "it is followed again, not sent again"
    assert cluster.skipped == [0, 5]
    assert printed == "some lines\n", "and nothing is printed twice"
    assert exit_code_of(job) is ExitCode.DONE


def test_a_head_that_comes_back_empty_gets_the_job_anew():
    cluster = FakeCluster("head killed", "down", "down", 0)
    ids, job, _, _, slept = attempts_at(cluster)
    assert ids == ["tiny-a0", "tiny-a0"], "the new head counts from zero"
    assert exit_code_of(job) is ExitCode.DONE
    assert slept == [5.0, 5.0, 5.0], "a retry, and twice nobody answered"


def test_a_lost_cluster_without_retries_is_said():
    with pytest.raises(UnreachableError, match="the same submit continues"):
        attempts_at(FakeCluster("head killed"), retries=0)


def test_a_cluster_that_never_comes_back_ends_the_waiting():
    with pytest.raises(UnreachableError, match="down"):
        attempts_at(FakeCluster("head killed", *["down"] * 1000))


def test_a_second_job_into_the_same_output_is_refused_while_the_first_runs():
    cluster = FakeCluster()
    send(cluster, SUBMISSION)
    with pytest.raises(
        CallerError, match=r"tiny-a0 writes to /shared/tiny and is running; follow it with `nfscale logs"
    ):
        send(cluster, SUBMISSION)
    assert send(cluster, Submission("tiny", "/shared/other", "exec true")) == "tiny-a1"


def test_ids_are_the_next_free_ones():
    def known(*ids):
        return [SubmittedJob(name, "FAILED") for name in ids]

    assert free_id("tiny", known()) == "tiny-a0"
    assert free_id("tiny", known("tiny-a0", "tiny-a10", "tiny-a2", "tiny-b-a40", "a-tiny-a50")) == "tiny-a11"
    assert Submission("my tiles / 2", "", "").stem == "my-tiles-2"


# --- what is sent


@pytest.fixture
def job_file(tmp_path):
    path = tmp_path / "some job's.yaml"
    path.write_text(yaml.safe_dump(tiny_settings("/shared/tiny")))
    return path


def ran(entrypoint: str, folder: Path) -> list[str]:
    """The arguments that the entrypoint gives to python, in a shell as Ray's."""
    (folder / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (folder / "python").chmod(0o755)
    path = f"{folder}:/usr/bin:/bin"
    done = subprocess.run(entrypoint, shell=True, cwd=folder, env={"PATH": path}, capture_output=True, text=True)
    return [f"exit {done.returncode}", *done.stdout.splitlines()]


def test_the_job_file_goes_alone_and_nothing_is_installed(job_file, tmp_path):
    with prepared(job_file, ["fit.max_steps=80", "name=a b"], REMOTE) as submission:
        folder = Path(submission.runtime_env["working_dir"])
        assert [path.name for path in folder.iterdir()] == [job_file.name]
        assert (folder / job_file.name).read_text() == job_file.read_text()
        assert set(submission.runtime_env) == {"working_dir", "env_vars"}
        assert submission.runtime_env["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    assert not folder.exists()
    arguments = ["-m", "nfscale", "encode", job_file.name, "fit.max_steps=80", "name=a b", "output=/shared/tiny"]
    assert ran(submission.entrypoint, tmp_path) == ["exit 0", *arguments]
    assert (submission.name, submission.stem, submission.output) == ("a b", "a-b", "/shared/tiny")


def test_what_is_asked_for_goes_along(job_file, tmp_path, monkeypatch):
    monkeypatch.setenv("SET_HERE", "value")
    (tmp_path / "more.txt").write_text("einops\n")
    options = {
        "working_dir": tmp_path,
        "pip": tmp_path / "more.txt",
        "code": True,
        "environment": ["SET_HERE", "A=b=c"],
    }
    with prepared(job_file, [], REMOTE, **options) as submission:
        sent = submission.runtime_env
    assert sent["working_dir"] == str(tmp_path)
    assert sent["pip"] == str(tmp_path / "more.txt")
    assert [Path(module).name for module in sent["py_modules"]] == ["nfscale"]
    assert sent["env_vars"].items() >= {"SET_HERE": "value", "A": "b=c"}.items()


def test_an_image_gets_the_job_file_in_the_command(job_file, tmp_path):
    with prepared(job_file, ["seed=1"], REMOTE, image="registry/nfscale:1") as submission:
        assert set(submission.runtime_env) == {"image_uri", "env_vars"}, "Ray takes nothing else beside an image"
    code, *arguments = ran(submission.entrypoint, tmp_path)
    assert code == "exit 0"
    assert Path(arguments[3]).name == job_file.name
    assert Path(arguments[3]).read_text() == job_file.read_text()
    assert arguments[4:] == ["seed=1", "output=/shared/tiny"]


def test_a_relative_output_ends_where_it_is_found(job_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = ["output=runs/tiny"]
    with pytest.raises(CallerError, match=r"output 'runs/tiny' is relative, and would be in a folder that the cluster"):
        prepared(job_file, relative, REMOTE).__enter__()
    with prepared(job_file, relative, REMOTE, output_root="s3://bucket/all/") as submission:
        assert submission.output == "s3://bucket/all/runs/tiny"
    with prepared(job_file, relative, REMOTE, output_root="/shared") as submission:
        assert submission.output == "/shared/runs/tiny"
    with prepared(job_file, relative, LOCAL) as submission:
        assert submission.output == str(tmp_path / "runs/tiny")
    assert ran(submission.entrypoint, tmp_path)[-1] == f"output={tmp_path}/runs/tiny"
    monkeypatch.chdir(tmp_path.joinpath("python").parent)
    elsewhere = submission.entrypoint.replace(str(tmp_path), "/only/here")  # the loopback of a tunnel
    code, *said = ran(elsewhere, tmp_path)
    assert code == "exit 2"
    assert said == ["error: /only/here is not on the machine of the cluster; give an absolute output, or --output-root"]


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (["fit.max_step=3"], {}, "unknown key fit.max_step"),
        (["dataset.kind=folder", "dataset.path=images"], {}, "dataset.path 'images' is relative"),
        (
            ["dataset.kind=folder", "dataset.path=/images", "dataset.label_from=labels.csv"],
            {},
            "dataset.label_from 'labels.csv' is relative",
        ),
        (["fit.step_plan=runs/tiny.steps.parquet"], {}, "fit.step_plan 'runs/tiny.steps.parquet' is relative"),
        ([], {"output_root": "here"}, None),
        (["output=x"], {"output_root": "here"}, "--output-root 'here' is relative"),
        ([], {"image": "a", "code": True}, "--image holds everything"),
        ([], {"working_dir": Path("/nowhere")}, "--working-dir /nowhere is no folder"),
        ([], {"working_dir": Path("/usr")}, "is not in --working-dir /usr"),
        ([], {"pip": Path("/nowhere.txt")}, "--pip /nowhere.txt is no file"),
        ([], {"environment": ["NFSCALE_NOT_SET"]}, "--env NFSCALE_NOT_SET: there is no such variable here"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_sent(job_file, overrides, options, message):
    if message is None:
        with prepared(job_file, overrides, REMOTE, **options) as submission:
            assert submission.output == "/shared/tiny"
        return
    with pytest.raises(CallerError, match=message.replace("(", r"\(")):
        prepared(job_file, overrides, REMOTE, **options).__enter__()


# --- the address


def test_addresses(monkeypatch):
    assert dashboard_address("head:8265") == "http://head:8265"
    assert dashboard_address("https://head/") == "https://head"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", REMOTE)
    assert dashboard_address(None) == REMOTE
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    with pytest.raises(CallerError, match="give --address"):
        dashboard_address(None)
    with pytest.raises(CallerError, match="cannot submit to 'ray://head:10001'; give the address of Ray's dashboard"):
        dashboard_address("ray://head:10001")
    assert is_loopback("http://localhost:1")
    assert is_loopback(LOCAL)
    assert is_loopback("http://[::1]:8265")
    assert not is_loopback("http://127.0.0.1.example:8265")
    assert not is_loopback(REMOTE)


class Dashboard(BaseHTTPRequestHandler):
    """As much of a dashboard as says who may submit."""

    token: str | None = None
    redirect: str | None = None
    seen: list[str | None]

    def do_GET(self):
        given = self.headers.get("Authorization")
        self.seen.append(given)
        answer = 200 if self.token is None else 401 if given is None else 403
        if given == f"Bearer {self.token}":
            answer = 200
        if self.redirect:
            answer = 302
        self.send_response(answer)
        if self.redirect:
            self.send_header("Location", self.redirect)
        self.end_headers()
        body = {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}
        self.wfile.write(json.dumps(body).encode() if self.path == "/api/version" else b"[]")

    def log_message(self, *_):
        pass


@pytest.fixture
def dashboard(monkeypatch, tmp_path):
    """A server on loopback, and an environment that knows no token."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    from ray._raylet import Config

    Config.initialize("")  # Ray keeps what it read of them: a local Ray of another test
    handler = type("One", (Dashboard,), {"seen": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_cluster_that_asks_for_no_token_is_sent_none(dashboard, monkeypatch):
    address, server = dashboard
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert RayCluster(address).jobs() == []
    assert set(server.seen) == {None}


def test_a_cluster_that_asks_gets_the_token_of_the_environment(dashboard, monkeypatch, tmp_path):
    address, server = dashboard
    server.token = "secret"
    with pytest.raises(CallerError, match="wants a token; set RAY_AUTH_TOKEN"):
        RayCluster(address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(CallerError, match="refuses the token"):
        RayCluster(address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert RayCluster(address).jobs() == []
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert RayCluster(address).jobs() == []
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(CallerError, match="cannot read RAY_AUTH_TOKEN_PATH"):
        RayCluster(address)


def test_the_token_of_the_home_folder_goes_to_this_machine_alone(dashboard, monkeypatch, tmp_path):
    address, server = dashboard
    server.token = "secret"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    assert RayCluster(address).jobs() == []
    monkeypatch.setattr("nfscale.distributed.job_api.is_loopback", lambda address: False)
    before = len(server.seen)
    with pytest.raises(CallerError, match="wants a token"):
        RayCluster(address)
    assert server.seen[before:] == [None]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # said aloud, it may go
    assert RayCluster(address).jobs() == []


def test_a_token_does_not_follow_a_redirection(dashboard, monkeypatch):
    address, server = dashboard
    server.redirect = "http://127.0.0.1:1/"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    with pytest.raises(UnreachableError, match=r"no Ray dashboard \(status 302\)"):
        RayCluster(address)


def test_nobody_at_the_address_is_a_line(dashboard):
    with pytest.raises(
        UnreachableError, match=r"no Ray cluster answers at http://127.0.0.1:9 \(.*refused\); is its head"
    ):
        RayCluster("http://127.0.0.1:9")


def test_a_tail_that_is_closed_early_is_taken_up_without_printing_anything_twice(monkeypatch):
    cluster = RayCluster.__new__(RayCluster)
    tails = [["one ", "two "], ["one two ", "three"], ["one two three"]]
    states = ["RUNNING", "RUNNING", "SUCCEEDED"]
    monkeypatch.setattr(cluster, "_tailed", lambda job_id: iter(tails.pop(0)), raising=False)
    monkeypatch.setattr(cluster, "job", lambda job_id: SubmittedJob(job_id, states.pop(0)))
    monkeypatch.setattr("nfscale.distributed.job_api.time.sleep", lambda seconds: None)
    assert list(cluster.follow("tiny-a0", skip=2)) == ["e ", "two ", "three"]
