"""The report of an evaluation or a benchmark: tables, plots and one self-contained page."""

from geoaccel.eval.report.files import merge_reports, read_report, read_rows, write_report
from geoaccel.eval.report.rows import Report, Row, json_line, knobs_of
from geoaccel.eval.report.tables import terminal_table

__all__ = [
    "Report",
    "Row",
    "json_line",
    "knobs_of",
    "merge_reports",
    "read_report",
    "read_rows",
    "terminal_table",
    "write_report",
]
