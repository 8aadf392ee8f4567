"""Walk all imports and hold them against the directions in the architecture."""

import ast
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("data_store", "state", "launcher")

# A module may import these of ours, and nothing else of ours. First match wins.
ALLOWED_OURS = (
    ("data_store.schema", ()),
    ("data_store.files", ("data_store.schema",)),
    ("data_store", ("data_store",)),
    ("state.mmd", ("state.mmd",)),
    ("state", ("state", "data_store.schema", "data_store.files")),
    ("launcher", ("launcher", "state", "data_store")),
)

# Heavy or framework packages, and the only places that may import them.
ONLY_IN = {
    "ray": ("launcher",),
    "deepspeed": ("state.training.engine",),
    "triton": ("state.mmd.fused_kernels", "state.mmd.fused_centre"),
    "faiss": ("state.embedding.neighbours",),
    "geomloss": ("state.mmd.sinkhorn",),
    "anndata": ("data_store",),
    "scanpy": ("data_store",),
    "zarr": ("data_store",),
    "h5py": ("data_store",),
    "fsspec": ("data_store.remote", "data_store.mirror"),
    "aiohttp": ("data_store.remote", "launcher.job_client"),
    "typer": (
        "launcher.cli",
        "launcher.cli_cluster",
        "launcher.cli_embed",
        "launcher.cli_monitor",
        "launcher.cli_evaluate",
        "launcher.cli_options",
        "launcher.cli_predict",
        "launcher.cli_simulate",
        "launcher.cli_statistics",
        "launcher.cli_store",
    ),
}


def modules() -> list[tuple[str, Path]]:
    found = []
    for package in PACKAGES:
        for path in sorted((REPO_ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(REPO_ROOT).with_suffix("").parts)
            found.append((name.removesuffix(".__init__"), path))
    return found


def imported_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            if node.module in PACKAGES:
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_under(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def violations(name: str, imported: set[str]) -> list[str]:
    allowed = next(ours for prefix, ours in ALLOWED_OURS if is_under(name, prefix))
    ours = [i for i in imported if any(is_under(i, package) for package in PACKAGES)]
    wrong = [i for i in ours if i != name and not any(is_under(i, ok) for ok in allowed)]
    for package, places in ONLY_IN.items():
        if any(is_under(i, package) for i in imported):
            wrong += [package] * (not any(is_under(name, place) for place in places))
    return wrong


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_follow_the_architecture(name: str, path: Path):
    assert violations(name, imported_names(path)) == []


@pytest.mark.parametrize(
    ("name", "imported"),
    [
        ("data_store.loader", {"state.config"}),
        ("state.losses", {"data_store.loader"}),
        ("state.losses", {"ray.train"}),
        ("state.mmd.blocked", {"data_store.schema"}),
        ("state.training.loop", {"deepspeed"}),
        ("launcher.pipeline", {"anndata"}),
    ],
)
def test_the_rule_catches_a_wrong_direction(name: str, imported: set[str]):
    assert violations(name, imported)


def test_deepspeed_is_imported_lazily():
    path = REPO_ROOT / "state" / "training" / "engine.py"
    top_level = ast.parse(path.read_text(encoding="utf-8")).body
    imported = {
        alias.name for node in top_level if isinstance(node, ast.Import) for alias in node.names
    }
    assert "deepspeed" not in imported
