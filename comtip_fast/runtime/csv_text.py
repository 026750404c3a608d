"""CSV tables that can be opened in spreadsheets."""

from __future__ import annotations

import pandas as pd
from comtip_shards.names import is_formula


def csv_text(frame: pd.DataFrame) -> str:
    """Return a table as CSV without its index; floating-point numbers have six significant digits.

    A text that a spreadsheet would evaluate as a formula gets an apostrophe in front, because names of a shard set are not
    trusted.
    """
    safe = frame.copy()
    for column in safe.columns:
        if not pd.api.types.is_numeric_dtype(safe[column]):
            safe[column] = [f"'{v}" if isinstance(v, str) and is_formula(v) else v for v in safe[column]]
    return safe.to_csv(index=False, float_format="%.6g", lineterminator="\n")
