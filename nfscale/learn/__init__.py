"""From weights to new data: readers, transforms, classifiers, generators, scores, exports. Names no dataset."""

from nfscale.learn.data import Rows, WeightsMap, WeightsStream
from nfscale.learn.transforms import Standardizer, Tokens

__all__ = ["Rows", "Standardizer", "Tokens", "WeightsMap", "WeightsStream"]
