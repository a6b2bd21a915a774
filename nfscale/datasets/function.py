"""Data that the user's own code makes: the one kind whose job file names something to import.

Danger: importing a module runs it. That happens for this kind alone, where the user wrote `module:name`.
"""

import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nfscale.datasets.base import ComputedIds, Dataset, Datum, Label, refuse_duplicates, require, row_id
from nfscale.errors import CallerError

_PROBED_DATA = 100  # data asked for a first label, as many as the plan of a run looks at


@dataclass(frozen=True)
class Function:
    """What `module:name` returns when it is called with the arguments, in every process that reads data.

    That is an object with `__len__` and `__getitem__`; an item is an array, or a mapping with `array` and
    optionally `id`, `label`, `split`. Ids are its attribute `ids` if it has one. Where items have an `id` and there
    is no such attribute, every process reads all items once to know them; where neither is, data are `row-0000017`.
    """

    target: str
    arguments: dict[str, Any] | None = None
    """Keyword arguments."""

    def open(self) -> "FunctionDataset":
        made = _call(_resolve(self.target), self.target, self.arguments or {})
        for method in ("__len__", "__getitem__"):
            require(
                hasattr(type(made), method),
                f"dataset.target: {self.target} returned a {type(made).__name__} without {method}; expected an object "
                "with __len__ and __getitem__, such as a list of arrays",
            )
        try:
            count = len(made)
        except Exception as error:
            raise CallerError(f"dataset.target: len() of what {self.target} returned: {_told(error)}") from error
        return FunctionDataset(made, count, self.target)


class FunctionDataset(Dataset):
    """Items of the user's object; what asking for one raises is the datum's error."""

    is_thread_bound = True  # the user's object may be bound to its thread, as connections of SQLite are

    def __init__(self, made: Any, count: int, target: str) -> None:
        self._made, self._count, self._target = made, count, target
        refuse_duplicates(self.ids, f"dataset.target, ids of {target}")

    @cached_property
    def ids(self) -> Sequence[str]:
        given = getattr(self._made, "ids", None)
        if given is None:
            given = self._ids_of_items()
        if isinstance(given, ComputedIds):
            return given
        ids = [str(one) for one in given] if isinstance(given, Iterable) and not isinstance(given, str) else None
        require(
            ids is not None and len(ids) == self._count,
            f"dataset.target: `ids` of {self._target} is {_described(given)}; expected {self._count} ids, one per item",
        )
        return ids or []

    def _ids_of_items(self) -> Sequence[str]:
        numbered = ComputedIds(self._count, row_id)
        first = self._item(0) if self._count else None
        if not isinstance(first, Mapping) or "id" not in first:
            return numbered
        items = (self._item(position) for position in range(self._count))
        return [
            str(item["id"]) if isinstance(item, Mapping) and "id" in item else row_id(position)
            for position, item in enumerate(items)
        ]

    def _item(self, position: int) -> Any:
        """An item, or the exception that asking for it raised."""
        try:
            return self._made[position]
        except Exception as error:
            return error

    @cached_property
    def _label_kind(self) -> type:
        """Of the first label; a run stores labels of one kind."""
        data = (self._read(position) for position in range(min(_PROBED_DATA, self._count)))
        return next((type(datum.label) for datum in data if datum.label is not None), str)

    def read(self, position: int) -> Datum:
        datum = self._read(position)
        if datum.label is None or isinstance(datum.label, self._label_kind):
            return datum
        wrong = f"the label {datum.label!r} is no {self._label_kind.__name__}, as the first label is"
        return Datum(datum.id, position, None, None, datum.split, datum.error or wrong)

    def _read(self, position: int) -> Datum:
        datum_id, item = self.ids[position], self._item(position)
        if isinstance(item, Exception):
            return Datum(datum_id, position, None, error=_told(item))
        label, split = None, None
        try:
            if isinstance(item, Mapping):
                label, split = _label(item.get("label")), item.get("split")
                split = None if split is None else str(split)
                item = item.get("array")
            return Datum(datum_id, position, _array(item), label, split)
        except Exception as error:  # conversions run the user's code too
            return Datum(datum_id, position, None, label, split, str(error) or _told(error))


def _resolve(target: str) -> Any:
    """What `module:name` names.

    Raises:
        CallerError: if it cannot be imported.
    """
    module_name, colon, name = target.partition(":")
    require(
        bool(colon and module_name and name) and all(part.isidentifier() for part in module_name.split(".")),
        f"dataset.target is module:name, such as my_data:make, got {target!r}",
    )
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that a file of the folder hides no installed package
    importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        hint = f"; modules are looked up among the installed packages and in {folder}"
        raise CallerError(
            f"dataset.target: importing {module_name!r}: {_told(error)}"
            f"{hint if isinstance(error, ModuleNotFoundError) else ''}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            public = [one for one in vars(found) if not one.startswith("_") and callable(getattr(found, one))]
            raise CallerError(
                f"dataset.target: {module_name!r} ({getattr(found, '__file__', 'built in')}) has no {name!r}; "
                f"it has: {', '.join(sorted(public)) or 'nothing to call'}"
            )
        found = getattr(found, part)
    require(callable(found), f"dataset.target: {target} is {_described(found)}; expected a function or a class")
    return found


def _call(function: Any, target: str, arguments: dict[str, Any]) -> Any:
    try:
        return function(**arguments)
    except CallerError:
        raise
    except Exception as error:
        raise CallerError(
            f"dataset.target: calling {target} with the arguments {sorted(arguments)}: {_told(error)}"
        ) from error


def _array(value: Any) -> np.ndarray:
    if not (isinstance(value, np.ndarray) or hasattr(value, "__array__") or hasattr(value, "__array_interface__")):
        raise ValueError(f"the item is {_described(value)}; expected an array, or a mapping with `array`")
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"the item is an array of {array.dtype}; expected numbers")
    return array


def _label(value: Any) -> Label:
    if value is None or isinstance(value, str):
        return None if value is None else str(value)
    if isinstance(value, bool | int | np.integer | np.bool_):
        return int(value)
    raise ValueError(f"the label is {_described(value)}; expected an integer or a string")


def _described(value: Any) -> str:
    size = f" of length {len(value)}" if hasattr(type(value), "__len__") else ""
    return "nothing (None)" if value is None else f"a {type(value).__name__}{size}"


def _told(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].removesuffix(": ")
