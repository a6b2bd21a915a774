"""What is read: openers of formats and of the shipped sets, one file each.

An opener is a frozen dataclass whose fields are the keys of its kind in the job file; `open()` gives a
`Dataset`, which knows its length and ids at once and reads data by range. Adding one is one file here
and one line in `DATASETS`.
"""

from nfscale.datasets.base import Dataset, Datum, Opener, Subset, seeded_sample
from nfscale.datasets.digits import Digits
from nfscale.datasets.folder import Folder
from nfscale.datasets.photos import Photos

DATASETS: dict[str, type] = {"digits": Digits, "folder": Folder, "photos": Photos}

__all__ = ["DATASETS", "Dataset", "Datum", "Opener", "Subset", "seeded_sample"]
