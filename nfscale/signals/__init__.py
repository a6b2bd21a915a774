"""What is represented: each signal turns a datum into samples and values back into a datum.

Adding a modality is one file here and one line in `SIGNALS`.
"""

from nfscale.signals.audio import Audio, Sound
from nfscale.signals.base import Kind, Pointwise, Samples, Signal, Source, mean_squared_error, psnr_db, samples_per_axis
from nfscale.signals.image import Image
from nfscale.signals.occupancy import Labelled, Occupancy
from nfscale.signals.radiance import Radiance, Scene
from nfscale.signals.sdf import Sdf
from nfscale.signals.solids import Grid, Mesh, Solid
from nfscale.signals.sphere import Sphere, SphereMap
from nfscale.signals.video import Clip, Video
from nfscale.signals.volume import Volume, Voxels

SIGNALS: dict[str, type] = {
    "audio": Audio,
    "image": Image,
    "occupancy": Occupancy,
    "radiance": Radiance,
    "sdf": Sdf,
    "sphere": Sphere,
    "video": Video,
    "volume": Volume,
}

__all__ = [
    "SIGNALS",
    "Audio",
    "Clip",
    "Grid",
    "Image",
    "Kind",
    "Labelled",
    "Mesh",
    "Occupancy",
    "Pointwise",
    "Radiance",
    "Samples",
    "Scene",
    "Sdf",
    "Signal",
    "Solid",
    "Sound",
    "Source",
    "Sphere",
    "SphereMap",
    "Video",
    "Volume",
    "Voxels",
    "mean_squared_error",
    "psnr_db",
    "samples_per_axis",
]
