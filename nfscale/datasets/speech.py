"""558 spoken prompts of a telephone exchange, 8 kHz, one voice (Allison Smith for Digium; CC BY-SA 3.0).

They are files of the Debian package asterisk-core-sounds-en-wav (18 MB); its ten files of silence are left out.
Ids are the files' paths without the suffix, labels their folders. They are in the order of their lengths, so that
those of one length, which share batches, are neighbours.
"""

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

from nfscale.datasets.base import Dataset, Datum
from nfscale.datasets.cache import Package, fetch_debian
from nfscale.hostile import reason_of
from nfscale.media.audio import decoded

_FOLDER = Path("usr/share/asterisk/sounds/en_US_f_Allison")
_WORDS = ("digits", "letters", "phonetic")
_ARCHIVE = "prompts.tar"


def _archived(package: Package, into: Path) -> Path:
    """The prompts as one file, whose bytes depend on theirs alone; from the package, if it is installed."""
    root = Path("/")
    if not (root / _FOLDER).is_dir():
        root = fetch_debian(package, into)
    folder = root / _FOLDER
    with tarfile.open(into / _ARCHIVE, "w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(folder.glob("**/*.wav"), key=lambda path: path.as_posix()):
            name = path.relative_to(folder).as_posix()
            if not name.startswith("silence/"):
                content = path.read_bytes()
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return into


_PACKAGE = Package(
    name="asterisk-core-sounds-en-wav",
    version="1.6.1",
    files={_ARCHIVE: (_ARCHIVE, "622b0addf5d0f34341078aa6ff8176bd5ee106b96db91038854ca294868e4ef1")},
    fetch=_archived,
    command="apt-get update && apt-get install asterisk-core-sounds-en-wav",
)


@dataclass(frozen=True)
class Speech:
    """The first use fetches the Debian package with apt-get, unless it is installed."""

    part: Literal["words", "digits", "letters", "phonetic", "all", "demo"] = "words"
    """words: the next three together, 182 numbers, days, letters and signs of 0.6 to 1.6 seconds.
    all: whole sentences too, of up to 73 seconds. demo: the ten that introduce the exchange, the longest among
    them; `signal.tile` cuts them."""

    def open(self) -> "SpeechDataset":
        archive = _PACKAGE.paths()[_ARCHIVE]
        folders = {"words": _WORDS, "all": None}.get(self.part, (self.part,))
        members = _members(archive)
        wanted = [name for name in members if folders is None or name.split("/")[0] in folders]
        if self.part == "demo":
            wanted = [name for name in members if name.startswith("demo-")]
        return SpeechDataset(archive, sorted(wanted, key=lambda name: (members[name][1], name)))


class SpeechDataset(Dataset):
    def __init__(self, archive: Path, names: list[str]) -> None:
        self._archive, self._names = archive, names

    @cached_property
    def ids(self) -> Sequence[str]:
        return [name.removesuffix(".wav") for name in self._names]

    def read(self, position: int) -> Datum:
        name = self._names[position]
        label = name.split("/")[0] if "/" in name else "prompts"
        offset, size = _members(self._archive)[name]
        try:
            with self._archive.open("rb") as file:
                file.seek(offset)
                return Datum(self.ids[position], position, decoded(file.read(size)), label)
        except (OSError, ValueError) as error:
            return Datum(self.ids[position], position, None, label, error=reason_of(error))


@lru_cache(maxsize=1)
def _members(path: Path) -> dict[str, tuple[int, int]]:
    """Where each prompt is: (offset, bytes) by name, in the order of the names."""
    with tarfile.open(path) as archive:
        return {member.name: (member.offset_data, member.size) for member in archive}
