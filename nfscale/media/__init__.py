"""Files and pages of the modalities: how data are read, written and shown. One file each, by the signal's kind."""

from nfscale.media.base import Beside, Medium, Panel, nothing_beside
from nfscale.media.image import ImageMedium

MEDIA: dict[str, Medium] = {"image": ImageMedium()}

__all__ = ["MEDIA", "Beside", "Medium", "Panel", "nothing_beside"]
