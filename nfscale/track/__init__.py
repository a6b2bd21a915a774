"""MLflow: the run of a job, a projection of what is committed. The only place that imports MLflow."""

from nfscale.track.folder import log_files, log_folder, log_results
from nfscale.track.mlflow_tracker import TOO_MANY_FAILED, Tracker, page_of, tracking_uri

__all__ = ["TOO_MANY_FAILED", "Tracker", "log_files", "log_folder", "log_results", "page_of", "tracking_uri"]
