"""Pretrain SE: vocabulary, training, scores on held-out cells.

Each step is a stage (``launcher.stages``) that is skipped while nothing it depends on changed.
"""

from __future__ import annotations

import json
from functools import cached_property

from data_store.files import sha256_of_file, write_json_atomically
from data_store.store import Store, is_store
from launcher.deepspeed_config import read_deepspeed_json
from launcher.embed_apply import score_held_out
from launcher.embed_data import EmbedDataset, compute_levels, open_datasets
from launcher.embed_folder import EmbedFolder, best_checkpoint
from launcher.embed_task import EmbedTask
from launcher.errors import LaunchError
from launcher.mirroring import copy_rest, forget_mirrored, mirrored, open_mirror
from launcher.progress import Reporter
from launcher.ray_cluster import RayCluster, ThisProcess
from launcher.run_folder import NOT_IN_THE_WEIGHTS
from launcher.stages import Stage, StageRunner, fingerprint
from launcher.step_division import divide_step
from launcher.train_job import train_here, train_with_ray
from state.embed_config import EmbedConfig
from state.embedding.scores import describe_scores
from state.embedding.vocabulary import (
    describe_match,
    load_saved_vocabulary,
    load_vocabulary,
    save_vocabulary,
)
from state.training.checkpoint import CheckpointFolder

# Settings that change nothing about the weights.
_NOT_IN_THE_WEIGHTS = {
    "train": NOT_IN_THE_WEIGHTS,
    "data": {"resident_gib", "prefetch_batches"},
}


class EmbedPipeline:
    """One run of one recipe in its run folder.

    Parameters
    ----------
    config
        The resolved recipe.
    cluster
        Where training runs.
    reporter
        Where progress is shown.
    """

    def __init__(
        self, config: EmbedConfig, cluster: RayCluster | ThisProcess, reporter: Reporter
    ) -> None:
        self.config = config
        self.folder = EmbedFolder(config.output_dir)
        self._cluster = cluster
        self._reporter = reporter
        self._runner = StageRunner(self.folder, reporter)

    def run(self, *, overwrite: bool = False) -> None:
        """Run the stages, in a folder locked for this process.

        Raises
        ------
        UserError
            For anything the user can mend; finished stages stay finished.
        """
        self._refuse_missing_inputs()
        deepspeed = read_deepspeed_json(self.config.train.deepspeed)
        if overwrite or not self.folder.config.is_file():
            self._refuse_before_it_begins()
        with self.folder.lock():
            if overwrite or not self._runner.was_finished("train"):
                open_mirror(self.config)
            self.folder.adopt(self.config, overwrite=overwrite)
            if overwrite:
                forget_mirrored(self.config)
            write_json_atomically(self.folder.deepspeed, deepspeed)
            for build in (self._genes_stage, self._train_stage, self._score_stage):
                self._runner.run(build())
            copy_rest(self.config, self._checkpoints, self._reporter)

    def _refuse_missing_inputs(self) -> None:
        for name, dataset in self.config.datasets.items():
            if not is_store(dataset.store):
                raise LaunchError(
                    f"datasets.{name}.store = {str(dataset.store)!r} is no finished store. Make "
                    "one: statewide preprocess INPUT.h5ad --out STORE --no-perturbations"
                )
        for path in self.config.genes.tables:
            if not path.is_file():
                raise LaunchError(
                    f"genes.tables: {str(path)!r} does not exist or is not a file. Give the paths "
                    "of files saved as torch.save(dict[str, Tensor], path)"
                )

    def _refuse_before_it_begins(self) -> None:
        """Find what would stop the first stages before there is a run folder, or it is cleared."""
        open_datasets(self.config, load_vocabulary(self.config.genes.tables))
        self._cluster.require(self.config)

    def _genes_stage(self) -> Stage:
        config = self.config
        return Stage(
            name="genes",
            fingerprint=fingerprint(
                "genes",
                self._stores,
                [sha256_of_file(path) for path in config.genes.tables],
                [dataset.gene_column for dataset in config.datasets.values()],
                config.data.val_share,
                config.data.target_sum,
                config.seed,
            ),
            outputs=[self.folder.vocabulary, self.folder.genes],
            work=self.write_vocabulary,
        )

    def _train_stage(self) -> Stage:
        return Stage(
            name="train",
            fingerprint=self._run_fingerprint,
            outputs=[
                self.folder.checkpoints,
                self.folder.metrics,
                self.folder.tensorboard / "train",
            ],
            work=self._train,
            is_costly=True,
            is_whole=lambda: bool(self._checkpoints.complete()),
        )

    def _score_stage(self) -> Stage:
        checkpoint = best_checkpoint(self.folder)
        return Stage(
            name="score",
            fingerprint=fingerprint(
                # Raised when the scores change.
                "score 2",
                self._run_fingerprint,
                sha256_of_file(checkpoint.folder / "manifest.json"),
            ),
            outputs=[self.folder.scores],
            work=self._score,
        )

    def write_vocabulary(self) -> None:
        """Join the gene tables and report which genes of each dataset are in them."""
        vocabulary = load_vocabulary(self.config.genes.tables)
        datasets = open_datasets(self.config, vocabulary)
        for dataset in datasets:
            self._reporter.say(f"  {describe_match(dataset.match, dataset.name)}")
        levels = compute_levels(
            datasets,
            len(vocabulary.names),
            self.config.data.target_sum,
            self._cluster.run_tasks,
        )
        save_vocabulary(self.folder.vocabulary, vocabulary, levels)
        report = {dataset.name: dataset.match.report() for dataset in datasets}
        write_json_atomically(self.folder.genes, report)

    def _train(self) -> None:
        config, cluster = self.config, self._cluster
        cluster.require(config)
        alone = isinstance(cluster, ThisProcess)
        with mirrored(config, self._checkpoints, self._reporter):
            task = EmbedTask(
                run_dir=self.folder.path,
                run_fingerprint=self._run_fingerprint,
                division=divide_step(config, self._checkpoints.last(), alone=alone),
            )
            if isinstance(cluster, ThisProcess):
                train_here(task, config, self._reporter)
            else:
                waits_s = cluster.wait_resources_s
                train_with_ray(task, config, self._reporter, wait_resources_s=waits_s)

    def _score(self) -> None:
        self._cluster.require_task(self.config.cluster)
        checkpoint = best_checkpoint(self.folder)
        vocabulary, _ = load_saved_vocabulary(self.folder.vocabulary)
        datasets: list[EmbedDataset] = open_datasets(self.config, vocabulary)
        scores = score_held_out(
            datasets, self.folder, self.config, checkpoint, self._cluster.run_tasks
        )
        for name, score in scores.items():
            self._reporter.say(f"  {name}, held-out cells: {describe_scores(score)}")
        write_json_atomically(
            self.folder.scores, {name: score.report() for name, score in scores.items()}
        )

    @property
    def _checkpoints(self) -> CheckpointFolder:
        return CheckpointFolder(self.folder.checkpoints, self._run_fingerprint)

    @cached_property
    def _stores(self) -> dict[str, str]:
        """The digest of each store, by the name of its dataset, in the order of the recipe."""
        return {
            name: Store.open(dataset.store).digest for name, dataset in self.config.datasets.items()
        }

    @property
    def _run_fingerprint(self) -> str:
        """Digest of all that the weights depend on."""
        config = self.config
        return fingerprint(
            "embed-train",
            list(self._stores.items()),
            sha256_of_file(self.folder.vocabulary),
            [(dataset.weight, dataset.gene_column) for dataset in config.datasets.values()],
            json.loads(self.folder.deepspeed.read_text(encoding="utf-8"))["zero_optimization"],
            config.model.model_dump(mode="json"),
            config.loss.model_dump(mode="json"),
            config.data.model_dump(mode="json", exclude=_NOT_IN_THE_WEIGHTS["data"]),
            config.train.model_dump(mode="json", exclude=_NOT_IN_THE_WEIGHTS["train"]),
            config.seed,
        )
