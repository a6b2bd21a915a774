"""The command `nfscale`: each command in a file of its own, errors as one line and an exit code."""

import sys

_TOO_LITTLE_MEMORY = ("annot allocate memory", "failed to map segment", "can't start new thread", "bad_alloc")


def main() -> None:
    """Run the command line; where memory does not even suffice to load it, say so."""
    try:
        from nfscale.cli.app import main as run

        run()
    except (MemoryError, ImportError, OSError, RuntimeError, SystemError) as error:
        if not isinstance(error, MemoryError) and not any(said in str(error) for said in _TOO_LITTLE_MEMORY):
            raise
        print(
            "error: the memory that this process may take is too small (see `ulimit -v`, or the container's limit); "
            "what is committed stays, and the same command continues where there is more",
            file=sys.stderr,
        )
        sys.exit(1)


__all__ = ["main"]
