"""nfscale encodes whole datasets as neural fields: one small network per datum, many fitted at once."""
from nfscale.engine import fit
