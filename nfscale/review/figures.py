"""Plots of single fields, for `nfscale diagnose`: SVG in an ink that is legible on light and dark."""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nfscale.review.drawing import BLUE, INK, ORANGE, inked, new, svg


def activations(values: dict[str, list[np.ndarray]]) -> str:
    """Histograms of the activations of each layer, a row of plots for each field, with the arcsine law."""
    depth = max(len(layers) for layers in values.values())
    figure = Figure(figsize=(2.2 * depth, 1.9 * len(values)), layout="constrained")
    grid = figure.subplots(len(values), depth, squeeze=False)
    inside = np.linspace(-0.999, 0.999, 400)
    for row, (name, layers) in zip(grid, values.items(), strict=True):
        for index, axes in enumerate(row):
            axes.tick_params(colors=INK, labelsize=7)
            if index >= len(layers):
                axes.axis("off")
                continue
            axes.hist(layers[index], bins=60, density=True, color=BLUE, alpha=0.85)
            if np.abs(layers[index]).max() <= 1:
                axes.plot(inside, 1 / (np.pi * np.sqrt(1 - inside**2)), color=ORANGE, linewidth=1)
                axes.set_ylim(0, 3)
            axes.set_title(f"{name}: layer {index}" if index == 0 else f"layer {index}", fontsize=8, color=INK)
    return svg(figure)


def spectra(curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """Power over frequency of fields and data."""
    shown = {name: (frequencies[1:], power[1:]) for name, (frequencies, power) in curves.items()}
    return _both_logarithmic(shown, "frequency [cycles per unit of the coordinates]", "share of the power")


def eigenvalues(curves: dict[str, np.ndarray]) -> str:
    """Spectra of kernels: eigenvalues from the largest on."""
    shown = {name: (np.arange(len(v)) + 1.0, np.maximum(v, v[0] * 1e-12)) for name, v in curves.items()}
    return _both_logarithmic(shown, "rank", "eigenvalue of the tangent kernel, over its size")


def qualities(curves: dict[str, tuple[list[int], list[float]]], unit: str) -> str:
    """Quality over steps of several fits."""
    figure, axes = new(6.2, 3.4)
    for index, (name, (steps, quality)) in enumerate(curves.items()):
        axes.plot(steps, quality, label=name, color=f"C{index}", linewidth=1.5)
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel(f"quality [{unit}]")
    axes.legend(frameon=False, labelcolor=INK, fontsize=8, loc="lower right")
    return svg(figure)


@dataclass(frozen=True)
class HessianPlot:
    """What is drawn of the Hessian of one field; what is empty is left out."""

    name: str
    conditions: dict[str, list[tuple[int, float]]]
    """By preconditioner: (steps, condition over the 10 % quantile as a multiple of that without one)."""
    spectra: dict[str, np.ndarray]
    """By preconditioner: absolute eigenvalues after the last step, from the largest on, over that."""
    small_shares: dict[str, list[float]]
    """By moment: of Hv, layer by layer."""
    clouds: dict[str, tuple[np.ndarray, np.ndarray]]
    """By moment: diag(J^T J) and Adam's v, weight by weight."""


def hessians(plots: list[HessianPlot]) -> str:
    """Condition numbers, spectra, the sparsity of Hv and Adam's second moment, a row of plots for each field."""
    drawn = [
        draw
        for draw, part in (
            (_conditions, "conditions"),
            (_absolute_spectra, "spectra"),
            (_small_shares, "small_shares"),
            (_clouds, "clouds"),
        )
        if any(getattr(plot, part) for plot in plots)
    ]
    figure = Figure(figsize=(4.0 * len(drawn), 3.2 * len(plots)), layout="constrained")
    grid = figure.subplots(len(plots), len(drawn), squeeze=False)
    for row, plot in zip(grid, plots, strict=True):
        for axes, draw in zip(row, drawn, strict=True):
            draw(axes, plot)
            inked(axes)
            axes.tick_params(labelsize=8)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, labelcolor=INK, fontsize=7, markerscale=2)
        row[0].set_title(plot.name, fontsize=9, color=INK, loc="left")
    return svg(figure)


def _conditions(axes: Axes, plot: HessianPlot) -> None:
    for index, (name, points) in enumerate(plot.conditions.items()):
        color = f"C{index + 1}"  # C0 is that of none, here the line at 1
        axes.plot(*zip(*points, strict=True), label=name, color=color, marker="o", markersize=3, linewidth=1.2)
    axes.axhline(1, color="C0", linewidth=1)
    axes.set_yscale("log")
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel("condition_10, times that of none")


def _absolute_spectra(axes: Axes, plot: HessianPlot) -> None:
    for index, (name, shares) in enumerate(plot.spectra.items()):
        axes.plot(np.linspace(0, 100, len(shares)), shares, label=name, color=f"C{index}", linewidth=1.2)
    axes.set_yscale("log")
    axes.set_xlabel("rank [%], after the last step")
    axes.set_ylabel("absolute eigenvalue, over the largest")


def _small_shares(axes: Axes, plot: HessianPlot) -> None:
    for index, (name, shares) in enumerate(plot.small_shares.items()):
        axes.plot(range(len(shares)), shares, label=name, color=f"C{index}", marker="o", markersize=3, linewidth=1.2)
    axes.set_xticks(range(max(len(shares) for shares in plot.small_shares.values())))
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("layer")
    axes.set_ylabel("share of Hv up to 1e-3 of the largest")


def _clouds(axes: Axes, plot: HessianPlot) -> None:
    for index, (name, (gauss_newton, second)) in enumerate(plot.clouds.items()):
        both = (gauss_newton > 0) & (second > 0)
        axes.plot(gauss_newton[both], second[both], ".", label=name, color=f"C{index}", markersize=2, alpha=0.6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("diag(J^T J)")
    axes.set_ylabel("second moment v of Adam")


def _both_logarithmic(curves: dict[str, tuple[np.ndarray, np.ndarray]], x: str, y: str) -> str:
    figure, axes = new(6.2, 3.4)
    for index, (name, (places, values)) in enumerate(curves.items()):
        axes.plot(places, values, label=name, color=f"C{index}", linewidth=1.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    return svg(figure)
