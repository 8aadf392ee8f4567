"""Inputs at a URL: read in ranges, checked for change, and refused with one message."""

import http.server
import threading
from functools import partial
from pathlib import Path

import anndata as ad
import fsspec
import numpy as np
import pytest

from data_store.atlas import open_source, read_table
from data_store.ingest import read_count_rows
from data_store.locate import describe_input, explain_change
from data_store.preprocess import PreprocessSpec, preprocess
from data_store.schema import ObsColumns, StoreError
from tests.support.atlas import build_atlas, write_atlas


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serves ranges of files, which the standard library's handler does not."""

    has_ranges = True
    sent_bytes = 0

    def send_head(self):
        wanted = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if not (self.has_ranges and wanted and path.is_file()):
            return super().send_head()
        first, last = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
        size = path.stat().st_size
        last = min(last, size - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        self.end_headers()
        with path.open("rb") as file:
            file.seek(first)
            self.wfile.write(file.read(last + 1 - first))
        type(self).sent_bytes += last + 1 - first
        return None

    def log_message(self, *arguments):
        pass


class QuietServer(http.server.ThreadingHTTPServer):
    """Says nothing of clients that hang up."""

    def handle_error(self, request, client_address):
        pass


@pytest.fixture
def handler():
    return type("Handler", (RangeHandler,), {})


@pytest.fixture
def served(tmp_path, handler):
    folder = tmp_path / "served"
    folder.mkdir()
    factory = partial(handler, directory=str(folder))
    with QuietServer(("127.0.0.1", 0), factory) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_store_from_http_is_that_of_the_file(served, tmp_path):
    folder, url = served
    write_atlas(folder / "atlas.h5ad")
    columns = ObsColumns(batch_col="batch")
    sources = (folder / "atlas.h5ad", f"{url}/atlas.h5ad")
    stores = [
        preprocess(PreprocessSpec(source, tmp_path / name, columns, None, {}, 20, 200))
        for source, name in zip(sources, ("here", "there"), strict=True)
    ]
    assert stores[0].digest == stores[1].digest
    assert stores[1].manifest.source["path"] == f"{url}/atlas.h5ad"


def test_only_the_rows_asked_for_are_fetched(served, handler):
    folder, url = served
    write_atlas(folder / "atlas.h5ad", num_cells=12_000, num_genes=300)
    size = (folder / "atlas.h5ad").stat().st_size
    source = open_source(f"{url}/atlas.h5ad")
    handler.sent_bytes = 0
    counts = read_count_rows(source, np.arange(40, 50))
    expected = ad.read_h5ad(folder / "atlas.h5ad").X[40:50].toarray()
    assert np.array_equal(counts.toarray(), expected)
    assert 0 < handler.sent_bytes < size / 2


@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part")
@pytest.mark.filterwarnings("ignore:Writing zarr v2 data will no longer be the default:UserWarning")
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr_over_http(served, zarr_format):
    folder, url = served
    atlas = build_atlas(num_cells=50, num_genes=20)
    with ad.settings.override(zarr_write_format=zarr_format, auto_shard_zarr_v3=False):
        atlas.write_zarr(folder / "atlas.zarr")
    source = open_source(f"{url}/atlas.zarr")
    assert np.array_equal(read_count_rows(source, np.arange(50)).toarray(), atlas.X.toarray())
    assert list(read_table(source, "obs")["batch"]) == list(atlas.obs["batch"])


def test_memory_file_system(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5ad", num_cells=50, num_genes=20)
    with fsspec.open("memory://test_remote/atlas.h5ad", "wb") as file:
        file.write(path.read_bytes())
    source = open_source("memory://test_remote/atlas.h5ad")
    expected = ad.read_h5ad(path).X.toarray()
    assert np.array_equal(read_count_rows(source, np.arange(50)).toarray(), expected)


def test_a_new_version_is_noticed(served):
    folder, url = served
    path = write_atlas(folder / "atlas.h5ad", num_cells=50, num_genes=20)
    before = describe_input(f"{url}/atlas.h5ad")
    assert explain_change(before, describe_input(f"{url}/atlas.h5ad")) is None
    with path.open("ab") as file:
        file.write(b"x")
    assert "bytes of atlas.h5ad" in explain_change(before, describe_input(f"{url}/atlas.h5ad"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("{url}/absent.h5ad", r"absent\.h5ad is not there"),
        ("{url}/text.h5ad", r"text\.h5ad is not an h5ad \(HDF5\) file"),
        ("{url}/absent.zarr", r"absent\.zarr is not a zarr group"),
        ("http://127.0.0.1:9/a.h5ad", "cannot be read: .*Check the address"),
        ("nowhere://a.h5ad", "cannot be opened: Protocol not known: nowhere"),
        ("gs://bucket/a.h5ad", "needs a Python package that is not installed: .*gcsfs"),
    ],
)
def test_what_cannot_be_opened_is_said(served, url, message):
    folder, base = served
    (folder / "text.h5ad").write_text("cell,gene\n" * 100)
    with pytest.raises(StoreError, match=message):
        open_source(url.format(url=base))


def test_a_server_without_ranges_is_refused(served, handler):
    folder, url = served
    write_atlas(folder / "atlas.h5ad", num_cells=12_000, num_genes=300)
    handler.has_ranges = False
    with pytest.raises(StoreError, match="download the file and give its path"):
        open_source(f"{url}/atlas.h5ad")
