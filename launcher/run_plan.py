"""Say what a run would do: ``statewide run RECIPE --dry-run``."""

from __future__ import annotations

from pathlib import Path

from launcher.errors import LaunchError
from launcher.judged_runs import find_beside
from launcher.pipeline import JUDGING_STAGES, STAGE_NAMES, Pipeline
from launcher.preprocess_job import describe_simulation
from launcher.run_inputs import find_missing_inputs


def describe_plan(pipeline: Pipeline, recipe: Path) -> str:
    """Say what a run would read, ask for and do, without doing any of it."""
    config = pipeline.config
    cluster = config.cluster
    gpu = " and 1 GPU" if cluster.use_gpu else ""
    missing = find_missing_inputs(pipeline.config)
    try:
        find_beside(config)
    except LaunchError as error:
        missing.append(str(error))
    left_out = set() if config.simulate is not None else {"simulate"}
    left_out |= set() if config.statistics.enabled else {"stats", "deltas"}
    left_out |= set() if config.is_judged else set(JUDGING_STAGES)
    stages = [name for name in STAGE_NAMES if name not in left_out]
    sets_per_step = (
        config.train.micro_batch_size * config.train.grad_accum_steps * cluster.num_workers
    )
    repeats = max(1, len(config.evaluate.seeds)) * (config.evaluate.folds or 1)
    lines = [
        f"recipe {recipe} is valid",
        *([f"{repeats} runs, one for each fold and seed"] if repeats > 1 else []),
        f"stages: {' -> '.join(stages)}",
        *(() if config.simulate is None else [f"simulates {describe_simulation(config.simulate)}"]),
        f"run folder: {config.output_dir}",
        f"resources: {cluster.num_workers} workers with {cluster.cpus_per_worker} CPU{gpu} each",
        f"global batch: {sets_per_step} sets of up to {config.model.cell_set_len} cells",
        *(f"not found yet: {line}" for line in missing),
        *([] if missing else ["all input files are there"]),
    ]
    return "\n".join(lines)
