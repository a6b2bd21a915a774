"""What is read: openers of formats and of the shipped sets, one file each.

An opener is a frozen dataclass whose fields are the keys of its kind in the job file; `open()` gives a
`Dataset`, which knows its length and ids at once and reads data by range. Adding one is one file here
and one line in `DATASETS`.
"""

from nfscale.datasets.backgrounds import Backgrounds
from nfscale.datasets.base import Dataset, Datum, Opener, Subset, seeded_sample
from nfscale.datasets.brain import Brain
from nfscale.datasets.clips import Clips
from nfscale.datasets.digits import Digits
from nfscale.datasets.emoji import Emoji
from nfscale.datasets.fashion_mnist import FashionMnist
from nfscale.datasets.folder import Folder
from nfscale.datasets.function import Function
from nfscale.datasets.hf import HuggingFace
from nfscale.datasets.mnist import Mnist
from nfscale.datasets.navy_winds import NavyWinds
from nfscale.datasets.netcdf import NetCdf
from nfscale.datasets.npz import Npz
from nfscale.datasets.photos import Photos
from nfscale.datasets.scenes import Scenes
from nfscale.datasets.shapes import Shapes
from nfscale.datasets.speech import Speech
from nfscale.datasets.table import Table
from nfscale.datasets.upper_winds import UpperWinds
from nfscale.datasets.webdataset import WebDataset

DATASETS: dict[str, type] = {
    "backgrounds": Backgrounds,
    "brain": Brain,
    "clips": Clips,
    "digits": Digits,
    "emoji": Emoji,
    "fashion_mnist": FashionMnist,
    "folder": Folder,
    "function": Function,
    "hf": HuggingFace,
    "mnist": Mnist,
    "navy_winds": NavyWinds,
    "netcdf": NetCdf,
    "npz": Npz,
    "photos": Photos,
    "scenes": Scenes,
    "shapes": Shapes,
    "speech": Speech,
    "table": Table,
    "upper_winds": UpperWinds,
    "webdataset": WebDataset,
}

__all__ = ["DATASETS", "Dataset", "Datum", "Opener", "Subset", "seeded_sample"]
