"""Quality checks of a section before training, and the report pages."""

from comtip_shards.qc.page import pages, write_pages
from comtip_shards.qc.result import Finding, SectionReport, refuse_failed
from comtip_shards.qc.run import check_section, check_source, check_sources

__all__ = [
    "Finding",
    "SectionReport",
    "check_section",
    "check_source",
    "check_sources",
    "pages",
    "refuse_failed",
    "write_pages",
]
