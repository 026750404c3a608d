"""A study: many sources in one table, opened, planned and built together."""

from comtip_shards.study.sections import OpenedRow, is_study, open_study, sections_of
from comtip_shards.study.table import COLUMNS, StudyRow, read_study

__all__ = ["COLUMNS", "OpenedRow", "StudyRow", "is_study", "open_study", "read_study", "sections_of"]
