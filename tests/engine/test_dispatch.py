"""Which step is taken, what is refused, and what happens where nothing can be compiled."""

import os
import signal as signals
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nfscale.engine import build, handwritten, native
from nfscale.engine.dispatch import PLAIN, chosen, warn_once
from nfscale.fields import MLP
from nfscale.optim import LBFGS, Adam
from nfscale.rng import as_tensor
from nfscale.signals import Image
from tests.engine.fits import (
    ADAM,
    DATA,
    ESGD_OWN,
    ESGD_SHARED,
    FIELD,
    NEEDS_COMPILER,
    RAYS,
    SCHEDULE,
    SIGNAL,
    fitted,
    ray_data,
)

CPU = torch.device("cpu")


class Louder(Image):
    """Says nothing of its loss, which is not the mean squared error."""

    def loss(self, predicted, samples):
        return 2 * super().loss(predicted, samples)


class Renamed(Image):
    quality_name = "decibels"


class Eager(Adam):
    def update(self, grads, state, params, extra):
        return super().update(grads, state, params, extra)


@NEEDS_COMPILER
def test_auto_takes_the_native_step_where_it_serves():
    for optimizer, at_once in ((ADAM, True), (ESGD_SHARED, True), (ESGD_OWN, True), (Eager(1e-3, SCHEDULE), False)):
        step = chosen("auto", CPU, FIELD, SIGNAL, optimizer)
        assert step.name == "native"
        assert (step.advance is not None) == at_once
        assert chosen("plain", CPU, FIELD, SIGNAL, optimizer) is PLAIN
    assert chosen("auto", CPU, FIELD, Renamed(1), ADAM).name == "native"


def test_the_step_of_torch_takes_all_steps_of_the_optimisers_that_it_knows():
    for optimizer, at_once in ((ADAM, True), (ESGD_SHARED, True), (ESGD_OWN, True), (Eager(1e-3, SCHEDULE), False)):
        step = chosen("torch", CPU, FIELD, SIGNAL, optimizer)
        assert step.name == "torch"
        assert (step.advance is not None) == at_once
    assert chosen("auto", torch.device("cuda"), MLP(2, 1, width=100), SIGNAL, ADAM).name == "torch"


@pytest.mark.parametrize("signal", [Louder(1), RAYS])
def test_what_the_step_of_torch_does_not_know_is_refused_where_it_is_asked_for(signal):
    with pytest.raises(ValueError, match=f"step='torch' cannot be taken: .*{type(signal).__name__} is not"):
        chosen("torch", CPU, FIELD, signal, ADAM)
    with pytest.raises(ValueError, match=r"step='torch' cannot be taken: .*not on meta"):
        chosen("torch", torch.device("meta"), FIELD, SIGNAL, ADAM)


@pytest.mark.parametrize("precision", ["tf32", "float16"])
def test_products_of_a_gpu_are_refused_elsewhere_and_where_nothing_has_them(precision):
    wide, cuda = MLP(2, 1, width=100), torch.device("cuda")
    step = chosen("auto", cuda, wide, SIGNAL, ADAM, precision)
    assert step.name == "torch"
    assert step.gradient.keywords == {"precision": precision}
    assert step.advance.precision == precision
    assert step.apply is handwritten.handwritten_apply, "what is measured is float32"
    own = chosen("torch", cuda, wide, SIGNAL, ESGD_OWN, precision)
    if precision == "float16":  # whose range is too small for derivatives along a probe
        assert own.advance is None
        assert own.gradient_and_hvp is handwritten.handwritten_gradient_and_hvp
    for name, device, field, optimizer, why in (
        ("auto", CPU, FIELD, ADAM, "it is for an NVIDIA GPU, not for cpu"),
        ("torch", CPU, FIELD, ADAM, "it is for an NVIDIA GPU, not for cpu"),
        ("auto", cuda, wide, LBFGS(), "LBFGS compares losses more finely"),
        ("plain", cuda, wide, ADAM, "a plain step has products in float32"),
        ("auto", cuda, MLP(2, 1, activation="finer"), ADAM, "not with activation=finer"),
    ):
        with pytest.raises(
            ValueError, match=f"precision='{precision}' cannot be taken: .*{why}.*; use precision='auto'"
        ):
            chosen(name, device, field, SIGNAL, optimizer, precision)
    with pytest.raises(ValueError, match="unknown precision 'half'; known precisions: auto, float32, tf32, float16"):
        fitted(DATA, precision="half")
    with pytest.raises(ValueError, match="not for cpu"):
        fitted(DATA, precision=precision)


@NEEDS_COMPILER
def test_on_a_cpu_float32_is_what_is_taken_anyway():
    for name in ("auto", "plain", "torch", "native"):
        assert chosen(name, CPU, FIELD, SIGNAL, ADAM, "float32") == chosen(name, CPU, FIELD, SIGNAL, ADAM)


@pytest.mark.parametrize(
    ("device", "signal", "why"),
    [
        ("cpu", Louder(1), "Louder is not"),
        ("cpu", RAYS, "Rays is not"),
        ("meta", SIGNAL, "on a CPU, not on meta"),
    ],
)
def test_what_the_native_step_does_not_know_is_plain_and_refused_where_it_is_asked_for(device, signal, why):
    assert chosen("auto", torch.device(device), FIELD, signal, ADAM) is PLAIN
    with pytest.raises(ValueError, match=f"step='native' cannot be taken: .*{why}.*; use step='auto' or 'plain'"):
        chosen("native", torch.device(device), FIELD, signal, ADAM)


@pytest.mark.parametrize("keys", [{"activation": "finer"}, {"encoding": "positional"}])
def test_fields_other_than_siren_take_the_plain_step(keys):
    field = MLP(2, 1, **keys)
    assert chosen("auto", CPU, field, SIGNAL, ADAM) is PLAIN
    for name in ("native", "torch"):
        with pytest.raises(ValueError, match=f"step='{name}' cannot be taken: it knows MLPs with sines, not with acti"):
            chosen(name, CPU, field, SIGNAL, ADAM)


@NEEDS_COMPILER
@pytest.mark.parametrize("name", ["native", "torch"])
def test_frequency_tuning_is_siren_to_every_step(name):
    field = MLP(2, 1, width=12, depth=2, initialization="frequency_tuning", weight_scale=2.0)
    rows = field.layout.ravel(field.init(as_tensor([1, 2])))
    samples = SIGNAL.samples(np.arange(48, dtype=np.uint8).reshape(6, 8, 1)).map(lambda part: torch.stack([part] * 2))
    losses, gradients = chosen(name, CPU, field, SIGNAL, ADAM).gradient(field, SIGNAL, rows, samples)
    expected_losses, expected = PLAIN.gradient(field, SIGNAL, rows, samples)
    torch.testing.assert_close(losses, expected_losses)
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)
    untuned = replace(field, initialization="siren")
    assert not torch.allclose(PLAIN.gradient(untuned, SIGNAL, rows, samples)[0], losses, rtol=1e-2)


def test_an_unknown_step_is_refused_before_anything_is_read():
    def data():
        raise AssertionError("the data were read")
        yield

    with pytest.raises(ValueError, match="unknown step 'quick'; known steps: auto, plain, torch, native, fused"):
        fitted(data(), step="quick")


@NEEDS_COMPILER
def test_a_check_says_which_step_was_taken():
    heard = {}
    for step in ("auto", "plain", "torch", "native"):
        fitted(DATA, step=step, observe=lambda check, step=step: heard.setdefault(step, set()).add(check.step))
    assert heard == {"auto": {"native"}, "plain": {"plain"}, "torch": {"torch"}, "native": {"native"}}
    fitted(ray_data(2), signal=RAYS, observe=lambda check: heard.setdefault("rays", set()).add(check.step))
    assert heard["rays"] == {"plain"}


# Without a library


@pytest.fixture
def forgetful():
    """The library is looked for anew, in this test and after it."""
    native._loaded.cache_clear()
    warn_once.cache_clear()
    yield
    native._loaded.cache_clear()
    warn_once.cache_clear()


def fitted_without_a_library(why: str) -> None:
    with pytest.warns(UserWarning, match=f"the native step is not available.*{why}") as heard:
        results = fitted(DATA[:2], samples=16)
    assert len(heard) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(DATA[2:], samples=16)  # once in a process is enough
    for datum_id, result in fitted(DATA[:2], samples=16, step="torch").items():
        assert torch.equal(result.weights, results[datum_id].weights)
    with pytest.raises(ValueError, match=f"step='native' cannot be taken: .*{why}"):
        fitted(DATA, step="native")


def test_without_a_compiler_the_step_of_torch_runs_and_says_so_once(forgetful, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "absent-c++"))
    fitted_without_a_library("there is no C.. compiler .*absent-c")


def test_with_a_compiler_that_fails_the_step_of_torch_runs(forgetful, monkeypatch, tmp_path):
    failing = tmp_path / "c++"
    failing.write_text("#!/bin/sh\ncase $1 in --version) echo g++;; *) exit 1;; esac\n")
    failing.chmod(0o755)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(failing))
    fitted_without_a_library("it did not compile")


def test_an_old_processor_has_the_step_of_torch(forgetful, monkeypatch):
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    fitted_without_a_library("AVX2")


def test_a_cache_that_cannot_be_written_is_a_reason(forgetful, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    fitted_without_a_library("cannot be written")


# Building

BUILD = """
from pathlib import Path
from nfscale.engine.build import compiled
from nfscale.engine.native import _SOURCE
print(compiled(_SOURCE))
"""


def build_in(folder: Path, monkeypatch, compiler: str | None = None) -> subprocess.Popen:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    if compiler is None:
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setenv("CXX", compiler)
    return subprocess.Popen(
        [sys.executable, "-c", BUILD],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        start_new_session=True,
    )


@NEEDS_COMPILER
def test_processes_that_start_together_build_once(tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    counting = tmp_path / "c++"
    counting.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) echo . >> {calls};; esac\nexec c++ "$@"\n')
    counting.chmod(0o755)
    together = [build_in(tmp_path / "cache", monkeypatch, str(counting)) for _ in range(3)]
    said = [process.communicate(timeout=200) for process in together]
    assert all(process.returncode == 0 for process in together), said
    (library,) = {out.strip() for out, _ in said}
    assert Path(library).exists()
    assert calls.read_text().count(".") == 1


@NEEDS_COMPILER
def test_a_build_that_is_killed_keeps_nobody_waiting(tmp_path, monkeypatch):
    """The compiler hangs on when the process that waits for it has died; the next process builds nevertheless."""
    begun = tmp_path / "begun"
    hanging = tmp_path / "c++"
    hanging.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) touch {begun}; exec sleep 100;; esac\nexec c++ "$@"\n')
    hanging.chmod(0o755)
    doomed = build_in(tmp_path / "cache", monkeypatch, str(hanging))
    waited = time.monotonic()
    while not begun.exists():
        assert time.monotonic() - waited < 100
        assert doomed.poll() is None, doomed.communicate()
        time.sleep(0.05)
    doomed.kill()
    hanging.unlink()  # the shell that runs it reads on in the old file
    hanging.write_text('#!/bin/sh\nexec c++ "$@"\n')
    hanging.chmod(0o755)
    try:
        done = build_in(tmp_path / "cache", monkeypatch, str(hanging))
        out, error = done.communicate(timeout=100)
    finally:
        os.killpg(doomed.pid, signals.SIGKILL)
        doomed.communicate()
    assert done.returncode == 0, error
    assert Path(out.strip()).exists()
