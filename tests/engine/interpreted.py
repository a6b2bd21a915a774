"""Tests that run in a process of their own, where Triton interprets its kernels on the CPU.

TRITON_INTERPRET counts when Triton is imported, and what is compiled in the tests' own process needs it unset.
"""

import atexit
import functools
import importlib
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

import pytest

VARIABLE = "TRITON_INTERPRET"

NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (Linux only)")


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """The test in the other process; what it raises is raised here. Its arguments are pickled."""

    @functools.wraps(test)
    def run(*arguments, **named):
        if os.environ.get(VARIABLE) == "1":
            return test(*arguments, **named)
        return _other_process().submit(_run, test.__module__, test.__qualname__, arguments, named).result()

    return run


def _run(module: str, name: str, arguments: tuple, named: dict) -> None:
    importlib.import_module("torch").set_num_threads(1)
    getattr(importlib.import_module(module), name)(*arguments, **named)


@functools.cache
def _other_process() -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    try:
        pool.submit(int).result()
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
    atexit.register(pool.shutdown)
    return pool
