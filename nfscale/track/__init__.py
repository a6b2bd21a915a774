"""MLflow: the run of a job, a projection of what is committed. The only place that imports MLflow."""

from nfscale.track.mlflow_tracker import Tracker, tracking_uri

__all__ = ["Tracker", "tracking_uri"]
