"""The run folder and the weights table: schema, atomic commits, lazy readers. Nothing is ever pickled."""

from nfscale.store.run_folder import RunFolder
from nfscale.store.table import WeightsTable, open_weights

__all__ = ["RunFolder", "WeightsTable", "open_weights"]
