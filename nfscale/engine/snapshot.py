"""Fields under way, taken out of the batch at a check and put back into another one, bit for bit.

A field is its slot's record, its params now and at its best, and its optimiser's state. Its random numbers are keyed by
its seed and its step, so there is no generator to remember; the rate, and which samples the next steps draw from,
follow from the record and the params.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nfscale.engine.batch import Batch, Slot
from nfscale.optim.base import State

_STATE = "state/"


@dataclass(frozen=True)
class Snapshot:
    """F fields at a check."""

    slots: list[Slot]
    tensors: dict[str, Tensor]
    """On the CPU, [F, ...] each: `rows`, `best_rows`, and the optimiser's state by its path, such as `state/pairs`."""

    def place(self, datum_id: str) -> int | None:
        """Where a field is, if it is here."""
        return next((place for place, slot in enumerate(self.slots) if slot.id == datum_id), None)


def snapshot_of(batch: Batch) -> Snapshot:
    """The fields of a batch as they are now."""
    tensors = {"rows": batch.rows, "best_rows": batch.best_rows} | _flat(batch.state, _STATE)
    where = torch.tensor(batch.occupied, dtype=torch.int64, device=batch.rows.device)
    slots = [batch.slot(index).copied() for index in batch.occupied]
    return Snapshot(slots, {name: tensor[where].cpu() for name, tensor in tensors.items()})


def put_back(batch: Batch, index: int, snapshot: Snapshot, place: int) -> None:
    """Let the datum in a slot go on from where a snapshot has it.

    Raises:
        ValueError: if the snapshot is of another field or optimiser.
    """
    slot = snapshot.slots[place].copied()
    batch.slots[index] = slot
    batch.steps[index] = slot.step
    batch.rate[index] = slot.rate
    if batch.lengths is not None and slot.max_steps is not None:
        batch.lengths[index] = slot.max_steps
    ours = {"rows": batch.rows, "best_rows": batch.best_rows} | _flat(batch.state, _STATE)
    if ours.keys() != snapshot.tensors.keys():
        raise ValueError("the snapshot is of another optimiser: " + ", ".join(ours.keys() ^ snapshot.tensors.keys()))
    for name, tensor in ours.items():
        theirs = snapshot.tensors[name]
        if theirs.dtype != tensor.dtype or theirs.shape[1:] != tensor.shape[1:]:
            raise ValueError(
                f"the snapshot is of another field: {name} is {theirs.dtype} {list(theirs.shape[1:])} in it and "
                f"{tensor.dtype} {list(tensor.shape[1:])} here"
            )
        tensor[index] = theirs[place].to(tensor.device)


def _flat(state: State, prefix: str) -> dict[str, Tensor]:
    """Tensors of a state by their paths; they are the state's own."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        path = prefix + name
        found |= {path: value} if isinstance(value, Tensor) else _flat(value, path + "/")
    return found
