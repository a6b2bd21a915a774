"""What a command wrote into a folder, as an MLflow run of its own, or added to that of a job."""

import math
import os
import tempfile
from pathlib import Path

from nfscale.store.run_folder import RunFolder
from nfscale.track.mlflow_tracker import experiment_id, migrated_store, store_folder, tracking_uri


def log_results(
    run: RunFolder, name: str, files: dict[str, bytes], params: dict[str, object], metrics: dict[str, float]
) -> str | None:
    """Log what a command found out about a run, beside that run. Returns why that failed, or None.

    Args:
        files: artifacts by name.
    """
    job = run.plan().job
    with tempfile.TemporaryDirectory() as temporary:
        for file, content in files.items():
            (Path(temporary) / file).write_bytes(content)
        given = {"run": run.files.absolute()} | params
        return log_folder(
            Path(temporary), job["track"]["experiment"], f"{job['name']} {name}", given, metrics, store_folder(run)
        )


def log_folder(
    folder: Path,
    experiment: str,
    name: str,
    params: dict[str, object],
    metrics: dict[str, float],
    store: Path | None = None,
) -> str | None:
    """Log params, metrics and all files of a folder. Returns why that failed, or None.

    The store is `MLFLOW_TRACKING_URI`, or `mlruns.db` in the folder `store` or else in the one above, as for runs.
    """
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    uri, above = os.environ.get("MLFLOW_TRACKING_URI"), store or folder.resolve().parent
    try:
        if not uri:
            migrated_store(above / "mlruns.db")
            uri = f"sqlite:///{above / 'mlruns.db'}"
        client = MlflowClient(uri)
        run_id = client.create_run(experiment_id(client, experiment, above), run_name=name).info.run_id
        known = [Metric(key, value, 0, 0) for key, value in metrics.items() if math.isfinite(value)]
        client.log_batch(run_id, known, [Param(key, str(value)) for key, value in params.items()])
        client.log_artifacts(run_id, str(folder))
        client.set_terminated(run_id)
    except Exception as error:  # whatever a tracking server answers, the figures are in the folder
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def log_files(run: RunFolder, place: RunFolder, names: list[str], artifact_path: str) -> str | None:
    """Add files of a run folder to the MLflow run of another, if it has one. Returns why that failed, or None."""
    known, uri = run.tracking, tracking_uri(run)
    if known.get("tracking_uri") != uri:
        return None
    from mlflow import MlflowClient

    try:
        for name in names:
            with place.files.local_copy(name) as path:
                MlflowClient(uri).log_artifact(known["run_id"], str(path), artifact_path)
    except Exception as error:  # whatever a tracking server answers, the files are in the folder
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None
