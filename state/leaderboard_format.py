"""Write a leaderboard as csv, markdown or html.

Columns beyond those of ``state.leaderboard.build_leaderboard`` are written where they are there:
train_s and predict_s (seconds), control (whose control cells the effects are measured against),
and overall_min and overall_max (over seeds).
"""

from __future__ import annotations

import html
from typing import Any

import pandas as pd

from state.leaderboard import CEILING
from state.metrics.overall import METRICS

EXPLANATION = (
    "DES: share of the truly differential genes found. PDS: how near a predicted effect lies to "
    "its own true effect. MAE: error of the mean expression (lower is better). Overall: 100 x mean "
    "of the three, scaled so that the reference is 0 and perfection 1. Intervals: 95 %, bootstrap "
    "over perturbations, paired with the reference and, for the difference, with the best "
    "baseline. The ceiling predicts a random half of the real cells; it is not ranked."
)
"""What the columns mean."""


def leaderboard_to_csv(leaderboard: pd.DataFrame) -> str:
    """Write a leaderboard as csv, with every digit."""
    return str(leaderboard.to_csv(index=False, lineterminator="\n"))


def leaderboard_to_markdown(leaderboard: pd.DataFrame) -> str:
    """Write a leaderboard as a markdown table, rounded, with what the columns mean below it."""
    rows = [_cells(row) for row in leaderboard.to_dict("records")]
    header = list(rows[0])
    lines = [
        f"| {' | '.join(header)} |",
        f"|---|{'---:|' * (len(header) - 1)}",
        *(f"| {' | '.join(row.values())} |" for row in rows),
        "",
        *describe_leaderboard(leaderboard),
    ]
    return "\n".join(lines) + "\n"


def leaderboard_to_html(leaderboard: pd.DataFrame) -> str:
    """Write a leaderboard as an html table (a fragment), the trained model's row emphasised."""
    rows = [_cells(row) for row in leaderboard.to_dict("records")]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "\n".join(
        f'<tr class="{html.escape(row["model"])}">'
        + "".join(f"<td>{html.escape(value)}</td>" for value in row.values())
        + "</tr>"
        for row in rows
    )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n"


def describe_leaderboard(leaderboard: pd.DataFrame) -> list[str]:
    """Say what the figures rest on, one sentence or two a line."""
    num_perts = int(leaderboard["num_perturbations"].max())
    best = str(leaderboard["best_baseline"].iloc[0])
    lines = [f"Means over {num_perts} held-out perturbations. {EXPLANATION}"]
    if best:
        lines.append(
            f"Best baseline: {best}, chosen by its Overall in this table, which favours it."
        )
    if "control" in leaderboard:
        lines.append(f"Effects are measured against {leaderboard['control'].iloc[0]} controls.")
    return lines


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """Round one row for reading."""
    cells = {
        "model": str(row["model"]),
        "DES": f"{row['des']:.4f}",
        "PDS": f"{row['pds']:.4f}",
        "MAE": f"{row['mae']:.4f}",
        "Overall": f"{row['overall']:.2f}",
        "95 % interval": f"{row['overall_low']:.2f} to {row['overall_high']:.2f}",
    }
    if row["best_baseline"]:
        cells["less best baseline"] = (
            "-"
            if row["model"] in (row["best_baseline"], CEILING)
            else f"{row['difference']:+.2f} ({row['difference_low']:+.2f} to "
            f"{row['difference_high']:+.2f})"
        )
    cells["scaled DES / PDS / MAE"] = " / ".join(f"{row[f'{m}_scaled']:.3f}" for m in METRICS)
    if "overall_min" in row:
        cells["over seeds"] = f"{row['overall_min']:.2f} to {row['overall_max']:.2f}"
    if "train_s" in row:
        cells["train s"], cells["predict s"] = f"{row['train_s']:.1f}", f"{row['predict_s']:.1f}"
    return cells
