"""Tables as HTML, for notebooks, widgets and reports."""

import html
from collections.abc import Collection
from typing import Any

import pandas as pd
from IPython.display import HTML
from pandas.api.types import is_bool_dtype, is_float_dtype, is_numeric_dtype

UNITS = {  # of columns of comparisons and metrics, for people
    "top1": "top-1 (%)",
    "low": "95 % interval (%)",  # to "high"
    "sd": "sd of seeds (points)",
    "interval": "interval over",
    "top5": "top-5 (%)",
    "ema_top1": "EMA top-1 (%)",
    "train_top1": "training top-1 (%)",
    "train_loss": "training loss (nats)",
    "val_loss": "validation loss (nats)",
    "ece": "calibration error (0 to 1)",
    "minutes": "minutes a run",
    "images": "validation images",
    "val_images": "validation images",
}


def table(frame: pd.DataFrame, right: Collection[str] = ()) -> HTML:
    """`html_table` to display in a cell."""
    return HTML(html_table(frame, right))


def html_table(frame: pd.DataFrame, right: Collection[str] = ()) -> str:
    """A table with numbers, and the columns of `right`, aligned right.

    Floats have two digits, three in a column without a value of 10 or more; `low` and `high` are
    one column. An index that is not just the numbers of the rows is the first columns.
    """
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index()
    if {"low", "high"} <= set(frame):
        span = [f"{low:.2f} to {high:.2f}" for low, high in zip(frame.low, frame.high, strict=True)]
        frame, right = frame.assign(low=span).drop(columns="high"), [*right, "low"]
    columns, sides = [], []
    for title, values in frame.items():
        number = is_numeric_dtype(values) and not is_bool_dtype(values)
        sides.append("right" if number or title in right else "left")
        digits = 3 if is_float_dtype(values) and not (values.abs() >= 10).any() else 2
        columns.append([_text(value, digits) for value in values])

    def line(kind: str, values: Collection[Any], style: str) -> str:
        cells = [
            f"<{kind} style='text-align:{side}; padding:2px 10px'>{value}</{kind}>"
            for value, side in zip(values, sides, strict=True)
        ]
        return f"<tr style='border-bottom:{style}'>{''.join(cells)}</tr>"

    head = line("th", [html.escape(str(UNITS.get(title, title))) for title in frame], "1px solid")
    body = [line("td", row, "1px solid #8884") for row in zip(*columns, strict=True)]
    style = "border-collapse:collapse; line-height:1.4; font-variant-numeric:tabular-nums"
    text = f"<table style='{style}'><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"
    return f"<div style='overflow-x:auto'>{text}</div>"  # a wide one has a scroll bar


def _text(value: Any, digits: int) -> str:
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return ""
    return html.escape(f"{value:.{digits}f}" if isinstance(value, float) else str(value))
