"""Predictions of a model, their metrics, and comparisons of runs."""

from workbench.evaluation.comparison import out_of_fold
from workbench.evaluation.headline import headline
from workbench.evaluation.metrics import (
    by_column,
    calibration_error,
    confusion,
    custom_metrics,
    image_cautions,
    mistakes,
    per_class,
    reliability,
    shared_teacher_errors,
    side_by_side,
    summary,
)
