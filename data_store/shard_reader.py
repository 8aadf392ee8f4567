"""Read rows of the store's sharded arrays: one ``pread`` a shard, chunks decoded where they belong.

``shards`` writes these arrays in the Zarr v3 layout, and zarr-python reads them too, but spends
milliseconds on every read however small it is. Here a read costs what its bytes cost.
Tests: ``pytest tests/unit/data_store/test_shard_reader.py``.
"""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import blosc

from data_store.schema import StoreError

_ABSENT = np.iinfo(np.uint64).max
_CRC_BYTES = 4
_MAX_KNOWN_INDEXES = 1024


class ReadBuffer:
    """Memory that reads use again and again: fresh pages cost nearly as much as the decoding."""

    def __init__(self) -> None:
        self._bytes: dict[str, npt.NDArray[np.uint8]] = {}

    def take(self, use: str, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return an uninitialised array, which lives until the next call for the same use."""
        needed = count * dtype.itemsize
        held = self._bytes.get(use)
        if held is None or held.size < needed:
            held = self._bytes[use] = np.empty(needed + needed // 4, dtype=np.uint8)
        return held[:needed].view(dtype)


class ShardedArray:
    """An array of the store whose shards and chunks are cut along its first axis.

    Safe to use from several threads (buffers are not: one for each).

    Parameters
    ----------
    path
        Folder of the array, with its ``zarr.json``.

    Raises
    ------
    StoreError
        If the array is not laid out as ``data_store.shards`` does it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            meta = json.loads((path / "zarr.json").read_bytes())
            (sharding,) = meta["codecs"]
            names = [codec["name"] for codec in sharding["configuration"]["codecs"]]
            chunk_shape = sharding["configuration"]["chunk_shape"]
            shard_shape = meta["chunk_grid"]["configuration"]["chunk_shape"]
            is_known = (
                sharding["name"] == "sharding_indexed"
                and names == ["bytes", "blosc", "crc32c"]
                and sharding["configuration"]["index_location"] == "end"
                and chunk_shape[1:] == shard_shape[1:] == meta["shape"][1:]
                and meta["fill_value"] == 0
            )
            self.dtype: np.dtype[Any] = np.dtype(meta["data_type"]).newbyteorder("<")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path}/zarr.json is missing or damaged ({error!r}); run 'statewide preprocess' "
                "anew"
            ) from error
        if not is_known:
            raise StoreError(
                f"{path} is not laid out as statewide writes it (shards of blosc chunks with "
                "checksums, cut along the rows): make a store with 'statewide preprocess'"
            )
        self.shape = tuple(int(size) for size in meta["shape"])
        self._chunk_rows = int(chunk_shape[0])
        self._chunks_per_shard = int(shard_shape[0]) // self._chunk_rows
        self._row_items = math.prod(self.shape[1:])
        self._key_tail = "/0" * (len(self.shape) - 1)
        self._indexes: OrderedDict[int, npt.NDArray[np.uint64]] = OrderedDict()

    def read(self, start: int, stop: int, buffer: ReadBuffer | None = None) -> npt.NDArray[Any]:
        """Read ``[start:stop]``.

        Parameters
        ----------
        start, stop
            Rows, within the array.
        buffer
            Where to decode to; the result is then valid until the buffer's next use.

        Raises
        ------
        StoreError
            If a shard is missing, cut short, or cannot be decoded.
        """
        if stop <= start:
            return np.empty((0, *self.shape[1:]), dtype=self.dtype)
        first, last = start // self._chunk_rows, -(-stop // self._chunk_rows)
        # Whole chunks are decoded in place: what lies outside of start:stop is cut off by a view.
        chunk_items = self._chunk_rows * self._row_items
        num_items = (last - first) * chunk_items
        buffer = buffer or ReadBuffer()
        items = buffer.take(str(self._path), num_items, self.dtype)
        per_shard = self._chunks_per_shard
        for shard in range(first // per_shard, (last - 1) // per_shard + 1):
            begin, end = max(first, shard * per_shard), min(last, (shard + 1) * per_shard)
            out = items[(begin - first) * chunk_items : (end - first) * chunk_items]
            chunks = slice(begin - shard * per_shard, end - shard * per_shard)
            self._read_chunks(shard, chunks, out, buffer)
        rows = items.reshape(-1, *self.shape[1:])
        offset = first * self._chunk_rows
        return rows[start - offset : stop - offset]

    def _read_chunks(
        self, shard: int, chunks: slice, out: npt.NDArray[Any], buffer: ReadBuffer
    ) -> None:
        """Decode some neighbouring chunks of a shard one after the other into ``out``."""
        path = self._path / f"c/{shard}{self._key_tail}"
        try:
            handle = os.open(path, os.O_RDONLY)
            try:
                index = self._read_index(handle, shard)[chunks]
                _decode(handle, index, out.view(np.uint8).reshape(len(index), -1), buffer)
            finally:
                os.close(handle)
        except (OSError, ValueError, RuntimeError) as error:
            raise StoreError(
                f"{path} is missing or damaged ({error}). Make what is damaged anew: "
                f"statewide store verify {_store_of(self._path)} --repair"
                ", and run the same command again"
            ) from error

    def _read_index(self, handle: int, shard: int) -> npt.NDArray[np.uint64]:
        """Return offset and size of each chunk of a shard, from the end of its file."""
        known = self._indexes.get(shard)
        if known is not None:
            return known
        num_bytes = self._chunks_per_shard * 16
        tail = os.fstat(handle).st_size - num_bytes - _CRC_BYTES
        if tail < 0:
            raise ValueError("it is cut short")
        raw = np.empty(num_bytes + _CRC_BYTES, dtype=np.uint8)
        _read_exactly(handle, raw, tail)
        body, checksum = raw[:num_bytes].tobytes(), raw[num_bytes:].tobytes()
        if google_crc32c.value(body) != int.from_bytes(checksum, "little"):
            raise ValueError("the checksum of its index is wrong")
        index = np.frombuffer(body, dtype="<u8").reshape(-1, 2)
        while len(self._indexes) >= _MAX_KNOWN_INDEXES:
            self._indexes.popitem(last=False)
        self._indexes[shard] = index
        return index


def _decode(
    handle: int,
    index: npt.NDArray[np.uint64],
    out: npt.NDArray[np.uint8],
    buffer: ReadBuffer,
) -> None:
    is_there = index[:, 0] != _ABSENT
    out[~is_there] = 0
    if not is_there.any():
        return
    offsets = index[is_there, 0].astype(np.int64)
    stops = offsets + index[is_there, 1].astype(np.int64)
    # A shard is written in the order of its chunks, so they are neighbours in the file.
    origin = int(offsets.min())
    raw = buffer.take("encoded", int(stops.max()) - origin, np.dtype(np.uint8))
    _read_exactly(handle, raw, origin)
    places = np.flatnonzero(is_there)
    for place, offset, stop in zip(places, offsets - origin, stops - origin, strict=True):
        stop -= _CRC_BYTES
        checksum = int.from_bytes(raw[stop : stop + _CRC_BYTES].tobytes(), "little")
        if google_crc32c.value(raw[offset:stop]) != checksum:
            raise ValueError("the checksum of a chunk is wrong")
        # Of blosc's header: bytes once decoded at 4, bytes in all at 12. It trusts both.
        header = raw[offset : offset + 16].tobytes()
        decoded_bytes = int.from_bytes(header[4:8], "little")
        if decoded_bytes != out.shape[1] or int.from_bytes(header[12:16], "little") > stop - offset:
            raise ValueError("a chunk has the wrong size")
        blosc.decompress(raw[offset:stop], out[place])


def _store_of(array: Path) -> Path:
    """Return the store that an array (``X/data``, ``obsm/X_hvg``) belongs to."""
    return array.parent.parent


def _read_exactly(handle: int, out: npt.NDArray[np.uint8], offset: int) -> None:
    """Fill ``out`` from a file, from ``offset`` on."""
    view, done = out.data, 0
    while done < out.size:
        count = os.preadv(handle, [view[done:]], offset + done)
        if not count:
            raise ValueError("it is cut short")
        done += count
