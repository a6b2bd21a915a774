"""The command `nfscale`: each command in a file of its own, errors as one line and an exit code."""

from nfscale.cli.app import main

__all__ = ["main"]
