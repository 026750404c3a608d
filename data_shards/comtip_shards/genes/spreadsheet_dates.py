"""Dates into which spreadsheets turn names of genes (SEPT2 becomes 2-Sep), as text and as serial numbers."""

from __future__ import annotations

import re
from datetime import date, timedelta

MONTHS = {
    "jan": ("JAN",),
    "feb": ("FEB",),
    "mar": ("MARCH", "MARC"),
    "apr": ("APR",),
    "may": ("MAY",),
    "jun": ("JUN",),
    "jul": ("JUL",),
    "aug": ("AUG",),
    "sep": ("SEPT", "SEP"),
    "oct": ("OCT",),
    "nov": ("NOV",),
    "dec": ("DEC",),
}
"""{month: beginnings of symbols that spreadsheets turn into its dates (SEPT2 becomes 2-Sep), in order of preference}."""
AMBIGUOUS = {("mar", 1), ("mar", 2)}
"""Dates of two gene families: MARCH1 and MARC1 both become 1-Mar."""
_GERMAN = {"mrz": "mar", "mär": "mar", "mai": "may", "okt": "oct", "dez": "dec"}
"""Months that spreadsheets in German write otherwise (``2. Okt``)."""
_NAME = f"(?:{'|'.join((*MONTHS, *_GERMAN))})"
_MONTH = rf"(?P<month>{_NAME})(?:t|tember|ch|uary|ruary|il|e|y|ust|ober|ember)?"
_YEAR = r"(?:\d{4}|\d{2})"
_TIME = r"(?:[ T.]00[:.]00(?:[:.]00)?)?"
_FORMS = tuple(
    re.compile(form, re.IGNORECASE)
    for form in (
        rf"X?(?P<day>\d{{1,2}})[-. /]\s?{_MONTH}(?:[-. /]\s?{_YEAR})?{_TIME}$",
        rf"{_MONTH}[-. /](?P<day>\d{{1,2}})(?:,?[-. /]\s?\d{{4}})?$",
        rf"X?\d{{4}}[-./](?P<number>\d{{1,2}})[-./](?P<day>\d{{1,2}}){_TIME}$",
        rf"X?(?P<first>\d{{1,2}})(?P<sep>[-./])(?P<second>\d{{1,2}})(?P=sep){_YEAR}{_TIME}$",
    )
)
"""2-Sep, 2-Sep-22; Sep-02, Sep 2, 2022; 2024-09-02 00:00:00; 9/2/2022 and 02.09.22; and these after R's make.names (X2.Sep)."""
_SERIAL = re.compile(r"X?(\d{5})(?:\.0)?$")
_FIRST_YEAR, _EPOCHS = 1995, ((date(1899, 12, 30), 2035), (date(1904, 1, 1), 2012))
"""First year in which a name can have been typed; (day 0, last year) of both date systems: spreadsheets of a Mac counted from 1904
until 2011."""


def dates_of(text: str) -> list[tuple[str, int]]:
    """Return the dates (month, day) that a text may mean, empty if none; 9/2/2022 may mean 2 September or 9 February."""
    match = next((m for form in _FORMS if (m := form.match(text))), None)
    if match is None:
        return []
    found = match.groupdict()
    if found.get("first"):
        first, second = int(found["first"]), int(found["second"])
        pairs = [(first, second), (second, first)]
    else:
        names = list(MONTHS)
        number = int(found["number"]) if found.get("number") else names.index(_month(found["month"])) + 1
        pairs = [(number, int(found["day"]))]
    return [(list(MONTHS)[m - 1], day) for m, day in dict.fromkeys(pairs) if 1 <= m <= 12 and 1 <= day <= 31]


def _month(name: str) -> str:
    """Return the key of :data:`MONTHS` of a name of a month."""
    start = name[:3].lower()
    return _GERMAN.get(start, start)


def serial_dates_of(text: str) -> list[tuple[str, int]]:
    """Return the dates (month, day) that a spreadsheet may have stored as this number (44621: 1 March 2022), empty if none."""
    match = _SERIAL.match(text)
    if match is None:
        return []
    days = [(epoch + timedelta(days=int(match[1])), last) for epoch, last in _EPOCHS]
    return [(list(MONTHS)[d.month - 1], d.day) for d, last in days if _FIRST_YEAR <= d.year <= last]
