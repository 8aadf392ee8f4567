"""Names of outputs are refused before anything is read."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from launcher.errors import LaunchError


@pytest.mark.parametrize(
    ("command", "suffix"),
    [
        (("predict", "no_run"), ".h5ad"),
        (("prep", "no.h5ad", "--genes", "no.csv"), ".vcc"),
        (("export", "no_run"), ".safetensors"),
    ],
)
def test_a_folder_and_another_ending_are_refused(command, suffix: str, tmp_path: Path):
    for out, said in (
        (tmp_path, f"is a folder. Name the file to write, such as {tmp_path}/new{suffix}"),
        (tmp_path / "out.txt", f"must end in {suffix}"),
    ):
        done = CliRunner().invoke(app, [*command, "--out", str(out)])
        assert isinstance(done.exception, LaunchError)
        assert said in str(done.exception)
    assert list(tmp_path.iterdir()) == []
