"""The image holds the versions that were tested, and gets nothing but the code."""

import re

import pytest

from tests.support.runs import REPO_ROOT
from tests.unit.cluster.pins import pin_of, pins

FOLDER = REPO_ROOT / "cluster" / "docker"
TEXT = (FOLDER / "Dockerfile").read_text()
INSTRUCTIONS = {
    *("ARG", "FROM", "ENV", "RUN", "COPY", "USER", "WORKDIR", "EXPOSE", "CMD"),
}


def arguments() -> dict[str, str]:
    return dict(re.findall(r"^ARG (\w+)=(\S+)$", TEXT, re.MULTILINE))


@pytest.mark.parametrize("name", ["ray", "torch", "deepspeed"])
def test_pins_are_those_of_the_constraints(name: str):
    assert arguments()[f"{name.upper()}_VERSION"] == pin_of(name)


def test_everything_is_installed_under_the_constraints():
    installs = re.findall(r"pip install [^&]*?(?=&&|\n[A-Z]|\Z)", TEXT.replace("\\\n", " "))
    assert len(installs) == 3
    for install in installs:
        assert "--constraint /opt/statewide/constraints.txt" in install
    assert len(pins()) > 100


def test_cuda_of_torch_and_of_the_compiler_have_one_major_version():
    """DeepSpeed refuses another major version when it is imported."""
    cuda, torch = arguments()["CUDA_VERSION"], arguments()["TORCH_CUDA"]
    assert re.fullmatch(rf"cu{cuda.split('.')[0]}\d", torch)
    assert "-devel-" in TEXT


def test_the_instructions_are_docker_s_and_no_tag_floats():
    joined = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", TEXT, flags=re.MULTILINE))
    words = {line.split()[0] for line in joined.splitlines() if line.strip()}
    assert words <= INSTRUCTIONS
    assert ":latest" not in TEXT
    assert joined.strip().splitlines()[-1].startswith("CMD [")
    assert "USER ray" in joined


def test_what_is_copied_is_there_and_let_through():
    copied = [
        source
        for line in re.findall(r"^COPY (.+)$", TEXT, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    let_through = {
        line.removeprefix("!")
        for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert set(copied) == let_through
    assert all((REPO_ROOT / name).exists() for name in copied)
    packages = {p.name for p in REPO_ROOT.iterdir() if (p / "py.typed").is_file()}
    assert packages <= set(copied)
