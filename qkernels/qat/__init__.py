"""The thin QAT layer: QSpec and QConfig, prepare, calibrate, switches for training, convert, unprepare, report."""

from . import losses, schedules
from .adaround import adaround
from .advice import Advice, WidthAdvice
from .advise import advise
from .assign import Assignment, Widths, assign
from .batch_norm import freeze_bn, reestimate_bn
from .bias_correction import correct_bias
from .bit_schedule import BitSchedule
from .calibrate import calibrate
from .compare import ComparedLayer, Comparison, compare
from .config import QConfig
from .convert import convert
from .equalize import equalize
from .exact import exact
from .gptq import gptq
from .hybrid import Hybrid, hybrid
from .latency import measure_latency
from .oscillation import OscillationTracker
from .prepare import prepare
from .presets import presets
from .quant_loss import QuantLoss
from .recipe import Phase, Recipe
from .report import report
from .report_table import Report
from .saving import load, save
from .scale_tuning import ScaleTuning
from .sensitivity import sensitivity
from .sensitivity_table import Sensitivity, SensitivityRow
from .smoothquant import smoothquant
from .spec import QSpec
from .training import enable_fake_quant, freeze_observers, freeze_scales, parameter_groups, set_bits
from .training_log import TrainingLog
from .unprepare import unprepare

__all__ = [
    "Advice",
    "Assignment",
    "BitSchedule",
    "ComparedLayer",
    "Comparison",
    "Hybrid",
    "OscillationTracker",
    "Phase",
    "QConfig",
    "QSpec",
    "QuantLoss",
    "Recipe",
    "Report",
    "ScaleTuning",
    "Sensitivity",
    "SensitivityRow",
    "TrainingLog",
    "WidthAdvice",
    "Widths",
    "adaround",
    "advise",
    "assign",
    "calibrate",
    "compare",
    "convert",
    "correct_bias",
    "enable_fake_quant",
    "equalize",
    "exact",
    "freeze_bn",
    "freeze_observers",
    "freeze_scales",
    "gptq",
    "hybrid",
    "load",
    "losses",
    "measure_latency",
    "parameter_groups",
    "prepare",
    "presets",
    "reestimate_bn",
    "report",
    "save",
    "schedules",
    "sensitivity",
    "set_bits",
    "smoothquant",
    "unprepare",
]
