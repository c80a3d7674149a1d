"""The thin QAT layer: QSpec and QConfig, prepare, calibrate, switches for training, convert, unprepare, report."""

from . import losses, widths
from .batch_norm import freeze_bn, reestimate_bn
from .bit_schedule import BitSchedule
from .calibrate import calibrate
from .config import QConfig
from .convert import convert
from .exact import exact
from .prepare import prepare
from .presets import presets
from .quant_loss import QuantLoss
from .report import Report, report
from .saving import load, save
from .spec import QSpec
from .training import enable_fake_quant, freeze_observers, parameter_groups, set_bits
from .unprepare import unprepare

__all__ = [
    "BitSchedule",
    "QConfig",
    "QSpec",
    "QuantLoss",
    "Report",
    "calibrate",
    "convert",
    "enable_fake_quant",
    "exact",
    "freeze_bn",
    "freeze_observers",
    "load",
    "losses",
    "parameter_groups",
    "prepare",
    "presets",
    "reestimate_bn",
    "report",
    "save",
    "set_bits",
    "unprepare",
    "widths",
]
