"""The state of a quantizer: its tensors and switches, and how they are reset, cast, saved and loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.dynamic import range_of_bits
from .granularity import Granularity, PerTensor, PerToken
from .last_result import LastResult
from .learned_scale import LOG_LIMIT, MSE_BITS, learned_scale
from .quantizer_rules import check_bits, check_tensor, resolve
from .ranges import is_sharded, whole

LEARNED = ("lsq", "lsq+", "pact", "ewgs")
EWGS_SLACK = 2**-22  # two last bits of fp32

_classes: dict[str, type[QuantizerState]] = {}  # the quantizers that have a class of their own, by name


def apply_keeping_dtype(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Applies ``fn`` (of Module._apply) to t, except that the dtype stays."""
    moved = fn(t)
    return moved if moved.dtype == t.dtype else t.to(moved.device)


def fault_of_scale(scale: Tensor) -> str:
    """What is wrong with a scale that is given, for an error; empty: nothing (waits for the device)."""
    if scale.is_meta or is_sharded(scale):
        return ""
    wrong = scale[~(scale > 0) | scale.isinf()]
    return f"got {float(wrong[0])}; accepted: positive, finite numbers" if wrong.numel() else ""


class QuantizerState(nn.Module):
    """The tensors and switches of ``FakeQuantize``, whose docstring describes the arguments.

    A quantizer that needs more than ``FakeQuantize`` has a subclass, which names it: ``class C(FakeQuantize,
    quantizers=("nf4",))``. To construct a FakeQuantize of that name is to construct one of that class.
    """

    integer_codes: ClassVar[bool] = True  # whether its values are integers, less a zero point, times a scale
    log_scale: Tensor
    zero_point: Tensor | None
    running_min: Tensor
    running_max: Tensor
    observer_on: Tensor
    fake_quant_on: Tensor
    calibrated: Tensor
    _scale: Tensor  # for a learned scale: its start
    magnitude: Tensor  # the mean |x| that the start of a learned scale is for; -1: not known
    # Of the last sequence that moved them: whether there was a scale, its start, and the zero point (see for_steps).
    _of_steps: tuple[bool, Tensor, Tensor | None] | None = None
    at_source: bool = False  # whether it acts where the tensor is made, so that layers that have it too do not call it
    ewgs_delta: float = 1e-3  # a plain attribute, not a tensor: EWGS's authors change it every some epochs

    def __init_subclass__(cls, quantizers: Sequence[str] = (), **options: Any) -> None:
        super().__init_subclass__(**options)
        _classes.update(dict.fromkeys(quantizers, cls))

    def __new__(cls, *args: Any, quantizer: str = "lsq", **options: Any) -> QuantizerState:
        own = _classes.get(quantizer, cls)
        return super().__new__(own if issubclass(own, cls) else cls)

    def __init__(
        self,
        *,
        bits: int = 8,
        granularity: Granularity | None = None,
        symmetric: bool | None = None,
        quantizer: str = "lsq",
        shape: Sequence[int] | None = None,
        feature_dims: int = 1,
        straight_through: str | None = None,
    ) -> None:
        super().__init__()
        self.granularity = granularity = PerTensor() if granularity is None else granularity
        self.symmetric, self.straight_through = resolve(quantizer, bits, symmetric, straight_through)
        self.quantizer = quantizer
        if not isinstance(self, _classes.get(quantizer, QuantizerState)):
            raise ValueError(f'quantizer: got "{quantizer}" in {type(self).__name__}; accepted: FakeQuantize itself')
        self.feature_dims = feature_dims
        self.exact_zero_point: Tensor | None = None  # what set_bits rounded to an integer zero point
        self.name = ""  # its name in the model, for errors
        self.last: LastResult | None = None  # where several layers get one tensor, which is then quantized once
        self._set_width(bits)
        self._ready = True
        self._observes = self._quantizes = True
        self.frozen = False  # whether ``freeze`` holds the range against calibration too
        self._observed = True  # whether it observed before that
        self.is_weight = shape is not None
        check_tensor(quantizer, self.is_weight)
        self._numel: int | None = None
        if quantizer == "dynamic":
            if shape is not None and not isinstance(granularity, PerToken):
                granularity.scale_shape(shape)  # which refuses what does not fit the shape
            self.register_buffer("fake_quant_on", torch.ones(1, dtype=torch.uint8))
            return
        scale_shape = granularity.scale_shape(shape)
        self._span = 1.0  # the largest magnitude that is assumed for a tensor of zeros
        if shape is not None:
            self._numel = math.prod(shape) // max(math.prod(scale_shape), 1)
            self._span = 4 * max(math.prod(shape[1:]), 1) ** -0.5
        self._register(scale_shape)
        self.reset_parameters()

    def _register(self, scale_shape: Sequence[int]) -> None:
        """Makes the tensors, which ``reset_parameters`` fills."""
        self.register_buffer("_scale", torch.empty(scale_shape), persistent=False)
        if self.learns:
            self.register_buffer("magnitude", torch.empty(scale_shape), persistent=False)
            self.log_scale = nn.Parameter(torch.empty(scale_shape))
            self.zero_point = None if self.symmetric else nn.Parameter(torch.empty(scale_shape))
        else:
            zero_point = torch.empty(scale_shape, dtype=torch.int32)
            self.register_buffer("zero_point", None if self.symmetric and self.quantizer != "ema" else zero_point)
        if self.quantizer == "ema":
            self.register_buffer("running_min", torch.empty(scale_shape))
            self.register_buffer("running_max", torch.empty(scale_shape))
        else:
            self.register_buffer("calibrated", torch.empty(1, dtype=torch.bool))
        self.register_buffer("observer_on", torch.empty(1, dtype=torch.uint8))
        self.register_buffer("fake_quant_on", torch.empty(1, dtype=torch.uint8))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forgets all that was calibrated or learned; torch calls it after ``to_empty``."""
        self.fake_quant_on.fill_(self._quantizes)
        if self.quantizer == "dynamic":
            return
        self._scale.fill_(torch.nan)
        if self.zero_point is not None:
            self.zero_point.zero_()
        if self.learns:
            self.log_scale.zero_()
            self.magnitude.fill_(-1)
        if self.quantizer == "ema":
            self.running_min.fill_(torch.inf)
            self.running_max.fill_(-torch.inf)
        else:
            self.calibrated.fill_(False)
        self.observer_on.fill_(self._observes)
        self._ready = self.quantizer == "ema" and not self._scale.is_meta

    def check_width(self, bits: int) -> None:
        """Raises ValueError if the quantizer does not take ``bits``, so that a model can ask all before it changes."""
        check_bits(self.quantizer, bits)

    def _set_width(self, bits: int) -> None:
        check_bits(self.quantizer, bits)
        quant_min, self.quant_max = range_of_bits(bits)
        self.quant_min = -self.quant_max if self.symmetric else quant_min
        self.steps = self.quant_max - (0 if self.symmetric else self.quant_min)
        self._bits = bits

    @property
    def bits(self) -> int:
        """The width; ``set_bits`` changes it."""
        return self._bits

    @property
    def learns(self) -> bool:
        """Whether the scale is learned."""
        return self.quantizer in LEARNED

    @property
    def learns_at_few_bits(self) -> bool:
        """Whether the scale is learned, from a start that has the smallest squared error instead of the range."""
        return self.learns and self.bits <= MSE_BITS

    @property
    def quantizes(self) -> bool:
        """Whether the forward pass quantizes; ``enable_fake_quant`` switches it."""
        return self._quantizes

    @property
    def observes(self) -> bool:
        """Whether training moves the range by what it sees; ``enable_observer`` switches it."""
        return self._observes

    @property
    def scale(self) -> Tensor:
        """The scale, fp32, in the shape that the granularity gives; NaN before it is known."""
        if self.learns:
            return learned_scale(self._scale, whole(self.log_scale), self._log_limits(), self.steps)
        return self._scale

    @scale.setter
    @torch.no_grad()
    def scale(self, scale: Tensor | float) -> None:
        scale = torch.as_tensor(scale)
        own, where = self._scale.shape, f"{self.name}.scale".removeprefix(".")
        if scale.shape not in (own, (), (1,)):
            raise ValueError(f"{where}: got shape {list(scale.shape)}; accepted: a number, or shape {list(own)}")
        if fault := fault_of_scale(scale):
            raise ValueError(f"{where}: {fault}")
        self._scale.copy_(scale)
        self._started()

    @property
    def is_calibrated(self) -> bool:
        """Whether the scale is known or can be computed from the weight (waits for the device)."""
        return self.has_scale or (self.is_weight and self.quantizer != "ema")

    @property
    def has_scale(self) -> bool:
        """Whether the scale is known (waits for the device)."""
        if self.quantizer == "ema":
            return self._ready and not bool(self.running_min.isinf().any())
        return self._ready or self._was_calibrated()

    def _was_calibrated(self) -> bool:
        """What its tensor says: averaging a model copies another quantizer's tensors into this one."""
        return self.quantizer != "ema" and not self.calibrated.is_meta and bool(self.calibrated)

    def _started(self) -> None:
        if self.learns:
            self.log_scale.zero_()
            self.magnitude.fill_(-1)
        if self.learns or (self.is_weight and self.quantizer not in ("ema", "dynamic")):
            self.disable_observer()
        if self.quantizer != "ema":
            self.calibrated.fill_(True)
            self._ready = True

    def enable_observer(self, enabled: bool = True) -> None:
        """Sets whether training starts a scale and moves ranges: of "ema", of followed weights, of growing inputs."""
        self._observes = enabled
        self.frozen = self.frozen and not enabled
        if self.quantizer != "dynamic":
            self.observer_on.fill_(enabled)

    def disable_observer(self) -> None:
        self.enable_observer(False)

    def freeze(self, frozen: bool = True) -> None:
        """Holds the range against training and ``calibrate``; False: as it was before, or else the observer is on."""
        if frozen:
            self._observed = self._observed if self.frozen else self._observes
            self.enable_observer(False)
        else:
            self.enable_observer(self._observed if self.frozen else True)
        self.frozen = frozen

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Sets whether the forward pass quantizes; if not, x passes unchanged and observers go on."""
        self._quantizes = enabled
        self.fake_quant_on.fill_(enabled)

    def disable_fake_quant(self) -> None:
        self.enable_fake_quant(False)

    def _log_limits(self) -> tuple[float, float]:
        """The least and the largest logarithm of a learned scale over its start."""
        if not (self.is_weight and self.bits > MSE_BITS):
            return -LOG_LIMIT, LOG_LIMIT
        # EWGS clips before it rounds: by the rounding of its scale the largest weight would often count as clipped.
        return EWGS_SLACK if self.straight_through == "ewgs" else 0.0, math.log(2)

    def extra_repr(self) -> str:
        parts = (f"{name}={getattr(self, name)!r}" for name in ("bits", "granularity", "symmetric", "quantizer"))
        return ", ".join(parts)

    def _materialize(self, device: torch.device) -> None:
        """Moves the quantizer off the meta device, where ``load_state_dict(float_state, assign=True)`` leaves it."""
        if self._scale.is_meta:
            self.to_empty(device=device)

    def forget(self) -> None:
        """Drops the scale: the next weight sets it anew, or the next input in training mode."""
        if self.quantizer == "dynamic":
            return
        if self.quantizer != "ema":
            self.calibrated.fill_(False)
        self._ready = False
        self.enable_observer()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizerState:
        def apply(t: Tensor) -> Tensor:
            return fn(t) if isinstance(t, nn.Parameter) else apply_keeping_dtype(fn, t)

        was_empty = any(t.is_meta for t in self.buffers(recurse=False))
        super()._apply(apply, recurse)
        if was_empty and not any(t.is_meta for t in self.buffers(recurse=False)):  # to_empty does not initialize memory
            self.reset_parameters()
        if self.quantizer == "ema" and self._scale.is_meta:
            self._ready = False  # its averages have no values there
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # A key of a state_dict is the name of an attribute: torch.distributed.checkpoint looks for it.
        destination[prefix + "bits"] = torch.tensor([self.bits], dtype=torch.int32)
        if self.quantizer == "dynamic":
            return
        scale = self._scale.detach()
        destination[prefix + "scale"] = scale
        destination[prefix + "frozen"] = torch.tensor([self.frozen, self._observed])
        if self.exact_zero_point is not None:
            destination[prefix + "exact_zero_point"] = self.exact_zero_point
        if self.learns:
            destination[prefix + "scale"] = self.scale.detach()
            destination[prefix + "start"] = scale
            destination[prefix + "magnitude"] = self.magnitude.detach()
            for name in self._parameters.keys() & {key.removeprefix(prefix) for key in destination}:
                destination[prefix + name] = destination[prefix + name].float()

    def fault_of_state(self, state: Mapping[str, Any], scale: Tensor) -> str:
        """``fault_of_scale`` of a state's, in which a quantizer without a scale yet holds any value."""
        if self.quantizer == "ema":
            lowest = state.get("running_min")
            is_set = lowest is not None and not lowest.is_meta and not bool(lowest.isinf().any())
        else:
            calibrated = state.get("calibrated")
            is_set = calibrated is not None and not calibrated.is_meta and bool(calibrated)
        return fault_of_scale(scale) if is_set else ""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = strict, missing_keys, unexpected_keys, error_msgs
        state = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        bits, scale, start = state.pop("bits", None), state.pop("scale", None), state.pop("start", None)
        magnitude, exact_zero_point = state.pop("magnitude", None), state.pop("exact_zero_point", None)
        frozen = state.pop("frozen", None)
        if bits is not None and int(bits) != self.bits:
            error_msgs.append(
                f"{prefix}bits: got a state of {int(bits)} bits; accepted: {self.bits}, the width of this quantizer "
                "(qk.set_bits changes it)"
            )
            return
        if self.quantizer == "dynamic":
            state.setdefault("fake_quant_on", torch.tensor([self._quantizes], dtype=torch.uint8))
            super()._load_from_state_dict({prefix + key: t for key, t in state.items()}, prefix, local_metadata, *rest)
            self._quantizes = self.fake_quant_on.is_meta or bool(self.fake_quant_on)
            return
        self.exact_zero_point = None if exact_zero_point is None else exact_zero_point.detach().clone()
        if scale is None:
            missing_keys.append(prefix + "scale")
        elif scale.shape != self._scale.shape:
            error_msgs.append(
                f"{prefix}scale: got shape {list(scale.shape)}; accepted: {list(self._scale.shape)}, that of this "
                "quantizer"
            )
            return
        elif fault := self.fault_of_state(state, scale):
            error_msgs.append(f"{prefix}scale: {fault}")
            return
        if scale is not None:
            for name, value in (("observer_on", self._observes), ("fake_quant_on", self._quantizes)):
                state.setdefault(name, torch.tensor([value], dtype=torch.uint8))
            self._observes = bool(state["observer_on"])
            if self.learns:
                log_scale = state.get("log_scale")
                # A scale that was edited, or that comes without a start, is a new start.
                if (
                    start is not None
                    and log_scale is not None
                    and torch.equal(learned_scale(start, whole(log_scale), self._log_limits(), self.steps), scale)
                ):
                    scale = start
                else:
                    magnitude = None
                    state["log_scale"] = torch.zeros_like(self.log_scale if is_sharded(self.log_scale) else scale)
                if magnitude is None or magnitude.shape != scale.shape:
                    magnitude = torch.full_like(scale, -1)
            assign = self._scale.is_meta or local_metadata.get("assign_to_params_buffers", False)
            for name, value in (("_scale", scale), ("magnitude", magnitude)):
                if name in self._buffers and assign:
                    setattr(self, name, value.detach().clone())
                elif name in self._buffers:
                    getattr(self, name).copy_(value)
        loaded = {prefix + key: value for key, value in state.items()}
        super()._load_from_state_dict(loaded, prefix, local_metadata, *rest)
        if self._scale.is_meta:
            return
        self._observes, self._quantizes = bool(self.observer_on), bool(self.fake_quant_on)
        if frozen is None:  # a state of a float model, or of an earlier version
            self.frozen = self.frozen and not self._observes
        else:
            self.frozen, self._observed = frozen.tolist()
        if self.quantizer == "ema":
            self._ready = True
        elif scale is not None:
            self._ready = bool(self.calibrated)
