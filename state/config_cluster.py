"""The processes that train, and the faults that a test or a drill injects into them."""

from __future__ import annotations

from state.config_section import NonNegativeInt, PositiveInt, Section


class ClusterConfig(Section):
    """How many processes train, and what each of them gets."""

    num_workers: PositiveInt = 1
    """Data-parallel workers (one GPU each when ``use_gpu``)."""
    cpus_per_worker: PositiveInt = 1
    """CPU cores, and torch threads, of each worker."""
    use_gpu: bool = False
    """Give each worker a GPU."""
    max_failures: NonNegativeInt = 3
    """Restarts of the worker group from the last checkpoint before the run fails."""
    timeout_s: PositiveInt = 1800
    """Seconds after which a collective operation that hangs is an error."""


class FaultsConfig(Section):
    """Faults to inject into training, once each; for tests and drills, and off by default."""

    rank: NonNegativeInt = 0
    """Worker that they happen to."""
    exception_at_step: PositiveInt | None = None
    """Raise an error at the start of this step."""
    kill_at_step: PositiveInt | None = None
    """End the process with SIGKILL at the start of this step."""
    hang_at_step: PositiveInt | None = None
    """Stop working, without an error, at the start of this step."""
    nan_at_step: PositiveInt | None = None
    """Turn the target cells of this step into NaN."""
    tear_checkpoint_at_step: PositiveInt | None = None
    """Cut the newest checkpoint's weights in half at the start of this step, and raise an error."""
    fill_disk_at_step: PositiveInt | None = None
    """Let this step's checkpoint, or the first one after it, meet a full disk."""
