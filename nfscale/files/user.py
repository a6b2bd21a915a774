"""Folders of the user's own: what can be fetched again, and what is to be kept."""

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """`NFSCALE_CACHE`, or `nfscale` where this system keeps what can be fetched again."""
    if chosen := os.environ.get("NFSCALE_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "nfscale" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "nfscale"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nfscale"


def data_folder() -> Path:
    """`NFSCALE_DATA`, or `nfscale` where this system keeps a user's data."""
    if chosen := os.environ.get("NFSCALE_DATA"):
        return Path(chosen).expanduser()
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "nfscale" / "data"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "nfscale"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "nfscale"
