"""The measurements behind `field.weight_scale=auto`: quality between the samples over the weight scale.

    python -m pipelines.weight_scale_rule            # two minutes on two cores

Whole photographs with every second pixel held back, over resolution, width and depth. Each cell of the table is the
median of what was held back, of what was fitted (PSNR in dB), and of the steps to 30 dB.
"""

import argparse

import nfscale
from nfscale.signals import samples_per_axis
from pipelines.weight_scaling import median, photographs, written

SCALES = (1.0, 1.1, 1.25, 1.5, 2.0)
GEOMETRIES = ((32, 4), (64, 2), (64, 4), (128, 4))
STEPS, SAMPLES = 400, 512


def sweep(count: int, sides: tuple[int, ...]) -> None:
    """Print a row of the table for each resolution and geometry."""
    print(
        "| samples per axis | width | depth | "
        + " | ".join(f"{scale:g}" for scale in SCALES)
        + " | auto: interpolate, fit |"
    )
    print("|---" * (len(SCALES) + 4) + "|")
    for side in sides:
        task = photographs(count, side, holdout=2)
        axis = samples_per_axis(task.signal, task.data[0][1])
        for width, depth in GEOMETRIES:
            cells = []
            for scale in SCALES:
                field = nfscale.MLP(2, 1, width=width, depth=depth, weight_scale=scale)
                adam = nfscale.Adam(0.064 / width, nfscale.Schedule("cosine", STEPS))
                stop = nfscale.Stop(STEPS, check_every=20)
                fitted = list(
                    nfscale.fit(field, task.signal, task.data, optimizer=adam, stop=stop, seed=0, samples=SAMPLES)
                )
                held = median(one.quality_heldout for one in fitted if one.quality_heldout is not None)
                reached = median(
                    next(
                        (s for s, q in zip(one.history_step, one.history_quality, strict=True) if q >= 30), float("inf")
                    )
                    for one in fitted
                )
                cells.append(f"{held:.1f}, {median(one.quality for one in fitted):.0f}, {written(reached, '.0f')}")
            rule = [nfscale.MLP.auto_weight_scale(axis, 30.0, depth, objective) for objective in ("interpolate", "fit")]
            chosen = ", ".join(f"{scale:.2f}" for scale in rule)
            print(f"| {axis:.0f} | {width} | {depth} | " + " | ".join(cells) + f" | {chosen} |", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--photographs", type=int, default=6)
    sweep(parser.parse_args().photographs, (48, 96))


if __name__ == "__main__":
    main()
