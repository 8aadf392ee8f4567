"""A run for each fold and seed, in one run folder, judged together.

``evaluate.folds`` and ``evaluate.seeds`` ask for it. The run folder holds the store, which all
share, and under ``runs/`` an ordinary run folder for each fold and seed; so what is finished is
skipped, and what was killed goes on. Each perturbation is for test in one fold, and judged beside
the perturbations of that fold.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from data_store.files import folder_made_whole
from data_store.store import is_store
from launcher.effects import Effects, read_effects, write_effects
from launcher.evaluate_job import LEADERBOARD_FILES, write_leaderboard
from launcher.judged_runs import read_costs
from launcher.mirroring import forget_mirrored, open_mirror
from launcher.pipeline import STAGE_NAMES, Pipeline, StageName
from launcher.progress import Reporter
from launcher.ray_cluster import RayCluster, ThisProcess
from launcher.run_folder import RunFolder
from launcher.run_report import write_run_report
from launcher.stages import Stage, StageRunner, fingerprint, identify_file
from launcher.train_job import single_process_group
from state.config import RunConfig, TrainConfig
from state.evaluate import Evaluation
from state.leaderboard import build_leaderboard

_SHARED: Final[StageName] = "deltas"
"""Stages up to this one are made once, for all sub-runs."""


@dataclass(frozen=True)
class SubRun:
    """The run of one fold and seed."""

    fold: int | None
    seed: int
    config: RunConfig


class RepeatedRun:
    """The runs of all folds and seeds of one recipe.

    Parameters
    ----------
    config
        The resolved recipe, with ``evaluate.folds`` or ``evaluate.seeds``.
    cluster
        Where tasks and training run.
    reporter
        Where progress is shown.
    """

    def __init__(
        self, config: RunConfig, cluster: RayCluster | ThisProcess, reporter: Reporter
    ) -> None:
        self.config = config
        self.folder = RunFolder(config.output_dir)
        self._cluster = cluster
        self._reporter = reporter

    def run(self, *, overwrite: bool = False, until: StageName = "evaluate") -> None:
        """Run the stages up to and with ``until`` for every fold and seed.

        Raises
        ------
        UserError
            For anything the user can mend; what is finished stays finished.
        """
        sub_runs = list_sub_runs(self.config)
        if overwrite or until not in STAGE_NAMES[: STAGE_NAMES.index("train")]:
            # A URL that cannot be written to is refused before hours of preprocessing.
            open_mirror(sub_runs[0].config)
        shared = STAGE_NAMES[min(STAGE_NAMES.index(_SHARED), STAGE_NAMES.index(until))]
        Pipeline(self.config, self._cluster, self._reporter).run(overwrite=overwrite, until=shared)
        if overwrite:
            for sub_run in sub_runs:
                forget_mirrored(sub_run.config)
        if until == shared:
            return
        alone = isinstance(self._cluster, ThisProcess)
        with self.folder.lock(), single_process_group(self.config) if alone else nullcontext():
            for number, sub_run in enumerate(sub_runs, start=1):
                name = sub_run.config.output_dir.name
                self._reporter.say(f"run {number} of {len(sub_runs)}: {name}", "bold")
                Pipeline(sub_run.config, self._cluster, self._reporter).run(until=until)
            if until == "evaluate":
                runner = StageRunner(self.folder, self._reporter)
                runner.run(_build_stage(self.config, self.folder, sub_runs))


def list_sub_runs(config: RunConfig) -> list[SubRun]:
    """Derive the recipe of every fold and seed: one seed of the split, one store, for all."""
    settings, split = config.evaluate, config.split
    folds: list[int | None] = [None] if settings.folds is None else list(range(settings.folds))
    own_store = config.data.input if is_store(config.data.input) else None
    split_seed = config.seed if split.seed is None else split.seed
    return [
        SubRun(
            fold,
            seed,
            config.model_copy(
                update={
                    "output_dir": config.output_dir / "runs" / _name(fold, seed),
                    "seed": seed,
                    "simulate": None,
                    "data": config.data.model_copy(
                        update={
                            "input": own_store or config.output_dir / "store",
                            "embed_file": None,
                        }
                    ),
                    "train": _mirror_apart(config),
                    "statistics": config.statistics.model_copy(update={"enabled": False}),
                    "split": split.model_copy(
                        update={
                            "seed": split_seed,
                            **({} if fold is None else {"folds": settings.folds, "fold": fold}),
                        }
                    ),
                    "evaluate": settings.model_copy(
                        update={
                            "folds": None,
                            "seeds": (),
                            "beside": tuple(
                                path / "runs" / _name(fold, seed) for path in settings.beside
                            ),
                        }
                    ),
                }
            ),
        )
        for seed in (settings.seeds or (config.seed,))
        for fold in folds
    ]


def _name(fold: int | None, seed: int) -> str:
    return f"seed{seed}" if fold is None else f"fold{fold}_seed{seed}"


def _build_stage(config: RunConfig, folder: RunFolder, sub_runs: list[SubRun]) -> Stage:
    judged = [sub_run.config.output_dir / "evaluation" for sub_run in sub_runs]
    return Stage(
        name="evaluate",
        fingerprint=fingerprint(
            "aggregate",
            [identify_file(path / name) for path in judged for name in LEADERBOARD_FILES[:1]],
        ),
        outputs=[
            *(folder.evaluation / name for name in LEADERBOARD_FILES),
            folder.tensorboard / "evaluate",
            folder.report,
        ],
        work=lambda: _judge_together(config, folder, sub_runs),
    )


def _judge_together(config: RunConfig, folder: RunFolder, sub_runs: list[SubRun]) -> None:
    """Write the tables of all folds and seeds together, and the report."""
    models = [
        path.name.removesuffix("_per_perturbation.csv")
        for path in sorted(
            (sub_runs[0].config.output_dir / "evaluation").glob("*_per_perturbation.csv")
        )
    ]
    tables = {model: _read_tables(sub_runs, model) for model in models}
    by_seed = {
        seed: build_leaderboard(_average(tables, seed), baselines=config.evaluate.baselines)
        for seed in sorted({sub_run.seed for sub_run in sub_runs})
    }
    spread: dict[str, dict[str, float]] = {}
    if len(by_seed) > 1:
        overall = pd.concat(by_seed.values()).groupby("model")["overall"]
        spread = {
            str(model): {"overall_min": low, "overall_max": high}
            for model, low, high in zip(overall.groups, overall.min(), overall.max(), strict=True)
        }
    with folder_made_whole(folder.evaluation) as partial:
        frames = {
            model: evaluation.per_perturbation for model, evaluation in _average(tables).items()
        }
        write_leaderboard(partial, config, frames, _add_costs(sub_runs), spread)
        for model, table in tables.items():
            table.to_csv(partial / f"{model}_runs.csv", index=False)
        if len(by_seed) > 1:
            _stack(by_seed, "seed").to_csv(partial / "seeds.csv", index=False)
        if config.evaluate.folds is not None:
            _stack(_by_fold(tables, config), "fold").to_csv(partial / "folds.csv", index=False)
        write_effects(partial, _join_effects(sub_runs))
    runs = [RunFolder(sub_run.config.output_dir) for sub_run in sub_runs]
    write_run_report(config, folder, runs)


def _read_tables(sub_runs: list[SubRun], model: str) -> pd.DataFrame:
    parts = []
    for sub_run in sub_runs:
        path = sub_run.config.output_dir / "evaluation" / f"{model}_per_perturbation.csv"
        # As text: pandas would read a perturbation called NA as missing, and leave it out.
        part = pd.read_csv(path, converters={"perturbation": str})
        part["fold"] = 0 if sub_run.fold is None else sub_run.fold
        part["seed"] = sub_run.seed
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _average(
    tables: dict[str, pd.DataFrame], seed: int | None = None, fold: int | None = None
) -> dict[str, Evaluation]:
    """Average each perturbation over seeds, so that it counts once."""
    evaluations = {}
    for model, table in tables.items():
        chosen = np.ones(len(table), dtype=bool)
        if seed is not None:
            chosen &= (table["seed"] == seed).to_numpy()
        if fold is not None:
            chosen &= (table["fold"] == fold).to_numpy()
        mean = table[chosen].drop(columns="seed").groupby("perturbation", as_index=False).mean()
        evaluations[model] = Evaluation(mean)
    return evaluations


def _by_fold(tables: dict[str, pd.DataFrame], config: RunConfig) -> dict[int, pd.DataFrame]:
    return {
        fold: build_leaderboard(
            _average(tables, fold=fold), baselines=config.evaluate.baselines, num_resamples=1
        )
        for fold in range(config.evaluate.folds or 0)
    }


def _stack(boards: dict[int, pd.DataFrame], name: str) -> pd.DataFrame:
    """Put small leaderboards under one another: figures without their intervals."""
    columns = ["model", "des", "pds", "mae", "overall", "num_perturbations"]
    return pd.concat(
        [board[columns].assign(**{name: number}) for number, board in boards.items()],
        ignore_index=True,
    )[[name, *columns]]


def _add_costs(sub_runs: list[SubRun]) -> dict[str, dict[str, object]]:
    """Add up the seconds of all sub-runs, and list how cells were made in how many of them."""
    per_run = [
        read_costs(sub_run.config, RunFolder(sub_run.config.output_dir)) for sub_run in sub_runs
    ]
    total: dict[str, dict[str, object]] = {}
    for model in per_run[0]:
        ways = pd.Series([costs[model]["synthesis"] for costs in per_run]).value_counts()
        total[model] = {
            "train_s": sum(costs[model]["train_s"] for costs in per_run),
            "predict_s": sum(costs[model]["predict_s"] for costs in per_run),
            "synthesis": "; ".join(f"{way} ({count})" for way, count in ways.items()),
        }
    return total


def _join_effects(sub_runs: list[SubRun]) -> Effects:
    """Join the effects of all folds, of the first seed."""
    first = sub_runs[0].seed
    return Effects.concatenate(
        [
            read_effects(Path(sub_run.config.output_dir) / "evaluation")
            for sub_run in sub_runs
            if sub_run.seed == first
        ]
    )


def _mirror_apart(config: RunConfig) -> TrainConfig:
    """Let the copies of a sub-run's checkpoints lie as its folder does: in ``NAME/runs``."""
    url = config.train.checkpoint_mirror
    if url is None:
        return config.train
    apart = f"{url.rstrip('/')}/{config.output_dir.name}/runs"
    return config.train.model_copy(update={"checkpoint_mirror": apart})
