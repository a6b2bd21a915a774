"""Reports: HTML that needs no server, made from run folders alone (and the dataset, for the originals)."""

from nfscale.review.compare import compare_runs, comparison_page, words_of
from nfscale.review.curve import curve_of
from nfscale.review.report import make_report

__all__ = ["compare_runs", "comparison_page", "curve_of", "make_report", "words_of"]
