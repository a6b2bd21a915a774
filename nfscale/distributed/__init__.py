"""Ray: the driver's pool with one actor per device. The only place that imports Ray."""

from nfscale.distributed.ray_pool import RayPool

__all__ = ["RayPool"]
