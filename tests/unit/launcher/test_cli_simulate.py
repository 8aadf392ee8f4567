import anndata as ad
import numpy as np
import pytest
from typer.testing import CliRunner

from data_store.schema import StoreError
from launcher.cli import app


def simulate(*arguments):
    result = CliRunner().invoke(app, ["simulate", "--local", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_preset_with_names_and_counts_from_files(tmp_path):
    names, counts = tmp_path / "names.csv", tmp_path / "counts.csv"
    names.write_text("\n".join(f"GENE{number}" for number in range(300)))
    counts.write_text("target_gene,n_cells\nGENE5,30\nnon-targeting,60\nGENE8,10\n")
    out = tmp_path / "atlas.h5ad"
    sizes = ("--cells", 200, "--genes", 300, "--perturbations", 2)
    files = ("--gene-names", names, "--cells-per-perturbation", counts)
    assert simulate("--out", out, "--preset", "vcc", *sizes, *files).exit_code == 0
    atlas = ad.read_h5ad(out)
    assert atlas.shape == (200, 300)
    assert atlas.X.dtype == np.uint16
    assert atlas.obs["batch"].nunique() == 48
    assert atlas.obs["target_gene"].value_counts().to_dict() == {
        "GENE5": 60,
        "non-targeting": 120,
        "GENE8": 20,
    }
    with pytest.raises(StoreError, match="num_genes = 18080, but .*lists 300.*--genes"):
        simulate("--out", out, "--preset", "vcc", *files)


def test_without_a_preset_the_sizes_are_small_and_contexts_can_be_asked_for(tmp_path):
    out = tmp_path / "atlas.h5ad"
    simulate("--out", out, "--cells", 400, "--genes", 60, "--perturbations", 5, "--contexts", 2)
    atlas = ad.read_h5ad(out)
    assert atlas.shape == (400, 60)
    assert atlas.X.dtype == np.float32
    assert (atlas.obs["cell_type"].nunique(), atlas.obs["batch"].nunique()) == (2, 2)


def test_an_unknown_preset_is_a_usage_error(tmp_path):
    result = simulate("--out", tmp_path / "a.h5ad", "--preset", "tahoe")
    assert result.exit_code == 2
    assert "vcc" in result.output
