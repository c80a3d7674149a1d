"""Subclasses of Linear and the convolutions: their own forward runs at every call, and its product is quantized.

A TorchFunctionMode finds the product: the call of F.linear or F.conv2d, say, with the layer's own weight. The forward
may pad its input, and may call ``super().forward``, ``self._conv_forward`` or the function itself. Whatever else the
forward does with its weight, it does with the quantized values in float. So the prepared and the converted layer
compute the same, whichever branch the forward takes for an input.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from .int8 import Int8Convolution
from .tracing import node_of

FLOAT_CLASSES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PRODUCTS = (F.linear, torch.conv1d, torch.conv2d, torch.conv3d)  # F.conv2d is torch.conv2d
ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
GEOMETRY = {"stride": 1, "padding": 0, "dilation": 1}  # the defaults of F.conv2d
Arguments = dict[str, Any]


def product_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Which of torch's layers with one product a class derives from."""
    return next(parent for parent in FLOAT_CLASSES if issubclass(kind, parent))


def has_own_forward(kind: type[nn.Module]) -> bool:
    """Whether a subclass of Linear or a convolution overrides its parent's forward."""
    parent = product_class(kind)
    names = ("forward", "__call__", "_conv_forward")
    return any(inspect.getattr_static(kind, n, None) is not inspect.getattr_static(parent, n, None) for n in names)


# METADATA: what a forward may ask of its weight besides the values. CASTS: their result still counts as the weight.
METADATA = frozenset(
    [
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda")
    ]
    + [getattr(Tensor, name) for name in ("size", "dim", "numel", "element_size", "is_floating_point", "get_device")]
    + [getattr(Tensor, name) for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")]
)
CASTS = frozenset((Tensor.to, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double))


class _Products(TorchFunctionMode):
    """Hands every product with the weight ``own`` to ``product``; any other function gets ``value()`` as that weight.

    own None: hands over every product whose weight has this shape. The functions called here run outside the mode.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        own: Tensor | None,
        product: Callable[[Callable[..., Tensor], Arguments], Tensor],
        value: Callable[[], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.own, self.product, self.value = shape, [] if own is None else [own], product, value
        self.by_shape = own is None

    def is_own(self, t: Any) -> bool:
        return any(t is own for own in self.own)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Arguments | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS:
            arguments = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
            weight = arguments["weight"]
            if self.is_own(weight) or (self.by_shape and tuple(weight.shape) == self.shape):
                return self.product(func, arguments)
        if self.value is None or func in METADATA or not any(self.is_own(t) for t in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func in CASTS and self.is_own(args[0]) and not any(self.is_own(t) for t in args[1:]):
            self.own.append(func(*args, **kwargs))
            return self.own[-1]
        value = self.value()
        args, kwargs = tree_map(lambda t: value if self.is_own(t) else t, (args, kwargs))
        return func(*args, **kwargs)


@dataclass
class Trial:
    """What one call of a float layer's own forward showed."""

    reason: str | None = None  # why only a rule may have its product quantized; None: it uses its weight there alone
    refused: bool = False  # no rule may either
    returns_product: bool = False  # the result is the product itself, so whatever follows the layer follows the product
    derives_weight: bool = False  # the forward computes the product's weight from the layer's


class _OwnForward(nn.Module):
    """The first base of a layer that runs the forward of ``own_class`` and replaces its product by ``_product``."""

    own_class: ClassVar[type[nn.Module]]
    base_class: ClassVar[type[nn.Module]]
    trial: Trial = Trial("it was not tried")

    def _product(self, func: Callable[..., Tensor], arguments: Arguments) -> Tensor:
        raise NotImplementedError

    def _derived(self, own: Tensor, arguments: Arguments) -> None:
        """Refuses a product with the layer's own weight: the codes stand for the weight that is computed from it."""
        if arguments["weight"] is own:
            raise RuntimeError(
                f"{self.own_class.__name__}: got an input of shape {list(arguments['input'].shape)}, for which its "
                "forward takes its weight as it is; accepted: inputs for which it computes another weight from it, as "
                "it did when it was prepared"
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _made_at_run_time(self, self.__getstate__())  # type: ignore[attr-defined]


class QATForward(_OwnForward):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own: Any = self.weight
        shape = tuple(own.shape)
        if parametrize.is_parametrized(self, "weight"):
            own = None  # each access computes a new tensor
        value = None if self.weight_fake_quant is None else lambda: self.weight_fake_quant(own)  # type: ignore[operator]
        mode = _Products(shape, own, self._product, value)  # type: ignore[arg-type]
        if self.trial.derives_weight:

            def derived(func: Callable[..., Tensor], arguments: Arguments) -> Tensor:
                if own is not None:
                    self._derived(own, arguments)  # type: ignore[arg-type]
                return self._product(func, arguments)

            mode = _Products(shape, None, derived)
        with mode:
            y = self.own_class.forward(self, *args, **kwargs)
        return y if self.output_fake_quant is None else self.output_fake_quant(y)  # type: ignore[operator]

    def _product(self, func: Callable[..., Tensor], arguments: Arguments) -> Tensor:
        if self.input_fake_quant is not None:
            arguments["input"] = self.input_fake_quant(arguments["input"])  # type: ignore[operator]
        if self.weight_fake_quant is not None:
            arguments["weight"] = self.weight_fake_quant(arguments["weight"])  # type: ignore[operator]
        return func(**arguments)


class _Here(threading.local):
    """For this thread alone: the stand-in for the weight of each layer whose forward runs in the thread."""

    def __init__(self) -> None:
        self.stand_ins: dict[nn.Module, Tensor] = {}


_here = _Here()


class ConvertedForward(_OwnForward):
    """Computes the product as ``base_class`` does, an int8 or int4 layer.

    While the forward runs, ``weight`` is a stand-in: a tensor of the right shape, device and dtype that takes no
    memory. A function other than the product that takes it gets the dequantized values instead.
    """

    folded = False  # whether a BatchNorm is folded into the product, which must then be the result

    @property
    def weight(self) -> Tensor:
        held = _here.stand_ins.get(self)
        return self.base_class.weight.fget(self) if held is None else held  # type: ignore[attr-defined]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for t in (*args, *kwargs.values()):
            if isinstance(t, Proxy):
                return node_of(self, *args, **kwargs)
        made: list[Tensor] = []
        stand_ins = _here.stand_ins
        outermost = self not in stand_ins  # False: the forward has called its own layer
        if outermost:
            nan = torch.full((), torch.nan, dtype=self.dtype, device=self._device())  # type: ignore[operator, call-overload]
            stand_ins[self] = nan.expand(self.weight_shape)  # type: ignore[arg-type]
        held = stand_ins[self]

        def product(func: Callable[..., Tensor], arguments: Arguments) -> Tensor:
            if self.trial.derives_weight:
                self._derived(held, arguments)
            made.append(self._product(func, arguments))
            return made[-1]

        values: list[Tensor] = []

        def value() -> Tensor:
            if not values:
                values.append(self.base_class.weight.fget(self))  # type: ignore[attr-defined]
            return values[0]

        mode = _Products(self.weight_shape, held, product, value)  # type: ignore[arg-type]
        mode.by_shape = self.trial.derives_weight
        try:
            with mode:
                y = self.own_class.forward(self, *args, **kwargs)
        finally:
            if outermost:
                del stand_ins[self]
        if self.folded and not (len(made) == 1 and y is made[0]):
            raise RuntimeError(
                f"{self.own_class.__name__}: its forward does more than convolve for this input, which it did not when "
                "the BatchNorm behind it was folded; accepted: inputs for which it returns its convolution"
            )
        return self._output(y)  # type: ignore[operator]

    def _product(self, func: Callable[..., Tensor], arguments: Arguments) -> Tensor:
        x = arguments["input"]
        if arguments.get("bias") is not self.bias or arguments.get("groups", 1) != getattr(self, "groups", 1):
            values = self._input_values(x)  # type: ignore[operator]
            return func(**{**arguments, "input": values, "weight": self._weight_in(values.dtype)})  # type: ignore[operator]
        if not issubclass(self.base_class, Int8Convolution):
            return self.base_class.compute(self, x)  # type: ignore[attr-defined]
        stride, padding, dilation = (arguments.get(name, default) for name, default in GEOMETRY.items())
        return self.convolve(x, stride, padding, dilation)  # type: ignore[operator]


_made: dict[tuple[type[nn.Module], ...], type[nn.Module]] = {}


def own_forward_class(mixin: type[_OwnForward], own: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """A class with the forward of ``own``, a subclass of one of FLOAT_CLASSES, on ``base``, a QAT or integer layer."""
    key = (mixin, own, base)
    if key in _made:
        return _made[key]
    attributes: dict[str, Any] = {"own_class": own, "base_class": base, "float_type": own, "__module__": own.__module__}
    bases: tuple[type, ...] = (mixin, own, base)
    if not has_own_forward(own):
        attributes["forward"] = base.forward
    else:
        attributes["forward"] = _with_signature_of(own.forward, mixin.forward)
    if has_own_forward(own) and mixin is QATForward:
        # super().forward in ``own`` is then the float forward, so that nothing is quantized twice.
        bases = (mixin, own, type(base.__name__, (base,), {"forward": product_class(base).forward}))
    if mixin is ConvertedForward:
        attributes["extra_repr"] = base.extra_repr
    prefix = "QAT" if mixin is QATForward else base.__name__.rstrip("123d").removesuffix("Conv").removesuffix("Linear")
    made = _made[key] = type(prefix + own.__name__, bases, attributes)
    if mixin is ConvertedForward:  # the integer layers register their classes too
        ForkingPickler.register(made, lambda layer: _made_at_run_time(layer, dict(vars(layer))))
    return made


def _with_signature_of(own: Callable[..., Any], mixin: Callable[..., Any]) -> Callable[..., Any]:
    """The mixin's forward with the signature of the user's, which torch.fx and calibrate look at."""

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return mixin(self, *args, **kwargs)

    return forward


def _made_at_run_time(layer: nn.Module, state: dict[str, Any]) -> tuple[Any, ...]:
    """What a copy or a pickle of the layer holds: instead of its class, the classes that the class is made of."""
    kind: Any = next(kind for kind in type(layer).__mro__ if "own_class" in vars(kind))
    return _blank, (kind.__mro__[1], kind.own_class, kind.base_class), state


def _blank(mixin: type[_OwnForward], own: type[nn.Module], base: type[nn.Module]) -> nn.Module:
    kind = own_forward_class(mixin, own, base)
    return kind.__new__(kind)


def with_forward_of(layer: nn.Module, qat: nn.Module) -> nn.Module:
    """Gives an int8 or int4 layer the forward of the subclass of Linear or Conv2d that ``qat`` has, if it has one."""
    if isinstance(qat, QATForward):
        layer.__class__ = own_forward_class(ConvertedForward, qat.own_class, type(layer))
    return layer


@torch.no_grad()
def try_forward(twin: Any) -> Trial:
    """Runs ``twin``, a copy that nothing else uses, on the meta device, where that costs nothing."""
    name = type(twin).__name__
    weight, bias = twin.weight, twin.bias
    x = _example_input(twin)
    products: list[tuple[Arguments, Tensor]] = []
    uses: list[str] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            result = func(*args, **kwargs)
            given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs if func in PRODUCTS else {}
            if given and given["weight"].shape == weight.shape:
                products.append((given, result))
            elif isinstance(result, Tensor) and any(t is weight and t is not result for t in (*args, *kwargs.values())):
                uses.append(getattr(func, "__name__", str(func)))
            return result

    try:
        with Watch():
            y = type(twin).forward(twin, x)
    except Exception as error:  # a user's forward may raise anything; the reason repeats its message
        message = (str(error).splitlines() or [""])[0][:100]
        return Trial(f"the forward of {name} could not be tried on an input of shape {list(x.shape)} "
                     f"({type(error).__name__}: {message})")  # fmt: skip
    if len(products) != 1:
        return Trial(f"the forward of {name} does not use its weight in one product, such as F.linear", refused=True)
    arguments, product = products[0]
    if arguments.get("bias") is not bias or arguments.get("groups", 1) != getattr(twin, "groups", 1):
        return Trial(f"the forward of {name} computes its product with another bias or groups than its own", True)
    derives = arguments["weight"] is not weight
    reason = None
    if derives:
        reason = f"the forward of {name} computes another weight from its own"
    elif uses:
        reason = f"the forward of {name} uses its weight elsewhere too, in {', '.join(dict.fromkeys(uses))}"
    return Trial(reason, returns_product=y is product, derives_weight=derives)


def _example_input(layer: Any) -> Tensor:
    if isinstance(layer, nn.Linear):
        shape: tuple[int, ...] = (2, layer.in_features)
    else:
        side = max(32, *(2 * d * k for d, k in zip(layer.dilation, layer.kernel_size, strict=True)))
        shape = (1, layer.in_channels, *[side] * len(layer.kernel_size))
    return torch.zeros(shape, device=layer.weight.device, dtype=layer.weight.dtype)


def product_weight(layer: nn.Module) -> Tensor:
    """The weight that the layer's own forward hands to its product at present."""
    found: list[Tensor] = []

    def watch(func: Callable[..., Tensor], arguments: Arguments) -> Tensor:
        found.append(arguments["weight"])
        return func(**arguments)

    kind = layer.own_class if isinstance(layer, _OwnForward) else type(layer)
    with _Products(tuple(layer.weight.shape), None, watch):  # type: ignore[arg-type]
        kind.forward(layer, _example_input(layer))
    return found[0]
