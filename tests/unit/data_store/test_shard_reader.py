"""Reading shards by hand gives what zarr-python gives, and damage is named."""

import json

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec

from data_store.schema import StoreError
from data_store.shard_reader import ReadBuffer, ShardedArray

ROWS, WIDTH = 103, 3


def write(folder, *, dtype="float32", shape=(ROWS,), chunk=5, shard=20, **settings):
    tail = shape[1:]
    array = zarr.create_array(
        folder,
        zarr_format=3,
        shape=shape,
        chunks=(chunk, *tail),
        shards=(shard, *tail),
        dtype=dtype,
        compressors=settings.pop("compressors", [BloscCodec(cname="lz4"), Crc32cCodec()]),
        fill_value=0,
        **settings,
    )
    values = np.random.default_rng(0).integers(1, 200, size=shape).astype(dtype)
    array[:] = values
    return values


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arrays")
    made = []
    for number, (dtype, shape) in enumerate(
        [("float32", (ROWS,)), ("uint16", (ROWS,)), ("int64", (ROWS,)), ("float32", (ROWS, WIDTH))]
    ):
        values = write(folder / str(number), dtype=dtype, shape=shape)
        made.append((ShardedArray(folder / str(number)), values))
    return made


@settings(deadline=None)
@given(bounds=st.tuples(st.integers(0, ROWS), st.integers(0, ROWS)).map(sorted))
def test_any_range_equals_the_written_values(arrays, bounds):
    start, stop = bounds
    for array, values in arrays:
        read = array.read(start, stop)
        assert read.dtype == values.dtype
        assert np.array_equal(read, values[start:stop])


def test_a_buffer_is_used_again(arrays):
    array, values = arrays[0]
    buffer = ReadBuffer()
    first = array.read(0, 40, buffer)
    kept = first.copy()
    assert np.array_equal(array.read(40, 80, buffer), values[40:80])
    assert not np.array_equal(first, kept)


def test_chunks_that_were_never_written_are_zero(tmp_path):
    array = zarr.create_array(
        tmp_path / "a", shape=(40,), chunks=(5,), shards=(20,), dtype="float32", fill_value=0,
        compressors=[BloscCodec(), Crc32cCodec()],
    )  # fmt: skip
    array[7:9] = 3.0
    expected = np.zeros(20, dtype=np.float32)
    expected[7:9] = 3
    assert np.array_equal(ShardedArray(tmp_path / "a").read(0, 20), expected)


@pytest.mark.parametrize("harm", ["missing", "empty", "short", "index", "header", "chunk"])
def test_a_damaged_shard_is_named(tmp_path, harm):
    write(tmp_path / "a")
    shard = tmp_path / "a/c/1"
    content = bytearray(shard.read_bytes())
    if harm == "missing":
        shard.unlink()
    elif harm == "empty":
        shard.write_bytes(b"")
    elif harm == "short":
        shard.write_bytes(content[10:])
    else:
        content[{"index": -30, "header": 5, "chunk": 40}[harm]] ^= 0xFF
        shard.write_bytes(content)
    array = ShardedArray(tmp_path / "a")
    array.read(0, 20)
    with pytest.raises(StoreError, match=r"a/c/1 is missing or damaged"):
        array.read(0, 40)


@pytest.mark.parametrize(
    "settings",
    [{"compressors": None}, {"compressors": BloscCodec()}, {"shape": (ROWS, 4), "chunk": 4}],
)
def test_another_layout_is_refused(tmp_path, settings):
    write(tmp_path / "a", **settings)
    if "chunk" in settings:
        meta = json.loads((tmp_path / "a/zarr.json").read_text())
        meta["codecs"][0]["configuration"]["chunk_shape"][1] = 2
        (tmp_path / "a/zarr.json").write_text(json.dumps(meta))
    with pytest.raises(StoreError, match="not laid out as statewide writes it"):
        ShardedArray(tmp_path / "a")


def test_missing_metadata_is_an_error(tmp_path):
    with pytest.raises(StoreError, match=r"zarr\.json is missing or damaged"):
        ShardedArray(tmp_path / "absent")
