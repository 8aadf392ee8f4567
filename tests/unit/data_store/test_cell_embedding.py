"""An embedding goes from obsm, in the input or beside it, into the store in the store's order."""

import os
import re
import warnings

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from data_store import cell_embedding
from data_store.manifest import read_manifest
from data_store.preprocess import preprocess
from data_store.repair import repair_store
from data_store.schema import StoreError, run_in_process
from data_store.store import Store
from tests.support.atlas import build_atlas
from tests.support.preprocess import file_digests, make_spec

KEY = "X_emb"
DIM = 5


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


def embed(atlas, seed=0, dim=DIM, dtype=np.float32):
    """Give every cell numbers that no other has."""
    rng = np.random.default_rng(seed)
    atlas.obsm[KEY] = rng.normal(size=(atlas.n_obs, dim)).astype(dtype)
    return atlas


@pytest.fixture
def atlas():
    return embed(build_atlas(num_cells=400, num_genes=40, contexts=2))


@pytest.fixture
def small_deals(monkeypatch):
    """Several deals of each file, and several pieces in each block of the store."""
    monkeypatch.setattr(cell_embedding, "VALUES_PER_DEAL", 61 * DIM)


def expected(store, *atlases):
    """Look the embedding of each cell of the store up by where the cell came from."""
    return np.concatenate([atlas.obsm[KEY] for atlas in atlases])[store.source_row]


def make(tmp_path, source, name="store", **changes):
    return preprocess(make_spec(source, tmp_path / name, embed_key=KEY, **changes))


def write_zarr(atlas, path, zarr_format):
    with warnings.catch_warnings(), ad.settings.override(zarr_write_format=zarr_format):
        warnings.simplefilter("ignore")
        atlas.write_zarr(path)


FORMS = {
    "h5ad": lambda atlas, path: atlas.write_h5ad(path),
    "compressed": lambda atlas, path: atlas.write_h5ad(path, compression="gzip"),
    "zarr2": lambda atlas, path: write_zarr(atlas, path, 2),
    "zarr3": lambda atlas, path: write_zarr(atlas, path, 3),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_cell_keeps_its_embedding(tmp_path, atlas, small_deals, form):
    path = tmp_path / ("a.zarr" if "zarr" in form else "a.h5ad")
    FORMS[form](atlas, path)
    store = make(tmp_path, path, keep={"cell_type": ["line_1"]})
    assert (store.embed_key, store.embed_dim) == (KEY, DIM)
    values = store.read_matrix("embedding")
    assert values.dtype == np.float32
    assert np.array_equal(values, expected(store, atlas))
    assert np.array_equal(store.read_rows("embedding", 70, 130), values[70:130])
    written = ad.read_zarr(store.path)
    assert np.array_equal(written.obsm[KEY], values)
    assert written.obsm["X_hvg"].shape == (store.num_cells, 20)
    assert store.verify() == []
    assert f"obsm/{KEY}/c/0/0" in read_manifest(store.path).files


def test_wider_types_are_narrowed_and_other_layouts_of_the_counts_do_not_matter(tmp_path, atlas):
    atlas.obsm[KEY] = atlas.obsm[KEY].astype(np.float64) * 1.1
    atlas.X = sp.csc_matrix(atlas.X)
    atlas.write_h5ad(tmp_path / "a.h5ad")
    store = make(tmp_path, tmp_path / "a.h5ad")
    assert np.array_equal(store.read_matrix("embedding"), expected(store, atlas).astype(np.float32))


def test_several_files_are_one_below_the_other(tmp_path, small_deals):
    (tmp_path / "in").mkdir()
    parts = [embed(build_atlas(num_cells=150, seed=seed), seed) for seed in range(2)]
    for number, part in enumerate(parts):
        part.obs_names = [f"{number}_{name}" for name in part.obs_names]
        part.write_h5ad(tmp_path / f"in/{number}.h5ad")
    store = make(tmp_path, tmp_path / "in")
    assert np.array_equal(store.read_matrix("embedding"), expected(store, *parts))
    embed(parts[1], dim=7).write_h5ad(tmp_path / "in/1.h5ad")
    with pytest.raises(StoreError, match=r"5 numbers wide in .*0\.h5ad and 7 in .*1\.h5ad"):
        make(tmp_path, tmp_path / "in", "other")
    del parts[1].obsm[KEY]
    parts[1].write_h5ad(tmp_path / "in/1.h5ad")
    with pytest.raises(StoreError, match=r"1\.h5ad has no obsm\['X_emb'\]"):
        make(tmp_path, tmp_path / "in", "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "store"]


def test_a_file_of_its_own_is_matched_by_the_cells_names(tmp_path, atlas, small_deals):
    embedding = ad.AnnData(obs=atlas.obs[[]].copy(), obsm={KEY: atlas.obsm.pop(KEY)})
    atlas.write_h5ad(tmp_path / "a.h5ad")
    shuffled = embedding[np.random.default_rng(1).permutation(atlas.n_obs)].copy()
    shuffled.write_h5ad(tmp_path / "e.h5ad")
    store = make(tmp_path, tmp_path / "a.h5ad", embed_file=tmp_path / "e.h5ad")
    values = embedding.obsm[KEY][store.source_row]
    assert np.array_equal(store.read_matrix("embedding"), values)
    # Cells that are not kept need none.
    kept = atlas.obs["cell_type"].to_numpy() == "line_0"
    embedding[kept].write_h5ad(tmp_path / "part.h5ad")
    options = {"embed_file": tmp_path / "part.h5ad"}
    store = make(tmp_path, tmp_path / "a.h5ad", "k", keep={"cell_type": ["line_0"]}, **options)
    assert np.array_equal(store.read_matrix("embedding"), embedding.obsm[KEY][store.source_row])
    with pytest.raises(StoreError, match=r"part\.h5ad has no embedding of 200 of the 400 cells"):
        make(tmp_path, tmp_path / "a.h5ad", "all", **options)
    # The store knows its cells' names too.
    named = ad.AnnData(obs=store.read_obs(np.arange(store.num_cells)))
    named.obsm[KEY] = np.arange(store.num_cells, dtype=np.float32)[:, None]
    named.write_h5ad(tmp_path / "of_store.h5ad")
    options = {"embed_file": tmp_path / "of_store.h5ad", "keep": {"cell_type": ["line_0"]}}
    again = make(tmp_path, tmp_path / "a.h5ad", "again", **options)
    assert again.read_matrix("embedding")[:, 0].tolist() == list(range(store.num_cells))


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_names_that_occur_twice_are_refused_unless_the_order_tells(tmp_path, atlas):
    atlas.obs_names = ["same"] * 2 + list(atlas.obs_names[2:])
    embedding = ad.AnnData(obs=atlas.obs[[]].copy(), obsm={KEY: atlas.obsm.pop(KEY)})
    atlas.write_h5ad(tmp_path / "a.h5ad")
    embedding.write_h5ad(tmp_path / "e.h5ad")
    store = make(tmp_path, tmp_path / "a.h5ad", embed_file=tmp_path / "e.h5ad")
    values = embedding.obsm[KEY][store.source_row]
    assert np.array_equal(store.read_matrix("embedding"), values)
    embedding[::-1].write_h5ad(tmp_path / "e.h5ad")
    with pytest.raises(StoreError, match="names occur more than once: same"):
        make(tmp_path, tmp_path / "a.h5ad", "other", embed_file=tmp_path / "e.h5ad")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_a_value_that_is_not_finite_is_refused_with_its_row(tmp_path, atlas, value):
    atlas.obsm[KEY] = atlas.obsm[KEY].astype(np.float64)
    atlas.obsm[KEY][17, 3] = value
    atlas.write_h5ad(tmp_path / "a.h5ad")
    message = re.escape(f"a.h5ad holds {value:g} (row 17, column 3)")
    with pytest.raises(StoreError, match=message):
        make(tmp_path, tmp_path / "a.h5ad")
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5ad"]
    # A cell that is left out needs none.
    other = ["line_0", "line_1"][atlas.obs["cell_type"].iloc[17] == "line_0"]
    make(tmp_path, tmp_path / "a.h5ad", keep={"cell_type": [other]})


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("X_em", r"no obsm\['X_em'\].*did you mean 'X_emb'.*X_emb.*embed apply"),
        ("X_hvg", "every store makes"),
        ("a/b", "cannot be a folder"),
        ("table", "stored as 'dataframe', but must be a dense matrix"),
        ("sparse", "stored as 'csr_matrix', but must be a dense matrix"),
        ("cube", r"shape \(400, 2, 2\)"),
        ("flags", r"bool of shape \(400, 2\)"),
    ],
)
def test_what_is_no_embedding_is_one_message(tmp_path, atlas, key, message):
    atlas.obsm["table"] = pd.DataFrame({"a": np.zeros(400)}, index=atlas.obs_names)
    atlas.obsm["sparse"] = sp.csr_matrix(np.ones((400, 2)))
    atlas.obsm["cube"] = np.zeros((400, 2, 2))
    atlas.obsm["flags"] = np.zeros((400, 2), dtype=bool)
    atlas.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(StoreError, match=message):
        preprocess(make_spec(tmp_path / "a.h5ad", tmp_path / "store", embed_key=key))
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5ad"]


def test_a_file_without_obsm_and_rows_that_are_too_few_are_refused(tmp_path, atlas):
    path = tmp_path / "a.h5ad"
    atlas.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        short = file["obsm"][KEY][:-1]
        del file["obsm"][KEY]
        file["obsm"][KEY] = short
    with pytest.raises(StoreError, match="399 rows for 400 cells"):
        make(tmp_path, path)
    with h5py.File(path, "r+") as file:
        del file["obsm"]
    with pytest.raises(StoreError, match=r"Keys of its obsm: \(none\)"):
        make(tmp_path, path)


def test_a_store_without_one_is_what_it_was_and_an_embedding_adds_files_alone(tmp_path, atlas):
    atlas.write_h5ad(tmp_path / "a.h5ad")
    plain = preprocess(make_spec(tmp_path / "a.h5ad", tmp_path / "plain"))
    assert "embed_key" not in plain.manifest.spec
    assert (plain.embed_key, plain.embed_dim) == (None, 0)
    assert not (plain.path / "obsm" / KEY).exists()
    store = make(tmp_path, tmp_path / "a.h5ad")
    ours, theirs = file_digests(store.path), file_digests(plain.path)
    differing = {name for name in ours if ours[name] != theirs.get(name)}
    own = {name for name in differing if name.startswith(f"obsm/{KEY}/")}
    # And the files that list the others.
    assert differing - own == {"zarr.json", "manifest.json", "COMMIT"}
    assert theirs.keys() == ours.keys() - own
    assert store.digest != plain.digest


def test_another_key_or_file_is_another_store(tmp_path, atlas):
    atlas.obsm["X_two"] = atlas.obsm[KEY] + 1
    atlas.write_h5ad(tmp_path / "a.h5ad")
    store = make(tmp_path, tmp_path / "a.h5ad")
    assert make(tmp_path, tmp_path / "a.h5ad").digest == store.digest
    with pytest.raises(StoreError, match="embed_key: 'X_emb' there, 'X_two' asked"):
        preprocess(make_spec(tmp_path / "a.h5ad", store.path, embed_key="X_two"))
    with pytest.raises(StoreError, match="embed_key: 'X_emb' there, None asked"):
        preprocess(make_spec(tmp_path / "a.h5ad", store.path))
    atlas.write_h5ad(tmp_path / "e.h5ad")
    with pytest.raises(StoreError, match=r"an embedding from the input there, from .*e\.h5ad now"):
        make(tmp_path, tmp_path / "a.h5ad", embed_file=tmp_path / "e.h5ad")


def test_an_interrupted_run_goes_on_to_the_same_store(tmp_path, atlas, small_deals):
    atlas.write_h5ad(tmp_path / "a.h5ad")
    whole = make(tmp_path, tmp_path / "a.h5ad")

    class Interrupted(Exception):
        pass

    for stop_after in (("read embedding", 2), ("read cells", 1), ("write store", 2)):
        seen = []

        def run_tasks(task, items, *, what, unit, stop_after=stop_after, seen=seen):
            for number, result in enumerate(run_in_process(task, items, what=what, unit=unit)):
                if (what, number) == stop_after:
                    raise Interrupted
                seen.append(what)
                yield result

        spec = make_spec(tmp_path / "a.h5ad", tmp_path / "killed", embed_key=KEY)
        with pytest.raises(Interrupted):
            preprocess(spec, run_tasks)
        # What was dealt stays: nothing of it is read again.
        assert len(list((tmp_path / "killed.partial/deals").glob("*.embedding"))) >= 3
    assert file_digests(preprocess(spec).path) == file_digests(whole.path)


def test_a_damaged_embedding_is_mended_from_the_input(tmp_path, atlas, small_deals):
    atlas.write_h5ad(tmp_path / "a.h5ad")
    embedding = ad.AnnData(obs=atlas.obs[[]].copy(), obsm={KEY: atlas.obsm[KEY]})
    embedding[::-1].write_h5ad(tmp_path / "e.h5ad")
    for embed_file in (None, tmp_path / "e.h5ad"):
        store = make(tmp_path, tmp_path / "a.h5ad", f"s{embed_file is None}", embed_file=embed_file)
        before = file_digests(store.path)
        for names in (
            [f"obsm/{KEY}/c/1/0"],
            [f"obsm/{KEY}/c/0/0", "X/data/c/0", "obs/source_row/c/0"],
            [f"obsm/{KEY}/zarr.json"],
        ):
            for name in names:
                content = bytearray((store.path / name).read_bytes())
                content[len(content) // 2] ^= 1
                (store.path / name).write_bytes(content)
            if len(names) == 1 and "zarr" not in names[0]:
                with pytest.raises(StoreError, match=rf"{names[0]} is missing or damaged.*repair"):
                    Store.open(store.path).read_matrix("embedding")
            assert repair_store(store.path) == sorted(names)
            assert file_digests(store.path) == before
    (tmp_path / "e.h5ad").unlink()
    (store.path / f"obsm/{KEY}/c/0/0").unlink()
    with pytest.raises(StoreError, match=r"cannot be repaired without .*e\.h5ad is not there"):
        repair_store(store.path)
