"""Processes that tests start, find and kill."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def ancestors(pid: int) -> list[int]:
    line = []
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except FileNotFoundError:
            break
        line.append(pid)
    return line


def descendants(root: int) -> list[int]:
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdecimal()]
    return [pid for pid in pids if root in ancestors(pid)]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return ""


def killed_after(command: list[str], reached: Callable[[], bool], log: Path) -> None:
    """Start an encode; once it has got somewhere, end driver and workers by SIGKILL."""
    with open(log, "w") as stream:
        running = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
        try:
            deadline = time.monotonic() + 120
            while not reached() and time.monotonic() < deadline and running.poll() is None:
                time.sleep(0.05)
        finally:
            workers = [pid for pid in descendants(running.pid) if "ray::_FitWorker" in command_of(pid)]
            for pid in (running.pid, *workers):
                os.kill(pid, signal.SIGKILL)
            running.wait()
