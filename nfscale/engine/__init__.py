"""Many fields at once on one device: the only loop of the project. Needs torch and numpy, nothing else."""

from nfscale.engine.calibrate import Calibration, calibrate
from nfscale.engine.learned import LearnedStart, learn_start
from nfscale.engine.learners import LEARNERS
from nfscale.engine.loop import Check, fit, fit_and_checks
from nfscale.engine.result import Fitted, Result, Stop
from nfscale.engine.snapshot import Snapshot

__all__ = [
    "LEARNERS",
    "Calibration",
    "Check",
    "Fitted",
    "LearnedStart",
    "Result",
    "Snapshot",
    "Stop",
    "calibrate",
    "fit",
    "fit_and_checks",
    "learn_start",
]
