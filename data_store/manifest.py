"""What a finished store consists of: its manifest with checksums, and its commit marker.

``manifest.json`` lists every file with size and SHA-256; ``COMMIT`` holds the SHA-256 of the
manifest and is written last. A folder without a matching ``COMMIT`` is not a store.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_store.files import sha256_of_file, write_json_atomically, write_text_atomically
from data_store.hints import some
from data_store.schema import StoreError

FORMAT = "statewide-store"
FORMAT_VERSION = 3
MANIFEST_NAME = "manifest.json"
COMMIT_NAME = "COMMIT"


@dataclass(frozen=True)
class FileRecord:
    """A file of the store as it was written."""

    bytes: int
    """Size."""
    sha256: str
    """Checksum, hexadecimal."""


@dataclass(frozen=True)
class Manifest:
    """What the store was made from and what it holds. Nothing in it depends on the clock."""

    source: dict[str, Any]
    """The input: its path, its files (path, bytes, version), and the cells of each file."""
    spec: dict[str, Any]
    """The settings of ``PreprocessSpec`` that shape the content."""
    rows_per_block: int
    """Cells in a task's block, from which the sizes of the shards follow."""
    counts: dict[str, int]
    """Numbers of cells, genes, highly variable genes, perturbations, non-zeros, cells without
    counts, genes never seen."""
    target_sum: float
    """The count every cell was scaled to before log1p."""
    files: dict[str, FileRecord]
    """Every file of the store except the manifest and the marker, by relative path."""

    def digest(self) -> str:
        """Return one SHA-256 over the names and checksums of all files."""
        lines = (f"{name} {self.files[name].sha256}\n" for name in sorted(self.files))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def hash_file(path: Path) -> FileRecord:
    """Compute size and SHA-256 of a file."""
    return FileRecord(bytes=path.stat().st_size, sha256=sha256_of_file(path))


def is_intact(path: Path, record: FileRecord) -> bool:
    """Tell whether a file is there with the recorded size and checksum."""
    try:
        return path.stat().st_size == record.bytes and hash_file(path) == record
    except FileNotFoundError:
        return False


def list_damaged(root: Path, manifest: Manifest) -> list[str]:
    """Read every file of a store and return the names of those that are missing or damaged."""
    files = manifest.files
    return [name for name in sorted(files) if not is_intact(root / name, files[name])]


def refuse_torn_files(root: Path, manifest: Manifest) -> None:
    """Check that every file is there in its full size, and the content of the tables.

    The shards of the matrices have checksums of their own, which every read looks at.

    Raises
    ------
    StoreError
        If one is missing or of another size, or a table was changed.
    """
    files = manifest.files
    torn = [name for name, record in files.items() if _size(root / name) != record.bytes]
    found = f"{some(sorted(torn))} missing or cut short"
    if not torn:
        tables = [name for name in files if not is_shard(name)]
        torn = [name for name in tables if not is_intact(root / name, files[name])]
        found = f"{some(sorted(torn))} changed since it was written"
    if torn:
        raise StoreError(
            f"{root} is damaged: {found}. Mend it: statewide store verify {root} --repair"
        )


def is_shard(name: str) -> bool:
    """Tell whether a file of the store holds a part of a matrix."""
    folder, is_part, _ = name.partition("/c/")
    return bool(is_part) and (folder in ("X/data", "X/indices") or folder.startswith("obsm/"))


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write the manifest and then the commit marker that makes the folder a store."""
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(manifest)}
    write_json_atomically(root / MANIFEST_NAME, content)
    digest = sha256_of_file(root / MANIFEST_NAME)
    write_text_atomically(root / COMMIT_NAME, f"{digest}\n")


def read_manifest(root: Path) -> Manifest:
    """Read the manifest of a finished store.

    Raises
    ------
    StoreError
        If the folder is missing, not a store, unfinished, damaged, or of a newer format.
    """
    path = root / MANIFEST_NAME
    if not root.is_dir():
        raise StoreError(f"there is no store at {root}; make one with 'statewide preprocess'")
    if not path.is_file():
        raise StoreError(
            f"{root} is not a finished store: it has no {MANIFEST_NAME}; "
            "make one with 'statewide preprocess'"
        )
    try:
        content = json.loads(path.read_bytes())
        file_format = content.pop("format")
        version = int(content.pop("format_version"))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise StoreError(
            f"{path} is damaged ({error}); remove the folder and run 'statewide preprocess' anew"
        ) from error
    if file_format != FORMAT:
        raise StoreError(f"{root} is not a store: {path} has the format {file_format!r}")
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{root} has store format {version}, but this version of statewide reads "
            f"{FORMAT_VERSION}; upgrade statewide or run 'statewide preprocess' anew"
        )
    if version < FORMAT_VERSION:
        raise StoreError(
            f"{root} has store format {version} of an older statewide, and this one reads "
            f"{FORMAT_VERSION}; remove the folder and run 'statewide preprocess' anew"
        )
    marker = root / COMMIT_NAME
    if not marker.is_file() or marker.read_bytes().strip() != sha256_of_file(path).encode():
        raise StoreError(
            f"{root} is unfinished or damaged: {COMMIT_NAME} does not match {MANIFEST_NAME}; "
            "remove the folder and run 'statewide preprocess' anew"
        )
    files = {name: FileRecord(**record) for name, record in content.pop("files").items()}
    return Manifest(**content, files=files)
