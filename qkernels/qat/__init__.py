"""The thin QAT layer: QSpec and QConfig, prepare, calibrate, convert, exact, report."""

from .calibrate import calibrate
from .config import QConfig, QSpec
from .convert import convert
from .exact import exact
from .prepare import prepare
from .report import Report, report

__all__ = ["QConfig", "QSpec", "Report", "calibrate", "convert", "exact", "prepare", "report"]
