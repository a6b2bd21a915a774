"""An MLflow model that decodes: ids and a shape in, arrays out. MLflow loads this file as the model's code.

It needs mlflow, torch, numpy and pyarrow; the parts of nfscale that read and decode a table travel with the model.
The weights do not: they are in the run folder that the model's configuration names, and where that has moved, the
model is loaded with `mlflow.pyfunc.load_model(uri, model_config={"run": "where/it/is/now"})`.
"""

from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from nfscale.store import WeightsTable, open_weights
from nfscale.store.table import as_array


class Decoder(PythonModel):
    """Decodes data of any modality.

    The input has a column `datum_id`, an id or an index as text, and optionally `shape`, as `nfscale decode --shape`
    takes it: `256x256` of an image; the shape of its fit where there is none. The output is a list of float32 arrays,
    one per row: [H, W, C] of an image, [N, C] of a sound, [T, H, W, C] of a film, levels [X, Y, Z] of a solid.
    """

    def load_context(self, context: PythonModelContext) -> None:
        self.table: WeightsTable = open_weights(context.model_config["run"])  # type: ignore[index]

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[np.ndarray]:
        keys = [self.table.key_of(str(datum)) for datum in model_input["datum_id"]]
        shapes = [_text(shape) for shape in model_input["shape"]] if "shape" in model_input else [None] * len(keys)
        decoded: list[np.ndarray] = [np.empty(0)] * len(keys)
        for shape in dict.fromkeys(shapes):
            places = [place for place, own in enumerate(shapes) if own == shape]
            contents = self.table.decode([keys[place] for place in places], shape)
            for place, content in zip(places, contents, strict=True):
                decoded[place] = as_array(content)
        return decoded


def _text(shape: Any) -> str | None:
    return shape if isinstance(shape, str) and shape else None


set_model(Decoder())
