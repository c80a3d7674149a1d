"""What the layers on integer weights share: how they save, load and copy their state, and quantize their input."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import checks
from ..ops.dynamic import fake_quantize_dynamic
from ..ops.fake_quantize import fake_quantize
from ..ops.frozen import as_torch_jit_takes_them
from ..ops.pickling import reduce_for_a_process
from ..ops.quantize import choose_qparams
from .fake_quantize import FakeQuantize
from .granularity import PerToken
from .log_gain import with_gain
from .quantizer_state import apply_keeping_dtype
from .tracing import call_as_leaf, root_as_leaf

Self = TypeVar("Self", bound="QuantizedLayer")
Logical = dict[str, tuple[torch.dtype, tuple[int, ...]] | None]
Reference = tuple[weakref.ref[Tensor], int]  # a tensor, and its version when the reference was taken

OLD_NAME = {"codes": "weight"}  # logical tensor -> its name in files of version 0.1.0
# The logical tensors that a state_dict got from a layer, so that a layer with two names is stored once.
_saved: weakref.WeakKeyDictionary[QuantizedLayer, tuple[list[Reference], dict[str, Reference]]]
_saved = weakref.WeakKeyDictionary()


class QuantizedLayer(nn.Module):
    """A layer on integers in place of a float one.

    It holds its weight in private tensors, packed for the kernels, and saves logical tensors, which are the same on
    every device. ``weight`` is the float layer's weight, dequantized at each access into ``dtype``, which follows casts
    of the model; ``codes`` are the integers. A state_dict and a pickle hold the persistent tensors and those of
    ``_logical``; ``_pack`` makes the private tensors from these, for the device that they are on. Only a process that
    this one starts gets the private tensors themselves, in shared memory. The layer loads all of its tensors or none,
    and only with their own dtypes and shapes: an error names the tensor and leaves the layer as it was, even if
    strict=False accepts a missing one. ``codes_form`` (int32) holds the bits of a code, the weight's shape and, if the
    input has a fixed scale, the range of its codes. It tells apart states that have the same shapes; files of version
    0.1.0 lack it and load if their shapes fit.

    Scales and ranges keep their dtypes when the model is cast, because the kernels compute in fp32 whatever x is. They
    are Parameters that want no gradient (and get none). Code that asks a model for its dtype and device looks at the
    first Parameter: ``weight_dtype``, one zero of ``dtype``, which no state_dict holds.
    """

    weight_dtype: nn.Parameter
    weight_bits: int
    weight_shape: tuple[int, ...]
    private_buffers: tuple[str, ...] = ()
    private_parameters: tuple[str, ...] = ()
    kept_dtypes = ("scale", "zero_point", "input_scale", "input_zero_point", "log_gain")  # private ones keep theirs too
    tied_to: tuple[QuantizedLayer, ...] = ()  # a layer of the same float weight, with which this one shares tensors
    weight_elsewhere = False  # whether the float model also holds the weight under an earlier name

    __call__ = call_as_leaf

    def __init__(self, weight_shape: Sequence[int], weight_bits: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        checks.require(dtype.is_floating_point, f"dtype: got {dtype}; accepted: a floating dtype")
        self.weight_shape, self.weight_bits = tuple(weight_shape), weight_bits
        self.weight_dtype = frozen(torch.zeros(1, dtype=dtype))

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        ForkingPickler.register(cls, reduce_for_a_process)

    @property
    def itself(self: Self) -> Self:
        """The layer, for a graph of torch.fx that was traced from it (see ``root_as_leaf``)."""
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of ``weight``."""
        return self._parameters["weight_dtype"].dtype  # type: ignore[union-attr]

    @property
    def codes_form(self) -> Tensor:
        """What the shapes of a state's tensors do not tell (see the class)."""
        return torch.tensor(self._form_of_codes(), dtype=torch.int32, device="cpu")

    def _form_of_codes(self) -> list[int]:
        return [self.weight_bits, *self.weight_shape]

    def _describe_form(self, form: list[int]) -> str:
        bits, *shape = form[: 1 + len(self.weight_shape)]
        return f"codes of {bits} bits for a weight {shape}"

    @property
    def weight(self) -> Tensor:
        """The weight in the float layer's shape and ``dtype``, dequantized: a new tensor at each access."""
        return self._weight_in(self.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight, computed in fp32 (fp64 for fp64) and rounded once to dtype."""
        return self._weight_in(dtype)

    def compute(self, input: Tensor) -> Tensor:
        """The result before the quantizer of the output."""
        raise NotImplementedError

    @root_as_leaf
    def forward(self, input: Tensor) -> Tensor:
        return self._output(self.compute(input))

    def quantize_output(self, quantizer: FakeQuantize) -> None:
        """Lets the result pass through a quantizer, whose range is fixed from here on."""
        quantizer.disable_observer()
        self.output_fake_quant = quantizer

    def _output(self, y: Tensor) -> Tensor:
        y, quantizer = with_gain(y, self), self._modules.get("output_fake_quant")
        return y if quantizer is None else quantizer(y)

    def _weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight, computed in fp32 (fp64 for fp64) and rounded once to dtype."""
        raise NotImplementedError

    def _logical(self) -> Logical:
        """Names, dtypes and shapes of the tensors that the private ones stand for; None: this layer has none."""
        return {}

    def _pack(self, logical: dict[str, Tensor]) -> dict[str, Tensor | None]:
        """The private tensors that hold the logical ones."""
        return {}

    def _unpack(self) -> dict[str, Tensor]:
        """The logical tensors that the private ones hold."""
        return {}

    def _modernize(self, codes: Tensor) -> Tensor:
        """Brings codes as files of version 0.1.0 hold them to the form of ``_logical``."""
        return codes

    def _register_private(self) -> None:
        zeros = {name: torch.zeros(form[1], dtype=form[0]) for name, form in self._logical().items() if form}
        for name, t in self._pack(zeros).items():
            if name not in self.private_parameters:
                self.register_buffer(name, t, persistent=False)
            elif t is not None:
                self.register_parameter(name, frozen(t))
        # None goes last: torch.export takes a buffer's place in this dict for its place among the program's inputs.
        self._buffers = dict(sorted(self._buffers.items(), key=lambda item: item[1] is None))

    def _hold(self, private: dict[str, Tensor | None], in_place: bool = False) -> None:
        """Takes the private tensors; in_place: copies them, if possible, into the present ones, which may be shared."""
        device = next(t.device for t in private.values() if t is not None)
        if self.weight_dtype.device != device:
            self.weight_dtype = frozen(torch.zeros(1, dtype=self.dtype, device=device))
        for name, t in private.items():
            held = (self._parameters if name in self.private_parameters else self._buffers)[name]
            same = held is not None and t is not None and _form(held) == _form(t)
            if in_place and same and not (held.is_meta or held.is_inference()):  # type: ignore[union-attr]
                held.detach().copy_(t)  # type: ignore[union-attr, arg-type]
            elif name in self.private_parameters and t is not None:
                self._parameters[name] = frozen(t)
            else:
                self._buffers[name] = t

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def flat(t: Tensor) -> Tensor:  # a memory format is meant for the float weight of a convolution, not for codes
            return fn(t.reshape(-1)).view(t.shape) if t.dim() >= 4 else fn(t)

        names = {*self.kept_dtypes, *self.private_buffers, *self.private_parameters}
        kept = [t for held in (self._parameters, self._buffers) for name, t in held.items() if name in names]
        super()._apply(lambda t: apply_keeping_dtype(flat, t) if any(t is other for other in kept) else fn(t), recurse)
        if not (self.weight_dtype.is_meta or self.weight_dtype.is_inference()):
            self.weight_dtype.detach().zero_()  # to_empty does not initialize memory
        self._share()
        return self

    def tie(self, other: QuantizedLayer) -> None:
        """Shares the tensors of a layer made of the same float weight, as long as both hold the same values.

        After loading, moving or unpickling, tensors that are still the same are shared again.
        """
        self.tied_to = (other,)
        self._share()

    def _share(self) -> None:
        for own, others, name in self._tied_names():
            a, b = own[name], others[name]
            if a is not b and _form(a) == _form(b) and not a.is_meta and torch.equal(a, b):
                own[name] = b

    def _unshare(self) -> None:
        """Copies the shared tensors before new values are written: the other layer may not get the same ones."""
        for own, others, name in self._tied_names():
            if own[name] is others[name]:
                t = own[name].detach().clone()
                own[name] = frozen(t) if own is self._parameters else t

    def _tied_names(self) -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
        for other in self.tied_to:
            for own, others in ((self._parameters, other._parameters), (self._buffers, other._buffers)):
                for name in ("scale", "zero_point", *self.private_buffers, *self.private_parameters):
                    if own.get(name) is not None and others.get(name) is not None:
                        yield own, others, name

    def _unpack_tied(self) -> dict[str, Tensor]:
        """``_unpack``; if another layer has the same private tensors, that layer's result, so that both share it."""
        private = (*self.private_buffers, *self.private_parameters)
        for other in self.tied_to:
            if all(getattr(self, name) is getattr(other, name, None) for name in private):
                return {name: t for name, t in other._unpack_once().items() if name != "codes_form"}
        return self._unpack()

    def _scale_of(self, name: str) -> Tensor:
        """A frozen parameter as a tensor that wants no gradient, even after a call of requires_grad_."""
        t = self._parameters[name]  # the attribute is a Proxy, not a tensor, while torch.fx traces
        assert t is not None
        return t.detach() if t.requires_grad else t

    def _device(self) -> torch.device:
        return next(t.device for t in (*self._parameters.values(), *self._buffers.values()) if t is not None)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._unsaved():
            destination.pop(prefix + name, None)
        destination.update({prefix + name: t for name, t in self._unpack_once().items()})

    def _unsaved(self) -> tuple[str, ...]:
        """Parameters that no state_dict holds."""
        return tuple({"weight_dtype", "log_gain", *self.private_parameters} & self._parameters.keys())

    def _unpack_once(self) -> dict[str, Tensor]:
        """``_unpack`` and ``codes_form``; the last result again if it is still alive and nothing has changed."""

        def unpack() -> dict[str, Tensor]:
            return {**self._unpack_tied(), "codes_form": self.codes_form}

        held = [t for t in (*self._parameters.values(), *self._buffers.values()) if t is not None]
        if torch.is_inference_mode_enabled() or any(t.is_inference() for t in held):  # such tensors have no version
            return unpack()
        sources, made = _saved.get(self, ([], {}))
        tensors = {
            name: t for name, (reference, version) in made.items() if (t := _alive(reference, version)) is not None
        }
        unchanged = len(sources) == len(held) and all(_alive(*old) is t for old, t in zip(sources, held, strict=True))
        if not unchanged or len(tensors) < len(made):
            tensors = unpack()
            _saved[self] = [_reference(t) for t in held], {name: _reference(t) for name, t in tensors.items()}
        return tensors

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
        arguments = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, *arguments)
        given, missing, errors = self.given_in(state_dict, prefix)
        if missing or errors:
            missing_keys += missing
            error_msgs += errors
            return
        if logical := self._logical():
            assign = local_metadata.get("assign_to_params_buffers", False)
            device = None if assign else self._device()
            try:
                with torch.no_grad():
                    private = self._pack({name: given[name].to(device) for name in logical if logical[name]})
                    self._unshare()
                    self._hold(private, in_place=not assign)
            except RuntimeError as error:  # values out of range
                error_msgs.append(f"{prefix}{error}")
                return
        taken = {"codes_form", *logical, *(old for name, old in OLD_NAME.items() if name in logical)}
        others = {key: value for key, value in state_dict.items() if key.removeprefix(prefix) not in taken}
        others.update({prefix + name: self._parameters[name] for name in self._unsaved()})  # they stay
        if isinstance(given.get("bias"), Tensor):
            others[prefix + "bias"] = given["bias"].to(self.dtype)  # assign=True would keep its dtype
        hooks, self._load_state_dict_pre_hooks = self._load_state_dict_pre_hooks, {}  # the hooks have run above
        try:
            super()._load_from_state_dict(others, prefix, *arguments)
        finally:
            self._load_state_dict_pre_hooks = hooks
        self._share()

    def given_in(self, state_dict: Mapping[str, Any], prefix: str) -> tuple[dict[str, Any], list[str], list[str]]:
        """The tensors that a state_dict has for this layer, by their names here; the keys that it lacks; errors."""
        expected = dict(self._logical())
        for name, t in (*self._parameters.items(), *self._buffers.items()):
            if name not in self._non_persistent_buffers_set and name not in self._unsaved():
                expected[name] = None if t is None else (t.dtype, tuple(t.shape))
        given: dict[str, Any] = {}
        missing, errors = [], self._errors_of_form(prefix, state_dict.get(prefix + "codes_form"))
        for name, form in expected.items():
            key = prefix + name
            if name in OLD_NAME and key not in state_dict and prefix + OLD_NAME[name] in state_dict:
                key = prefix + OLD_NAME[name]
            value = given[name] = state_dict.get(key)
            if name in OLD_NAME and key != prefix + name and isinstance(value, Tensor):
                try:
                    value = given[name] = self._modernize(value)
                except RuntimeError as error:
                    errors.append(f"{key}: {error}")
                    continue
            if value is None:
                missing += [] if form is None else [key]
            elif form is None:
                errors.append(f"{key}: got {_describe(value)}; accepted: none, as this layer has none")
            elif not isinstance(value, Tensor) or value.shape != form[1] or not self._takes(name, value, form[0]):
                errors.append(f"{key}: got {_describe(value)}; accepted: {form[0]} of shape {list(form[1])}")
        return given, missing, errors

    def _errors_of_form(self, prefix: str, form: Any) -> list[str]:
        """The errors of a state's ``codes_form``, if it has one: another weight's codes may take as many bytes."""
        own = self._form_of_codes()
        if form is None or (isinstance(form, Tensor) and (form.is_meta or form.tolist() == own)):
            return []
        readable = isinstance(form, Tensor) and form.dim() == 1 and form.numel() == len(own)
        got = self._describe_form(form.tolist()) if readable else _describe(form)
        return [f"{prefix}codes_form: got {got}; accepted: {self._describe_form(own)}"]

    def _takes(self, name: str, value: Tensor, dtype: torch.dtype) -> bool:
        """Whether a tensor's dtype fits: tensors that the kernels read need that very dtype, others are cast."""
        if name in self._logical() or name in self.kept_dtypes:
            return value.dtype == dtype
        return value.is_floating_point() == dtype.is_floating_point

    def __copy__(self: Self) -> Self:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_unpacked": self._unpack_once()}
        for kind, private in (("_buffers", self.private_buffers), ("_parameters", self.private_parameters)):
            state[kind] = {name: None if name in private else t for name, t in state[kind].items()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        logical = state.pop("_unpacked", None)
        super().__setstate__(state)
        if logical is not None:  # None: the state comes from a parent process and has the private tensors
            self._hold(self._pack(logical))
            self._share()


def _reference(t: Tensor) -> Reference:
    return weakref.ref(t), t._version


def _alive(reference: weakref.ref[Tensor], version: int) -> Tensor | None:
    t = reference()
    return None if t is None or t._version != version else t


def _form(t: Tensor) -> tuple[Any, ...]:
    return t.dtype, t.shape, t.device


class QuantizedInputLayer(QuantizedLayer):
    """A layer that quantizes its input (input None: the input stays in float).

    The bias has the float layer's dtype and follows casts of the model, as the float layer's does; the kernels add it
    in fp32.

    The result has the input's dtype, or autocast's under autocast. The layer computes an fp64 input in fp64, from the
    same integers, without the integer kernels. It refuses integer inputs: codes go, with their scale, to the functions.

    state_dict: ``bias`` [N] (loaded from any floating dtype) and, if the input's scale is fixed, ``input_scale`` [1]
    and ``input_zero_point`` [1].
    """

    bias: nn.Parameter | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(
        self,
        weight_shape: Sequence[int],
        bias: bool,
        weight_bits: int,
        input: FakeQuantize | None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(weight_shape, weight_bits, dtype)
        self.input_bits = None if input is None else input.bits
        self.input_granularity = None if input is None else input.granularity
        self.input_symmetric = input is None or input.symmetric
        self.quant_min, self.quant_max = (-128, 127) if input is None else (input.quant_min, input.quant_max)
        static = input is not None and input.quantizer != "dynamic"
        n, fp32 = self._outputs(weight_shape), torch.float32
        self.register_parameter("bias", nn.Parameter(torch.zeros(n, dtype=dtype)) if bias else None)
        self.register_buffer("input_scale", torch.ones(1, dtype=fp32) if static else None)
        asymmetric = static and not self.input_symmetric
        self.register_buffer("input_zero_point", torch.zeros(1, dtype=torch.int32) if asymmetric else None)

    def _outputs(self, weight_shape: Sequence[int]) -> int:
        """How many outputs, each with a scale and a bias, a weight of this shape has."""
        return weight_shape[0]

    def _form_of_codes(self) -> list[int]:
        """Adds the range of the input's codes, if the input's scale is fixed."""
        return super()._form_of_codes() + ([] if self.input_scale is None else [self.quant_min, self.quant_max])

    def _describe_form(self, form: list[int]) -> str:
        input = form[1 + len(self.weight_shape) :]
        return super()._describe_form(form) + (f" and an input in {input[0]}…{input[1]}" if input else "")

    def set_input(self, input: FakeQuantize) -> None:
        """Takes the scale and zero point of the quantizer that the layer was made with, if they are fixed."""
        if self.input_scale is None:
            return
        scale, zero_point = input.qparams()
        self.input_scale = scale.reshape(1).float().clone()
        if zero_point is not None:
            self.input_zero_point = zero_point.reshape(1)

    def _out_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype that the float layer returns for x."""
        checks.dense("input", x)
        if not x.is_floating_point():
            raise RuntimeError(
                f"input: got {x.dtype}; accepted: a floating dtype (integer codes go, with their scale, through "
                "int8_linear or int4_linear)"
            )
        device = x.device.type
        if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(device):
            return x.dtype
        return torch.get_autocast_dtype(device)

    def _input_qparams(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Those for an input that ``_out_dtype`` has taken."""
        scale = self._buffers["input_scale"]
        if scale is not None or self.input_bits is None or isinstance(self.input_granularity, PerToken):
            return scale, self._buffers["input_zero_point"]
        low, high = torch.aminmax(x.detach()) if x.numel() else (x.new_zeros(()), x.new_zeros(()))
        scale, zero_point = choose_qparams(
            low.float(),
            high.float(),
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            symmetric=self.input_symmetric,
        )
        return scale, None if self.input_symmetric else zero_point

    def _input_values(self, x: Tensor) -> Tensor:
        """The values that the codes of x stand for, in x's dtype; gradients pass as through the kernels."""
        if self.input_bits is None:
            return x
        (x,) = as_torch_jit_takes_them(x)
        if self.input_scale is None:
            group_size = -1 if isinstance(self.input_granularity, PerToken) else None
            return fake_quantize_dynamic(
                x, bits=self.input_bits, group_size=group_size, symmetric=self.input_symmetric
            )  # fmt: skip
        qparams = self.input_scale, self.input_zero_point
        return fake_quantize(x, *qparams, quant_min=self.quant_min, quant_max=self.quant_max)

    def _bias_in(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)

    def _set_bias(self, bias: Tensor | None) -> None:
        wanted = bias.requires_grad if isinstance(bias, nn.Parameter) else True
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(self.dtype, copy=True), wanted)

    def _repr_of_codes(self) -> str:
        if self.input_bits is None:
            return f"weight_bits={self.weight_bits}, input in float"
        fixed = "static" if self.input_scale is not None else "dynamic"
        return f"weight_bits={self.weight_bits}, input_bits={self.input_bits} ({fixed}, {self.input_granularity})"


def frozen(t: Tensor) -> nn.Parameter:
    """A Parameter that wants no gradient, for scales."""
    return nn.Parameter(t, requires_grad=False)


def _describe(value: Any) -> str:
    return f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_finite(weight: Tensor) -> Tensor:
    if not bool(weight.isfinite().all()):
        raise ValueError("weight: got NaN or infinite values; accepted: finite weights")
    return weight
