"""Runs torch's own fake-quantize ops on qkernels' kernels, for code that calls only torch and torch.ao."""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .. import checks, library, loading, registry
from ..ops import aten_fake_quantize

_lock = threading.Lock()
_held: set[override_torch] = set()  # the overrides in force
_cuda: torch.library.Library | None = None
_torchs: torch.library.Library | None = None


class override_torch:
    """Reroutes torch's fake-quantize ops to qkernels, in every thread, until restored; takes no arguments.

    ``with qk.override_torch():`` holds to the end of the block. A plain ``qk.override_torch()`` holds for the rest of
    the process, or until ``restore()`` of the object that it returns. Both nest and may end in any order: torch's own
    kernels are back when the last one has ended. The dispatcher reroutes, forward and backward,
    ``torch.fake_quantize_per_tensor_affine`` (both overloads), ``torch.fake_quantize_per_channel_affine``, their
    ``_cachemask`` forms, ``torch._fake_quantize_learnable_per_{tensor,channel}_affine`` and
    ``torch.fused_moving_avg_obs_fake_quant``; with them torch.ao's FakeQuantize, learnable and fused modules.

    On the CPU the C++ kernels take torch's schemas directly, no Python runs, and autograd, torch.compile, torch.export
    and vmap see torch's ops as before. Compiled code holds those same ops: the override acts on it whenever it runs
    inside, no matter when it was compiled. Without the C++ kernels the CPU keeps torch's own, and a warning says so.

    Every call that torch can compute still works: torch's own kernel runs a call that the kernels do not take (a range
    beyond ±2**24 in the fused observer, statistics in bf16, many scales where one is read, ...), on every device.
    Otherwise the numbers are torch's, bit for bit, except where torch is wrong or refuses:

    - NaN stays NaN (torch: quant_min); a zero whose scale is 0, or has an infinite reciprocal, stays 0 (torch:
      quant_min·scale, without a gradient).
    - Per channel, +inf and values beyond 2**63 steps saturate at quant_max (torch on the CPU: quant_min).
    - A clipped element has the gradient 0, whatever dy is (torch: 0·inf = NaN, and −0). Compiled code and second
      derivatives multiply by the mask as torch does.
    - The learnable ops round a zero point the same way forward and backward (torch's per-tensor op rounds every
      negative or half-way value differently backward); the sums of their gradients agree to rounding.
    - The fused observer trains with the scale and zero point that torch.ao's observers compute for convert from the
      same statistics; torch's op trains with others. This op, like the observers, takes max(−min, max) / 127.5; torch's
      op takes the larger of −min / 128 and max / 127. So symmetric scales differ from torch's by up to 0.4 % in
      −128 … 127, and with them 99.5 % of the weights under torch.ao's default configs. If all values have one sign
      torch's op is up to 2× away, and below its smallest scale, 6.1e-5, further. This op keeps its averages in fp32,
      skips a batch whose range is not finite, and leaves scale and zero point unchanged while the observer is off
      (torch computes them from the statistics again). It cannot follow settings that an observer does not pass to its
      op: an ``eps`` other than fp32's (torch.ao's symmetric qnnpack configs raise smaller scales to 2**-12 at convert);
      quint8 without an explicit range (the observer's zero point is 128, here 127 as with a range); a signed dtype
      whose range starts at 0 (the observer's is 0, here the middle); a part of uint16's range (the observer's is
      2**15).
    - Against torch up to 2.11, 2 of 108,000 bf16 elements with fp16 zero points per channel differ by a step: later
      versions agree bit for bit.
    - The ops also accept, per channel, any zero point dtype, any floating scale and a negative axis, and fp16, bf16 and
      fp64 in the learnable and fused ops.

    On CUDA, Python code reroutes the same ops, eager and compiled, without waiting for the GPU. The differences are:

    - torch's own kernel runs a call that no CUDA or Triton kernel can take. For ops that neither learn nor observe it
      also runs a call in fp64, with a range beyond ±2**24, with a floating zero point tensor, or with a number for
      scale or zero point that the kernels treat differently (a negative or subnormal scale, a zero point outside the
      range). Per tensor, scale tensors other than fp32 and zero points other than int32 go to torch, which refuses
      them.
    - A value in a scale tensor below the smallest normal fp32 acts as that value, and a negative one gives NaN; an
      integer outside the range in a zero point tensor gives NaN (torch per channel reads it back and refuses).
    - Eager calls of the differentiable ops keep a bit per element for the backward pass and write no byte mask.
      Compiled code holds only the ``_cachemask`` ops, which must return a byte mask: they unpack it from the bits,
      which costs two passes over it, and their gradient is torch's product with the mask.

    Enter and leave while no other thread is inside one of these ops, as for any torch.library registration. While
    ``use_kernel`` forces a CPU path, rerouted calls take it too; forcing another kernel does not affect them.
    """

    def __init__(self) -> None:
        self._hold()

    def _hold(self) -> None:
        with _lock:
            if not _held:
                _install()
            _held.add(self)

    def restore(self) -> None:
        """Ends this override; does nothing if it has ended already."""
        with _lock:
            if self in _held:
                _held.remove(self)
                if not _held:
                    _uninstall()

    def __enter__(self) -> override_torch:
        self._hold()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def _install() -> None:
    global _cuda
    _cpu_kernels(True)
    if torch.backends.cuda.is_built():
        _cuda = _reroute("CUDA")


def _uninstall() -> None:
    global _cuda
    _cpu_kernels(False)
    if _cuda is not None:
        _unroute(_cuda)
        _cuda = None


def _cpu_kernels(on: bool) -> None:
    """Registers the C++ kernels under aten's names with the dispatcher, or removes them."""
    if library.host is None:
        if on:
            warnings.warn(
                f"qkernels: override_torch leaves torch's own kernels on the CPU: {library.cpu_missing}", stacklevel=4
            )
        return
    global _torchs
    if on:
        _say_once_that_kernels_are_overridden()
        _torchs = _keep_torchs("CPU")
    if ctypes.CDLL(str(loading.module_file("_cpu"))).qkernels_override_aten(on):
        raise RuntimeError(f"override_torch: torch {torch.__version__} does not accept the kernels; restart Python")
    if not on and _torchs is not None:
        _torchs._destroy()
        _torchs = None
    _forget_choices()


def _keep_torchs(device: str) -> torch.library.Library:
    """Registers torch's own kernels under other names, by which the C++ kernels call them for what they refuse."""
    kept = torch.library.Library("qkernels_torch", "FRAGMENT")
    for name in (*KERNELS, *(name for name in DROP_INS if "learnable" in name)):
        kept.define(str(getattr(torch.ops.aten, name).default._schema).removeprefix("aten::"))
        kept.impl(name, torch.library.get_kernel(f"aten::{name}", device).call_boxed, device, with_keyset=True)
    return kept


def _say_once_that_kernels_are_overridden() -> None:
    # torch warns of the first override in a process. C++ writes that warning to stderr, past Python's filter, so this
    # makes the first override here, where the filter holds.
    op = aten_fake_quantize._backward_bytes
    scratch = torch.library.Library(library.NAMESPACE, "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="[\\s\\S]*Overriding a previously registered kernel")
        scratch.impl(op.name().partition("::")[2], torch.mul, "CPU", allow_override=True)
    scratch._destroy()


# On a GPU Python kernels take the calls; one returns NotImplemented to have torch's own kernel take the call. There are
# two layers. Above autograd are the differentiable drop-ins, for plain tensors only, because tracers and transforms
# must see torch's ops. At the device's own key are the raw ops with byte masks, for compiled code and all other calls.


def _reroute(device: str) -> torch.library.Library:
    rerouted = torch.library.Library("aten", "IMPL")
    layers = (
        (f"Autograd{device}", DROP_INS, _above),
        (device, {**DROP_INS, **KERNELS}, _below),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="[\\s\\S]*Overriding a previously registered kernel")
        for key, kernels, layer in layers:
            for name, kernel in kernels.items():
                own = torch.library.get_kernel(f"aten::{name}", key)
                rerouted.impl(name, layer(kernel, own), key, with_keyset=True, allow_override=True)
    _forget_choices()
    return rerouted


def _unroute(rerouted: torch.library.Library) -> None:
    rerouted._destroy()
    _forget_choices()


def _forget_choices() -> None:
    """Clears torch's caches of which kernel an op has at a key, which its tracing for compilers fills."""
    backward = (f"fake_quantize_per_{kind}_affine_cachemask_backward" for kind in ("tensor", "channel"))
    for name in (*DROP_INS, *KERNELS, *backward):
        packet, _, overload = name.partition(".")
        getattr(getattr(torch.ops.aten, packet), overload or "default")._dispatch_cache.clear()


def _above(kernel: Callable[..., Any], own: Any) -> Callable[..., Any]:
    def call(keys: Any, x: Tensor, *args: Any) -> Any:
        plain = type(x) in (Tensor, torch.nn.Parameter) and not torch._C._are_functorch_transforms_active()
        result = kernel(x, *args) if plain else NotImplemented
        return own.call_boxed(keys, x, *args) if result is NotImplemented else result

    return call


def _below(kernel: Callable[..., Any], own: Any) -> Callable[..., Any]:
    def call(keys: Any, *args: Any) -> Any:
        with torch.no_grad():
            result = kernel(*args)
        return own.call_boxed(keys, *args) if result is NotImplemented else result

    return call


def _takes(op: str, *args: Any) -> bool:
    """Whether a kernel other than the reference can run a raw op on these arguments."""
    return any(
        kernel.unsupported(*args) is None for kernel in registry.kernels(op) if kernel.name != registry.REFERENCE
    )


TINY, HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
Scale = Tensor | float
ZeroPoint = Tensor | int


def _exact(quant_min: int, quant_max: int) -> bool:
    return -checks.EXACT_INT <= quant_min <= quant_max <= checks.EXACT_INT


def _beside(x: Tensor, *params: Any) -> bool:
    """Whether the tensors among params are on x's device; torch also reads some from other devices."""
    return all(param.device == x.device for param in params if isinstance(param, Tensor))


def _affine(x: Tensor, scale: Scale, zero_point: ZeroPoint, quant_min: int, quant_max: int) -> bool:
    """Whether a kernel takes the call and, as far as the host can see, gives torch's bits."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not _exact(quant_min, quant_max):
        return False
    if not _beside(x, scale, zero_point):
        return False
    args = (x, scale, zero_point, quant_min, quant_max)
    if isinstance(scale, Tensor) and isinstance(zero_point, Tensor):
        takes = scale.is_floating_point() and not zero_point.is_floating_point()
        return takes and _takes("fake_quantize_forward_mask", *args)
    if isinstance(scale, Tensor) or isinstance(zero_point, Tensor):
        return False
    takes = TINY <= scale <= HUGE and quant_min <= zero_point <= quant_max
    return takes and _takes("fake_quantize_forward_mask.scalar", *args)


def _learnable(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> bool:
    return (
        _exact(quant_min, quant_max)
        and x.is_floating_point()
        and scale.is_floating_point()
        and _beside(x, scale, zero_point)
        and _takes("fake_quantize_learnable_backward", x, x, scale, zero_point, quant_min, quant_max, 1.0)
    )


def _one(scale: Tensor, zero_point: Tensor) -> bool:
    return scale.numel() == 1 and zero_point.numel() == 1


def _as_torchs(scale: Tensor, zero_point: Tensor) -> bool:
    """Whether torch's per-tensor kernels take this scale and zero point."""
    return _one(scale, zero_point) and scale.dtype == torch.float32 and zero_point.dtype == torch.int32


def _per_tensor(x: Tensor, *args: Any) -> Any:
    return aten_fake_quantize.fake_quantize_per_tensor_affine(x, *args) if _affine(x, *args) else NotImplemented


def _per_tensor_tensors(x: Tensor, scale: Tensor, zero_point: Tensor, *quant_range: int) -> Any:
    return _per_tensor(x, scale, zero_point, *quant_range) if _as_torchs(scale, zero_point) else NotImplemented


def _per_channel(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, *quant_range: int) -> Any:
    if not _affine(x, scale, zero_point, *quant_range):
        return NotImplemented
    return aten_fake_quantize.fake_quantize_per_channel_affine(x, scale, zero_point, axis, *quant_range)


def _learnable_per_tensor(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, factor: float = 1) -> Any:
    if not _one(scale, zero_point) or not _learnable(x, scale, zero_point, low, high):
        return NotImplemented
    return aten_fake_quantize.fake_quantize_learnable_per_tensor_affine(x, scale, zero_point, low, high, factor)


def _learnable_per_channel(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, low: int, high: int, factor: float = 1
) -> Any:
    if not _learnable(x, scale, zero_point, low, high):
        return NotImplemented
    return aten_fake_quantize.fake_quantize_learnable_per_channel_affine(x, scale, zero_point, axis, low, high, factor)


def _fused(x: Tensor, *args: Any) -> Any:
    return aten_fake_quantize.fused_moving_avg_obs_fake_quant(x, *args) if _observes(x, *args) else NotImplemented


def _observes(x: Tensor, *args: Any) -> bool:
    flags, stats, axis, per_row = args[:2], args[2:6], args[9], args[10:11] == (True,)
    if not _exact(*args[7:9]) or not x.is_floating_point() or not _beside(x, *flags, *stats):
        return False
    if any(flag.numel() != 1 for flag in flags) or not -x.dim() <= axis < max(x.dim(), 1):
        return False
    channels = x.shape[axis] if per_row and x.dim() else 1
    dtypes = (torch.float32,), (torch.float32,), (torch.float32,), (torch.int32, torch.int64)
    for stat, accepted in zip(stats, dtypes, strict=True):
        fits = stat.numel() == channels and (stat.dim() == 1 or not per_row)
        resized = per_row and stat.numel() <= 1 and stat.numel() != channels
        if stat.dtype not in accepted or not stat.is_contiguous() or not (fits or resized):
            return False
    return _takes("observe_fake_quantize", x, *args[:9], 0.0, 0)


def _with_bytes(masked: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """y, and its mask of a bit per element as a bool tensor in y's memory layout."""
    y, bits = masked
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = (bits[:, None] >> shifts).bitwise_and_(1).view(torch.bool)
    return y, flat.as_strided(y.shape, y.stride())


def _cachemask(x: Tensor, scale: float, zero_point: int, *quant_range: int) -> Any:
    if not _affine(x, scale, zero_point, *quant_range):
        return NotImplemented
    return _with_bytes(torch.ops.qkernels.fake_quantize_forward_mask.scalar(x, scale, zero_point, *quant_range))


def _cachemask_tensors(
    x: Tensor, scale: Tensor, zero_point: Tensor, enabled: Tensor, quant_min: int, quant_max: int
) -> Any:
    """Runs the observer's kernel, with the observer off, because it reads the switch ``enabled`` on the device."""
    if not _as_torchs(scale, zero_point) or not _affine(x, scale, zero_point, quant_min, quant_max):
        return NotImplemented
    off = torch.zeros_like(enabled)
    unused = torch.empty_like(scale), torch.empty_like(scale)
    args = (x, off, enabled, *unused, scale, zero_point, 0.0, quant_min, quant_max, 0.0, 0)
    if not _takes("observe_fake_quantize", *args):
        return NotImplemented
    return _with_bytes(torch.ops.qkernels.observe_fake_quantize(*args))


def _cachemask_channels(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, *quant_range: int) -> Any:
    if not _affine(x, scale, zero_point, *quant_range):
        return NotImplemented
    views = checks.channel_views(x, axis, scale, zero_point)
    return _with_bytes(torch.ops.qkernels.fake_quantize_forward_mask(x, *views, *quant_range))


def _fused_helper(x: Tensor, *args: Any) -> Any:
    if not _observes(x, *args):
        return NotImplemented
    rest = (*args, False, False)[:12]  # the last two may be left out
    return _with_bytes(torch.ops.qkernels.observe_fake_quantize(*aten_fake_quantize.observed_arguments(x, *rest)))


def _backward_per_tensor(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, factor: float = 1
) -> Any:
    if not _one(scale, zero_point) or not _learns(grad, x, scale, zero_point, low, high):
        return NotImplemented
    return _learned(grad, x, scale, aten_fake_quantize.rounded(zero_point), low, high, factor)


def _backward_per_channel(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, low: int, high: int, factor: float = 1
) -> Any:
    if not _learns(grad, x, scale, zero_point, low, high):
        return NotImplemented
    views = checks.channel_views(x, axis, scale, aten_fake_quantize.rounded(zero_point))
    return _learned(grad, x, *views, low, high, factor)


def _learns(grad: Tensor, x: Tensor, *args: Any) -> bool:
    return grad.dtype == x.dtype and grad.shape == x.shape and _beside(x, grad) and _learnable(x, *args)


def _learned(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dx, dscale, dzp = torch.ops.qkernels.fake_quantize_learnable_backward(grad, x, scale, zero_point, *rest)
    return dx, dscale.view(-1), dzp.view(-1).to(zero_point.dtype)


DROP_INS: dict[str, Callable[..., Any]] = {
    "fake_quantize_per_tensor_affine": _per_tensor,
    "fake_quantize_per_tensor_affine.tensor_qparams": _per_tensor_tensors,
    "fake_quantize_per_channel_affine": _per_channel,
    "_fake_quantize_learnable_per_tensor_affine": _learnable_per_tensor,
    "_fake_quantize_learnable_per_channel_affine": _learnable_per_channel,
    "fused_moving_avg_obs_fake_quant": _fused,
}
KERNELS: dict[str, Callable[..., Any]] = {
    "fake_quantize_per_tensor_affine_cachemask": _cachemask,
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams": _cachemask_tensors,
    "fake_quantize_per_channel_affine_cachemask": _cachemask_channels,
    "_fake_quantize_learnable_per_tensor_affine_backward": _backward_per_tensor,
    "_fake_quantize_learnable_per_channel_affine_backward": _backward_per_channel,
    "_fused_moving_avg_obs_fq_helper": _fused_helper,
}
