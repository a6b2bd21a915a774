"""The card of an exported table, written from the run's own facts."""

from typing import Any

import numpy as np
import yaml

from nfscale.store.schema import quality_text
from nfscale.store.table import WeightsTable

_HOW = {
    "hf": 'from datasets import load_dataset\n\nrows = load_dataset("PLACE")',
    "lance": 'import lance\n\nrows = lance.dataset("PLACE/weights.lance").to_table()',
    "npz": 'import numpy as np\n\nrows = np.load("PLACE/weights.npz", allow_pickle=False)',
    "safetensors": 'from safetensors.numpy import load_file\n\nfields = load_file("PLACE/weights-00000.safetensors")',
    "pth": 'import torch\n\nfield = torch.load("PLACE/fields/0000000.pth", weights_only=True)',
}


def card(table: WeightsTable, to: str, dtype: str = "float32") -> str:
    """Markdown with the front matter that Hugging Face reads."""
    plan, forward = table.plan, table.plan.forward
    read = table.to_arrow(["quality", "status", "split", "label", "steps"])
    quality = read["quality"].drop_null().to_numpy()
    statuses, splits = (_counts(read[name].to_pylist()) for name in ("status", "split"))
    labels = {label for label in read["label"].to_pylist() if label is not None}
    name = plan.quality_name
    front: dict[str, Any] = {
        "pretty_name": f"Neural fields of {plan.job['name']}",
        "tags": ["neural-fields", "implicit-neural-representations", "weight-space", plan.job["signal"]["kind"]],
        "size_categories": [_size(len(read))],
    }
    if to == "hf":
        known = list(splits) if set(splits) != {"none"} else ["train"]
        files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in known if split != "none"]
        front["configs"] = [{"config_name": "default", "data_files": files}]
    middle, low, high = np.percentile(quality, [50, 5, 95]) if len(quality) else (np.nan,) * 3
    keys = ", ".join(f"{key}: {value}" for key, value in forward["field"]["keys"].items() if value is not None)
    layout = "\n".join(f"| `{e.name}` | {list(e.shape)} | {e.offset} |" for e in table.layout.entries)
    coarse = "" if dtype == "float32" else (
        f"\nWeights are stored as `differences` from theta0 in {dtype}"
        + (", to be multiplied by `scales` (one for each field and tensor of the layout)" if dtype == "int8" else "")
        + ".\n"
    )  # fmt: skip
    start = "each from a draw of its own" if table.theta0 is None else "all share one theta0, which is in `job.json`"
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---
# Neural fields of {plan.job["name"]}

{len(read):,} data, each as the {table.layout.size:,} weights of one small network from coordinates to values, encoded
with nfscale {plan.versions.get("nfscale", "")}. The licence is that of the data the fields were fitted to; this card
knows none.

- data: {_section(plan.job["dataset"])}; labels: {len(labels) or "none"}; splits: {_text(splits)}
- quality: {name} {quality_text(name, float(middle))} in the median, {quality_text(name, float(low))} to \
{quality_text(name, float(high))} from the 5th to the 95th percentile
- rows: {_text(statuses)}
- start: {start}
{coarse}
## Reading

```python
{_HOW[to].replace("PLACE", "path/to/this/folder")}
```

## Decoding

Field ({forward["field"]["kind"]}): {keys}

{forward["field"].get("formula", "see job.json")}

Coordinates: {forward["signal"].get("coordinates", "see job.json")}. Output: {_output(forward["signal"])}.

A row of weights is these tensors, end to end, each in C order:

| tensor | shape | offset |
|---|---|---|
{layout}

## How they were fitted

Optimiser: {_section(plan.job["optimizer"])}

Fit: {_section(plan.job["fit"])}

`job.json` holds all of this for machines, and fits the same fields again: what comes out depends on nothing else.
"""


def _output(signal: dict[str, Any]) -> str:
    output = signal.get("output", "see job.json")
    return str(output.get("meaning", output)) if isinstance(output, dict) else str(output)


def _section(section: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in section.items() if value is not None)


def _counts(values: list[str | None]) -> dict[str, int]:
    found: dict[str, int] = {}
    for value in values:
        found[value or "none"] = found.get(value or "none", 0) + 1
    return found


def _text(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _size(rows: int) -> str:
    """As Hugging Face names sizes."""
    edges = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
    return next((name for edge, name in edges if rows < edge), "n>10M")
