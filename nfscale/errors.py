"""The errors that a command turns into one line and an exit code."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a command tells the shell."""

    DONE = 0
    FAILED = 1
    """Failed on the way, safe to repeat."""
    CALLER = 2
    """The caller's mistake; nothing was written."""
    TOO_MANY_FAILED = 3
    """Done, with more failed data than allowed."""
    SUPERSEDED = 4
    """Another driver took over."""
    MISMATCH = 5
    """`verify` found a mismatch."""
    INTERRUPTED = 130
    TERMINATED = 143


class NfscaleError(Exception):
    """An error with a message for the user: what was seen, what was expected, the way out."""

    exit_code = ExitCode.FAILED


class CallerError(NfscaleError):
    """The caller's mistake."""

    exit_code = ExitCode.CALLER


class EncodeError(NfscaleError):
    """The encode failed on the way; what is committed stays, and the same command continues."""


class OutputError(EncodeError):
    """The output cannot be written: a full disk, a lost permission."""


class SupersededError(NfscaleError):
    """Another driver took over the run; it continues where this one ends."""

    exit_code = ExitCode.SUPERSEDED


class MismatchError(NfscaleError):
    """What is stored is not what was committed."""

    exit_code = ExitCode.MISMATCH
