"""Methods compute the same, rows say what was measured, and what cannot be compared is refused."""

import json
import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from nfscale.benchmark import bounds
from nfscale.benchmark.app import main
from nfscale.benchmark.naive import COMPARED_STEPS, Compiled, Loop, Vmap
from nfscale.benchmark.ours import Ours, constant_adam
from nfscale.benchmark.step import Machine, losses_of, measured, refuse_disagreement
from nfscale.benchmark.timing import in_turns
from nfscale.benchmark.with_jax import Jax
from nfscale.benchmark.workers import Share, teams
from nfscale.benchmark.workloads import WORKLOADS, Workload, problem_of
from nfscale.errors import CallerError, NfscaleError
from tests.engine.fits import NEEDS_COMPILER

FULL = Workload(3, 49, width=8, depth=2, channels=2)
SAMPLED = Workload(3, 64, width=8, depth=3, dimensions=3, sampled=16)
LONE = Workload(1, 49, width=8, depth=1)
NEEDS_JAX = pytest.mark.skipif(find_spec("jax") is None, reason="jax is not installed")
TORCH_COMPILES = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
ONE_THREAD = Machine("cpu", 1)
KEYS = ["workload", "method", "threads", "ms_median", "ms_min", "ratio_to_loop", "ratio_to_loop_per_core"]
KEYS += ["ratio_to_jax", "fraction_of_bound", "peak_mb"]


@pytest.mark.parametrize("workload", [FULL, SAMPLED, LONE], ids=["full", "sampled", "lone"])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(Vmap, id="vmap"),
        pytest.param(Compiled, id="compile", marks=[pytest.mark.slow, NEEDS_COMPILER, TORCH_COMPILES]),
        pytest.param(Jax, id="jax", marks=NEEDS_JAX),
        pytest.param(partial(Ours, step="plain"), id="plain"),
        pytest.param(partial(Ours, step="native"), id="native", marks=NEEDS_COMPILER),
    ],
)
def test_methods_take_the_same_steps(make, workload):
    loop, method = Loop(problem_of(workload)), make(problem_of(workload))
    start = losses_of(workload, problem_of(workload).rows)
    torch.testing.assert_close(method.rows(), loop.rows(), rtol=0, atol=0)
    losses = {}
    for name, one in (("loop", loop), ("other", method)):
        one.advance(COMPARED_STEPS)
        losses[name] = losses_of(workload, one.rows())
    refuse_disagreement(start, losses, 1e-4)
    one_further = method.rows()
    method.advance(2)  # of samples that it draws itself
    assert losses_of(workload, method.rows()).isfinite().all()
    assert not torch.equal(method.rows(), one_further)


def test_a_range_of_the_fields_is_the_same_fields():
    whole, part = problem_of(SAMPLED), problem_of(SAMPLED, 1, 2)
    assert torch.equal(part.rows, whole.rows[1:])
    assert torch.equal(part.samples.values, whole.samples.values[1:])
    assert torch.equal(part.first_positions(2), whole.first_positions(2)[1:])


def test_operations_are_those_of_the_products():
    """As counted by hand: 28 x 28 points through 2-32-32-32-1, forward once and backward twice."""
    weights = 2 * 32 + 32 * 32 + 32 * 32 + 32
    assert WORKLOADS["A"].operations == 256 * 784 * 6 * weights
    assert WORKLOADS["A"].activations == 256 * 784 * 96
    assert WORKLOADS["F"].operations == 1024 * 64 * 6 * (2 * 64 + 3 * 64 * 64 + 64 * 3)
    assert WORKLOADS["F"].weights == 1024 * 12_867


def test_rows_say_what_was_measured(tmp_path, capsys):
    methods = ["loop", "loop_per_core", "vmap", "nfscale"] + ["jax"] * (find_spec("jax") is not None)
    arguments = ["--workloads", "A", "--fields", "3", "--rounds", "1", "--threads", "1", "--methods", ",".join(methods)]
    main(["step", *arguments, "--json", str(tmp_path / "rows.json")])
    assert "ratios are of the fastest rounds" in capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["method"] for row in rows] == methods
    fastest = {row["method"]: row["ms_min"] for row in rows}
    for row in rows:
        assert list(row)[: len(KEYS)] == KEYS
        assert (row["workload"], row["threads"]) == ("A", 1)
        assert 0 < row["ms_min"] <= row["ms_median"]
        for other in ("loop", "loop_per_core", "jax"):
            expected = pytest.approx(fastest[other] / row["ms_min"]) if other in fastest else None
            assert row[f"ratio_to_{other}"] == expected
        assert row["fraction_of_bound"] == pytest.approx(row["bound_ms"] / row["ms_min"])
        parts = sum(row[f"bound_{part}_ms"] for part in ("products", "sines", "updates"))
        assert row["bound_ms"] == pytest.approx(parts)
        assert row["fields_timed"] <= row["fields"] == 3
        assert row["peak_mb"] is None or row["peak_mb"] > 0
    assert {row["step"] for row in rows if row["method"] != "nfscale"} == {None}


def test_a_ratio_to_what_was_not_run_is_null():
    rows = measured("tiny", FULL, {"nfscale": partial(Ours, step="plain")}, ONE_THREAD, rounds=1)
    assert [rows[0][f"ratio_to_{other}"] for other in ("loop", "loop_per_core", "jax")] == [None] * 3
    assert rows[0]["step"] == "plain"


# What is refused


def twice_as_fast(problem):
    return Ours(problem, "plain", constant_adam(2 * problem.learning_rate))


def test_a_method_that_computes_something_else_is_refused():
    with pytest.raises(NfscaleError, match=r"losses of nfscale differ from those of loop by .* Nothing is reported"):
        measured("tiny", FULL, {"loop": Loop, "nfscale": twice_as_fast}, ONE_THREAD, rounds=1)


def test_losses_that_are_no_numbers_are_refused():
    start, broken = torch.ones(2), torch.tensor([0.5, float("nan")])
    with pytest.raises(NfscaleError, match="differ"):
        refuse_disagreement(start, {"loop": torch.full((2,), 0.5), "other": broken}, 1e-4)


def dies(problem):
    os._exit(7)


def fails(problem):
    raise ValueError("a reason\nand more")


@pytest.mark.parametrize(
    ("make", "why"), [(dies, "ended with exit code 7"), (fails, "ValueError: a reason .*test_step.py")]
)
def test_a_method_that_fails_is_one_error(make, why):
    with (
        pytest.raises(NfscaleError, match=f"method broken failed: .*{why}"),
        teams({"broken": [Share(make, FULL, 0, 3, "cpu", 1, ())]}),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--methods", "loop,quick"], "unknown method 'quick'; known methods: loop, "),
        (["--methods", ","], "unknown method"),
        (["--workloads", "Z"], "unknown workload 'Z'; known workloads: A, B"),
        (["--rounds", "0"], "--rounds is at least 1, got 0"),
        (["--threads", "100000"], "this process may use"),
        (["--fields", "0"], "--fields is at least 1, got 0"),
        (["--device", "abacus"], "unknown device 'abacus'"),
        (["--step", "quick"], "unknown step 'quick'; known steps: auto, plain"),
    ],
)
def test_bad_options_are_the_callers_mistake(arguments, why):
    with pytest.raises(CallerError, match=why):
        main(["step", "--threads", "1", *arguments])


def test_without_a_command_line_a_mistake_is_a_line_and_exit_2():
    done = subprocess.run(
        [sys.executable, "-m", "nfscale.benchmark", "step", "--workloads", "Z"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        timeout=100,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown workload 'Z'")
    assert done.stderr.count("\n") == 1


# What is held against


class Hoarder:
    """Holds 64 MiB for a moment."""

    step_name = None

    def __init__(self, problem):
        self._rows = problem.rows

    def advance(self, count):
        torch.zeros(16 << 20)

    def rows(self):
        return self._rows


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are counted on Linux alone")
def test_the_peak_is_what_a_method_held_beside_its_data():
    with teams({"hoarder": [Share(Hoarder, FULL, 0, 3, "cpu", 1, ())]}) as running:
        before = running["hoarder"].peak_bytes()
        running["hoarder"].advance(1)
        after = running["hoarder"].peak_bytes()
    assert before is not None
    assert after is not None
    assert before < 8 << 20
    assert 60 << 20 < after < 90 << 20


@pytest.mark.parametrize("compiler", [pytest.param("c++", marks=NEEDS_COMPILER), "absent-c++"])
def test_a_bound_is_the_sum_of_three_times(compiler, monkeypatch, tmp_path):
    if compiler == "absent-c++":
        monkeypatch.setenv("CXX", str(tmp_path / compiler))
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    kind, timed = bounds.parts(1)
    assert kind == {"c++": "hardware", "absent-c++": "torch"}[compiler]
    times = in_turns({name: part.run for name, part in timed.items()}, rounds=2, warm_up=0)
    bound = bounds.bound_of(kind, timed, times)
    workload = WORKLOADS["B"]
    expected = workload.operations / bound.products + workload.activations / bound.sines
    assert bound.ms(workload) == pytest.approx(1e3 * (expected + workload.weights / bound.updates))
