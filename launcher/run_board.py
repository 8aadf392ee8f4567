"""What TensorBoard shows of a finished run beside its curves and figures.

Hyper-parameters with the scores, the recipe and the leaderboard as text, precision and recall of
the predicted differentially expressed genes, and the projector of effects.
Tests: ``pytest tests/unit/launcher/test_run_board.py``. Shape legend: P perturbations, G genes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch.utils.tensorboard import SummaryWriter

from data_store.files import folder_made_whole
from launcher.effects import Effects

_MAX_CURVES: Final = 12
_MAX_COMPONENTS: Final = 50
_SCORES: Final = ("des", "pds", "mae", "overall")
# What a recipe sets that is compared between runs; paths and names are not.
_COMPARED_SECTIONS: Final = ("model", "loss", "train", "data")


def write_run_board(
    folder: Path,
    recipe: str,
    settings: Mapping[str, Any],
    leaderboard: pd.DataFrame,
    leaderboard_text: str,
    effects: Effects,
    model: str,
    fdr: float,
) -> None:
    """Replace a folder of TensorBoard events.

    Parameters
    ----------
    folder
        Below the run's ``tb/``.
    recipe
        The resolved recipe, TOML.
    settings
        The same as nested dicts.
    leaderboard
        A row a model.
    leaderboard_text
        The same in Markdown.
    effects
        True effects and those that ``model`` predicts.
    model
        Whose scores go with the hyper-parameters.
    fdr
        Below it a gene is truly significant.
    """
    row = leaderboard.set_index("model").loc[model]
    scores = {f"score/{name}": float(row[name]) for name in _SCORES}
    with folder_made_whole(folder) as partial, SummaryWriter(log_dir=str(partial)) as writer:
        writer.add_text("recipe", _as_code(recipe))
        writer.add_text("leaderboard", leaderboard_text)
        writer.add_hparams(flatten_settings(settings), scores, run_name=".")
        for tag, (is_real, scores_n) in rank_de_genes(effects, fdr).items():
            writer.add_pr_curve(f"de_genes/{tag}", is_real, scores_n)
        points, labels = project_effects(effects)
        header = ["perturbation", "effect"]
        writer.add_embedding(points, metadata=labels, metadata_header=header, tag="effects")


def flatten_settings(settings: Mapping[str, Any]) -> dict[str, float | str | bool]:
    """Return the settings that runs are compared by as ``section.key``; lists become text."""
    flat: dict[str, float | str | bool] = {}
    for section in _COMPARED_SECTIONS:
        for key, value in settings.get(section, {}).items():
            if value is not None:
                plain = isinstance(value, int | float | str)
                flat[f"{section}.{key}"] = value if plain else str(value)
    return flat | {"seed": settings["seed"]}


def rank_de_genes(
    effects: Effects, fdr: float
) -> dict[str, tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]]:
    """Return which genes are truly significant and how high the prediction ranks them.

    For all perturbations together, and for those with the most significant genes by name. A score
    is the share of genes of the perturbation that are predicted less significant, or as
    significant with a smaller fold change: a threshold of 0.9 takes the first tenth. Genes that
    the prediction does not tell apart share one score.
    """
    is_real_PG = effects.real_fdr < fdr
    size_PG = np.nan_to_num(np.abs(effects.pred_log2_fold_change), posinf=np.finfo(float).max)
    score_PG = np.empty(is_real_PG.shape)
    for fdr_G, size_G, score_G in zip(effects.pred_fdr, size_PG, score_PG, strict=True):
        order = np.lexsort((size_G, -fdr_G))
        keys_G = np.stack([fdr_G, size_G])[:, order]
        is_new = np.append(True, (keys_G[:, 1:] != keys_G[:, :-1]).any(axis=0))
        first = np.flatnonzero(is_new)
        score_G[order] = first[np.cumsum(is_new) - 1] / len(order)
    curves = {}
    if is_real_PG.any():
        curves["all perturbations"] = (is_real_PG.ravel(), score_PG.ravel())
    most = np.argsort(-is_real_PG.sum(1), kind="stable")[:_MAX_CURVES]
    for pert in most[is_real_PG[most].any(axis=1)]:
        curves[str(effects.names[pert])] = (is_real_PG[pert], score_PG[pert])
    return curves


def project_effects(effects: Effects) -> tuple[npt.NDArray[np.float32], list[list[str]]]:
    """Return true and predicted effects as points, [2 P, components], and what each is.

    Principal components of both together: a projector need not load every gene.
    """
    both = np.concatenate([effects.real_delta, effects.pred_delta])
    left, sizes, _ = np.linalg.svd(both - both.mean(0), full_matrices=False)
    points = (left * sizes)[:, :_MAX_COMPONENTS].astype(np.float32)
    labels = [[str(name), kind] for kind in ("true", "predicted") for name in effects.names]
    return points, labels


def _as_code(text: str) -> str:
    """Return Markdown that shows text as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())
