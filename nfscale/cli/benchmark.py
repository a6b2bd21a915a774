"""`nfscale benchmark`: side by side with what a user would write instead."""

import typer


def benchmark(context: typer.Context) -> None:
    """Measure nfscale beside what a user would write instead; `nfscale benchmark --help` lists what is measured.

    Example: `nfscale benchmark store runs/photos --json store.json`
    """
    from nfscale.benchmark.app import main

    main(context.args, prog="nfscale benchmark")
