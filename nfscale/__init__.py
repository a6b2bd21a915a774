"""nfscale encodes whole datasets as neural fields: one small network per datum, many fitted at once.

`import nfscale` and `nfscale.fit` need torch and numpy and nothing else; what reads and writes tables is
imported when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

from nfscale.engine import Calibration, Fitted, Result, Stop, calibrate, fit
from nfscale.fields import FIELDS, MLP
from nfscale.optim import ESGD, OPTIMIZERS, Adam, Schedule
from nfscale.signals import SIGNALS, Image, Samples

if TYPE_CHECKING:
    from nfscale.store.table import WeightsTable, open_weights

__version__ = "0.1.0"

__all__ = [
    "ESGD",
    "FIELDS",
    "MLP",
    "OPTIMIZERS",
    "SIGNALS",
    "Adam",
    "Calibration",
    "Fitted",
    "Image",
    "Result",
    "Samples",
    "Schedule",
    "Stop",
    "WeightsTable",
    "calibrate",
    "fit",
    "open_weights",
]


def __getattr__(name: str) -> Any:
    if name in ("open_weights", "WeightsTable"):
        from nfscale.store import table

        return getattr(table, name)
    raise AttributeError(f"module 'nfscale' has no attribute {name!r}")
