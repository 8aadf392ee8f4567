"""Copies of committed folders: whole or absent, on any file system, and refused when damaged."""

import errno
import hashlib
import json
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from data_store.files import FullDiskError
from data_store.mirror import DamagedCopyError, FolderGoneError, FolderMirror
from data_store.schema import StoreError

NAMES = r"step_\d"
FILES = {"model.pt": b"weights", "ranks/rank_0.pt": b"moments", "empty": b""}


def commit(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    records = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }
    manifest = json.dumps({"files": records, "run_fingerprint": "abc"}).encode()
    (folder / "manifest.json").write_bytes(manifest)
    (folder / "COMMIT").write_text(hashlib.sha256(manifest).hexdigest() + "\n")
    return folder


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path / 'there'}"
    return f"memory://{uuid4().hex}"


def test_what_is_pushed_comes_back(url: str, tmp_path: Path):
    folder = commit(tmp_path / "step_1", FILES)
    FolderMirror(url, "a.key", NAMES).push(folder)
    # Another process: nothing is remembered.
    mirror = FolderMirror(url, "a.key", NAMES)
    assert mirror.committed()["step_1"]["run_fingerprint"] == "abc"
    back = tmp_path / "back" / "step_1"
    mirror.fetch("step_1", back)
    for path in folder.rglob("*"):
        if path.is_file():
            assert (back / path.relative_to(folder)).read_bytes() == path.read_bytes()
    assert [path.name for path in back.parent.iterdir()] == ["step_1"]


def test_only_committed_folders_count(url: str, tmp_path: Path):
    mirror = FolderMirror(url, "a.key", NAMES)
    assert mirror.committed() == {}
    fs, root = fsspec.core.url_to_fs(url)
    # As on an object store, where an empty folder is none.
    fs.rm(root, recursive=True)
    assert mirror.committed() == {}
    for name in ("step_1", "step_2", "step_3"):
        mirror.push(commit(tmp_path / name, FILES))
    fs.rm_file(f"{root}/step_1/COMMIT")
    fs.pipe_file(f"{root}/step_2/manifest.json", b"{}")
    # Whatever else is there is none of ours.
    mirror.push(commit(tmp_path / "store", FILES))
    again = FolderMirror(url, "a.key", NAMES)
    assert list(again.committed()) == ["step_3"]
    again.remove_uncommitted()
    assert not fs.exists(f"{root}/step_1")
    assert not fs.exists(f"{root}/step_2")
    assert fs.exists(f"{root}/store/COMMIT")


def test_the_commit_is_written_last_and_removed_first(url: str, tmp_path: Path, monkeypatch):
    mirror = FolderMirror(url, "a.key", NAMES)
    folder = commit(tmp_path / "step_1", FILES)
    fs, root = fsspec.core.url_to_fs(url)
    put, seen = type(fs).put_file, []

    def watch(self, lpath, rpath, **kwargs):
        assert not self.exists(f"{root}/step_1/COMMIT")
        seen.append(rpath.rsplit("/", 1)[-1])
        put(self, lpath, rpath, **kwargs)

    monkeypatch.setattr(type(fs), "put_file", watch)
    mirror.push(folder)
    # Once more, over what is there.
    mirror.push(folder)
    assert seen[-1] == "COMMIT"
    assert seen.count("COMMIT") == 2
    remove = type(fs).rm

    def killed(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(fs), "rm", killed)
    with pytest.raises(KeyboardInterrupt):
        mirror.remove("step_1")
    assert mirror.committed() == {}
    monkeypatch.setattr(type(fs), "rm", remove)
    mirror.remove("step_1")
    mirror.remove("step_1")
    assert not fs.exists(f"{root}/step_1")


def test_a_folder_that_is_removed_meanwhile_leaves_nothing(url: str, tmp_path: Path, monkeypatch):
    mirror = FolderMirror(url, "a.key", NAMES)
    folder = commit(tmp_path / "step_1", FILES)
    fs, root = fsspec.core.url_to_fs(url)
    put = type(fs).put_file

    def remove_the_next(self, lpath, rpath, **kwargs):
        put(self, lpath, rpath, **kwargs)
        (folder / "model.pt").unlink(missing_ok=True)

    monkeypatch.setattr(type(fs), "put_file", remove_the_next)
    with pytest.raises(FolderGoneError):
        mirror.push(folder)
    assert not fs.exists(f"{root}/step_1")
    with pytest.raises(FolderGoneError):
        mirror.push(tmp_path / "never_there")


def test_a_damaged_copy_is_refused(url: str, tmp_path: Path):
    mirror = FolderMirror(url, "a.key", NAMES)
    mirror.push(commit(tmp_path / "step_1", FILES))
    fs, root = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{root}/step_1/model.pt", b"weighty")
    with pytest.raises(DamagedCopyError, match=r"step_1 \(a.key\) is damaged: model.pt"):
        mirror.fetch("step_1", tmp_path / "back" / "step_1")
    assert list((tmp_path / "back").iterdir()) == []


def test_a_copy_that_lacks_a_file_is_damaged(url: str, tmp_path: Path):
    mirror = FolderMirror(url, "a.key", NAMES)
    mirror.push(commit(tmp_path / "step_1", FILES))
    fs, root = fsspec.core.url_to_fs(url)
    fs.rm_file(f"{root}/step_1/model.pt")
    with pytest.raises(DamagedCopyError, match=r"is damaged: model.pt"):
        mirror.fetch("step_1", tmp_path / "back" / "step_1")


def test_a_bucket_that_is_not_there_is_the_urls_fault(url: str, tmp_path: Path, monkeypatch):
    """s3fs says FileNotFoundError of it, as if the file here were missing."""
    mirror = FolderMirror(url, "a.key", NAMES)

    def fail(self, *args, **kwargs):
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(type(fsspec.core.url_to_fs(url)[0]), "put_file", fail)
    with pytest.raises(StoreError, match="cannot be written to: The specified bucket"):
        mirror.push(commit(tmp_path / "step_1", FILES))


def test_a_full_disk_here_is_not_the_urls_fault(url: str, tmp_path: Path, monkeypatch):
    mirror = FolderMirror(url, "a.key", NAMES)
    mirror.push(commit(tmp_path / "step_1", FILES))

    def fail(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(fsspec.core.url_to_fs(url)[0]), "get_file", fail)
    with pytest.raises(FullDiskError, match="no space left on the disk of .*step_1"):
        mirror.fetch("step_1", tmp_path / "back" / "step_1")
    assert list((tmp_path / "back").iterdir()) == []


def test_a_url_that_cannot_be_used_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for url, what in (
        ("nowhere://bucket/run", r"Install the package of nowhere://"),
        (f"file://{tmp_path}/file/under", "cannot be written to"),
        ("file:///proc/x", "cannot be written to"),
        ("file://relative/x", "is no whole path"),
        ("github://no:repo@main/run", "cannot be written to"),
    ):
        with pytest.raises(StoreError, match=f"a.key = '{url}'.*{what}"):
            FolderMirror(url, "a.key", NAMES)
