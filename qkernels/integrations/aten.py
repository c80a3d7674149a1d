"""torch's own fake-quantize ops on qkernels' kernels, for code that calls torch and torch.ao only."""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .. import library, registry
from ..ops import aten_fake_quantize, fake_quantize

# What is rerouted on the GPU: composite ops and the learnable ones, above autograd, so that a bit per element is kept
# instead of a byte. With each, the raw op whose kernels decide whether a call can be taken.
DROP_INS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "fake_quantize_per_tensor_affine": (fake_quantize.fake_quantize_per_tensor_affine, "fake_quantize_forward.scalar"),
    "fake_quantize_per_tensor_affine.tensor_qparams": (
        fake_quantize.fake_quantize_per_tensor_affine,
        "fake_quantize_forward",
    ),
    "fake_quantize_per_channel_affine": (
        aten_fake_quantize.fake_quantize_per_channel_affine,
        "fake_quantize_forward",
    ),
    "_fake_quantize_learnable_per_tensor_affine": (
        fake_quantize.fake_quantize_learnable_per_tensor_affine,
        "fake_quantize_learnable_backward",
    ),
    "_fake_quantize_learnable_per_channel_affine": (
        fake_quantize.fake_quantize_learnable_per_channel_affine,
        "fake_quantize_learnable_backward",
    ),
    "fused_moving_avg_obs_fake_quant": (fake_quantize.fused_moving_avg_obs_fake_quant, "observe_fake_quantize"),
}

_lock = threading.Lock()
_held: set[override_torch] = set()  # what is in force
_cuda: torch.library.Library | None = None


class override_torch:
    """Reroutes torch's fake-quantize ops to qkernels, in every thread, until restored; takes no arguments.

    ``with qk.override_torch():`` holds to the end of the block. A plain ``qk.override_torch()`` holds for the rest of
    the process, or until ``restore()`` of the object it returned. Both nest and may end in any order: torch's own
    kernels are back when the last one ended. Rerouted, at the dispatcher, forward and backward:
    ``torch.fake_quantize_per_tensor_affine`` (both overloads), ``torch.fake_quantize_per_channel_affine``, their
    ``_cachemask`` forms, ``torch._fake_quantize_learnable_per_{tensor,channel}_affine`` and
    ``torch.fused_moving_avg_obs_fake_quant``; with them torch.ao's FakeQuantize, learnable and fused modules.

    On the CPU the C++ kernels take torch's schemas directly, no Python runs, and autograd, torch.compile, torch.export
    and vmap see torch's ops as before. Compiled code holds those same ops: it is rerouted where it runs inside, and
    is not where it runs outside, whenever it was compiled. Without the C++ kernels the CPU keeps torch's own, and a
    warning says so. On CUDA a call is taken where a CUDA or Triton kernel can run (else torch's own does); compiled
    code and the ``_cachemask`` forms keep torch's kernels there.

    The numbers are torch's, bit for bit, except where torch is wrong or refuses:

    - NaN stays NaN (torch: quant_min); a zero whose scale is 0, or has an infinite reciprocal, stays 0 (torch:
      quant_min·scale, without a gradient).
    - Per channel, +inf and values beyond 2**63 steps saturate at quant_max (torch on the CPU: quant_min).
    - A clipped element has the gradient 0, whatever dy is (torch: 0·inf = NaN, and −0).
    - The learnable ops round a zero point the same way forward and backward (torch per tensor: another one backward
      for every negative or half-way value); the sums of their gradients agree to rounding.
    - The fused observer trains with the scale and zero point that torch.ao's observers compute for convert, keeps its
      averages in fp32, and skips a batch whose range is not finite.
    - Accepted beside what torch takes: per channel any zero point dtype, any floating scale, a negative axis;
      fp16, bf16 and fp64 in the learnable and fused ops.

    Enter and leave while no other thread is inside one of these ops, as for any torch.library registration. While
    ``use_kernel`` forces a CPU path, rerouted calls take it too; the other kernels have no part in them.
    """

    def __init__(self) -> None:
        self._hold()

    def _hold(self) -> None:
        with _lock:
            if not _held:
                _install()
            _held.add(self)

    def restore(self) -> None:
        """Ends this override; nothing happens where it has ended already."""
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
        _cuda._destroy()
        _cuda = None


def _cpu_kernels(on: bool) -> None:
    """Puts the C++ kernels under aten's names into the dispatcher, or takes them out."""
    if library.host is None:
        if on:
            warnings.warn(
                f"qkernels: override_torch leaves torch's own kernels on the CPU: {library.cpu_missing}", stacklevel=4
            )
        return
    if on:
        _say_once_that_kernels_are_overridden()
    if ctypes.CDLL(str(library._module_file("_cpu"))).qkernels_override_aten(on):
        raise RuntimeError(f"override_torch: torch {torch.__version__} does not accept the kernels; restart Python")


def _say_once_that_kernels_are_overridden() -> None:
    # torch warns of the first override in a process, and from C++ only on stderr: here Python's filter holds.
    op = aten_fake_quantize._backward_bytes
    scratch = torch.library.Library(library.NAMESPACE, "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="[\\s\\S]*Overriding a previously registered kernel")
        scratch.impl(op.name().partition("::")[2], torch.mul, "CPU", allow_override=True)
    scratch._destroy()


def _reroute(device: str) -> torch.library.Library:
    """Python kernels for the composite and learnable ops, on tensors of a device."""
    rerouted = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="[\\s\\S]*Overriding a previously registered kernel")
        for name, (drop_in, raw_op) in DROP_INS.items():
            for key in (f"Autograd{device}", device):
                own = torch.library.get_kernel(f"aten::{name}", key)
                rerouted.impl(name, _choice(drop_in, raw_op, own), key, with_keyset=True, allow_override=True)
    return rerouted


def _choice(drop_in: Callable[..., Tensor], raw_op: str, own: Any) -> Callable[..., Tensor]:
    def call(keys: Any, x: Tensor, *args: Any) -> Tensor:
        if _takes(raw_op, x):
            return drop_in(x, *args)
        return own.call_boxed(keys, x, *args)

    return call


def _takes(op: str, x: Tensor) -> bool:
    """Whether a kernel other than the reference can run on x, which must be no subclass: tracers see torch's ops."""
    if type(x) not in (Tensor, torch.nn.Parameter):
        return False
    return any(kernel.unsupported(x) is None for kernel in registry.kernels(op) if kernel.name != registry.REFERENCE)
