"""How much an encode is slowed by MLflow: a server that is up, down from the start, or killed in the middle.

    python -m tests.chaos.tracking --repeats 5 --json tracking.json

The same job is encoded with tracking off and in each of these cases, in turns, on one worker of Ray. `encoding` is the
time from the first lease to the last commit, `whole` that of the command; ratios are of the medians, to tracking off.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.machines import TrackingServer

CASES = ("off", "up", "down", "killed")
_MIDDLE = 3  # commits after which the server is killed


def encode(case: str, job: Path, output: Path, server: TrackingServer, overrides: list[str]) -> dict[str, float]:
    """Seconds of one encode."""
    if case == "down":
        server.kill()
    figures = output.with_suffix(".json")
    command = [
        sys.executable,
        "-m",
        "nfscale",
        "encode",
        str(job),
        *overrides,
        f"output={output}",
        "--json",
        str(figures),
    ]
    command += ["track.enabled=false"] if case == "off" else []
    environment = os.environ | {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    with open(output.with_suffix(".log"), "w") as log:
        running = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while case == "killed" and running.poll() is None and len(list((output / "commits").glob("*.json"))) < _MIDDLE:
            time.sleep(0.02)
        if case == "killed":
            server.kill()
        code = running.wait()
    if case in ("down", "killed"):
        server.start()
        server.wait()
    if code:
        raise SystemExit(f"the encode ended with {code}: {output.with_suffix('.log').read_text()[-500:]}")
    found = json.loads(figures.read_text())
    return {"encoding": found["seconds"], "whole": found["wall_seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("job", type=Path, nargs="?", default=Path("pipelines/digits.yaml"))
    parser.add_argument("overrides", nargs="*", help="default: a minute of work")
    options = parser.parse_args()
    longer = ["fit.target=null", "fit.max_steps=1500", "store.shard_fields=100", "workers=1"]
    overrides = options.overrides or longer
    seconds: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        server = TrackingServer(Path(folder) / "mlflow")
        try:
            server.wait()
            for turn in range(options.repeats):
                for case in CASES:
                    output = Path(folder) / f"{case}-{turn}"
                    seconds[case].append(encode(case, options.job, output, server, overrides))
                    print(
                        f"{turn} {case:7}" + "".join(f" {k} {v:.1f} s" for k, v in seconds[case][-1].items()),
                        flush=True,
                    )
        finally:
            server.kill()
    medians = {
        case: {of: statistics.median(one[of] for one in found) for of in found[0]} for case, found in seconds.items()
    }
    ratios = {
        case: {of: found[of] / medians["off"][of] for of in found} for case, found in medians.items() if case != "off"
    }
    for case, ratio in ratios.items():
        print(f"{case:7} encoding x {ratio['encoding']:.3f}, whole x {ratio['whole']:.3f}")
    if options.json:
        options.json.write_text(json.dumps({"seconds": seconds, "medians": medians, "ratios": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main()
