"""Reports: one HTML file that needs no server, made from a run folder alone (and the dataset, for the originals)."""

from nfscale.review.report import make_report

__all__ = ["make_report"]
