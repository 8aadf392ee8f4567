"""Whether ours and cell-eval agree on predictions that arc-state makes.

arc-state 0.11.1 is trained for a few steps in its own environment on two simulated samples of the
same perturbations, some of them held out of the second, and predicts these by its own commands
(``state tx train``, ``state tx predict``). The two files it writes are judged by ``statewide
evaluate`` and ``cell-eval run`` as it leaves them: dense float32, genes named by number, with its
own controls. Nothing is timed. Run by
``python -m benchmarks arc_predictions``.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

from benchmarks.environments import interpreter
from benchmarks.errors import BenchmarkError
from benchmarks.evaluate import ENVIRONMENT, WARM_UP, Size, prepare_ours, simulate
from benchmarks.evaluate_checks import DELTA, ENERGY, METRIC_BARS, TABLES, Exact, MetricCheck
from benchmarks.evaluate_peers import CONTROL, PERT_COL, prepare_cell_eval
from benchmarks.harness import ONE_THREAD, Arrays, Side, run_side
from benchmarks.settings import Settings

SIZE = Size(perturbations=12, cells=80, controls=400, genes=300)
VALIDATED, HELD_OUT = ("GENE10",), tuple(f"GENE{number}" for number in range(6))
STEPS = 2000
PROFILES = ("vcc", "full")
_LOG_LINES = 15


@dataclass(frozen=True)
class Agreement:
    """How far the two tools are apart on one profile."""

    title: str
    differences: Mapping[str, float]
    """Column of results.csv -> largest difference over the perturbations."""
    means: Mapping[str, float]
    """Column -> our mean over the perturbations: what there is to agree on."""
    notes: tuple[str, ...]

    def table(self) -> str:
        """Format for a terminal, as Markdown."""
        lines = [self.title, "", "| metric | ours, mean | largest difference | bar |"]
        lines += ["|---|---:|---:|---:|"]
        for name, difference in self.differences.items():
            bar = METRIC_BARS.get(name, 0.0)
            shown = "exact" if bar == 0 else f"{bar:g}"
            lines.append(f"| {name} | {self.means[name]:.6g} | {difference:.1e} | {shown} |")
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])

    def describe(self) -> dict[str, Any]:
        """Return everything as JSON."""
        return {
            "title": self.title,
            "notes": list(self.notes),
            "differences": dict(self.differences),
            "means": dict(self.means),
        }


def run(settings: Settings) -> Iterator[Agreement]:
    """Let arc-state predict, and hold both evaluations of it together."""
    if not settings.peers:
        raise BenchmarkError("arc_predictions needs arc-state and cell-eval: no --without-peers")
    with TemporaryDirectory(prefix="benchmark-arc-") as name:
        folder = Path(name)
        real, pred = predict_with_arc_state(folder)
        exact = correlate_exactly(real, pred)
        small = simulate(folder / "warm_up.h5ad", WARM_UP, seed=0)
        for profile in PROFILES:
            arguments = {
                **{"real": str(real), "pred": str(pred), "small": str(small)},
                "profile": profile,
            }
            sides = (
                Side("ours", prepare_ours, arguments),
                Side("cell-eval", prepare_cell_eval, arguments, environment=ENVIRONMENT),
            )
            results = {side.name: run_side(side)[1] for side in sides}
            check = MetricCheck(exact)
            check(results)
            yield _compare(profile, results, check.notes())


def _compare(profile: str, results: Mapping[str, Arrays], notes: tuple[str, ...]) -> Agreement:
    ours, theirs = results["ours"], results["cell-eval"]
    names = [name for name in ours if name not in ("perturbation", *TABLES)]
    return Agreement(
        f"predictions of arc-state 0.11.1 ({STEPS} steps), profile {profile}, "
        f"{len(HELD_OUT)} perturbations held out of one of two samples of {SIZE}",
        # NaN on both sides is agreement, which the check has seen to.
        {name: float(np.nan_to_num(np.abs(ours[name] - theirs[name])).max()) for name in names},
        {name: float(np.mean(ours[name])) for name in names},
        notes,
    )


def correlate_exactly(real: Path, pred: Path) -> dict[str, Exact]:
    """Compute ``pearson_edistance`` and ``pearson_delta`` by their definitions, in float64.

    A float32 mean errs by about its size times the machine epsilon, a difference of means by a few
    such errors, and a correlation by that over the spread of what it correlates.
    """
    eps = 4 * float(np.finfo(np.float32).eps)
    energies, deltas, energy_noise, delta_noise_P = [], [], 0.0, np.zeros(len(HELD_OUT))
    for path in (real, pred):
        cells = _read_groups(path)
        control = cells.pop(CONTROL)
        within = float(cdist(control, control).mean())
        energies.append(
            np.array([2 * cdist(x, control).mean() - cdist(x, x).mean() for x in cells.values()])
        )
        means_PG = np.stack([x.mean(axis=0) for x in cells.values()])
        delta_PG = means_PG - control.mean(axis=0)
        deltas.append(delta_PG)
        energy_noise += eps * within / float(energies[-1].std())
        level_P = np.linalg.norm(means_PG, axis=1) / np.sqrt(means_PG.shape[1])
        delta_noise_P += eps * level_P / delta_PG.std(axis=1)
    num_perts = len(HELD_OUT)
    energy = float(np.corrcoef(energies[0], energies[1])[0, 1])
    return {
        ENERGY: Exact(np.full(num_perts, energy), np.full(num_perts, energy_noise)),
        DELTA: Exact(
            np.array([np.corrcoef(*pair)[0, 1] for pair in zip(*deltas, strict=True)]),
            delta_noise_P,
        ),
    }


def _read_groups(path: Path) -> dict[str, npt.NDArray[np.float64]]:
    """Return the cells of each perturbation [N, G], in the order of their names."""
    import anndata as ad

    adata = ad.read_h5ad(path)
    labels = adata.obs[PERT_COL].astype(str).to_numpy()
    return {str(name): adata.X[labels == name].astype(np.float64) for name in np.unique(labels)}


def predict_with_arc_state(folder: Path) -> tuple[Path, Path]:
    """Train arc-state a little and return the h5ad of the truth and of its prediction.

    Raises
    ------
    BenchmarkError
        If one of its commands fails; with the end of what it wrote.
    """
    samples = {
        name: simulate(folder / f"{name}.h5ad", SIZE, seed=seed)
        for seed, name in enumerate(("one", "two"), start=1)
    }
    cells = _join_for_arc(samples, folder / "cells.h5ad")
    split = folder / "split.toml"
    split.write_text(
        f'[datasets]\nsimulated = "{cells}"\n[training]\nsimulated = "train"\n[zeroshot]\n'
        f'[fewshot."simulated.two"]\nval = {list(VALIDATED)}\ntest = {list(HELD_OUT)}\n',
        encoding="utf-8",
    )
    data = {
        "toml_config_path": split,
        "embed_key": "X_hvg",
        "output_space": "gene",
        "num_workers": 0,
        "batch_col": "gem_group",
        "pert_col": PERT_COL,
        "cell_type_key": "cell_type",
        "control_pert": CONTROL,
    }
    training = {"max_steps": STEPS, "val_freq": STEPS, "ckpt_every_n_steps": STEPS}
    _run_arc(
        "train",
        *(f"data.kwargs.{key}={value}" for key, value in data.items()),
        *(f"training.{key}={value}" for key, value in training.items()),
        *("training.batch_size=2", "training.lr=1e-3", "use_wandb=false"),
        *("model=state_sm", "model.kwargs.cell_set_len=32", "model.kwargs.hidden_dim=64"),
        *(f"output_dir={folder}", "name=run"),
    )
    run_dir = folder / "run"
    _run_arc(
        *("predict", "--output-dir", str(run_dir), "--checkpoint", "final.ckpt", "--predict-only")
    )
    out = run_dir / "eval_final.ckpt"
    return out / "adata_real.h5ad", out / "adata_pred.h5ad"


def _join_for_arc(samples: Mapping[str, Path], out: Path) -> Path:
    """Write one file with what arc-state asks for: cell type, batch, and the genes in obsm."""
    import anndata as ad
    import pandas as pd

    adata = ad.concat(
        {name: ad.read_h5ad(path) for name, path in samples.items()},
        label="cell_type",
        index_unique="_",
    )
    adata.obs["gem_group"] = pd.Categorical(np.where(np.arange(adata.n_obs) % 2, "a", "b"))
    adata.obsm["X_hvg"] = adata.X.toarray()
    adata.write_h5ad(out)
    return out


def _run_arc(*arguments: str) -> None:
    command: Sequence[str] = [str(interpreter("arc").with_name("state")), "tx", *arguments]
    # Without PYTHONPATH: its package has the name of one of ours. On the CPU, and offline.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {**ONE_THREAD, "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled"}
    with TemporaryDirectory(prefix="benchmark-arc-cwd-") as cwd:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        lines = done.stdout.decode(errors="replace").splitlines()[-_LOG_LINES:]
        raise BenchmarkError("\n".join([f"state tx {arguments[0]} failed:", *lines]))
