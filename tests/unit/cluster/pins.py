"""The versions of constraints.txt."""

from tests.support.runs import REPO_ROOT


def pins() -> dict[str, str]:
    lines = (REPO_ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return dict(pairs)


def pin_of(name: str) -> str:
    return pins()[name]
