"""Predictions of a model, their metrics, and comparisons of runs."""

from workbench.evaluation.metrics import (
    by_column,
    calibration_error,
    confusion,
    mistakes,
    per_class,
    reliability,
    shared_teacher_errors,
    side_by_side,
    summary,
)
