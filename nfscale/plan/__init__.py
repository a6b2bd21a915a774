"""Before a run: what it will cost and come to."""

from nfscale.plan.estimate import Estimate, actual, estimate

__all__ = ["Estimate", "actual", "estimate"]
