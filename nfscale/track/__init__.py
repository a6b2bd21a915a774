"""MLflow: the run of a job, a projection of what is committed. The only place that imports MLflow."""

from nfscale.track.folder import log_folder, log_results
from nfscale.track.mlflow_tracker import Tracker, tracking_uri

__all__ = ["Tracker", "log_folder", "log_results", "tracking_uri"]
