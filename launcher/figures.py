"""Figures of the data, one column wide, as PNG bytes; their look: ``launcher.figure_style``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from launcher.figure_style import (
    BLUE,
    DARK,
    DASHES,
    GREY,
    HEIGHT_IN,
    VERMILION,
    new_figure,
    paper_style,
    to_png,
)

_MAX_NAMES = 40
_ROW_IN = 0.15
# Beyond this, the line at 1 is no longer near the right edge.
_FAR = 1.3


def draw_gene_means(mean_G: npt.NDArray[np.float64], label: str) -> bytes:
    """Draw the distribution of gene means on a logarithmic axis.

    Parameters
    ----------
    mean_G
        [G] mean of each gene. Genes with a mean of 0 have no place on the axis and are counted
        in words; the median is that of the others.
    label
        What the means are, such as ``mean count of a gene per cell``.
    """
    shown = mean_G[mean_G > 0]
    with paper_style():
        figure = new_figure(HEIGHT_IN)
        axes = figure.add_subplot()
        if shown.size:
            axes.hist(shown, bins=_log_bins(shown), color=BLUE, edgecolor="white", linewidth=0.3)
            middle = float(np.median(shown))
            axes.axvline(middle, color=VERMILION, linewidth=1)
            axes.annotate(
                f"median {middle:.2g}",
                (middle, 1),
                xycoords=axes.get_xaxis_transform(),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color=VERMILION,
            )
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(numticks=8))
            axes.xaxis.set_major_formatter(FuncFormatter(_plain_number))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel=label, ylabel="number of genes")
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(_plain_number))
        hidden = mean_G.size - shown.size
        note = f", {hidden:,} of them never expressed" if hidden else ""
        # Above the median's label, wherever that lies.
        axes.set_title(f"{mean_G.size:,} genes{note}", loc="left", color=DARK, pad=13)
        return to_png(figure)


def draw_deltas(delta_PG: npt.NDArray[np.float64], on_target: npt.NDArray[np.float64]) -> bytes:
    """Draw the distribution of all deltas, with counts on a logarithmic axis.

    Parameters
    ----------
    delta_PG
        [P, G] change of each gene's mean log1p expression under each perturbation.
    on_target
        Those of the perturbed genes themselves: each a mark in a strip below.
    """
    with paper_style():
        figure = new_figure(HEIGHT_IN)
        if on_target.size:
            axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=[9, 1])
            axes.tick_params(axis="x", which="both", bottom=False)
            axes.spines["bottom"].set_visible(False)
            strip.scatter(
                on_target,
                np.zeros(on_target.size),
                marker="|",
                s=60,
                linewidth=0.8,
                color=VERMILION,
                label=f"perturbed gene itself ({on_target.size:,})",
            )
            strip.set(yticks=[], ylim=(-1, 1))
            strip.spines["left"].set_visible(False)
        else:
            axes = strip = figure.add_subplot()
        axes.hist(delta_PG.ravel(), bins=_linear_bins(delta_PG), color=BLUE, log=True)
        for panel in {axes, strip}:
            panel.axvline(0, color="black", linewidth=0.6, linestyle=DASHES, zorder=0.5)
        axes.set(ylabel="gene-perturbation pairs", ylim=(0.5, None))
        axes.yaxis.set_major_locator(LogLocator(numticks=8))
        axes.yaxis.set_major_formatter(FuncFormatter(_plain_number))
        axes.yaxis.set_minor_formatter(NullFormatter())
        strip.set_xlabel("mean log1p expression, perturbed \N{MINUS SIGN} control")
        num_perts, num_genes = delta_PG.shape
        plural = "" if num_perts == 1 else "s"
        axes.set_title(
            f"{num_perts:,} perturbation{plural}, {num_genes:,} genes", loc="left", color=DARK
        )
        if on_target.size:
            # The peak is at 0: the longer side has the room.
            side = "left" if -delta_PG.min() > delta_PG.max() else "right"
            axes.legend(*strip.get_legend_handles_labels(), loc=f"upper {side}", handlelength=0.8)
        return to_png(figure)


def draw_knockdown(table: pd.DataFrame, residual_pert: float) -> bytes:
    """Draw what is left of each measured target, strongest knock-down on top.

    Parameters
    ----------
    table
        ``data_store.knockdown.Knockdown.table``.
    residual_pert
        Threshold of the filter's first stage, drawn as a line.
    """
    shown = table.dropna(subset="residual").sort_values("residual", ascending=False)
    has_names = len(shown) <= _MAX_NAMES
    height_in = max(HEIGHT_IN, 1.0 + _ROW_IN * len(shown)) if has_names else HEIGHT_IN * 1.4
    places = np.arange(len(shown))
    with paper_style():
        figure = new_figure(height_in)
        axes = figure.add_subplot()
        for is_kept, colour, label in ((True, BLUE, "kept"), (False, GREY, "not kept")):
            chosen = (shown["is_kept"] == is_kept).to_numpy()
            if chosen.any():
                x = shown["residual"].to_numpy()[chosen]
                axes.scatter(x, places[chosen], s=14 if has_names else 5, color=colour, label=label)
        line = f"threshold {residual_pert:g}"
        axes.axvline(residual_pert, color=VERMILION, linewidth=1, label=line, zorder=0.6)
        axes.axvline(1, color="black", linewidth=0.6, linestyle=DASHES, zorder=0.5)
        end = 1.05 * max(1.0, float(shown["residual"].max()))
        axes.set_xlim(0, end)
        axes.set_xlabel("expression left of the perturbed gene (control = 1)")
        if has_names:
            axes.set_yticks(places, list(shown["perturbation"]))
        else:
            axes.set(ylabel="perturbations, strongest knock-down on top", yticks=[])
        axes.set_ylim(-0.7, len(shown) - 0.3)
        axes.set_title(f"{len(shown):,} measured targets", loc="left", color=DARK)
        # Left of the line at 1, which would run through it.
        right = 0.98 / end if end < _FAR else 1.0
        axes.legend(loc="upper right", bbox_to_anchor=(right, 1.0), handlelength=1.2)
        return to_png(figure)


def _linear_bins(values: npt.NDArray[np.float64]) -> list[float]:
    """Cut the range into about 80 equal bins, one of them centred on 0."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    width = max(high - low, 0.01) / 80
    edges = np.arange(np.floor(low / width), np.ceil(high / width) + 2) - 0.5
    return list(edges * width)


def _log_bins(values: npt.NDArray[np.float64]) -> list[float]:
    """Cut the range into bins of equal width in log10, more of them for more genes."""
    low, high = np.log10(values.min()), np.log10(values.max())
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    num_bins = int(np.clip(2 * np.sqrt(values.size), 10, 60))
    bins = np.logspace(low, high, num_bins + 1)
    # Rounding must not leave out the ends.
    bins[0], bins[-1] = min(bins[0], values.min()), max(bins[-1], values.max())
    return list(bins)


def _plain_number(value: float, position: int | None = None) -> str:
    """Write powers of ten as people do: 0.01, 1, 1,000; far out that, as 10 to a power."""
    del position
    if value == 0 or 1e-4 <= value < 1e5:
        return f"{value:,.10g}"
    return f"$10^{{{np.log10(value):.0f}}}$" if value > 0 else ""
