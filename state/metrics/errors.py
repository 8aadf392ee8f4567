"""The error of cells that cannot be evaluated."""

from data_store.schema import UserError


class EvaluationError(UserError):
    """Predictions, truth or scores that cannot be compared as asked."""
