"""What several tests of ``preprocess`` share: an atlas, and the store made of it."""

import pytest

from data_store.preprocess import preprocess
from tests.support.atlas import write_atlas
from tests.support.preprocess import make_spec


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("atlas") / "atlas.h5ad"
    return write_atlas(path, num_cells=800, num_genes=70, contexts=2)


@pytest.fixture(scope="module")
def store(source, tmp_path_factory):
    return preprocess(make_spec(source, tmp_path_factory.mktemp("out") / "store"))
