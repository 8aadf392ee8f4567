"""``statewide store info|verify`` and ``preprocess``: what they print, and their exit codes."""

import sys

import pytest

from launcher import cli
from state.training.fault_log import FaultLog
from tests.support.atlas import write_atlas


@pytest.fixture
def statewide(capsys, monkeypatch):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["statewide", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return call


@pytest.fixture
def store(statewide, tmp_path):
    for number in range(2):
        write_atlas(tmp_path / f"part_{number}.h5ad", num_cells=200, seed=number)
    code, out, err = statewide(
        *("preprocess", tmp_path / "part_{0,1}.h5ad", "--out", tmp_path / "store", "--local"),
        *("--n-hvg", 20, "--batch-col", "batch", "--genes", "intersection"),
    )
    assert code == 0, err
    assert "400 cells, 60 genes, 20 highly variable" in out
    return tmp_path / "store"


def test_info_tells_what_is_in_it(statewide, store):
    code, out, _ = statewide("store", "info", store)
    assert code == 0
    for part in (
        "400 (0 without counts)",
        "2: batch_0, batch_1",
        "part_1.h5ad: 200 cells in it",
        "n_top_genes = 20",
        "genes = 'intersection'",
    ):
        assert part in out


def test_genes_by_another_flavor_within_batches(statewide, tmp_path):
    path = write_atlas(tmp_path / "atlas.h5ad", num_cells=200)
    make = ("preprocess", path, "--out", tmp_path / "store", "--local", "--n-hvg", 20)
    choice = ("--hvg-flavor", "cell_ranger", "--hvg-batch-key", "batch")
    code, _, err = statewide(*make, *choice)
    assert code == 0, err
    _, out, _ = statewide("store", "info", tmp_path / "store")
    assert "hvg_flavor = 'cell_ranger'" in out
    assert "hvg_batch_key = 'batch'" in out
    code, _, err = statewide(*make)
    assert (code, "hvg_flavor: 'cell_ranger' there, 'seurat' asked" in err) == (2, True)
    code, _, err = statewide(*make, "--hvg-flavor", "seurat4")
    assert (code, "seurat_v3_paper" in err) == (2, True)


def test_verify_names_the_damaged_shard_and_repair_mends_it(statewide, store):
    code, out, _ = statewide("store", "verify", store)
    assert (code, "files have their checksums" in out) == (0, True)
    shard = store / "X/data/c/0"
    content = shard.read_bytes()
    shard.write_bytes(content[:99] + bytes([content[99] ^ 1]) + content[100:])
    code, _, err = statewide("store", "verify", store)
    assert code == 2
    assert "X/data/c/0" in err
    assert "--repair" in err
    code, out, _ = statewide("store", "verify", store, "--repair")
    assert code == 0
    assert "mended X/data/c/0" in out
    assert shard.read_bytes() == content
    assert not (store.parent / "logs").exists()


def test_what_is_mended_in_a_runs_own_store_is_counted(statewide, store):
    (store.parent / "config.toml").touch()
    (store / "X/data/c/0").unlink()
    assert statewide("store", "verify", store, "--repair")[0] == 0
    assert FaultLog(store.parent).count()["faults/shards_repaired"] == 1


def test_other_commands_refuse_a_cut_shard(statewide, store, tmp_path):
    shard = store / "obsm/X_hvg/c/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    for command in (["store", "info", store], ["split", store, "--out", tmp_path / "s.toml"]):
        code, _, err = statewide(*command)
        assert code == 2
        assert "obsm/X_hvg/c/0/0 missing or cut short" in err


def test_verify_of_no_store(statewide, tmp_path):
    code, _, err = statewide("store", "verify", tmp_path)
    assert (code, "is not a finished store" in err) == (2, True)


def test_a_layer_that_is_not_there(statewide, tmp_path):
    path = write_atlas(tmp_path / "a.h5ad")
    code, _, err = statewide(
        "preprocess", path, "--layer", "umis", "--out", tmp_path / "s", "--local"
    )
    assert (code, "has no layer 'umis' (data.layer)" in err) == (2, True)
