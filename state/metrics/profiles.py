"""Which metrics a profile computes, and the conventions they follow.

Profiles ``full``, ``minimal``, ``vcc``, ``de``, ``anndata`` and ``pds`` hold cell-eval's columns
under cell-eval's names (``clustering_agreement``, which depends on a random clustering, is left
out). ``vcc2025`` is ``vcc`` as the Virtual Cell Challenge of 2025 computed it, ``source`` the
variants that public tables mix up with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from state.metrics.differential import METHODS, Method
from state.metrics.errors import EvaluationError

Profile = Literal["vcc", "full", "minimal", "de", "anndata", "pds", "vcc2025", "source"]
ControlChoice = Literal["own", "real"]

CUTOFFS: Final = (50, 100, 200, 500)
"""The fixed numbers of genes of ``overlap_at_K`` and ``precision_at_K``."""

_DE: Final = (
    "overlap_at_N",
    *(f"overlap_at_{cutoff}" for cutoff in CUTOFFS),
    "precision_at_N",
    *(f"precision_at_{cutoff}" for cutoff in CUTOFFS),
    "de_spearman_sig",
    "de_direction_match",
    "de_spearman_lfc_sig",
    "de_sig_genes_recall",
    "de_nsig_counts_real",
    "de_nsig_counts_pred",
    "pr_auc",
    "roc_auc",
)
_ANNDATA: Final = (
    "pearson_delta",
    "mse",
    "mae",
    "mse_delta",
    "mae_delta",
    "discrimination_score_l1",
    "discrimination_score_l2",
    "discrimination_score_cosine",
    "pearson_edistance",
)
_VCC: Final = ("overlap_at_N", "discrimination_score_l1", "mae")

COLUMNS_OF: Final[dict[Profile, tuple[str, ...]]] = {
    "vcc": _VCC,
    "full": (*_DE, *_ANNDATA),
    "minimal": (
        "overlap_at_N",
        "precision_at_N",
        "de_nsig_counts_real",
        "de_nsig_counts_pred",
        "pearson_delta",
        "mse",
        "mae",
        "discrimination_score_l1",
    ),
    "de": _DE,
    "anndata": _ANNDATA,
    "pds": ("discrimination_score_l1",),
    "vcc2025": _VCC,
    "source": ("overlap_at_N", "pds_cosine_rank1", "mae_top2000"),
}
"""Columns of each profile, in the order of the tables."""

ABSENT_WITHOUT_TRUE_GENES: Final = frozenset(
    {"de_direction_match", "de_spearman_lfc_sig", "de_sig_genes_recall"}
)
"""Metrics without a value for a perturbation that has no truly significant gene. Such a
perturbation does not count in the mean; any other NaN makes the mean NaN."""

BEST_IS_ZERO: Final = frozenset({"mse", "mae", "mse_delta", "mae_delta", "mae_top2000"})
"""Errors; of all other scored metrics the best value is 1."""
NOT_SCORED: Final = frozenset({"de_nsig_counts_real", "de_nsig_counts_pred"})
"""Counts, which have no best value."""


@dataclass(frozen=True)
class Conventions:
    """How a prediction is judged."""

    profile: Profile = "vcc"
    """Which metrics."""
    fdr: float = 0.05
    """A gene is significant below this false discovery rate."""
    control: ControlChoice = "own"
    """Compare predicted cells with the predicted control cells, as cell-eval does, or with the
    real ones."""

    method: Method = "wilcoxon"
    """The test, under scanpy's name, or ``logfc`` for none."""

    def __post_init__(self) -> None:
        """Refuse a method and a profile that cannot go together."""
        if not self.has_tests and set(self.columns) & set(_DE):
            without = [name for name, columns in COLUMNS_OF.items() if not set(columns) & set(_DE)]
            raise EvaluationError(
                f"method 'logfc' tests nothing, but profile {self.profile!r} counts significant "
                f"genes: take profile {' or '.join(without)}, or another method"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """The profile's columns."""
        return COLUMNS_OF[self.profile]

    @property
    def has_tests(self) -> bool:
        """Whether genes can be significant."""
        return self.method != "logfc"

    @property
    def needs_energy(self) -> bool:
        """Whether distances between cells are needed, not only tests and means."""
        return "pearson_edistance" in self.columns

    @property
    def is_vcc2025(self) -> bool:
        """Adjust p over all perturbations and genes together, and bound fold changes at zeros."""
        return self.profile == "vcc2025"


def find_profile(name: str) -> Profile:
    """Return the profile of a name.

    Raises
    ------
    EvaluationError
        If there is none.
    """
    for profile in get_args(Profile):
        if name == profile:
            return profile  # type: ignore[no-any-return]
    raise EvaluationError(
        f"profile {name!r} does not exist: choose one of {', '.join(get_args(Profile))}"
    )


def find_method(name: str) -> Method:
    """Return the test of a name.

    Raises
    ------
    EvaluationError
        If there is none.
    """
    for method in METHODS:
        if name == method:
            return method
    raise EvaluationError(f"method {name!r} does not exist: choose one of {', '.join(METHODS)}")
