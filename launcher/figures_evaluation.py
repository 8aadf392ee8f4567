"""Figures of an evaluation: leaderboard, ranks, and effects true against predicted.

Their look: ``launcher.figure_style``. Shape legend: P perturbations, G genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

from launcher.effects import Effects
from launcher.figure_style import (
    BLUE,
    COLUMN_IN,
    DARK,
    DASHES,
    GREY,
    HEIGHT_IN,
    LIGHT,
    PAGE_IN,
    VERMILION,
    new_figure,
    paper_style,
)
from state.leaderboard import CEILING

_MAX_PANELS: Final = 6
_MAX_VOLCANOES: Final = 3
_MAX_HEAT_PERTS: Final = 40
_MAX_HEAT_GENES: Final = 40
_MINUS: Final = "\N{MINUS SIGN}"
_LEAST_FDR: Final = 1e-300
_USUAL_FDR: Final = 0.05


def draw_leaderboard(leaderboard: pd.DataFrame, model: str) -> Figure:
    """Draw Overall of each model as a bar with its interval, best on top, the ceiling apart."""
    shown = leaderboard.iloc[::-1]
    places = np.arange(len(shown), dtype=float)
    is_ceiling = (shown["model"] == CEILING).to_numpy()
    places[~is_ceiling] += 0.5 * is_ceiling.any()
    colours = [
        LIGHT if ceiling else BLUE if name == model else GREY
        for name, ceiling in zip(shown["model"], is_ceiling, strict=True)
    ]
    overall = shown["overall"].to_numpy()
    errors = np.abs(shown[["overall_low", "overall_high"]].to_numpy().T - overall)
    with paper_style():
        figure = new_figure(0.7 + 0.23 * len(shown))
        axes = figure.add_subplot()
        axes.barh(places, overall, color=colours, height=0.66)
        axes.errorbar(
            overall, places, xerr=errors, fmt="none", ecolor="black", elinewidth=0.8, capsize=2
        )
        axes.set_yticks(places, [name.replace("_", " ") for name in shown["model"]])
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(left=0)
        axes.set_xlabel("Overall (perfect = 100), 95 % interval")
        num_perts = int(leaderboard["num_perturbations"].iloc[0])
        axes.set_title(f"{num_perts} held-out perturbations", loc="left", color=DARK)
    return figure


def draw_scatter(effects: Effects) -> Figure:
    """Draw true against predicted change of each gene, for the largest true effects."""
    chosen = _largest(effects, _MAX_PANELS)
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    with paper_style():
        figure = new_figure(0.35 + 1.95 * rows, PAGE_IN * columns / 3)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.ravel()[len(chosen) :]:
            axes.set_visible(False)
        for axes, pert in zip(grid.ravel(), chosen, strict=False):
            _scatter_panel(axes, effects, pert)
        figure.supxlabel("true change of mean log1p expression", fontsize=8)
        figure.supylabel("predicted change", fontsize=8)
    return figure


def _scatter_panel(axes: Axes, effects: Effects, pert: int) -> None:
    true_G, pred_G = effects.real_delta[pert], effects.pred_delta[pert]
    is_target = effects.genes == str(effects.names[pert]).split(" (")[0]
    reach = 1.08 * max(np.abs(true_G).max(), np.abs(pred_G).max(), 1e-3)
    axes.axline((0, 0), slope=1, color="black", linewidth=0.6, linestyle=DASHES, zorder=0.5)
    axes.axhline(0, color=LIGHT, linewidth=0.5, zorder=0.4)
    axes.axvline(0, color=LIGHT, linewidth=0.5, zorder=0.4)
    style: Any = {"linewidths": 0, "rasterized": True}
    axes.scatter(true_G[~is_target], pred_G[~is_target], s=5, color=BLUE, alpha=0.6, **style)
    axes.scatter(true_G[is_target], pred_G[is_target], s=14, color=VERMILION, **style)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    locator = MaxNLocator(4, symmetric=True)
    axes.xaxis.set_major_locator(locator)
    axes.yaxis.set_major_locator(MaxNLocator(4, symmetric=True))
    varies = min(np.ptp(true_G), np.ptp(pred_G)) > 0
    shown = f"  $r$ = {np.corrcoef(true_G, pred_G)[0, 1]:.2f}" if varies else ""
    axes.set_title(f"{effects.names[pert]}{shown}", loc="left")


def draw_volcano(effects: Effects, fdr: float) -> Figure:
    """Draw fold change against significance, true beside predicted, for the largest effects.

    Colours say which genes are truly significant, on both sides.
    """
    chosen = _largest(effects, _MAX_VOLCANOES)
    with paper_style():
        figure = new_figure(0.5 + 1.9 * len(chosen), 0.72 * PAGE_IN)
        grid = figure.subplots(len(chosen), 2, squeeze=False, sharex="row")
        for row, pert in zip(grid, chosen, strict=True):
            is_true = effects.real_fdr[pert] < fdr
            sides = (
                (effects.real_log2_fold_change[pert], effects.real_fdr[pert], "true"),
                (effects.pred_log2_fold_change[pert], effects.pred_fdr[pert], "predicted"),
            )
            changes = np.concatenate([change_G for change_G, _, _ in sides])
            finite = np.abs(changes[np.isfinite(changes)])
            reach = 1.08 * max(float(finite.max(initial=0.0)), 0.1)
            for axes, (change_G, fdr_G, side) in zip(row, sides, strict=True):
                _volcano_panel(axes, change_G, fdr_G, is_true, fdr, reach)
                num = int((fdr_G < fdr).sum())
                axes.set_title(f"{effects.names[pert]}, {side}: {num} significant", loc="left")
            row[0].set_ylabel(f"{_MINUS}log$_{{10}}$ FDR")
        for axes in grid[-1]:
            axes.set_xlabel("log$_2$ fold change")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, handletextpad=0.2)
    return figure


def _volcano_panel(
    axes: Axes,
    change_G: npt.NDArray[np.float64],
    fdr_G: npt.NDArray[np.float64],
    is_true_G: npt.NDArray[np.bool_],
    fdr: float,
    reach: float,
) -> None:
    x_G = np.clip(np.nan_to_num(change_G, posinf=reach, neginf=-reach), -reach, reach)
    y_G = -np.log10(np.maximum(fdr_G, _LEAST_FDR))
    for chosen, colour, label in (
        (~is_true_G, GREY, "other genes"),
        (is_true_G, VERMILION, "truly significant"),
    ):
        axes.scatter(
            *(x_G[chosen], y_G[chosen]),
            s=7,
            color=colour,
            alpha=0.75,
            linewidths=0,
            label=label,
            rasterized=True,
            clip_on=False,
        )
    axes.axhline(-np.log10(fdr), color="black", linewidth=0.6, linestyle=DASHES, zorder=0.5)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def draw_heat_map(effects: Effects) -> Figure:
    """Draw the effects on the genes that change most, true beside predicted, similar ones near."""
    perts = _largest(effects, _MAX_HEAT_PERTS)
    strength_G = np.abs(effects.real_delta[perts]).max(axis=0)
    genes = np.argsort(-strength_G, kind="stable")[:_MAX_HEAT_GENES]
    true_PG = effects.real_delta[np.ix_(perts, genes)]
    order_P, order_G = _order_by_similarity(true_PG), _order_by_similarity(true_PG.T)
    perts, genes = perts[order_P], genes[order_G]
    limit = float(np.quantile(np.abs(true_PG), 0.98)) or 1.0
    with paper_style():
        figure = new_figure(max(2.2, 1.1 + 0.125 * len(perts)), PAGE_IN)
        panels = figure.subplots(1, 2, sharey=True)
        for axes, values_PG, title in zip(
            panels,
            (effects.real_delta, effects.pred_delta),
            ("true change", "predicted change"),
            strict=True,
        ):
            image = axes.imshow(
                values_PG[np.ix_(perts, genes)],
                cmap="RdBu_r",
                vmin=-limit,
                vmax=limit,
                aspect="auto",
                interpolation="nearest",
            )
            axes.set_title(title, loc="left")
            axes.set_xticks(np.arange(len(genes)), effects.genes[genes], rotation=90, fontsize=5)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        panels[0].set_yticks(np.arange(len(perts)), effects.names[perts], fontsize=6)
        bar = figure.colorbar(image, ax=panels, extend="both", shrink=0.7, aspect=25, pad=0.01)
        bar.set_label("change of mean log1p expression", fontsize=7)
        bar.outline.set_linewidth(0.4)
    return figure


def draw_ranks(tables: dict[str, pd.DataFrame], model: str, other: str) -> Figure:
    """Draw the PDS of each perturbation, worst first, for the model and one to compare."""
    return _compare(tables, model, other, "discrimination_score_l1", "PDS", by_rank=True)


def draw_overlap(tables: dict[str, pd.DataFrame], model: str, other: str) -> Figure:
    """Draw DES against the number of truly significant genes."""
    return _compare(tables, model, other, "overlap_at_N", "DES", by_rank=False)


def _compare(
    tables: dict[str, pd.DataFrame],
    model: str,
    other: str,
    column: str,
    title: str,
    *,
    by_rank: bool,
) -> Figure:
    ours = tables[model].set_index("perturbation")
    order = ours[column].sort_values(kind="stable").index
    with paper_style():
        figure = new_figure(HEIGHT_IN, PAGE_IN if by_rank and len(order) > 12 else COLUMN_IN)
        axes = figure.add_subplot()
        for name, colour, marker in ((other, VERMILION, "s"), (model, BLUE, "o")):
            table = tables[name].set_index("perturbation").loc[order]
            x = np.arange(len(order)) if by_rank else table["de_nsig_counts_real"].to_numpy()
            axes.scatter(
                x,
                table[column],
                s=22,
                marker=marker,
                facecolors=colour if name == model else "none",
                edgecolors=colour,
                linewidths=0.9,
                label=f"{name.replace('_', ' ')} (mean {table[column].mean():.3f})",
                clip_on=False,
                zorder=2,
            )
        axes.set(ylim=(0, 1.0), ylabel=title)
        if by_rank:
            _finish_ranks(axes, list(order), _chance(ours))
        else:
            _finish_overlap(axes, ours["de_nsig_counts_real"].to_numpy())
        figure.legend(loc="outside upper left", ncols=3, handletextpad=0.2, columnspacing=1.2)
    return figure


def _chance(table: pd.DataFrame) -> float:
    """Return the mean PDS without information: ranks count from 0 among those judged together."""
    together = table.groupby("fold").size() if "fold" in table else pd.Series([len(table)])
    return float((together * (0.5 + 0.5 / together)).sum() / together.sum())


def _finish_ranks(axes: Axes, names: Sequence[str], chance: float) -> None:
    if len(names) <= _MAX_HEAT_PERTS:
        axes.set_xticks(np.arange(len(names)), names, rotation=90)
    else:
        axes.set(xticks=[], xlabel=f"{len(names):,} perturbations, worst told apart first")
    axes.axhline(
        chance, color="black", linewidth=0.6, linestyle=DASHES, zorder=0.5, label="no information"
    )
    axes.set_xlim(-0.7, len(names) - 0.3)


def _finish_overlap(axes: Axes, counts: npt.NDArray[np.int64]) -> None:
    if counts.min() == 0 < counts.max():
        axes.set_xscale("symlog", linthresh=1, linscale=0.4)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    if counts.min() == 0:
        axes.set_xlim(-0.15, max(2.0, 1.3 * float(counts.max())))
    axes.set_xlabel("truly significant genes")


def draw_curves(records: dict[str, list[dict[str, float]]]) -> Figure:
    """Draw the loss on the train and validation splits over the steps, a line for each run."""
    with paper_style():
        figure = new_figure(HEIGHT_IN)
        axes = figure.add_subplot()
        for tag, colour, label in (("train/loss", BLUE, "train"), ("val/loss", VERMILION, "val")):
            for number, run in enumerate(records.values()):
                points = [(r["step"], r[tag]) for r in run if tag in r]
                if not points:
                    continue
                axes.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    linewidth=0.8,
                    alpha=1.0 if len(records) == 1 else 0.6,
                    label=label if number == 0 else None,
                )
        axes.set(xlabel="step", ylabel="MMD loss")
        axes.set_ylim(bottom=0)
        axes.legend()
        axes.set_title("" if len(records) == 1 else f"{len(records)} runs", loc="left", color=DARK)
    return figure


def _largest(effects: Effects, most: int) -> npt.NDArray[np.int64]:
    """Return the perturbations with the most truly significant genes, then the largest changes.

    By change alone, those with few cells would lead by their noise.
    """
    size_P = np.abs(effects.real_delta).mean(axis=1)
    num_significant_P = (effects.real_fdr < _USUAL_FDR).sum(axis=1)
    return np.lexsort((-size_P, -num_significant_P))[:most]


def _order_by_similarity(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Order rows by their score on the first principal component."""
    centred = values - values.mean(axis=0)
    score = np.linalg.svd(centred, full_matrices=False)[0][:, 0]
    return np.argsort(score, kind="stable")
