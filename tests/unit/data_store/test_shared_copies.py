import gc
import logging
import multiprocessing as mp
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data_store.row_reader import StoreRows, open_rows
from data_store.shared_copies import SharedCopies
from tests.support.memory_store import MemoryStore

SIZE = 1 << 20
# The first process of the server waits for all its imports.
PATIENCE_S = 120
LIKE = (np.empty((SIZE // 4,), dtype=np.float32), np.empty(3, dtype=np.uint16))


def fill(arrays):
    arrays[0][:] = np.arange(SIZE // 4)
    arrays[1][:] = [7, 8, 65535]


def share(folder, content=b"atlas", fill=fill):
    return SharedCopies(folder, left_free_bytes=0).share([content], LIKE, fill)


def never(arrays):
    raise AssertionError("made anew")


def files(folder):
    return sorted(path.suffix for path in folder.glob("*/*"))


def inode(folder):
    return next(folder.glob("*/*.copy")).stat().st_ino


def attach_and_tell(folder, results, may_end):
    """Fill or attach in a process of its own; tell what it saw and in what memory."""
    made = []
    arrays = share(folder, fill=lambda out: (made.append(1), fill(out)))
    total = float(arrays[0].sum(dtype=np.float64))
    results.put((bool(made), total, *mapping_at(arrays[0].ctypes.data)))
    assert may_end.wait(PATIENCE_S)


def mapping_at(address):
    """Return the device, inode and KiB copied on write of the mapping that holds an address.

    How much of it is resident is the kernel's choice, which takes pages back when it likes.
    """
    mappings = re.findall(
        r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ (\S+) (\d+).*?^Anonymous:\s+(\d+)",
        Path("/proc/self/smaps").read_text(),
        flags=re.MULTILINE | re.DOTALL,
    )
    for start, end, device, inode_there, anonymous_kb in mappings:
        if int(start, 16) <= address < int(end, 16):
            return device, int(inode_there), int(anonymous_kb)
    raise AssertionError("not mapped")


def start(context, target, *args):
    process = context.Process(target=target, args=args)
    process.start()
    return process


@pytest.fixture(scope="module")
def context():
    """Processes that inherit nothing of this one, forked from a server that has imported."""
    chosen = mp.get_context("forkserver")
    chosen.set_forkserver_preload([__name__])
    return chosen


def test_processes_share_the_same_memory_and_the_last_one_removes_it(tmp_path, context):
    results, may_end = context.Queue(), context.Event()
    children = [start(context, attach_and_tell, tmp_path, results, may_end) for _ in range(3)]
    answers = [results.get(timeout=PATIENCE_S) for _ in children]
    made, totals, devices, inodes, anonymous_kb = zip(*answers, strict=True)
    assert sorted(made) == [False, False, True]
    assert set(totals) == {float(np.arange(SIZE // 4).sum())}
    # One file's pages, which the kernel holds once however many map them, and none copied.
    assert len(set(devices)) == 1
    assert set(inodes) == {inode(tmp_path)}
    assert set(anonymous_kb) == {0}
    may_end.set()
    for child in children:
        child.join(PATIENCE_S)
        assert child.exitcode == 0
    assert files(tmp_path) == []


def test_a_copy_lives_as_long_as_a_view_of_it(tmp_path):
    arrays = share(tmp_path)
    view = arrays[1][1:]
    del arrays
    gc.collect()
    assert files(tmp_path) == [".copy", ".lock"]
    assert view.tolist() == [8, 65535]
    assert not view.flags.writeable
    del view
    gc.collect()
    assert files(tmp_path) == []


def test_a_copy_held_twice_in_a_process_stays_until_both_let_go(tmp_path):
    first, second = share(tmp_path), share(tmp_path, fill=never)
    del first
    gc.collect()
    assert files(tmp_path) == [".copy", ".lock"]
    assert second[1].tolist() == [7, 8, 65535]
    del second
    gc.collect()
    assert files(tmp_path) == []


def test_a_forked_child_that_ends_leaves_its_parents_copy_alone(tmp_path):
    arrays = share(tmp_path)
    child = start(mp.get_context("fork"), gc.collect)
    child.join(PATIENCE_S)
    assert files(tmp_path) == [".copy", ".lock"]
    # Still locked: nobody takes it for an orphan.
    SharedCopies(tmp_path).remove_orphans()
    assert files(tmp_path) == [".copy", ".lock"]
    assert arrays[1][0] == 7


def hold_until_killed(folder, ready):
    arrays = share(folder)
    ready.set()
    time.sleep(60)
    del arrays


def fill_until_killed(folder, ready):
    def stall(arrays):
        arrays[0][:10] = 1
        ready.set()
        time.sleep(60)

    share(folder, fill=stall)


@pytest.mark.parametrize("target", [hold_until_killed, fill_until_killed])
@pytest.mark.parametrize("wanted", [b"atlas", b"another"])
def test_what_a_killed_process_leaves_is_used_or_removed(tmp_path, context, target, wanted):
    ready = context.Event()
    child = start(context, target, tmp_path, ready)
    assert ready.wait(PATIENCE_S)
    os.kill(child.pid, signal.SIGKILL)
    child.join(PATIENCE_S)
    assert ".lock" in files(tmp_path)
    is_whole = target is hold_until_killed
    arrays = share(tmp_path, wanted, never if is_whole and wanted == b"atlas" else fill)
    assert np.array_equal(arrays[0], np.arange(SIZE // 4))
    assert files(tmp_path) == [".copy", ".lock"]
    del arrays
    gc.collect()
    assert files(tmp_path) == []


def test_the_driver_removes_what_killed_workers_left(tmp_path, context):
    ready = context.Event()
    child = start(context, hold_until_killed, tmp_path, ready)
    assert ready.wait(PATIENCE_S)
    SharedCopies(tmp_path).remove_orphans()
    assert files(tmp_path) == [".copy", ".lock"]
    os.kill(child.pid, signal.SIGKILL)
    child.join(PATIENCE_S)
    SharedCopies(tmp_path).remove_orphans()
    assert files(tmp_path) == []


def test_whoever_waits_for_a_killed_maker_makes_the_copy(tmp_path, context):
    ready = context.Event()
    child = start(context, fill_until_killed, tmp_path, ready)
    assert ready.wait(PATIENCE_S)
    killer = threading.Timer(0.3, os.kill, (child.pid, signal.SIGKILL))
    killer.start()
    arrays = share(tmp_path)
    killer.join()
    child.join(PATIENCE_S)
    assert np.array_equal(arrays[0], np.arange(SIZE // 4))
    assert files(tmp_path) == [".copy", ".lock"]


@pytest.mark.parametrize("error", [KeyError, OSError])
def test_an_error_while_filling_is_the_callers_and_leaves_nothing(tmp_path, error):
    def fail(arrays):
        raise error("torn shard")

    with pytest.raises(error, match="torn shard"):
        share(tmp_path, fill=fail)
    assert files(tmp_path) == [".lock"]
    SharedCopies(tmp_path).remove_orphans()
    assert files(tmp_path) == []


def test_no_room_is_said_and_leaves_nothing(tmp_path, caplog):
    copies = SharedCopies(tmp_path, left_free_bytes=1 << 60)
    with caplog.at_level(logging.WARNING):
        assert copies.share([b"atlas"], LIKE, never) is None
    (record,) = caplog.records
    assert "GiB are free" in record.getMessage()
    assert "--shm-size" in record.getMessage()
    copies.remove_orphans()
    assert files(tmp_path) == []


def test_a_folder_of_somebody_else_is_not_used(tmp_path, caplog):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"statewide-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    assert share(tmp_path, fill=never) is None
    assert "not a folder of this user" in caplog.text
    assert share(tmp_path / "absent", fill=never) is None


@pytest.mark.parametrize("space", ["all", "hvg"])
@pytest.mark.parametrize("dense", [False, True])
def test_readers_share_what_they_hold_and_read_it_once(tmp_path, space, dense):
    store = MemoryStore.build()
    rows, out = np.arange(store.num_cells), np.empty_like(store.values)
    copies = SharedCopies(tmp_path, left_free_bytes=0)
    held = rows[:30]
    readers = [StoreRows(store, space, held, dense=dense, copies=copies) for _ in range(2)]
    assert files(tmp_path) == [".copy", ".lock"]
    for reader in readers:
        reader.take(rows, out)
        assert np.array_equal(out, store.values)
    del readers, reader
    gc.collect()
    assert files(tmp_path) == []


def test_another_store_at_the_same_path_has_another_copy(tmp_path):
    first, second = MemoryStore.build(), MemoryStore.build(seed=1)
    second.counts[:] = second.counts[::-1].copy()
    assert first.path == second.path
    rows = np.arange(first.num_cells)
    copies = SharedCopies(tmp_path, left_free_bytes=0)
    before = open_rows(first, "all", rows, resident_gib=1.0, copies=copies)
    after = open_rows(second, "all", rows, resident_gib=1.0, copies=copies)
    assert len(files(tmp_path)) == 4
    for store, reader in ((first, before), (second, after)):
        out = np.empty_like(store.values)
        reader.take(rows, out)
        assert np.array_equal(out, store.values)


def test_a_reader_without_room_holds_its_own_copy(tmp_path, caplog):
    store = MemoryStore.build()
    rows, out = np.arange(store.num_cells), np.empty_like(store.values)
    copies = SharedCopies(tmp_path, left_free_bytes=1 << 60)
    reader = StoreRows(store, "all", rows, dense=True, copies=copies)
    reader.take(rows, out)
    assert np.array_equal(out, store.values)
    assert "holds its own copy" in caplog.text
