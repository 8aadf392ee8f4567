"""Which files an input names, and whether they are still the same."""

import os
from pathlib import Path

import pytest

from data_store.locate import (
    describe_input,
    expand_braces,
    explain_change,
    find_files,
    label_files,
)
from data_store.schema import StoreError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.h5ad", "a.h5", "notes.txt", ".hidden.h5ad", "deep/c.h5ad"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "d.zarr").mkdir()
    (tmp_path / "d.zarr/zarr.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", ["a.h5", "b.h5ad", "d.zarr"]),
        ("b.h5ad", ["b.h5ad"]),
        ("d.zarr", ["d.zarr"]),
        ("*.h5ad", ["b.h5ad"]),
        ("{b.h5ad,a.h5}", ["a.h5", "b.h5ad"]),
        ("{a.h5,{b,b}.h5a?}", ["a.h5", "b.h5ad"]),
        ("*/*.h5ad", ["deep/c.h5ad"]),
    ],
)
def test_files_of_a_folder_and_of_a_glob(folder, pattern, names):
    assert list(find_files(folder / pattern)) == [folder / name for name in names]


def test_a_name_with_braces_is_itself(folder):
    (folder / "{a,b}.h5ad").write_text("x")
    assert find_files(folder / "{a,b}.h5ad") == (folder / "{a,b}.h5ad",)


def test_a_url_is_one_file():
    assert find_files("https://example.org/{a,b}.h5ad") == ("https://example.org/{a,b}.h5ad",)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("b.h5a", r"b.h5a is not there.*did you mean 'b.h5ad'\?"),
        ("{b,z}.h5ad", r"no file matches .*z\.h5ad \(data.input\)"),
        ("x*", r"no file matches .*x\*"),
        ("deep/er/a.h5ad", "the folder .*er does not exist"),
    ],
)
def test_what_is_not_there_is_named(folder, pattern, message):
    with pytest.raises(StoreError, match=message):
        find_files(folder / pattern)


def test_a_folder_without_files_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"is not an h5ad and holds none: no \.h5ad, \.h5, \.zarr"):
        find_files(tmp_path)


def test_braces_expand_as_in_a_shell():
    assert expand_braces("a{1,2}b{x,y}") == ["a1bx", "a1by", "a2bx", "a2by"]
    assert expand_braces("{a,b{1,2}}") == ["a", "b1", "b2"]
    assert expand_braces("{single}") == ["{single}"]


def test_labels_are_paths_below_the_common_folder():
    assert label_files([Path("/d/a.h5ad")]) == ("a.h5ad",)
    assert label_files([Path("/d/x/a.h5ad"), Path("/d/y/a.h5ad")]) == ("x/a.h5ad", "y/a.h5ad")


def test_changes_are_explained_and_moving_is_none(folder, tmp_path_factory):
    before = describe_input(folder)
    assert explain_change(before, describe_input(folder)) is None
    moved = tmp_path_factory.mktemp("moved") / "atlas"
    folder.rename(moved)
    assert explain_change(before, describe_input(moved)) is None
    os.utime(moved / "b.h5ad", ns=(1, 1))
    assert explain_change(before, describe_input(moved)) == "b.h5ad was written again since"
    (moved / "d.zarr/c").write_text("new")
    assert "bytes of d.zarr: 2 there, 5 now" in str(
        explain_change(
            describe_input(moved / "d.zarr") | {"files": before["files"][2:]},
            describe_input(moved / "d.zarr"),
        )
    )
    (moved / "a.h5").rename(moved / "a2.h5")
    assert explain_change(before, describe_input(moved)) == "input file a.h5 there, a2.h5 now"
    (moved / "a2.h5").unlink()
    assert explain_change(before, describe_input(moved)) == "3 input files there, 2 now"
