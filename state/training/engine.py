"""The only door to DeepSpeed: micro-steps, gradient norm, checkpoint files, full weights.

Used alike in one process, under spawned gloo ranks and under Ray Train; all it asks for is an
initialised ``torch.distributed`` process group. Tested in ``tests/distributed``.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from state.config import TrainConfig
from state.training.background import Write, copy_to_host

logger = logging.getLogger(__name__)

_TAG = "deepspeed"
_SECONDS_BETWEEN_LOOKS = 1.0


class Objective(Protocol):
    """What the engine trains: a module that knows its own loss."""

    use_bf16: bool
    """Whether it computes in bf16."""

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the terms of the loss."""
        ...

    def __call__(self, *batch: Tensor) -> Any:
        """Return an object with ``loss`` and ``terms_K``."""
        ...


class Engine:
    """A model under DeepSpeed data parallelism.

    Parameters
    ----------
    objective
        Module whose ``forward(*batch)`` returns an object with a scalar ``loss`` and its
        ``terms_K``; ``term_names`` names them and ``use_bf16`` says how it computes.
    settings
        Optimiser settings; the learning rate is set before each step by the loop.
    deepspeed_config
        Complete DeepSpeed settings (see ``launcher.deepspeed_config``).
    device
        Where this rank computes.
    timeout_s
        Seconds after which a rank that waits for another one fails.
    """

    def __init__(
        self,
        objective: Objective,
        settings: TrainConfig,
        deepspeed_config: Mapping[str, Any],
        device: torch.device,
        *,
        timeout_s: float = 1800,
    ) -> None:
        deepspeed = _import_deepspeed(device)
        # DeepSpeed talks in a group of its own, for which it would take torch's 30 minutes.
        deepspeed.utils.groups._WORLD_GROUP = dist.new_group(
            list(range(dist.get_world_size())), timeout=timedelta(seconds=timeout_s)
        )
        self.device = device
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.zero_stage = int(deepspeed_config["zero_optimization"]["stage"])
        self.sets_per_step = int(deepspeed_config["train_batch_size"])
        self.is_bf16 = objective.use_bf16
        self.term_names = objective.term_names
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=objective,
            optimizer=build_optimizer(objective, settings, device),
            config=dict(deepspeed_config),
            dist_init_required=False,
        )
        self._full_fp32_param: Callable[[Tensor], Tensor | None] = (
            deepspeed.utils.safe_get_full_fp32_param
        )
        self._gather = deepspeed.zero.GatheredParameters
        self._grad_norm: Tensor | float = math.nan

    def backward(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Run one micro-batch forward and backward.

        Returns
        -------
        Tensor
            [1 + K] the loss and its terms, detached, on the device: fetching them would make the
            host wait.
        """
        output = self._engine(*batch)
        self._engine.backward(output.loss)
        return torch.cat([output.loss.detach().reshape(1), output.terms_K])

    def step(self, lr: float) -> None:
        """Apply the accumulated gradients with this learning rate.

        Call after every micro-batch: DeepSpeed itself acts only on the last one of a step.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        at_boundary = self._engine.is_gradient_accumulation_boundary()
        if at_boundary and self.zero_stage == 0:
            # DeepSpeed keeps no norm at stage 0; the gradients are already averaged here.
            grads = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            self._grad_norm = nn.utils.get_total_norm(grads) if grads else math.nan
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        if norm is not None:
            self._grad_norm = norm

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping; the host waits for it."""
        return float(self._grad_norm)

    def evaluate(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the loss of a batch without gradients and without dropout (scalar)."""
        self._engine.eval()
        try:
            with torch.no_grad():
                loss: Tensor = self._engine(*batch).loss
                return loss
        finally:
            self._engine.train()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place, and return it."""
        dist.all_reduce(values)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Give every rank the object that rank 0 passes in."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the objects of all ranks, in rank order, on every rank."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier()

    def save(self, folder: Path) -> None:
        """Write optimiser, weights and counters of all ranks under ``folder`` (collective)."""
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)

    def copy_files(self, folder: Path) -> dict[Path, Write]:
        """Copy what ``save`` would write to host memory (collective).

        Returns
        -------
        File -> what writes it, by the rank that returned it and from any thread. What DeepSpeed
        writes beside these (a script) lies under ``folder`` already.
        """
        files: dict[Path, Write] = {}
        writer = self._engine.checkpoint_engine
        write = writer.save

        def keep(state_dict: Any, path: str) -> None:
            files[Path(path)] = partial(write, copy_to_host(state_dict), path)

        # Shadows the method for as long as DeepSpeed collects the files.
        writer.save = keep
        try:
            self.save(folder)
        finally:
            del writer.save
        return files

    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote, with as many ranks as wrote it (collective).

        Raises
        ------
        FileNotFoundError
            DeepSpeed only warns when there is nothing to load; here that is an error.
        """
        loaded, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
        if loaded is None:
            raise FileNotFoundError(f"no DeepSpeed checkpoint under {folder / _TAG}")
        # DeepSpeed counts micro-batches to know when to step; another number of them may make a
        # step now than when this was written.
        accumulation = self._engine.gradient_accumulation_steps()
        self._engine.micro_steps = self._engine.global_steps * accumulation

    def load_resized(self, folder: Path, universal: Path) -> None:
        """Restore what another number of ranks wrote (collective).

        ZeRO's shares are cut anew by way of DeepSpeed's universal format, which rank 0 writes
        under ``universal``. Stage 0 has no shares, and no such format.
        """
        if self.zero_stage == 0:
            self.load(folder)
            return
        self._convert_to_universal(folder / _TAG, universal / _TAG)
        # The setting is one of the configuration, read at load; only now is it known to apply.
        self._engine._config.load_universal_checkpoint = True
        decays = [group["weight_decay"] for group in self._optimizer.param_groups]
        try:
            self.load(universal)
        finally:
            self._engine._config.load_universal_checkpoint = False
        # At stage 3 it gives all groups the settings of the first, and all of them one tensor
        # that counts steps, which each then advances.
        for group, decay in zip(self._optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        for state in self._optimizer.optimizer.state.values():
            state["step"] = state["step"].clone()
        self.barrier()

    def _convert_to_universal(self, source: Path, target: Path) -> None:
        """Let rank 0 rewrite a ZeRO checkpoint without ranks, however long it takes (collective).

        The others hear every second that it goes on, so none runs into ``timeout_s``, and an
        error is everybody's.

        Raises
        ------
        RuntimeError
            With what the conversion said, when it failed.
        """
        conversion = _Conversion(source, target) if self.rank == 0 else None
        try:
            failure = None
            while failure is None:
                failure = self.broadcast_object(conversion.wait() if conversion else None)
        finally:
            if conversion is not None:
                conversion.end()
        if failure:
            raise RuntimeError(f"{source} cannot be converted for other ranks:\n{failure}")

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return all weights in fp32 on the CPU, whatever the ZeRO stage (collective)."""
        weights = dict(self._engine.module.state_dict())
        for name, parameter in self._engine.module.named_parameters():
            if parameter.requires_grad:
                master = self._full_fp32_param(parameter)
            else:
                # DeepSpeed keeps no optimiser state of these, only, at stage 3, a share of each.
                with self._gathered(parameter):
                    master = parameter.detach().cpu().clone()
            weights[name] = parameter if master is None else master
        return {
            name: value.detach().to("cpu", torch.float32 if value.is_floating_point() else None)
            for name, value in weights.items()
        }

    def _gathered(self, parameter: Tensor) -> AbstractContextManager[Any]:
        if self.zero_stage < 3:
            return nullcontext()
        context: AbstractContextManager[Any] = self._gather(parameter)
        return context

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self._engine.destroy()


def build_optimizer(
    module: Any, settings: TrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """Build AdamW with decay on matrices only: gains and biases are not shrunk towards 0."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        # One pass over each tensor instead of a dozen; torch has it for these devices.
        fused=device.type in ("cpu", "cuda"),
    )


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for this device, without its shared-memory extension on CPUs.

    That extension is compiled on first use and takes minutes; gloo does without it. The switch
    is private to DeepSpeed: ``tests/distributed/test_engine.py`` notices if it stops working.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class _Conversion:
    """Rewrites a ZeRO checkpoint in a process of its own, as DeepSpeed means it."""

    def __init__(self, source: Path, target: Path) -> None:
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
        command += ["--input_folder", str(source), "--output_folder", str(target)]
        command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        self._command = [*command, "--inject_missing_state"]
        self._process: subprocess.Popen[str] | None = None
        self._said = TemporaryFile("w+")

    def wait(self) -> str | None:
        """Wait a second; return why it failed, "" when it is done, None while it goes on."""
        try:
            if self._process is None:
                self._process = self._start()
            code = self._process.wait(_SECONDS_BETWEEN_LOOKS)
        except subprocess.TimeoutExpired:
            return None
        except OSError as error:
            return str(error)
        self._said.seek(0)
        return "" if code == 0 else self._said.read() or f"exit code {code}"

    def end(self) -> None:
        """End what still runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._said.close()

    def _start(self) -> subprocess.Popen[str]:
        # It joins no process group, and must not think that it is a rank of this one.
        ranks = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        inherited = {name: value for name, value in os.environ.items() if name not in ranks}
        return subprocess.Popen(
            self._command,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
            text=True,
            env=inherited,
        )
