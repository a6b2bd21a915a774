"""What tests of pages hand to a medium."""


def no_other_shape(shape: str) -> None:
    """A `Decode` for media that show a datum at its own shape alone."""
    raise AssertionError(f"asked for the shape {shape}")
