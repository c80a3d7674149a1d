"""What the layers on integer weights share: the state that leaves the process, and the codes of the input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..ops.quantize import choose_qparams
from ..reference.fake_quantize import check_dense
from .fake_quantize import FakeQuantize, apply_keeping_dtype
from .granularity import PerToken

Self = TypeVar("Self", bound="QuantizedLayer")
Logical = dict[str, tuple[torch.dtype, tuple[int, ...]] | None]


class QuantizedLayer(nn.Module):
    """A layer with private buffers in a kernel's order and logical tensors in what leaves the process.

    A state_dict and a pickle hold the persistent buffers and the tensors of ``_logical``, from which ``_pack`` makes
    the private buffers anew, in the order of whatever device they are on. Loading takes all of them or none, and only
    of their own dtypes and shapes: an error names the tensor and leaves the layer as it was, also where strict=False
    lets one be missing. Dtypes stay when the model is cast, because the kernels compute in fp32 whatever x is.
    """

    def _logical(self) -> Logical:
        """Names, dtypes and shapes of the tensors that the private buffers stand for; None: not in this layer."""
        return {}

    def _pack(self, logical: dict[str, Tensor]) -> dict[str, Tensor | None]:
        """The private buffers that hold the logical tensors."""
        return {}

    def _unpack(self) -> dict[str, Tensor]:
        """The logical tensors that the private buffers hold."""
        return {}

    def _register_private(self) -> None:
        zeros = {name: torch.zeros(form[1], dtype=form[0]) for name, form in self._logical().items() if form}
        for name, t in self._pack(zeros).items():
            self.register_buffer(name, t, persistent=False)
        # None last: torch.export takes a buffer's place in this dict for its place among the program's inputs.
        self._buffers = dict(sorted(self._buffers.items(), key=lambda item: item[1] is None))

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(lambda t: apply_keeping_dtype(fn, t), recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: t for name, t in self._unpack().items()})

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
        logical = self._logical()
        expected = dict(logical)
        for name, buffer in self._buffers.items():
            if name not in self._non_persistent_buffers_set:
                expected[name] = None if buffer is None else (buffer.dtype, tuple(buffer.shape))
        missing, errors = [], []
        for name, form in expected.items():
            value = state_dict.get(prefix + name)
            if value is None:
                missing += [] if form is None else [prefix + name]
            elif form is None:
                errors.append(f"{prefix}{name}: got {_describe(value)}; accepted: none, as this layer has none")
            elif not isinstance(value, Tensor) or (value.dtype, tuple(value.shape)) != form:
                accepted = f"{form[0]} of shape {list(form[1])}"
                errors.append(f"{prefix}{name}: got {_describe(value)}; accepted: {accepted}")
        if missing or errors:
            missing_keys += missing
            error_msgs += errors
            return
        if logical:
            assign = local_metadata.get("assign_to_params_buffers", False)
            device = None if assign else next(self.buffers()).device
            try:
                private = self._pack({name: state_dict[prefix + name].to(device) for name in logical if logical[name]})
            except RuntimeError as error:  # values out of range
                error_msgs.append(f"{prefix}{error}")
                return
            self._buffers.update(private)
        others = {key: value for key, value in state_dict.items() if key.removeprefix(prefix) not in logical}
        super()._load_from_state_dict(
            others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()  # type: ignore[misc]  # nn.Module has one, untyped
        private = self._non_persistent_buffers_set
        state["_buffers"] = {name: None if name in private else t for name, t in self._buffers.items()}
        return {**state, "_unpacked": self._unpack()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        logical = state.pop("_unpacked")
        super().__setstate__(state)
        self._buffers.update(self._pack(logical))


class QuantizedInputLayer(QuantizedLayer):
    """A layer that quantizes its input on the way in (input None: takes it as it is), with a bias in fp32.

    state_dict: ``bias`` [N], and where the input's scale is fixed ``input_scale`` [1] and ``input_zero_point`` [1].
    """

    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(self, weight_shape: Sequence[int], bias: bool, weight_bits: int, input: FakeQuantize | None) -> None:
        super().__init__()
        n = weight_shape[0]
        self.weight_shape = tuple(weight_shape)
        self.weight_bits = weight_bits
        self.input_bits = None if input is None else input.bits
        self.input_granularity = None if input is None else input.granularity
        self.input_symmetric = input is None or input.symmetric
        self.quant_min, self.quant_max = (-128, 127) if input is None else (input.quant_min, input.quant_max)
        static = input is not None and input.quantizer != "dynamic"
        self.register_buffer("bias", torch.zeros(n) if bias else None)
        self.register_buffer("input_scale", torch.ones(1) if static else None)
        asymmetric = static and not self.input_symmetric
        self.register_buffer("input_zero_point", torch.zeros(1, dtype=torch.int32) if asymmetric else None)

    def set_input(self, input: FakeQuantize) -> None:
        """Takes the scale and zero point of the quantizer that the layer was made with, where they are fixed."""
        if self.input_scale is None:
            return
        scale, zero_point = input.qparams()
        self.input_scale = scale.reshape(1).float().clone()
        if zero_point is not None:
            self.input_zero_point = zero_point.reshape(1)

    def _input_qparams(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        check_dense("x", x)
        if self.input_scale is not None or self.input_bits is None or isinstance(self.input_granularity, PerToken):
            return self.input_scale, self.input_zero_point
        low, high = torch.aminmax(x.detach()) if x.numel() else (x.new_zeros(()), x.new_zeros(()))
        scale, zero_point = choose_qparams(
            low.float(),
            high.float(),
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            symmetric=self.input_symmetric,
        )
        return scale, None if self.input_symmetric else zero_point

    def _set_bias(self, bias: Tensor | None) -> None:
        self.bias = None if bias is None else bias.detach().float().clone()

    def _repr_of_codes(self) -> str:
        if self.input_bits is None:
            return f"weight_bits={self.weight_bits}, input in float"
        fixed = "static" if self.input_scale is not None else "dynamic"
        return f"weight_bits={self.weight_bits}, input_bits={self.input_bits} ({fixed}, {self.input_granularity})"


def _describe(value: Any) -> str:
    return f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_finite(weight: Tensor) -> Tensor:
    if not bool(weight.isfinite().all()):
        raise ValueError("weight: got NaN or infinite values; accepted: finite weights")
    return weight
