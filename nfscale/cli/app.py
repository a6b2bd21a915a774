"""The commands by name, and the one place where an error becomes a line and an exit code."""

import os
import sys

import typer

from nfscale.cli.benchmark import benchmark
from nfscale.cli.classify import classify
from nfscale.cli.compare import compare
from nfscale.cli.decode import decode
from nfscale.cli.diagnose import app as diagnose
from nfscale.cli.encode import encode
from nfscale.cli.estimate import estimate
from nfscale.cli.export import export
from nfscale.cli.gc import gc
from nfscale.cli.generate import generate
from nfscale.cli.review import review
from nfscale.cli.status import status
from nfscale.cli.submit import jobs, logs, stop, submit
from nfscale.cli.tune import tune
from nfscale.cli.verify import verify
from nfscale.errors import ExitCode, NfscaleError

app = typer.Typer(
    help="Encode whole datasets as neural fields, one small network per datum.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
_OF_RUNS = (estimate, tune, encode, status, decode, verify, review, compare, gc)
_OF_CLUSTERS = (submit, jobs, logs, stop)
_OF_WEIGHTS = (classify, generate, export)
for command in (*_OF_RUNS, *_OF_CLUSTERS, *_OF_WEIGHTS):
    app.command()(command)
app.add_typer(diagnose, name="diagnose")
# Its arguments are parsed where torch and numpy are all there is.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)(
    benchmark
)


def main() -> None:
    """Run the command line."""
    try:
        app()
    except NfscaleError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(int(error.exit_code))
    except KeyboardInterrupt:
        print("interrupted; what is committed stays, and the same command continues", file=sys.stderr)
        sys.exit(int(ExitCode.INTERRUPTED))
    except BrokenPipeError:  # the reader of our output has gone, as in `nfscale status ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(int(ExitCode.FAILED))
