"""The genes SE knows: a vector for each, and how a dataset's genes are found among them.

A table is a ``torch.save`` of ``dict[str, Tensor]`` (ESM2 embeddings or any other), or of a dict
of such tables. Shape legend: V genes of the vocabulary, E width of the table, G genes of a
dataset. Tested by ``pytest tests/unit/state/embedding/test_vocabulary.py``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_store.files import file_made_whole
from state.config import ConfigError
from state.tensor_file import load_tensor_file

MAX_NAMES_IN_MESSAGE = 10
_ENSEMBL_VERSION = re.compile(r"^(ENS[A-Z]*G\d+)\.\d+$")


@dataclass(frozen=True, eq=False)
class GeneVocabulary:
    """Genes in the order of their tokens."""

    names: tuple[str, ...]
    """[V] names, sorted by code point."""
    values_VE: Tensor
    """float32 [V, E] what is known of each gene."""

    @property
    def tie_rank_V(self) -> npt.NDArray[np.int64]:
        """[V] an order of the genes that depends on their names alone, and is no alphabet.

        Decides which of equally expressed genes come into a sequence that is full.
        """
        digests = [hashlib.sha256(name.encode()).digest()[:8] for name in self.names]
        order = sorted(range(len(digests)), key=digests.__getitem__)
        ranks = np.empty(len(order), dtype=np.int64)
        ranks[order] = np.arange(len(order))
        return ranks


@dataclass(frozen=True, eq=False)
class GeneLevels:
    """How much the training cells express each gene, of datasets that have the gene."""

    frequency_V: npt.NDArray[np.float32]
    """[V] share of the cells that express it; 0 where no dataset has it."""
    mean_log_V: npt.NDArray[np.float32]
    """[V] mean log count; where no dataset has it, the mean of the other genes."""


@dataclass(frozen=True, eq=False)
class GeneMatch:
    """Where the genes of one dataset are in a vocabulary."""

    token_G: npt.NDArray[np.int32]
    """[G] token of each gene; -1: it has none."""
    column: str
    """Where the matching names came from: ``index``, or a column of ``var``."""
    missing: tuple[str, ...]
    """Genes without a token."""
    duplicates: tuple[str, ...]
    """Genes whose token an earlier gene of the dataset has; they are not read."""

    @property
    def num_matched(self) -> int:
        """Genes with a token."""
        return int((self.token_G >= 0).sum())

    def report(self) -> dict[str, Any]:
        """Return what the run folder keeps of the match."""
        report = asdict(self)
        del report["token_G"]
        return report | {"num_genes": len(self.token_G), "num_matched": self.num_matched}


def match_genes(
    candidates: Mapping[str, Sequence[str]], vocabulary: GeneVocabulary, *, where: str
) -> GeneMatch:
    """Find a dataset's genes by whichever of its name columns matches most.

    Names match as they are, or without the version of an Ensembl id (``ENSG00000141510.18``).

    Parameters
    ----------
    candidates
        Column -> [G] names, the preferred one first: it wins ties.
    vocabulary
        The genes to find.
    where
        The dataset, for messages.

    Raises
    ------
    ConfigError
        If no gene is found.
    """
    token_of = {name: token for token, name in enumerate(vocabulary.names)}
    matches = [_match_column(column, names, token_of) for column, names in candidates.items()]
    best = max(matches, key=lambda match: match.num_matched)
    if best.num_matched == 0:
        tried = "; ".join(
            f"{column}: {', '.join(map(str, names[:3]))}" for column, names in candidates.items()
        )
        raise ConfigError(
            f"{where}: none of its genes is in the gene table, which has names such as "
            f"{', '.join(vocabulary.names[:3])}. Tried {tried}. Use a table with the same kind of "
            "names (genes.tables), or name the var column that has them (gene_column)"
        )
    return best


def _match_column(column: str, names: Sequence[str], token_of: Mapping[str, int]) -> GeneMatch:
    tokens = np.full(len(names), -1, dtype=np.int32)
    missing, duplicates = [], []
    seen: set[int] = set()
    for gene, name in enumerate(names):
        token = token_of.get(name)
        if token is None:
            token = token_of.get(_ENSEMBL_VERSION.sub(r"\1", name))
        if token is None:
            missing.append(name)
        elif token in seen:
            duplicates.append(name)
        else:
            seen.add(token)
            tokens[gene] = token
    return GeneMatch(tokens, column, tuple(missing), tuple(duplicates))


def describe_match(match: GeneMatch, where: str) -> str:
    """Say in one line how many genes were found and which were not."""
    text = (
        f"{where}: {match.num_matched:,} of {len(match.token_G):,} genes are in the gene table "
        f"(by {match.column})"
    )
    for what, names in (("missing", match.missing), ("named twice", match.duplicates)):
        if names:
            shown = ", ".join(name.strip() or "(no name)" for name in names[:MAX_NAMES_IN_MESSAGE])
            more = len(names) - MAX_NAMES_IN_MESSAGE
            text += f"; {what}: {shown}{f' and {more:,} more' if more > 0 else ''}"
    return text


def load_vocabulary(paths: Sequence[Path]) -> GeneVocabulary:
    """Join gene tables into one vocabulary.

    Raises
    ------
    ConfigError
        If a file is missing or of another kind, widths differ, a number is not finite, or two
        tables disagree about a gene.
    """
    vectors: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for path in paths:
        for name, vector, where in _read_table(path):
            known = vectors.get(name)
            if known is not None and not torch.equal(known, vector):
                raise ConfigError(
                    f"genes.tables: {origin[name]} and {where} have different vectors for "
                    f"{name!r}. Leave one of them out, or rename the gene"
                )
            vectors[name], origin[name] = vector, where
    widths = {len(vector): name for name, vector in vectors.items()}
    if len(widths) != 1:
        shown = ", ".join(f"{width} ({origin[name]})" for width, name in sorted(widths.items()))
        raise ConfigError(
            f"genes.tables = {[str(path) for path in paths]} must hold vectors of one width; "
            f"found {shown or 'no gene'}"
        )
    names = tuple(sorted(vectors))
    values_VE = torch.stack([vectors[name] for name in names])
    if not bool(torch.isfinite(values_VE).all()):
        bad = names[int((~torch.isfinite(values_VE)).any(1).nonzero()[0])]
        raise ConfigError(
            f"genes.tables: {origin[bad]} has numbers for {bad!r} that are not finite"
        )
    return GeneVocabulary(names, values_VE)


def _read_table(path: Path) -> list[tuple[str, Tensor, str]]:
    """Return (gene, float32 vector, where it stands) of a file, species one after the other."""
    loaded = load_tensor_file(path, f"genes.tables: {path}")
    if not isinstance(loaded, dict):
        raise ConfigError(f"genes.tables: {path} holds a {type(loaded).__name__}, not a dict")
    found = []
    for name, value in loaded.items():
        tables = value.items() if isinstance(value, dict) else [(name, value)]
        where = f"{path}, table {name!r}" if isinstance(value, dict) else str(path)
        for gene, vector in tables:
            if not isinstance(gene, str) or not isinstance(vector, Tensor) or vector.ndim != 1:
                raise ConfigError(
                    f"genes.tables: {where} has no vector for {gene!r}; expected dict[str, Tensor]"
                )
            if not gene.strip():
                raise ConfigError(
                    f"genes.tables: {where} has a vector for a gene without a name ({gene!r}). "
                    "Name it, or leave it out of the table"
                )
            found.append((gene, vector.float(), where))
    return found


def save_vocabulary(path: Path, vocabulary: GeneVocabulary, levels: GeneLevels) -> None:
    """Write a vocabulary and how much training cells express each of its genes, atomically."""
    content = {
        "names": list(vocabulary.names),
        "values": vocabulary.values_VE,
        "frequency": torch.from_numpy(levels.frequency_V),
        "mean_log": torch.from_numpy(levels.mean_log_V),
    }
    with file_made_whole(path) as temporary:
        torch.save(content, temporary)


def load_saved_vocabulary(path: Path) -> tuple[GeneVocabulary, GeneLevels]:
    """Read what ``save_vocabulary`` wrote.

    Raises
    ------
    ConfigError
        If it is of a version that did not write all of it.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    if "mean_log" not in content:
        raise ConfigError(
            f"{path} is of an older version of statewide. Train anew: statewide embed train "
            "RECIPE --overwrite"
        )
    vocabulary = GeneVocabulary(tuple(content["names"]), content["values"])
    return vocabulary, GeneLevels(content["frequency"].numpy(), content["mean_log"].numpy())
