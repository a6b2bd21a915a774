"""`nfscale submit` and its companions: what they say, and end with, where there is nothing to submit to."""

import pytest
import yaml

from nfscale.cli import app
from tests.jobs import tiny_settings


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run a command line; its exit code and what it printed as errors."""
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tiny_settings("/shared/tiny")))

    def command(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["nfscale", *arguments])
        with pytest.raises(SystemExit) as ended:
            app.main()
        return ended.value.code, capsys.readouterr().err

    return command


NOWHERE = ("--address", "http://127.0.0.1:9")


@pytest.mark.parametrize("command", [("submit", "job.yaml"), ("jobs",), ("logs", "tiny-a0"), ("stop", "tiny-a0")])
def test_without_a_cluster_there_is_a_line_and_a_code(run, tmp_path, command):
    arguments = [str(tmp_path / word) if word == "job.yaml" else word for word in command]
    code, said = run(*arguments)
    assert (code, said) == (2, "error: no cluster: give --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS\n")
    code, said = run(*arguments, *NOWHERE)
    assert code == 1, "it may be up the next time"
    assert said.startswith("error: no Ray cluster answers at http://127.0.0.1:9 (")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("fit.max_step=3",), "unknown key fit.max_step"),
        (("--retries", "1", "--no-wait"), "--retries is the work of whoever waits"),
        (("--image", "x", "--code"), "--image holds everything"),
    ],
)
def test_a_mistake_is_said_before_the_cluster_is_asked(run, tmp_path, options, message):
    code, said = run("submit", str(tmp_path / "job.yaml"), *options, *NOWHERE)
    assert code == 2
    assert said.startswith(f"error: {message}")


def test_a_share_that_is_none_is_refused(run, tmp_path):
    code, said = run("encode", str(tmp_path / "job.yaml"), "--shards", "4/4")
    assert (code, said) == (
        2,
        "error: --shards '4/4' is no share; write i/n with i from 0 to n - 1, such as 3/16\n",
    )
