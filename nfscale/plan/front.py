"""Quality against cost of the settings that were tried, as a picture."""

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nfscale.plan.tune import Tuned


def front_picture(tuned: Tuned) -> bytes:
    """PNG: every setting that was tried, those that no other beats, the job's own and what was chosen."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    usable = {choices: one for choices, one in tuned.trials.items() if not one.why_not}
    for data, shade in zip(sorted({one.data for one in usable.values()}), ("0.8", "0.6", "0.35", "0.1"), strict=False):
        some = [one for one in usable.values() if one.data == data]
        label = f"tried on {data} data"
        axes.scatter([1e3 * one.seconds for one in some], [one.quality for one in some], 16, color=shade, label=label)
    front = [usable[choices] for choices in tuned.front]
    axes.plot([1e3 * one.seconds for one in front], [one.quality for one in front], color="tab:blue", label="front")
    for choices, mark, label in (((), "s", "the job's own"), (tuned.choices, "*", "chosen")):
        one = usable.get(choices)
        if one is not None:
            axes.scatter([1e3 * one.seconds], [one.quality], 90, marker=mark, color="tab:red", label=label, zorder=3)
    axes.axhline(tuned.goal, color="0.5", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", xlabel="cost [ms of the device per datum]", ylabel=f"median {tuned.own.quality_name}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return stream.getvalue()
