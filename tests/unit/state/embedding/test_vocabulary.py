"""Gene tables: joining, refusing, and finding a dataset's genes in them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from state.config import ConfigError
from state.embedding.vocabulary import (
    GeneLevels,
    GeneVocabulary,
    describe_match,
    load_saved_vocabulary,
    load_vocabulary,
    match_genes,
    save_vocabulary,
)

VOCABULARY = GeneVocabulary(("A", "B", "C", "ENSG00000000003"), torch.eye(4))


def write(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_tables_of_several_files_and_species_are_joined(tmp_path: Path):
    human = write(tmp_path / "human.pt", {"B": torch.ones(2), "A": torch.zeros(2).half()})
    more = write(tmp_path / "more.pt", {"mouse": {"a": torch.ones(2)}, "fly": {"f": torch.ones(2)}})
    vocabulary = load_vocabulary([human, more])
    assert vocabulary.names == ("A", "B", "a", "f")
    assert vocabulary.values_VE.dtype == torch.float32
    assert vocabulary.values_VE.tolist() == [[0, 0], [1, 1], [1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("contents", "parts"),
    [
        ([{"A": torch.ones(2)}, {"A": torch.zeros(2)}], ["0.pt", "1.pt", "'A'", "different"]),
        ([{"A": torch.ones(2), "B": torch.ones(3)}], ["one width", "2", "3"]),
        ([{"A": torch.tensor([1.0, float("nan")])}], ["'A'", "not finite"]),
        ([{"A": [1, 2]}], ["'A'", "dict[str, Tensor]"]),
        ([{"A": torch.ones(2), " ": torch.ones(2)}], ["0.pt", "without a name", "leave it out"]),
        ([[1]], ["a list, not a dict"]),
        ([{}], ["no gene"]),
    ],
)
def test_tables_that_cannot_be_used_are_refused(tmp_path: Path, contents, parts):
    paths = [write(tmp_path / f"{number}.pt", content) for number, content in enumerate(contents)]
    with pytest.raises(ConfigError) as caught:
        load_vocabulary(paths)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_a_file_that_is_no_table_is_refused(tmp_path: Path):
    (tmp_path / "text.pt").write_text("genes")
    for name, part in (("text.pt", "not a file of plain tensors"), ("absent.pt", "cannot be read")):
        with pytest.raises(ConfigError, match=part):
            load_vocabulary([tmp_path / name])


def test_the_column_that_matches_most_is_taken():
    columns = {"index": ["A", "x", "y"], "gene_id": ["A", "B", "ENSG00000000003.15"]}
    match = match_genes(columns, VOCABULARY, where="d")
    assert match.column == "gene_id"
    assert match.token_G.tolist() == [0, 1, 3]
    tie = match_genes({"index": ["A", "x"], "other": ["y", "B"]}, VOCABULARY, where="d")
    assert tie.column == "index"


def test_missing_and_repeated_genes_are_reported():
    match = match_genes({"index": ["B", "x", "B", "A"]}, VOCABULARY, where="d")
    assert match.token_G.tolist() == [1, -1, -1, 0]
    assert (match.missing, match.duplicates) == (("x",), ("B",))
    assert describe_match(match, "d") == (
        "d: 2 of 4 genes are in the gene table (by index); missing: x; named twice: B"
    )
    assert match.report()["num_matched"] == 2


def test_genes_without_a_name_are_missing():
    match = match_genes({"index": ["", "A"]}, VOCABULARY, where="d")
    assert match.token_G.tolist() == [-1, 0]
    assert "missing: (no name)" in describe_match(match, "d")


def test_a_dataset_without_any_known_gene_is_refused():
    with pytest.raises(ConfigError) as caught:
        match_genes({"index": ["x", "y"]}, VOCABULARY, where="datasets.d")
    assert all(part in str(caught.value) for part in ("datasets.d", "x, y", "A, B, C"))


def test_ties_are_ranked_by_name_alone():
    larger = GeneVocabulary((*VOCABULARY.names, "Z"), torch.eye(5))
    ranks, more = VOCABULARY.tie_rank_V, larger.tie_rank_V
    assert sorted(ranks) == [0, 1, 2, 3]
    assert (np.argsort(more[:4]) == np.argsort(ranks)).all()


def test_a_saved_vocabulary_reads_back(tmp_path: Path):
    frequency = np.array([0.5, 0, 1, 0.25], dtype=np.float32)
    save_vocabulary(tmp_path / "v.pt", VOCABULARY, GeneLevels(frequency, 2 * frequency))
    vocabulary, read = load_saved_vocabulary(tmp_path / "v.pt")
    assert vocabulary.names == VOCABULARY.names
    assert torch.equal(vocabulary.values_VE, VOCABULARY.values_VE)
    np.testing.assert_array_equal(read.frequency_V, frequency)
    np.testing.assert_array_equal(read.mean_log_V, 2 * frequency)


def test_a_vocabulary_of_an_older_version_is_refused(tmp_path: Path):
    torch.save({"names": ["A"], "values": torch.ones(1, 1)}, tmp_path / "v.pt")
    with pytest.raises(ConfigError, match="older version.*--overwrite"):
        load_saved_vocabulary(tmp_path / "v.pt")
