"""What is represented: each signal turns a datum into samples and values back into a datum.

Adding a modality is one file here and one line in `SIGNALS`.
"""

from nfscale.signals.base import Kind, Samples, Signal
from nfscale.signals.image import Image

SIGNALS: dict[str, type] = {"image": Image}

__all__ = ["SIGNALS", "Image", "Kind", "Samples", "Signal"]
