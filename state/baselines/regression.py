"""Standardise perturbation features, and choose hyper-parameters by cross-validation.

Shape legend: P perturbations, T held-out perturbations, G genes, D feature width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import KFold
from sklearn.preprocessing import StandardScaler

from data_store.schema import ControlCells, PerturbationProfiles
from state.baselines.base import stack_changes
from state.baselines.synthesis import synthesize_cells
from state.metrics.errors import EvaluationError

FloatArray = npt.NDArray[np.float64]
Choice = TypeVar("Choice")

_MOST_FOLDS: Final = 5
_SEED: Final = 0


class ChangeModel(Protocol):
    """A regression from features to the change of the mean expression."""

    def fit(self, features_PD: FloatArray, changes_PG: FloatArray) -> object:
        """Learn from perturbations with known changes."""
        ...

    def predict(self, features_TD: FloatArray) -> FloatArray:
        """Predict changes, [T, G]."""
        ...


def choose_by_cross_validation(
    build: Callable[[Choice], ChangeModel],
    choices: Sequence[Choice],
    features_PD: FloatArray,
    changes_PG: FloatArray,
) -> Choice:
    """Return the choice with the least squared error on left-out perturbations.

    At most five folds, the same for all choices; of equal choices the first wins. A perturbation
    that occurs in several contexts (several rows with the same features) is left out of all.
    """
    group_P = number_alike(features_PD)
    num_groups = int(group_P.max()) + 1
    if len(choices) == 1 or num_groups == 1:
        return choices[0]
    folds = KFold(min(_MOST_FOLDS, num_groups), shuffle=True, random_state=_SEED)
    errors = np.zeros(len(choices))
    for _, left_out_groups in folds.split(np.arange(num_groups)):
        left_out = np.isin(group_P, left_out_groups)
        kept = ~left_out
        for index, choice in enumerate(choices):
            model = build(choice)
            model.fit(features_PD[kept], changes_PG[kept])
            missed = model.predict(features_PD[left_out]) - changes_PG[left_out]
            errors[index] += float(np.square(missed).sum())
    return choices[int(np.argmin(errors))]


def number_alike(features_PD: FloatArray) -> npt.NDArray[np.int64]:
    """Give rows with the same features the same number, in the order of their first rows; [P]."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in features_PD])


class FeatureBaseline(ABC):
    """What baselines share that predict the change of the mean from perturbation features.

    Subclasses say which models they choose from; cells come from ``synthesize_cells``.
    """

    name: str

    def __init__(self) -> None:
        self._scaler = StandardScaler()
        self._model: ChangeModel | None = None

    @abstractmethod
    def _choose(self, features_PD: FloatArray, changes_PG: FloatArray) -> ChangeModel:
        """Choose hyper-parameters and return an unfitted model."""

    def fit(self, train: PerturbationProfiles, val: PerturbationProfiles) -> None:
        """Choose by cross-validation over the perturbations of both splits, then fit on all.

        Raises
        ------
        EvaluationError
            With fewer than two perturbations: there is none to leave out.
        """
        changes_PG = stack_changes(train, val)
        if len(changes_PG) < 2:
            raise EvaluationError(
                f"{self.name} needs at least 2 train and validation perturbations, not "
                f"{len(changes_PG)}: widen split.train, or drop {self.name!r} from "
                "evaluate.baselines"
            )
        features_PD = np.concatenate([train.features_PD, val.features_PD]).astype(np.float64)
        scaled_PD = self._scaler.fit_transform(features_PD)
        self._model = self._choose(scaled_PD, changes_PG)
        self._model.fit(scaled_PD, changes_PG)

    def predict_change(self, feature_D: npt.NDArray[np.float32]) -> FloatArray:
        """Predict the change of the mean log1p expression, [G]."""
        assert self._model is not None, "fit comes before predict"
        scaled_1D = self._scaler.transform(feature_D[None].astype(np.float64))
        return np.asarray(self._model.predict(scaled_1D)[0], dtype=np.float64)

    def predict(
        self,
        perturbation: str,
        feature_D: npt.NDArray[np.float32],
        controls: ControlCells,
        rng: np.random.Generator,
    ) -> npt.NDArray[np.float32]:
        """Predict one perturbed cell for each control cell; the name plays no part."""
        del perturbation
        return synthesize_cells(self.predict_change(feature_D), controls, rng)
