"""The report of an evaluation: ``report.html``, one self-contained page, and its tables as CSV."""

from comtip_fast.evaluation.report.page import write_report

__all__ = ["write_report"]
