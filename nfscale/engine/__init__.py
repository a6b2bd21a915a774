"""Many fields at once on one device: the only loop of the project. Needs torch and numpy, nothing else."""

from nfscale.engine.calibrate import Calibration, calibrate
from nfscale.engine.learned import LEARNERS, LearnedStart, learn_start
from nfscale.engine.loop import Check, fit
from nfscale.engine.result import Fitted, Result, Stop

__all__ = [
    "LEARNERS",
    "Calibration",
    "Check",
    "Fitted",
    "LearnedStart",
    "Result",
    "Stop",
    "calibrate",
    "fit",
    "learn_start",
]
