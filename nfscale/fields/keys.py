"""What the keys of every field must be."""

from collections.abc import Iterable
from typing import Any


def refuse_unless_positive(field: Any, names: Iterable[str]) -> None:
    """Raise ValueError, with the name and the value, unless these keys of a field are above 0."""
    for name in names:
        if not getattr(field, name) > 0:
            raise ValueError(f"{name} is above 0, got {getattr(field, name)}")
