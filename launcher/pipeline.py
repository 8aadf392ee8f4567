"""The whole way: simulate, preprocess, stats, deltas, split, train, predict, evaluate.

Each step is a stage (``launcher.stages``) that is skipped while nothing it depends on changed.
"""

from __future__ import annotations

import json
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

from data_store.files import sha256_of_file, write_json_atomically
from data_store.locate import describe_input
from data_store.split_table import format_split_table
from data_store.store import Store, is_store
from launcher.deepspeed_config import read_deepspeed_json
from launcher.errors import LaunchError
from launcher.evaluate_job import LEADERBOARD_FILES, evaluate_run
from launcher.faults import refuse_impossible
from launcher.judged_runs import find_beside
from launcher.mirroring import copy_rest, forget_mirrored, mirrored, open_mirror
from launcher.predict_job import TRUTH, predict_run
from launcher.preprocess_job import (
    build_spec,
    describe_store,
    preprocess_run,
    refuse_other_spec,
    simulate,
    split_store,
)
from launcher.progress import Reporter
from launcher.ray_cluster import RayCluster, ThisProcess
from launcher.run_folder import NOT_IN_THE_WEIGHTS, RunFolder
from launcher.run_inputs import refuse_missing_inputs
from launcher.stages import Stage, StageRunner, fingerprint, identify_file
from launcher.statistics_stages import deltas_of_run, statistics_of_run, statistics_outputs
from launcher.step_division import divide_step
from launcher.train_job import train_here, train_with_ray
from launcher.train_worker import TrainTask
from state.config import RunConfig
from state.leaderboard import CEILING
from state.training.checkpoint import CheckpointFolder
from state.training.checkpoint_files import Checkpoint, find_damaged_files
from state.transition.initialize import find_weights

StageName = Literal[
    "simulate", "preprocess", "stats", "deltas", "split", "train", "predict", "evaluate"
]
STAGE_NAMES: tuple[StageName, ...] = get_args(StageName)
JUDGING_STAGES: tuple[StageName, ...] = ("predict", "evaluate")
# Settings of [evaluate] that change nothing about what is predicted.
_NOT_IN_THE_PREDICTIONS = {"checkpoint", "folds", "seeds", "beside"}


class Pipeline:
    """One run of one recipe in its run folder.

    Parameters
    ----------
    config
        The resolved recipe.
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
        self._runner = StageRunner(self.folder, reporter)

    def run(self, *, overwrite: bool = False, until: StageName = "evaluate") -> None:
        """Run the stages up to and with ``until``, in a folder locked for this process.

        Raises
        ------
        UserError
            For anything the user can mend; finished stages stay finished.
        """
        refuse_missing_inputs(self.config)
        world_size = self.config.cluster.num_workers
        alone = isinstance(self._cluster, ThisProcess)
        refuse_impossible(self.config.faults, 1 if alone else world_size)
        deepspeed = read_deepspeed_json(self.config.train.deepspeed)
        if until == "evaluate":
            find_beside(self.config)
        trains = STAGE_NAMES.index(until) >= STAGE_NAMES.index("train")
        with self.folder.lock():
            if overwrite or (trains and not self._runner.was_finished("train")):
                # Said before the hours of preprocessing, and before anything is removed.
                open_mirror(self.config)
                if trains:
                    self._cluster.require(self.config)
            self.folder.adopt(self.config, overwrite=overwrite)
            if overwrite:
                forget_mirrored(self.config)
            write_json_atomically(self.folder.deepspeed, deepspeed)
            for name in STAGE_NAMES[: STAGE_NAMES.index(until) + 1]:
                stage = self._build(name)
                if stage is not None:
                    self._runner.run(stage)
            if trains:
                copy_rest(self.config, self._checkpoints, self._reporter)

    def _build(self, name: StageName) -> Stage | None:
        """Describe a stage; None where the recipe has no such stage.

        Called just before the stage runs, because its fingerprint holds what the ones before it
        made.
        """
        builders = {
            "simulate": self._simulate_stage,
            "preprocess": self._preprocess_stage,
            "stats": self._stats_stage,
            "deltas": self._deltas_stage,
            "split": self._split_stage,
            "train": self._train_stage,
            "predict": self._predict_stage,
            "evaluate": self._evaluate_stage,
        }
        if name in JUDGING_STAGES and not self.config.is_judged:
            self._reporter.say(
                f"{name}: model.output_space = 'embedding' predicts {self.config.model.embed_key} "
                "and no genes, by which models are judged: left out"
            )
            return None
        return builders[name]()

    def _simulate_stage(self) -> Stage | None:
        simulation, features = self.config.simulate, self.config.features.path
        if simulation is None:
            return None
        atlas = Path(self.config.data.input)
        return Stage(
            name="simulate",
            fingerprint=fingerprint("simulate", simulation.model_dump(), atlas, features),
            outputs=[atlas] if features is None else [atlas, features],
            work=lambda: simulate(simulation, atlas, features, self._cluster.run_tasks),
        )

    def _preprocess_stage(self) -> Stage | None:
        data = self.config.data
        if is_store(data.input):
            refuse_other_spec(data, self.store, self.config.model.embed_key)
            self._reporter.say(f"preprocess: {data.input} is a finished store: used as it is")
            return None
        used = data.model_dump(
            mode="json",
            include={
                *("input", "pert_col", "control_pert", "cell_type_key", "batch_col"),
                *("library_size_col", "keep", "n_top_genes", "layer", "genes"),
                *("hvg_flavor", "hvg_batch_key"),
            },
        )
        spec = build_spec(data, self.folder.store, self.config.model.embed_key)
        if spec.embed_key is not None:
            used["embed_key"] = spec.embed_key
        return Stage(
            name="preprocess",
            fingerprint=fingerprint("preprocess", used, spec.describe_source()),
            outputs=[self.folder.store],
            work=lambda: self._say_store(
                preprocess_run(self.config, self.folder.store, self._cluster.run_tasks)
            ),
        )

    def _stats_stage(self) -> Stage | None:
        data = self.config.data
        if not self.config.statistics.enabled:
            return None
        # A store that is used as it is has its source elsewhere, if anywhere.
        source = None if is_store(data.input) else data.input
        return Stage(
            name="stats",
            fingerprint=fingerprint(
                "stats", self.store.digest, None if source is None else describe_input(source)
            ),
            outputs=statistics_outputs(self.config, self.folder, "stats"),
            work=lambda: self._reporter.say(
                statistics_of_run(self.config, self.folder, self.store, self._cluster.run_tasks)
            ),
        )

    def _deltas_stage(self) -> Stage | None:
        statistics = self.config.statistics
        if not statistics.enabled:
            return None
        return Stage(
            name="deltas",
            fingerprint=fingerprint(
                "deltas", self.store.digest, statistics.model_dump(mode="json")
            ),
            outputs=statistics_outputs(self.config, self.folder, "deltas"),
            work=lambda: self._reporter.say(
                deltas_of_run(self.config, self.folder, self.store, self._cluster.run_tasks)
            ),
        )

    def _split_stage(self) -> Stage:
        config = self.config
        files = [path for path in (config.split.file, config.features.path) if path is not None]
        return Stage(
            name="split",
            fingerprint=fingerprint(
                "split",
                self.store.digest,
                config.split.model_dump(mode="json"),
                config.features.model_dump(mode="json"),
                config.seed,
                [identify_file(path) for path in files],
            ),
            outputs=[
                self.folder.splits,
                self.folder.features,
                self.folder.path / "splits.md",
                self.folder.path / "splits.csv",
            ],
            work=lambda: self._reporter.say(
                format_split_table(split_store(config, self.store, self.folder))
            ),
        )

    def _train_stage(self) -> Stage:
        run_fingerprint = self._run_fingerprint
        return Stage(
            name="train",
            fingerprint=run_fingerprint,
            outputs=[
                self.folder.checkpoints,
                self.folder.metrics,
                self.folder.tensorboard / "train",
            ],
            work=self._train,
            is_costly=True,
            inputs=describe_store(self.store),
            is_whole=lambda: bool(self._checkpoints.complete()),
        )

    def _predict_stage(self) -> Stage:
        evaluate = self.config.evaluate
        return Stage(
            name="predict",
            fingerprint=fingerprint(
                "predict",
                self._run_fingerprint,
                sha256_of_file(self.checkpoint.folder / "manifest.json"),
                evaluate.model_dump(mode="json", exclude=_NOT_IN_THE_PREDICTIONS),
                version("statewide"),
            ),
            outputs=[
                self.folder.predictions / f"{model}.h5ad"
                for model in (TRUTH, self.config.model.row_name, *evaluate.baselines, CEILING)
            ],
            work=lambda: predict_run(
                self.config, self.folder, self.store, self.checkpoint, self._cluster.run_tasks
            ),
        )

    def _evaluate_stage(self) -> Stage:
        predicted = sorted(self.folder.predictions.glob("*.h5ad"))
        beside = find_beside(self.config)
        return Stage(
            name="evaluate",
            fingerprint=fingerprint(
                "evaluate",
                self.config.evaluate.fdr,
                [identify_file(path) for path in predicted],
                [run.identity for run in beside],
                version("statewide"),
            ),
            outputs=[
                *(self.folder.evaluation / name for name in LEADERBOARD_FILES),
                self.folder.tensorboard / "evaluate",
                self.folder.tensorboard / "run",
                self.folder.report,
            ],
            work=lambda: evaluate_run(self.config, self.folder, self._cluster.run_tasks),
        )

    def _train(self) -> None:
        config, cluster = self.config, self._cluster
        cluster.require(config)
        alone = isinstance(cluster, ThisProcess)
        with mirrored(config, self._checkpoints, self._reporter):
            task = TrainTask(
                run_dir=self.folder.path,
                store=self.store.path,
                run_fingerprint=self._run_fingerprint,
                division=divide_step(config, self._checkpoints.last(), alone=alone),
            )
            if isinstance(cluster, ThisProcess):
                train_here(task, config, self._reporter)
            else:
                waits_s = cluster.wait_resources_s
                train_with_ray(task, config, self._reporter, wait_resources_s=waits_s)

    @cached_property
    def store(self) -> Store:
        """The store this run reads."""
        data = self.config.data
        return Store.open(Path(data.input) if is_store(data.input) else self.folder.store)

    @property
    def _run_fingerprint(self) -> str:
        """Digest of all that the weights depend on."""
        config, start = self.config, self.config.model.init_from
        return fingerprint(
            "train",
            self.store.digest,
            sha256_of_file(self.folder.splits),
            sha256_of_file(self.folder.features),
            json.loads(self.folder.deepspeed.read_text(encoding="utf-8"))["zero_optimization"],
            config.features.model_dump(mode="json"),
            config.data.control_matching,
            config.model.model_dump(mode="json"),
            config.loss.model_dump(mode="json"),
            config.train.model_dump(mode="json", exclude=NOT_IN_THE_WEIGHTS),
            None if start is None else sha256_of_file(find_weights(start)),
            config.seed,
        )

    @property
    def _checkpoints(self) -> CheckpointFolder:
        return CheckpointFolder(self.folder.checkpoints, self._run_fingerprint)

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that ``evaluate.checkpoint`` asks for."""
        sub_runs = sorted(path.name for path in self.folder.sub_runs.glob("*"))
        if sub_runs and not self.folder.checkpoints.is_dir():
            raise LaunchError(
                f"{self.folder.path} holds a run for each fold and seed; name one of them: "
                f"{self.folder.sub_runs / sub_runs[0]} (of {', '.join(sub_runs)})"
            )
        # Whatever it was trained from need not be there any more.
        folder = CheckpointFolder(self.folder.checkpoints, run_fingerprint="")
        wanted = self.config.evaluate.checkpoint
        checkpoint = folder.best() if wanted == "best" else folder.last()
        if checkpoint is None:
            raise LaunchError(
                f"{self.folder.checkpoints} holds no complete checkpoint. Train first: "
                "statewide train CONFIG"
            )
        damaged = find_damaged_files(checkpoint.folder)
        if damaged:
            raise LaunchError(
                f"checkpoint {checkpoint.folder} is damaged ({', '.join(damaged)}). Remove that "
                "folder, and statewide train goes on from the one before it"
            )
        return checkpoint

    def _say_store(self, store: Store) -> None:
        self._reporter.say(
            f"  store: {store.num_cells:,} cells x {len(store.genes):,} genes, "
            f"{len(store.perturbations) - 1:,} perturbations, {len(store.batches)} batches, "
            f"{len(store.hvg_index):,} highly variable genes"
        )
