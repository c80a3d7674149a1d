"""The thin QAT layer: QSpec and QConfig, prepare, calibrate, switches for training, convert, exact, report."""

from .calibrate import calibrate
from .config import QConfig, QSpec
from .convert import convert
from .exact import exact
from .prepare import prepare
from .report import Report, report
from .training import enable_fake_quant, freeze_observers, parameter_groups, set_bits

__all__ = [
    "QConfig",
    "QSpec",
    "Report",
    "calibrate",
    "convert",
    "enable_fake_quant",
    "exact",
    "freeze_observers",
    "parameter_groups",
    "prepare",
    "report",
    "set_bits",
]
