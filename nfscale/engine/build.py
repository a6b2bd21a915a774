"""Compiles the native step at its first use and keeps it for the next process.

Workers start together, so several processes want the library at once. One builds it, in a folder of its own, while
the others wait for its lock; it appears under its final name by a rename. The lock is the kernel's: whoever dies,
however, has released it. torch's builder has a lock, too, which a killed process leaves behind for ever; it is
never shared, since every build has a folder of its own.
"""

import hashlib
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_COMMON_FLAGS = ["-O3", "-fno-math-errno"]  # never -ffast-math: see the source
_WAIT_SECONDS = 120.0
"""For another process's build, which takes a few seconds; then this one builds for itself."""


class CannotBuild(Exception):  # noqa: N818 (it reads as what it says)
    """Why there is no library, in words that follow "the native step is not available: "."""


def compiled(source: Path) -> Path:
    """The shared library of this source for this machine, built if no process has built it yet.

    Raises:
        CannotBuild: without a compiler, or on a processor that the source is not written for.
    """
    flags = _flags()
    library = cache_folder() / f"{source.stem}-{_key(source, flags)}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with _lock(library.with_suffix(".lock")):
            if not library.exists():
                _build(source, flags, library)
    except OSError as error:
        raise CannotBuild(f"{library.parent} cannot be written ({error.strerror or error})") from error
    return library


def cache_folder() -> Path:
    """Where torch keeps what it compiles: `TORCH_EXTENSIONS_DIR`, or `torch_extensions` in the user's cache."""
    if chosen := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(chosen) / "nfscale"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "torch_extensions" / "nfscale"


def _flags() -> list[str]:
    """Instruction sets by name and not `native`, so that machines that share a cache share what they can run."""
    if sys.platform == "win32":
        raise CannotBuild("it is not built on Windows")
    if platform.machine().lower() in ("aarch64", "arm64"):
        return [*_COMMON_FLAGS, "-ffp-contract=fast"]
    sets = {"AVX512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"]}
    sets["AVX2"] = ["-mavx2", "-mfma"]
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in sets:
        raise CannotBuild(f"it needs a processor with AVX2, and this one has {capability}")
    return [*_COMMON_FLAGS, "-ffp-contract=off", *sets[capability]]


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _key(source: Path, flags: list[str]) -> str:
    found = shutil.which(_compiler())
    compiler = os.path.realpath(found) if found else _compiler()
    parts = [source.read_text(encoding="utf-8"), *flags, compiler, torch.__version__, platform.machine()]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time, where the file system can lock; without, several build at once, which is safe."""
    import fcntl  # of Unix alone, and nothing is built elsewhere

    deadline = time.monotonic() + _WAIT_SECONDS
    with open(path, "w", encoding="utf-8") as file:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break
        yield


def _build(source: Path, flags: list[str], library: Path) -> None:
    if shutil.which(_compiler()) is None:
        raise CannotBuild(f"there is no C++ compiler ({_compiler()})")
    folder = tempfile.mkdtemp(prefix="nfscale-build-")
    try:
        with warnings.catch_warnings(), _scripts_in_path():
            warnings.simplefilter("ignore")
            from torch.utils.cpp_extension import load  # takes a moment, and setuptools: only where it builds

            built = load(
                name=f"nfscale_{library.stem.replace('-', '_')}",
                sources=[str(source)],
                extra_cflags=flags,
                extra_ldflags=["-pthread"],
                build_directory=folder,
                is_python_module=False,
            )
        arriving = library.with_suffix(f".{os.getpid()}")
        shutil.copy(str(built), arriving)
        os.replace(arriving, library)
    except (ImportError, RuntimeError, AssertionError) as error:
        raise CannotBuild(f"it did not compile ({_first_line(error)})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _scripts_in_path() -> Iterator[None]:
    """Let torch find the `ninja` beside this Python, which is in no PATH unless the environment is activated."""
    before = os.environ.get("PATH")
    places = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
    os.environ["PATH"] = os.pathsep.join([before, *places] if before else places)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PATH"]
        else:
            os.environ["PATH"] = before


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
