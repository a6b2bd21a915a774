"""The contract of a medium: what of a modality is no mathematics, its files and how a page shows it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

Beside = Callable[[str], BinaryIO]
"""Opens another file of the dataset by its path relative to the one that is read; raises OSError or ValueError."""


@runtime_checkable
class Listing(Protocol):
    """A `Beside` of a folder that can be listed."""

    def __call__(self, relative: str, /) -> BinaryIO: ...

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder, by its path relative to the file that is read; sorted, none of what is not
        there."""
        ...


Decode = Callable[[str], Any]
"""A datum out of its weights at another shape, written as `nfscale decode --shape` takes it."""


@dataclass(frozen=True)
class Panel:
    """One thing that a page shows: a picture, or a sound with its player."""

    mime: str
    """`image/png`, `image/webp`, `image/gif`, `audio/wav`."""
    content: bytes
    """Of a file of that type."""
    caption: str = ""


def nothing_beside(relative: str) -> BinaryIO:
    """`Beside` where data are no files in a folder: cells of a table, members of a tar.

    Raises:
        ValueError: always.
    """
    raise ValueError("it names another file, and there are none beside it; put such data into a folder")


class Medium(Protocol):
    """The contract of every entry of `MEDIA`. Contents are what the signal of the same kind takes samples of."""

    suffixes: frozenset[str]
    """What names of files that it reads end in: lower case, with the dot."""
    written: tuple[str, ...]
    """What names of files that it writes end in; the first is the usual one."""
    panel_pixels: int
    """How wide a panel is shown at least, so that what is written in it can be read; small images are enlarged."""
    legend: str
    """What the panels of a datum are, in their order: `original, rebuilt, error times ten`."""

    def read(self, stream: BinaryIO, name: str, beside: Beside) -> Any:
        """The content of a file. Files are hostile.

        Args:
            name: path of the file in its dataset, whose suffix may lie.

        Raises:
            ValueError: in a sentence that becomes the row's reason.
        """
        ...

    def write(self, content: Any, path: Path) -> None:
        """Write what a field was decoded to, in the format of the path's suffix, one of `written`.

        Raises:
            OSError: if the file cannot be written.
        """
        ...

    def measures(self, original: Any, rebuilt: Any) -> dict[str, float]:
        """Further measures of a reconstruction, by name with the unit: `ssim`. Empty where none is defined."""
        ...

    def measurable(self, original: Any) -> bool:
        """Whether `measures` says anything of such a datum: decoding costs time."""
        ...

    def panels(self, original: Any, rebuilt: Any, decode: Decode) -> list[Panel]:
        """What a page shows of a datum; `decode` gives what its field says at other shapes than the original's."""
        ...
