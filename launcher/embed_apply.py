"""Embed the cells of a file: blocks as tasks, each of which leaves its part; then one h5ad.

Parts that an interrupted run left are used if they are of the same model and input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from data_store.embedding_file import write_embedding
from data_store.expression_source import (
    Expression,
    Reader,
    RowBlock,
    cut_rows,
    has_whole_values,
    read_block,
    stored_by_row,
)
from data_store.files import file_made_whole, full_disk_is_a_user_error, sha256_of_file
from data_store.locate import describe_input, find_files
from data_store.schema import InputPath, StoreError, TaskRunner
from data_store.store import Store
from launcher.embed_data import EmbedDataset, list_gene_names
from launcher.embed_folder import EmbedFolder
from launcher.embed_model import load_embedder
from launcher.embed_parts import parts_of
from launcher.errors import LaunchError
from launcher.stages import fingerprint
from state.embed_config import EmbedConfig
from state.embedding.scores import DetectionAnswers, DetectionScores, score_detection
from state.embedding.sequence import CountsOfCells
from state.embedding.vocabulary import (
    GeneMatch,
    describe_match,
    load_saved_vocabulary,
    match_genes,
)
from state.training.checkpoint_files import Checkpoint

OBSM_KEY = "X_state"
MAX_SCORED_CELLS = 256
NUM_SCORED_GENES = 1000
# Of the files that blocks leave; others are made anew.
_PARTS_VERSION = 2


@dataclass(frozen=True)
class EmbedBlock:
    """Cells that one task embeds; picklable."""

    run_dir: Path
    weights: Path
    weights_digest: str
    """By which a process tells whether it holds this model already."""
    reader: Reader
    rows: npt.NDArray[np.int64]
    """Rows of the input, ascending."""
    match: GeneMatch
    scored: npt.NDArray[np.int64]
    """Which of the rows to score the decoder on."""
    asked_K: npt.NDArray[np.int32]
    """Tokens to decode for each of them, the same in all blocks of an input."""
    batch_size: int
    part: Path | None = None
    """Where to leave the embeddings; None: they are only for scoring."""
    num_cpus: int = 1
    num_gpus: int = 0

    @property
    def num_cells(self) -> int:
        """Cells of the block."""
        return len(self.rows)


def embed_block(block: EmbedBlock) -> DetectionAnswers:
    """Embed the cells of a block, leave its part, and return what scores are made of.

    Raises
    ------
    StoreError
        If the values are not raw counts.
    LaunchError
        If there is no GPU where one was asked for.
    """
    scores = None if block.part is None else block.part.with_suffix(".scores.npz")
    if block.part is not None and scores is not None and block.part.exists() and scores.exists():
        with np.load(scores) as saved:
            return DetectionAnswers(**saved)
    if block.num_gpus and not torch.cuda.is_available():
        raise LaunchError(
            "cluster.use_gpu = true, but torch finds no CUDA GPU on this node. To compute on "
            "CPUs: cluster.use_gpu=false (embed apply: --cpu)"
        )
    device = "cuda" if block.num_gpus else "cpu"
    embedder = load_embedder(block.run_dir, block.weights, block.weights_digest, device)
    values = read_block(RowBlock(block.rows), block.reader, as_counts=True)
    if not has_whole_values(values):
        raise StoreError(
            f"rows {block.rows[0]} to {block.rows[-1]} hold values that are not whole numbers: SE "
            "reads raw counts. Name the layer that has them: --layer counts"
        )
    cells = CountsOfCells(values.indptr, values.indices, values.data)
    embedded = embedder.embed(
        cells,
        block.match,
        batch_size=block.batch_size,
        scored=block.scored,
        asked_K=block.asked_K,
    )
    found = embedded.answers
    if block.part is not None and scores is not None:
        with file_made_whole(scores) as temporary, temporary.open("wb") as handle:
            np.savez(handle, **vars(found))
        with file_made_whole(block.part) as temporary, temporary.open("wb") as handle:
            np.save(handle, embedded.values_BX)
    return found


@dataclass(frozen=True)
class ApplySettings:
    """How ``embed_file`` works."""

    out: Path
    """h5ad to write."""
    rows_per_block: int
    """Cells of one task."""
    batch_size: int
    """Cells that go through the model at once."""
    use_gpu: bool = False
    """Compute each block on a GPU."""
    gene_column: str | None = None
    """``var`` column with the genes' names; None: whichever matches most."""


def embed_file(
    source: InputPath,
    expression: Expression,
    folder: EmbedFolder,
    config: EmbedConfig,
    checkpoint: Checkpoint,
    settings: ApplySettings,
    run_tasks: TaskRunner,
) -> tuple[str, DetectionScores]:
    """Write ``obsm["X_state"]`` of every cell; return how genes matched, and the scores.

    Raises
    ------
    StoreError, ConfigError, LaunchError
        For input that cannot be read or has no known gene, and an output that is the input or
        that another process writes.
    """
    out = settings.out
    if not isinstance(expression.reader, Store) and out.resolve() in {
        file.resolve() for file in find_files(source) if isinstance(file, Path)
    }:
        raise LaunchError(f"--out {out} is the input. Choose another file")
    vocabulary, _ = load_saved_vocabulary(folder.vocabulary)
    columns = list_gene_names(expression.var, settings.gene_column, "--gene-column")
    match = match_genes(columns, vocabulary, where=str(source))
    identity = fingerprint(
        _describe_source(source, expression),
        expression.query.layer,
        sha256_of_file(checkpoint.weights_path),
        match.column,
        settings.rows_per_block,
        _PARTS_VERSION,
    )
    with parts_of(out, identity) as parts:
        with stored_by_row(
            expression, out.parent, run_tasks, rows_per_block=settings.rows_per_block
        ) as by_row:
            blocks = _cut_blocks(by_row, folder, config, checkpoint, match, settings, parts)
            found = list(run_tasks(embed_block, blocks, what="embedding", unit="cells"))
        scores = join_scores(found)
        with full_disk_is_a_user_error(out):
            provenance: dict[str, str | int] = {
                "checkpoint_step": checkpoint.progress.step,
                "run": config.name,
                "run_fingerprint": checkpoint.run_fingerprint,
            }
            files = [block.part for block in blocks if block.part is not None]
            write_embedding(out, OBSM_KEY, files, expression.obs, provenance)
    return describe_match(match, str(source)), scores


def _describe_source(source: InputPath, expression: Expression) -> object:
    if isinstance(expression.reader, Store):
        return expression.reader.digest
    return describe_input(source)


def _cut_blocks(
    expression: Expression,
    folder: EmbedFolder,
    config: EmbedConfig,
    checkpoint: Checkpoint,
    match: GeneMatch,
    settings: ApplySettings,
    parts: Path,
) -> list[EmbedBlock]:
    rows = expression.rows
    is_scored = np.zeros(len(rows), dtype=np.bool_)
    size = min(MAX_SCORED_CELLS, len(rows))
    is_scored[np.random.default_rng(config.seed).choice(len(rows), size, replace=False)] = True
    digest, blocks = sha256_of_file(checkpoint.weights_path), []
    asked_K = draw_asked_genes(match, config.seed)
    for number, block in enumerate(cut_rows(rows, settings.rows_per_block)):
        first = number * settings.rows_per_block
        blocks.append(
            EmbedBlock(
                run_dir=folder.path,
                weights=checkpoint.weights_path,
                weights_digest=digest,
                reader=expression.reader,
                rows=block.rows,
                match=match,
                scored=np.flatnonzero(is_scored[first : first + len(block.rows)]),
                asked_K=asked_K,
                batch_size=settings.batch_size,
                part=parts / f"{number:08d}.npy",
                num_cpus=config.cluster.cpus_per_worker,
                num_gpus=int(settings.use_gpu),
            )
        )
    return blocks


def draw_asked_genes(match: GeneMatch, seed: int) -> npt.NDArray[np.int32]:
    """Draw the tokens that all scored cells of an input are asked for, the same ones each time.

    All cells share them, so that a gene can be scored over cells too. What is kept is at most
    ``MAX_SCORED_CELLS`` x ``NUM_SCORED_GENES`` numbers (1 MB), whatever the input's size.
    """
    known = np.sort(match.token_G[match.token_G >= 0])
    size = min(NUM_SCORED_GENES, len(known))
    drawn_K: npt.NDArray[np.int32] = np.random.default_rng(seed).choice(known, size, replace=False)
    return drawn_K


def join_scores(found: Sequence[DetectionAnswers]) -> DetectionScores:
    """Score all cells of several blocks together."""
    answers = DetectionAnswers(
        decoded_SK=np.concatenate([block.decoded_SK for block in found]),
        is_expressed_SK=np.concatenate([block.is_expressed_SK for block in found]),
        level_S=np.concatenate([block.level_S for block in found]),
        frequency_K=found[0].frequency_K,
    )
    return score_detection(answers)


def score_held_out(
    datasets: Sequence[EmbedDataset],
    folder: EmbedFolder,
    config: EmbedConfig,
    checkpoint: Checkpoint,
    run_tasks: TaskRunner,
) -> dict[str, DetectionScores]:
    """Score the decoder on held-out cells of each dataset."""
    digest, blocks = sha256_of_file(checkpoint.weights_path), []
    for dataset in datasets:
        size = min(MAX_SCORED_CELLS, len(dataset.val_rows))
        rng = np.random.default_rng(config.seed)
        rows = np.sort(rng.choice(dataset.val_rows, size, replace=False))
        blocks.append(
            EmbedBlock(
                run_dir=folder.path,
                weights=checkpoint.weights_path,
                weights_digest=digest,
                reader=dataset.store,
                rows=rows,
                match=dataset.match,
                scored=np.arange(size),
                asked_K=draw_asked_genes(dataset.match, config.seed),
                batch_size=config.train.micro_batch_size,
                num_cpus=config.cluster.cpus_per_worker,
                num_gpus=int(config.cluster.use_gpu),
            )
        )
    found = run_tasks(embed_block, blocks, what="scoring", unit="cells")
    return {
        dataset.name: join_scores([scores]) for dataset, scores in zip(datasets, found, strict=True)
    }
