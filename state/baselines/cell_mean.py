"""One vector for every cell: the mean of all perturbations (the reference), or of the controls."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from data_store.schema import ControlCells, PerturbationProfiles


class CellMeanBaseline:
    """Predict one vector for every cell of every perturbation, as cell-eval's baseline does.

    The vector is the unweighted mean over the pseudobulks of all train and validation
    perturbations and of the control group, which counts as one more group.
    """

    name = "cell_mean"

    def __init__(self) -> None:
        self._mean_G: npt.NDArray[np.float32] | None = None

    def fit(self, train: PerturbationProfiles, val: PerturbationProfiles) -> None:
        """Average the pseudobulks of both splits and the control."""
        splits = [split for split in (train, val) if len(split.names)]
        # The splits may hold different control cells; together they are one group.
        control_mean_G = np.mean([split.control_mean_G for split in splits], axis=0)
        groups = [split.mean_PG for split in splits] + [control_mean_G[None]]
        self._mean_G = np.concatenate(groups).mean(axis=0).astype(np.float32)

    def predict(
        self,
        perturbation: str,
        feature_D: npt.NDArray[np.float32],
        controls: ControlCells,
        rng: np.random.Generator,
    ) -> npt.NDArray[np.float32]:
        """Repeat the mean for each control cell; neither perturbation nor generator matter."""
        del perturbation, feature_D, rng
        assert self._mean_G is not None, "fit comes before predict"
        return np.tile(self._mean_G, (len(controls.values_NG), 1))


class ControlMeanBaseline:
    """Predict the mean of the control cells for every cell: no change, and no spread either."""

    name = "control_mean"

    def fit(self, train: PerturbationProfiles, val: PerturbationProfiles) -> None:
        """Learn nothing."""
        del train, val

    def predict(
        self,
        perturbation: str,
        feature_D: npt.NDArray[np.float32],
        controls: ControlCells,
        rng: np.random.Generator,
    ) -> npt.NDArray[np.float32]:
        """Repeat the level of the controls; neither perturbation nor generator matter."""
        del perturbation, feature_D, rng
        values_NG = controls.values_NG
        mean_G = values_NG.mean(axis=0) if controls.mean_G is None else controls.mean_G
        return np.tile(mean_G.astype(np.float32), (len(values_NG), 1))
