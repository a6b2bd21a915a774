"""nfscale encodes whole datasets as neural fields: one small network per datum, many fitted at once.

`import nfscale` and `nfscale.fit` need torch and numpy and nothing else. Each name is imported when it is first asked
for, so that the command line starts at once, and can say so where not even torch fits into memory.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nfscale.engine import Calibration, Fitted, Result, Stop, calibrate, fit
    from nfscale.fields import FIELDS, MLP
    from nfscale.optim import ESGD, OPTIMIZERS, Adam, Schedule
    from nfscale.signals import SIGNALS, Audio, Image, Occupancy, Radiance, Samples, Sdf, Sphere
    from nfscale.store.table import WeightsTable, open_weights

__version__ = "0.1.0"

__all__ = [
    "ESGD",
    "FIELDS",
    "MLP",
    "OPTIMIZERS",
    "SIGNALS",
    "Adam",
    "Audio",
    "Calibration",
    "Fitted",
    "Image",
    "Occupancy",
    "Radiance",
    "Result",
    "Samples",
    "Schedule",
    "Sdf",
    "Sphere",
    "Stop",
    "WeightsTable",
    "calibrate",
    "fit",
    "open_weights",
]

_HOMES = {
    "nfscale.engine": ("Calibration", "Fitted", "Result", "Stop", "calibrate", "fit"),
    "nfscale.fields": ("FIELDS", "MLP"),
    "nfscale.optim": ("ESGD", "OPTIMIZERS", "Adam", "Schedule"),
    "nfscale.signals": ("SIGNALS", "Audio", "Image", "Occupancy", "Radiance", "Samples", "Sdf", "Sphere"),
    "nfscale.store.table": ("WeightsTable", "open_weights"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'nfscale' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
