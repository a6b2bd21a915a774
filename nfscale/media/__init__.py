"""Files and pages of the modalities: how data are read, written and shown. One file each, by the signal's kind."""

from nfscale.media.audio import AudioMedium
from nfscale.media.base import Beside, Decode, Medium, Panel, nothing_beside
from nfscale.media.image import ImageMedium
from nfscale.media.occupancy import OccupancyMedium
from nfscale.media.radiance import RadianceMedium
from nfscale.media.sdf import SdfMedium
from nfscale.media.sphere import SphereMedium
from nfscale.media.video import VideoMedium
from nfscale.media.volume import VolumeMedium

MEDIA: dict[str, Medium] = {
    "audio": AudioMedium(),
    "image": ImageMedium(),
    "occupancy": OccupancyMedium(),
    "radiance": RadianceMedium(),
    "sdf": SdfMedium(),
    "sphere": SphereMedium(),
    "video": VideoMedium(),
    "volume": VolumeMedium(),
}

__all__ = ["MEDIA", "Beside", "Decode", "Medium", "Panel", "nothing_beside"]
