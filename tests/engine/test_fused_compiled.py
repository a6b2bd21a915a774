"""The kernels of the fused step compiled for an H200 where there is none: what they need, and what they consist of.

Bounds leave room above what Triton 3.6 and 3.9 make.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from nfscale.engine import Calibration, fused
from nfscale.engine.sampling import Sampler
from nfscale.fields import MLP
from nfscale.optim import ESGD, Adam, Schedule
from nfscale.signals import Image, Samples
from tests.engine.interpreted import NEEDS_TRITON

pytestmark = NEEDS_TRITON

TYPES = {
    "counts": "*i32",
    "runs": "*i32",
    "units": "*i32",
    "positions": "*i32",
    **dict.fromkeys(("fields", "seeds", "steps", "diagonal_row"), "*i64"),
    **dict.fromkeys(("available", "taken", "chunk", "chunks", "index", "step_count", "most_units"), "i32"),
    **dict.fromkeys(("omega_0", "omega_hidden", "beta1", "rest1", "beta2", "rest2", "epsilon"), "fp32"),
}
"""Of the kernels' arguments; all others that are no constants are pointers to float32."""

SHARED_BYTES = 227 << 10  # that a program may have on compute capability 9.0


@dataclass(frozen=True)
class Compiled:
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: Counter
    tile_loop: Counter
    """Of the innermost loop with sines."""
    tile_length: int


@cache
def compiled(kernel: str, field: MLP, **constants: int) -> Compiled:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nfscale.engine import fused_curvature, fused_kernels

    if fused_kernels.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set: nothing can be compiled")
    launch = fused._LAUNCHES["fp16"][field.width]
    known = {
        "KIND": fused_kernels.ADAM.value,
        "CLIPPED": True,
        "STREAM": 1,
        "SAMPLING": fused_kernels.ALL.value,
        "MASKED": False,
        "DIMENSIONS": field.dimensions,
        "CHANNELS": field.channels,
        "WIDTH": field.width,
        "DEPTH": field.depth,
        "TILE": launch.tile,
        "OPERAND": tl.float16,
        "FAST": True,
        "SIZE": field.layout.size,
        **constants,
    }
    function = getattr(fused_curvature if kernel == "partial_curvature" else fused_kernels, kernel)
    constants = {name: known[name] for name in function.arg_names if name in known}
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "*fp32") for name in function.arg_names}
    options = {"num_warps": launch.warps, "num_stages": fused.STAGES, "enable_fp_fusion": True}
    made = triton.compile(
        ASTSource(function, signature, constexprs=constants), target=GPUTarget("cuda", 90, 32), options=options
    )
    return _looked_into(made.asm["cubin"], made.metadata.shared, Path(triton.__file__).parent)


def _looked_into(cubin: bytes, shared_bytes: int, triton_folder: Path) -> Compiled:
    tools = triton_folder / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, listing = (
            subprocess.run([str(tools / tool), option, str(path)], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    names, labels, jumps = [], {}, []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)(.*?);", line):
            if instruction[1].startswith("BRA") and (target := re.search(r"\.L_x_\d+", instruction[2])):
                jumps.append((target[0], len(names)))
            names.append(instruction[1])
    loops = [names[labels[target] : end + 1] for target, end in jumps if labels.get(target, end + 1) <= end]
    tiles = min((loop for loop in loops if "MUFU.SIN" in loop), key=len)
    return Compiled(registers, stack, shared_bytes, Counter(names), Counter(tiles), len(tiles))


def count(instructions: Counter, *beginnings: str) -> int:
    return sum(number for name, number in instructions.items() if name.startswith(beginnings))


SMALL, LARGE, DEEP = (
    MLP(2, 1, width=32, depth=2),
    MLP(2, 3, width=64, depth=2),
    MLP(2, 3, width=64, depth=4),
)


@pytest.mark.parametrize(
    ("field", "constants", "most_stack", "most_by_sine"),
    [
        (SMALL, {}, 400, 18),
        (LARGE, {}, 1000, 20),
        (DEEP, {"KIND": 2, "SAMPLING": 1}, 2400, 18),
    ],
    ids=["32x2-adam", "64x2-adam", "64x4-esgd-stratified"],
)
def test_the_kernel_of_all_steps_keeps_to_its_bounds(field, constants, most_stack, most_by_sine):
    kernel = compiled("advance", field, **constants)
    launch = fused._LAUNCHES["fp16"][field.width]
    assert kernel.registers <= 255
    assert kernel.stack_bytes <= most_stack
    programs = 4 if field.width == 32 else 2  # of one multiprocessor, to hide each other's latency
    assert kernel.shared_bytes * programs < SHARED_BYTES
    sines = launch.tile * field.width * field.depth // (32 * launch.warps)
    assert count(kernel.tile_loop, "MUFU.SIN") == count(kernel.tile_loop, "MUFU.COS") == sines
    assert kernel.tile_length / sines <= most_by_sine
    assert count(kernel.tile_loop, "HMMA", "HGMMA") > 0
    assert count(kernel.tile_loop, "SHFL") == 0  # sums over points are products


def test_a_narrow_kernel_spills_nothing_in_the_loop_over_tiles():
    kernel = compiled("advance", SMALL)
    assert count(kernel.tile_loop, "LDL", "STL") == 0


def test_a_wide_kernel_spills_little_in_the_loop_over_tiles():
    kernel = compiled("advance", LARGE)
    assert count(kernel.tile_loop, "LDL", "STL") / kernel.tile_length < 0.12


@pytest.mark.parametrize("kernel", ["partial_gradient", "partial_curvature"])
def test_the_kernels_of_partial_sums_compile(kernel):
    made = compiled(kernel, LARGE)
    assert made.shared_bytes < SHARED_BYTES
    assert count(made.tile_loop, "HMMA", "HGMMA") > 0
    launch = fused._LAUNCHES["fp16"][LARGE.width]
    sines = launch.tile * LARGE.width * LARGE.depth // (32 * launch.warps)
    assert sines <= count(made.tile_loop, "MUFU.SIN") < 2 * sines


class H200:
    """As much of a driver as compiling needs."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were called: bound to their arguments and compiled, but not launched."""
    from triton.runtime import driver

    from nfscale.engine import fused_curvature, fused_kernels

    if fused_kernels.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set: nothing can be compiled")
    names = []

    def instead(kernel, run):
        def warm_up(*arguments, grid, warmup, **named):
            made = run(*arguments, grid=grid, warmup=True, **named)
            assert made.asm["cubin"]
            names.append(kernel)

        return warm_up

    for module, kernels in (
        (fused_kernels, ("advance", "partial_gradient", "update")),
        (fused_curvature, ("partial_curvature",)),
    ):
        for kernel in kernels:
            function = getattr(module, kernel)
            monkeypatch.setattr(function, "run", instead(kernel, function.run))
    monkeypatch.setattr(driver, "_active", H200())
    return names


def test_calls_fit_the_compiled_kernels(launched):
    """What the interpreter does not look at: types of arguments, constants, options of a launch."""
    field, signal, sampler = MLP(2, 3, width=16, depth=2), Image(3), Sampler(100, 20)
    rows, samples = torch.zeros(3, field.layout.size), Samples(torch.zeros(3, 100, 2), torch.zeros(3, 100, 3))
    fused.fused_gradient(field, signal, rows, samples)
    fused.fused_gradient_and_hvp(field, signal, rows, samples, rows)
    assert launched == ["partial_gradient", "update", "partial_curvature", "update"]
    calibration = Calibration(torch.ones(2, field.layout.size), torch.ones(2), 10)
    seeds, rate = torch.zeros(3, dtype=torch.int64), torch.ones(3)
    for optimizer in (Adam(1e-3, Schedule()), ESGD(1.0, Schedule())):
        state = optimizer.init({"rows": rows})
        fused.fused_steps(field, optimizer, calibration, sampler, rows, state, samples, seeds, seeds, rate, 2, [0, 2])
    assert launched[4:] == ["advance", "advance"]
