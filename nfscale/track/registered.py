"""Registering the model that decodes a run, with the code it needs and none that it does not."""

import contextlib
import importlib.metadata
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

import nfscale
from nfscale.files import is_uri
from nfscale.store.schema import OK_STATUSES, STATUS
from nfscale.store.table import WeightsTable, as_array

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SHIPPED = ("__init__.py", "errors.py", "layout.py", "rng.py", "engine", "fields", "files", "optim", "signals", "store")
"""What of nfscale a reader of weights imports: torch, numpy and pyarrow are all that it needs."""

_NEEDS = ("mlflow", "torch", "numpy", "pyarrow")


def register_decoder(client: "MlflowClient", uri: str, run_id: str, name: str, table: WeightsTable) -> None:
    """A registered model that decodes ids of this run to arrays, as a new version of the model of this name."""
    import mlflow
    from mlflow.exceptions import MlflowException

    for logger in ("mlflow.pyfunc", "mlflow.models.model", "mlflow.store.model_registry.abstract_store"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    example, dimensions = _example(table)
    run = table.folder.files.absolute()
    with tempfile.TemporaryDirectory() as folder, _active(uri, run_id), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice to add type hints to predict
        logged = mlflow.pyfunc.log_model(
            name="decoder",
            python_model=str(Path(__file__).with_name("decoder.py")),
            model_config={"run": run},
            code_paths=[str(_shipped_code(Path(folder)))],
            signature=_signature(dimensions),
            input_example=example,
            pip_requirements=_requirements(is_uri(run)),  # inferring them starts pip and takes seconds
            metadata={
                "nfscale.fingerprint": table.plan.fingerprint,
                "nfscale.modality": table.plan.job["signal"]["kind"],
            },
        )
        with contextlib.suppress(MlflowException):  # it exists: this is another version of it
            client.create_registered_model(name)
        client.create_model_version(name, logged.model_uri, run_id, model_id=logged.model_id, await_creation_for=0)


def _shipped_code(target: Path) -> Path:
    """The parts of this package that a reader imports, below `target`."""
    package = Path(nfscale.__file__).parent
    copy = target / "nfscale"
    copy.mkdir()
    for name in _SHIPPED:
        source = package / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    return copy


def _example(table: WeightsTable) -> tuple[Any, int | None]:
    """An input of one datum, and how many dimensions its array has; None where no datum can be decoded."""
    import pandas as pd

    for commit in table.commits:
        rows = pq.read_table(table.file_of(commit), columns=["datum_id", "status"])
        if ids := rows.filter(STATUS.isin(OK_STATUSES))["datum_id"].to_pylist()[:1]:
            return pd.DataFrame({"datum_id": ids}), as_array(table.decode(ids)[0]).ndim
    return None, None


def _signature(dimensions: int | None) -> Any:
    """A column of ids and, where wanted, one of shapes in; an array for each row out."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    inputs: list[Any] = [ColSpec("string", "datum_id"), ColSpec("string", "shape", required=False)]
    if dimensions is None:
        return ModelSignature(Schema(inputs))
    output: Any = DataType.float
    for _ in range(dimensions):
        output = Array(output)
    return ModelSignature(Schema(inputs), Schema([ColSpec(output)]))


def _requirements(in_object_store: bool) -> list[str]:
    """What the model was made with, as pip takes it."""
    needs = [*_NEEDS, "obstore"] if in_object_store else _NEEDS
    return [f"{package}=={importlib.metadata.version(package).partition('+')[0]}" for package in needs]


@contextlib.contextmanager
def _active(uri: str, run_id: str) -> Iterator[None]:
    """MLflow's own functions look for a store that is set for the whole process, and put a model into the experiment
    of the run that is active: set both, and set them back. Who calls this sets the run's status afterwards."""
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        with mlflow.start_run(run_id=run_id):
            yield
    finally:
        mlflow.set_tracking_uri(before or None)  # type: ignore[arg-type] (None unsets it)
