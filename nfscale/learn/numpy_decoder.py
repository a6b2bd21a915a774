"""A decoder of images that imports nothing of nfscale: all that a stranger with numpy and pyarrow needs.

It keeps the format honest: layout, dtype, forward, theta0 and output affine are all in the folder. It knows MLPs
without an encoding, of every activation with one real map; images; local folders.

    python numpy_decoder.py runs/digits digit-0017 17.npy
"""

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

ACTIVATIONS: dict[str, Callable[[np.ndarray, float, dict], np.ndarray]] = {
    "sine": lambda z, omega, keys: np.sin(omega * z),
    "finer": lambda z, omega, keys: np.sin(omega * (np.abs(z) + 1) * z),
    "gaussian": lambda z, omega, keys: np.exp(-((keys["spread"] * z) ** 2)),
    "sinc": lambda z, omega, keys: np.sinc(keys["frequency"] * z),
    "relu": lambda z, omega, keys: np.maximum(z, 0),
}


def read_weights(run: Path, wanted: list[str]) -> tuple[dict[str, np.ndarray], list[dict]]:
    """The committed rows of these ids, as the layout has them: {name: [F, ...]}, and the metrics of each datum."""
    job = json.loads((run / "job.json").read_text())
    found: dict[str, tuple[np.ndarray, dict]] = {}
    for commit in sorted((run / "commits").glob("*.json")):
        table = pq.read_table(run / json.loads(commit.read_text())["file"], columns=["datum_id", "weights", "metrics"])
        about = table.schema.field("weights").metadata
        for place, name in enumerate(table["datum_id"].to_pylist()):
            if name in wanted:
                row = np.array(table["weights"][place].values, dtype=np.float64)
                if about[b"nfscale.dtype"] == b"delta_float16":
                    row += np.frombuffer(base64.b64decode(job["theta0"]["data"]), dtype="<f4")
                found[name] = row, dict(table["metrics"][place].as_py())
    missing = [name for name in wanted if name not in found]
    if missing:
        raise SystemExit(f"no committed row for {missing}")
    rows = np.stack([found[name][0] for name in wanted])
    params = {}
    for entry in job["layout"]:
        size = int(np.prod(entry["shape"]))
        params[entry["name"]] = rows[:, entry["offset"] :][:, :size].reshape(len(rows), *entry["shape"])
    return params, [found[name][1] for name in wanted]


def values_at(run: Path, params: dict[str, np.ndarray], coordinates: np.ndarray) -> np.ndarray:
    """What fields say at coordinates, in the data's unit: [N, D] -> [F, N, C]."""
    forward = json.loads((run / "job.json").read_text())["forward"]
    keys, output = forward["field"]["keys"], forward["signal"]["output"]
    if forward["field"]["kind"] != "mlp" or keys["encoding"] != "none" or keys["activation"] not in ACTIVATIONS:
        raise SystemExit(f"not known here: {forward['field']}")
    first = keys["omega_0"] * (keys["weight_scale"] if keys["initialization"] == "frequency_tuning" else 1)
    hidden = np.broadcast_to(coordinates, (len(params["layers.0.bias"]), *coordinates.shape))
    for layer in range(keys["depth"] + 1):
        weight, bias = params[f"layers.{layer}.weight"], params[f"layers.{layer}.bias"]
        hidden = hidden @ weight.transpose(0, 2, 1) + bias[:, None, :]
        if layer < keys["depth"]:
            omega = keys["omega_hidden"] if layer else first
            hidden = ACTIVATIONS[keys["activation"]](hidden, omega, keys)
    return output["scale"] * hidden + output["shift"]


def decode(run: Path, wanted: list[str]) -> list[np.ndarray]:
    """Images [H, W, C] in [0, 1], each at the size of its fit."""
    params, metrics = read_weights(run, wanted)
    images = []
    for place, measured in enumerate(metrics):
        height, width = int(measured["height"]), int(measured["width"])
        axes = [(2 * np.arange(count) + 1) / count - 1 for count in (height, width)]
        centres = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
        own = {name: tensor[place : place + 1] for name, tensor in params.items()}
        images.append(np.clip(values_at(run, own, centres)[0].reshape(height, width, -1), 0, 1))
    return images


if __name__ == "__main__":
    folder, datum, out = sys.argv[1:]
    np.save(out, decode(Path(folder), [datum])[0])
