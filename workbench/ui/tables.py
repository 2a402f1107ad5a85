"""Tables as HTML, for widgets, saved notebooks and reports."""

import html
from collections.abc import Collection
from typing import Any

import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype

UNITS = {  # of columns of comparisons and metrics, for people
    "top1": "top-1 (%)",
    "low": "95 % interval from",
    "high": "to (%)",
    "sd": "sd of seeds (points)",
    "interval": "interval over",
    "top5": "top-5 (%)",
    "ece": "calibration error (0 to 1)",
    "minutes": "minutes a run",
    "images": "validation images",
}


def html_table(frame: pd.DataFrame, right: Collection[str] = ()) -> str:
    """A table with numbers, and the columns of `right`, aligned right; floats with two digits.

    An index that is not just the numbers of the rows is the first columns.
    """
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index()
    numeric = [is_numeric_dtype(t) and not is_bool_dtype(t) for t in frame.dtypes]
    sides = [
        "right" if number or title in right else "left"
        for number, title in zip(numeric, frame, strict=True)
    ]

    def line(kind: str, values: Collection[Any], style: str) -> str:
        cells = [
            f"<{kind} style='text-align:{side}; padding:2px 10px'>{_text(value)}</{kind}>"
            for value, side in zip(values, sides, strict=True)
        ]
        return f"<tr style='border-bottom:{style}'>{''.join(cells)}</tr>"

    head = line("th", [UNITS.get(title, title) for title in frame], "1px solid")
    body = [line("td", row, "1px solid #8884") for row in frame.itertuples(index=False)]
    style = "border-collapse:collapse; line-height:1.4; font-variant-numeric:tabular-nums"
    return f"<table style='{style}'><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"


def _text(value: Any) -> str:
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return ""
    return html.escape(f"{value:.2f}" if isinstance(value, float) else str(value))
