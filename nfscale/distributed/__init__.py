"""Ray: the driver's pool with one actor per device, and jobs sent to a cluster. The only place that imports Ray."""

from nfscale.distributed.ray_pool import RayPool

__all__ = ["RayPool"]
