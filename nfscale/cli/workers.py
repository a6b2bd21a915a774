"""The workers that a job asks for: this process, those of a Ray started here, or of the cluster of `RAY_ADDRESS`."""

import os
import sys

from nfscale.errors import CallerError
from nfscale.job import EncodeJob
from nfscale.pool import InProcessPool, Pool
from nfscale.store import RunFolder


def pool_of(job: EncodeJob, folder: RunFolder | None, useful: int | None = None) -> Pool:
    """A pool as the job wants it.

    Args:
        folder: of the run; None for workers of calls.
        useful: more workers than so many are of no use.

    Raises:
        EncodeError: if Ray does not answer.
    """
    if job.workers == 0:
        return InProcessPool(folder)
    from nfscale.distributed import RayPool

    return RayPool(folder, job.workers, job.max_workers, job.workers_per_gpu, useful)


def device_of(job: EncodeJob) -> str:
    """What the workers will compute on: a head without GPUs plans for those of its cluster.

    Raises:
        CallerError: if the workers are to have GPUs, and there is nothing but this machine, which has none.
    """
    import torch

    asks_for_gpus = job.workers != 0 and job.workers_per_gpu not in (0, "auto")
    if torch.cuda.is_available():
        return "cuda"
    if asks_for_gpus and not os.environ.get("RAY_ADDRESS"):
        raise CallerError(
            f"workers_per_gpu={job.workers_per_gpu} asks for GPUs, and this machine has none; leave it out, or give "
            "the address of a cluster (RAY_ADDRESS)"
        )
    return "cuda" if asks_for_gpus else "cpu"


def leave_at_once(code: int) -> None:
    """End the process without Python's own ending, in which a Ray that is half started aborts; what it has started
    ends with its parent."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
