"""Predictions of a model, what follows from them, and comparisons of runs."""

from workbench.evaluation.metrics import (
    confusion,
    mistakes,
    per_class,
    shared_teacher_errors,
    side_by_side,
    summary,
)
