"""The table ``[simulate]`` of a recipe, and the presets that fill it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from pydantic import model_validator

from state.config_section import (
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
)

PresetName: TypeAlias = Literal["vcc"]

# The Virtual Cell Challenge's training set: 183,097 perturbed cells and 38,176 controls.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "vcc": MappingProxyType(
            {
                "num_cells": 221_273,
                "num_genes": 18_080,
                "num_perturbations": 150,
                "num_batches": 48,
                "control_fraction": 38_176 / 221_273,
                "calibration": "vcc",
                "count_type": "uint16",
            }
        )
    }
)


class SimulateConfig(Section):
    """An atlas with known effects, written to ``data.input`` before the run if it is not there."""

    preset: PresetName | None = None
    """Values for the keys that are not given: ``vcc`` is the training set of the Virtual Cell
    Challenge, 221,273 cells x 18,080 genes (docs/simulator.md)."""
    num_cells: PositiveInt
    """Cells in all, controls included."""
    num_genes: PositiveInt
    """Genes; every perturbation targets one of them."""
    num_perturbations: PositiveInt
    """Perturbed genes, the control not counted."""
    num_batches: PositiveInt = 2
    """Experimental batches, each with its own shift of expression."""
    num_contexts: PositiveInt = 1
    """Cell lines, each with its own baseline; effects are the same in all."""
    control_fraction: Fraction = 0.2
    """Share of the cells that are controls."""
    feature_dim: PositiveInt = 32
    """Width of the perturbation features that the effects depend on."""
    effect_size: NonNegativeFloat = 1.0
    """Scale of the log fold changes; 0 gives perturbations without effect."""
    calibration: Literal["plain", "vcc"] = "plain"
    """How genes are expressed and vary: ``vcc`` has the challenge's published figures, and dropout;
    ``plain`` is denser and noisier, for small atlases."""
    depth: PositiveFloat = 1.0
    """Scale of all counts: 0.1 is the same atlas sequenced to a tenth, with far fewer non-zeros."""
    count_type: Literal["float32", "uint16"] = "float32"
    """Type of the counts in the h5ad; ``uint16`` takes half the memory."""
    gene_names: Path | None = None
    """File with the names of the genes, one a line; absent: invented ones."""
    cells_per_perturbation: Path | None = None
    """CSV with ``target_gene`` and ``n_cells``, the control among them, scaled to ``num_cells``;
    absent: drawn, with ``control_fraction``. Its targets must be in ``gene_names``."""
    compression: Literal["gzip", "lzf", "none"] = "gzip"
    """Filter of the h5ad. gzip (level 1) is the smallest, and is read as fast as lzf."""
    seed: Seed = 0
    """Seed of the simulation, apart from the run's own."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        preset = values.get("preset")
        # What is no text is for the field's own check to refuse.
        if not isinstance(preset, str):
            return values
        if preset not in PRESETS:
            raise ValueError(f"preset = {preset!r} must be one of: {', '.join(PRESETS)}")
        return {**PRESETS[preset], **values}
