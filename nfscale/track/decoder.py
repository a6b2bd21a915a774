"""An MLflow model that decodes: ids or indices in, arrays out. MLflow loads this file as the model's code."""

from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from nfscale.store import WeightsTable, open_weights


class Decoder(PythonModel):
    """Decodes data of the run folder that the model's configuration names.

    The input has a column `datum_id`, and optionally `height` and `width`; the output is one array
    [H, W, C] per row, at the shape it was fitted at where none is given.
    """

    def load_context(self, context: PythonModelContext) -> None:
        self.table: WeightsTable = open_weights(context.model_config["run"])  # type: ignore[index]

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[np.ndarray]:
        return [self._decoded(row) for row in model_input.to_dict(orient="records")]

    def _decoded(self, row: dict[str, Any]) -> np.ndarray:
        sides = [row.get("height"), row.get("width")]
        shape = tuple(int(side) for side in sides if side is not None and np.isfinite(side))
        return self.table.decode([row["datum_id"]], shape if len(shape) == 2 else None)[0]


set_model(Decoder())
