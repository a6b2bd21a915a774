"""Signals that end a command in good order."""

import signal
import threading
from types import FrameType
from typing import Any

from nfscale.errors import ExitCode


class Terminated(BaseException):
    """SIGTERM arrived: leave in good order."""


class Termination:
    """Turns SIGTERM into `Terminated` while the block runs, where that is the main thread.

    Ray installs a handler of its own when it starts, one that exits with the signal's number, so `install`
    is called again after that; and an exception that arises inside Ray's C code comes out as a SystemError.
    """

    def __init__(self) -> None:
        self.arrived = False
        self._before: Any = None

    def __enter__(self) -> "Termination":
        self._before = self.install()
        return self

    def install(self) -> Any:
        """Handle SIGTERM from now on; the handler there was."""
        if threading.current_thread() is not threading.main_thread():
            return None  # the embedding program owns the signals
        return signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.arrived = True
        raise Terminated

    def exit_code_of(self, error: BaseException) -> ExitCode | None:
        """The exit code of an interruption, as which exception it may come; None if it is none."""
        if isinstance(error, KeyboardInterrupt):
            return ExitCode.INTERRUPTED
        by_ray = isinstance(error, SystemExit) and error.code == signal.SIGTERM
        in_c_code = isinstance(error, SystemError) and self.arrived
        return ExitCode.TERMINATED if by_ray or in_c_code or isinstance(error, Terminated) else None

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
