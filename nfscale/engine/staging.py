"""Samples on their way to a GPU while it computes: read in one thread, stepped with in another.

A copy waits for the device unless it is from memory that is pinned, and for the steps that were launched before it
unless it is on a stream of its own. So who reads data copies them into pinned memory and from there, on such a stream;
who puts them into a batch lets the batch's stream wait for that, and no thread waits for anything.

A batch that is made anew takes its data in one piece from where they were read; what is staged is for slots that are
filled again. Where the device has no room for them, samples stay where they were read.
"""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from nfscale.signals import Samples
from nfscale.signals.base import Kind

ALONE = threading.Lock()
"""Held while a reader allocates memory of a device, and while what a field takes is measured by what is allocated."""


class Staged:
    """A datum's samples, where they were read and, once they have `arrived`, on a device."""

    def __init__(self, host: Samples, device: torch.device, stream: torch.cuda.Stream) -> None:
        self.host = host
        self._pinned = host.map(torch.Tensor.pin_memory)  # kept until the copy has been waited for
        with ALONE, torch.cuda.stream(stream):
            self._there = self._pinned.map(lambda tensor: tensor.to(device, non_blocking=True))
            self._copied = torch.cuda.Event()
            self._copied.record(stream)

    @property
    def kind(self) -> Kind:
        return self.host.kind

    def arrived(self) -> Samples:
        """On the device, for what is launched from here on on the current stream."""
        current = torch.cuda.current_stream(self._there.values.device)
        current.wait_event(self._copied)

        def used(tensor: Tensor) -> Tensor:
            tensor.record_stream(current)  # it was allocated on another one
            return tensor

        return self._there.map(used)


def staging(device: torch.device | str | None = None) -> Callable[[Samples], Samples | Staged]:
    """What a reader does to samples for a fit on this device; by default, as of `fit`, a GPU if there is one.

    On a CPU, and of data whose samples stay in their files: nothing.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda":
        return lambda samples: samples
    if device.index is None:  # each thread has a current device of its own
        device = torch.device("cuda", torch.cuda.current_device())
    stream = torch.cuda.Stream(device)

    def staged(samples: Samples) -> Samples | Staged:
        if samples.source is not None:
            return samples
        try:
            return Staged(samples, device, stream)
        except RuntimeError:  # no memory to pin, or none on the device: it is copied when it is wanted
            return samples

    return staged
