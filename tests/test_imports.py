"""Who may import whom, read from the sources, and what `nfscale.fit` needs, tried in a process without the rest."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "nfscale"

NUMERICAL = {"torch", "numpy"}

RULES = {
    # part: what it may import beside itself and the standard library
    "rng": {"torch", "numpy", "nfscale.layout"},
    "layout": {"torch", "numpy", "nfscale.rng"},
    "fields": NUMERICAL | {"nfscale.rng", "nfscale.layout"},
    "signals": NUMERICAL | {"nfscale.rng", "nfscale.layout"},
    "optim": NUMERICAL | {"nfscale.rng", "nfscale.layout"},
    "engine": NUMERICAL
    | {"triton", "nfscale.rng", "nfscale.layout", "nfscale.fields", "nfscale.signals", "nfscale.optim"},
    "coordinator": set(),
}

HOMES = {"ray": "distributed", "mlflow": "track", "triton": "engine"}
"""Packages that one part alone may import."""

WITHOUT_ARROW = ("engine", "fields", "signals", "optim", "coordinator")


def module_of(path: Path) -> str:
    parts = ("nfscale", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The folder or module directly below nfscale."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(text: str, module: str, is_package: bool) -> Iterator[str]:
    """Full names of all that a source imports, at its top, inside functions, relative, or by `import_module`.

    `from a import b` counts as `a.b`, because b may be a module; rules compare by prefix.
    """
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = package[: len(package) - node.level + 1]
                origin = ".".join([*base, origin]) if origin else ".".join(base)
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def imports_in(path: Path) -> list[str]:
    return list(imports_of(path.read_text(encoding="utf-8"), module_of(path), path.name == "__init__.py"))


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def forbidden(names: list[str], part: str) -> list[str]:
    """Those of the imported names that this part may not import."""
    allowed = RULES[part] | {f"nfscale.{part}"}
    return [
        name
        for name in names
        if name.split(".")[0] not in sys.stdlib_module_names and not any(is_within(name, module) for module in allowed)
    ]


@pytest.mark.parametrize("part", RULES)
def test_a_part_imports_only_what_the_design_lets_it(part):
    own = [path for path in sources() if part_of(path) == part]
    assert own, f"nfscale has no {part}"
    found = {module_of(path): forbidden(imports_in(path), part) for path in own}
    assert {module: names for module, names in found.items() if names} == {}


@pytest.mark.parametrize(("package", "home"), HOMES.items())
def test_a_package_is_imported_in_its_home_only(package, home):
    importers = {
        module_of(path): part_of(path)
        for path in sources()
        if any(is_within(name, package) for name in imports_in(path))
    }
    assert {module for module, part in importers.items() if part != home} == set()


def test_arrow_is_imported_by_no_part_that_computes():
    offenders = [
        module_of(path)
        for path in sources()
        if part_of(path) in WITHOUT_ARROW and any(is_within(name, "pyarrow") for name in imports_in(path))
    ]
    assert offenders == []


def test_an_import_is_seen_wherever_it_stands():
    """The rules above hold nothing if the reader of imports overlooks one."""
    text = """
import ray.util as util
from nfscale import encode
from . import base
from ..engine.loop import fit
from .curvature import gradient
def late():
    if True:
        from mlflow import MlflowClient
    importlib.import_module("pyarrow.parquet")
    __import__("typer")
"""
    seen = set(imports_of(text, "nfscale.optim.adam", is_package=False))
    assert seen == {
        "ray.util",
        "nfscale.encode",
        "nfscale.optim.base",
        "nfscale.engine.loop.fit",
        "nfscale.optim.curvature.gradient",
        "mlflow.MlflowClient",
        "pyarrow.parquet",
        "typer",
    }
    assert set(imports_of("from . import base", "nfscale.optim", is_package=True)) == {"nfscale.optim.base"}
    refused = {"ray.util", "nfscale.encode", "nfscale.engine.loop.fit", "mlflow.MlflowClient", "pyarrow.parquet"}
    assert set(forbidden(sorted(seen), "optim")) == refused | {"typer"}
    assert forbidden(["nfscale.optimistic", "nfscale", "nfscale.rng.words", "math", "torch.nn"], "optim") == [
        "nfscale.optimistic",
        "nfscale",
    ]


FIT_WITHOUT_THE_REST = """
import sys

ABSENT = {"ray", "mlflow", "pyarrow", "pydantic", "typer", "PIL", "skimage", "sklearn", "matplotlib", "triton"}


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ImportError(f"{name} is not installed here")
        return None


sys.meta_path.insert(0, Absent())
for name in ABSENT:
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} can be imported: this process shows nothing")

import numpy
import torch

torch.set_num_threads(1)
import nfscale

signal = nfscale.Image(1)
draw = numpy.random.default_rng(0)
fields = nfscale.fit(
    nfscale.MLP(2, 1, width=8, depth=2),
    signal,
    [(name, signal.samples(draw.random((8, 8)))) for name in ("a", "b")],
    optimizer=nfscale.Adam(1e-3, nfscale.Schedule("cosine", total_steps=20)),
    stop=nfscale.Stop(max_steps=20, check_every=10),
    seed=0,
    device="cpu",
)
for fitted in fields:
    assert fitted.quality > fitted.history_quality[0]
    print(fitted.id, fitted.result.value, fitted.steps)
assert not ABSENT & {name.split(".")[0] for name in sys.modules}
"""


def test_fit_needs_torch_and_numpy_and_nothing_else():
    done = subprocess.run(
        [sys.executable, "-c", FIT_WITHOUT_THE_REST],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["a max_steps 20", "b max_steps 20"]
