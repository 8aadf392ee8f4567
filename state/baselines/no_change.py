"""The control cells themselves: what a perturbation without any effect would look like."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from data_store.schema import ControlCells, PerturbationProfiles


class NoChangeBaseline:
    """Predict that nothing happens."""

    name = "no_change"

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
        """Return a copy of the control cells."""
        del perturbation, feature_D, rng
        return controls.values_NG.copy()
