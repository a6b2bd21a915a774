"""From weights to new data: readers, transforms, classifiers, generators, scores, exports. Names no dataset."""

from nfscale.learn.data import Rows, WeightsMap, WeightsStream

__all__ = ["Rows", "WeightsMap", "WeightsStream"]
