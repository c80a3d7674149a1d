"""Sparse, mkldnn, quantized and nested tensors: an error that names the argument, by every op and every module."""

import re

import pytest
import torch

import qkernels as qk
from qkernels import registry

DENSE = torch.linspace(-2, 2, 128).view(4, 32)
FORMS = {
    "a tensor of layout torch.sparse_coo": DENSE.to_sparse(),
    "a tensor of layout torch.sparse_csr": DENSE.to_sparse_csr(),
    "a tensor of layout torch._mkldnn": DENSE.to_mkldnn(),
    "a quantized tensor of torch.qint8": torch.quantize_per_tensor(DENSE, 0.1, 0, torch.qint8),
    "a nested tensor": torch.nested.nested_tensor([DENSE, DENSE[:2]]),
    "a nested tensor ": torch.nested.nested_tensor([DENSE, DENSE[:2]], layout=torch.jagged),
}
SCALE, CODES, SEEN = torch.tensor(0.1), torch.ones(4, 32, dtype=torch.int8), torch.ones(1, dtype=torch.uint8)
PACKED8, PACKED4 = qk.PackedInt8.from_float(torch.ones(8, 32)), qk.PackedInt4.from_float(torch.ones(8, 32))
RANGE = {"quant_min": -8, "quant_max": 7}
STATISTICS = torch.zeros(1), torch.ones(1), torch.ones(1), torch.zeros(1, dtype=torch.int32)
CALLS = {
    "fake_quantize": lambda x: qk.fake_quantize(x, SCALE, **RANGE),
    "fake_quantize by numbers": lambda x: qk.fake_quantize(x, 0.1, **RANGE),
    "fake_quantize, pass": lambda x: qk.fake_quantize(x, SCALE, **RANGE, straight_through="pass"),
    "fake_quantize_dynamic": qk.fake_quantize_dynamic,
    "foreach": lambda x: qk.foreach_fake_quantize([x], [SCALE], **RANGE),
    "relu": lambda x: qk.relu_fake_quantize(x, SCALE, **RANGE),
    "observe": lambda x: qk.observe_fake_quantize(
        x, SEEN, SEEN, *STATISTICS, averaging_const=0.1, **RANGE, symmetric=True
    ),
    "quantize": lambda x: qk.quantize(x, SCALE),
    "dequantize": lambda x: qk.dequantize(x, SCALE),
    "quantize_dynamic": qk.quantize_dynamic,
    "transposed": qk.quantize_dynamic_transposed,
    "choose_qparams": lambda x: qk.choose_qparams(x, x, **RANGE),
    "pack_int4": qk.pack_int4,
    "unpack_int4": qk.unpack_int4,
    "int8_linear": lambda x: qk.int8_linear(x, PACKED8),
    "int4_linear": lambda x: qk.int4_linear(x, PACKED4),
    "int8_mm": lambda x: qk.int8_mm(x, CODES.t()),
    "int8_training_linear": lambda x: qk.int8_training_linear(x, torch.ones(8, 32)),
    "PackedInt8": qk.PackedInt8.from_float,
    "PackedInt4": qk.PackedInt4.from_float,
    "Int8Linear": qk.nn.Int8Linear.from_float(torch.nn.Linear(32, 8)),
    "Int4Linear": qk.nn.Int4Linear.from_float(torch.nn.Linear(32, 8)),
    "Int8Conv2d": qk.nn.Int8Conv2d.from_float(torch.nn.Conv2d(3, 8, 1)),
    "FakeQuantize": qk.nn.FakeQuantize(quantizer="dynamic"),
    "FakeQuantize, ema": qk.nn.FakeQuantize(quantizer="ema"),
    "QATLinear": qk.nn.QATLinear.from_float(torch.nn.Linear(32, 8), input=qk.nn.FakeQuantize(quantizer="dynamic")),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CALLS)
def test_functions_and_modules(name, form, grad):
    x = FORMS[form]
    if grad and x.is_floating_point() and not x.is_quantized:
        x = x.detach().requires_grad_()
    got = rf"^(\w+: )?[a-z_0-9\[\]]+: got {re.escape(form.strip())}; "
    with pytest.raises(RuntimeError, match=got + r"accepted: a dense tensor of layout torch\.strided"):
        CALLS[name](x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", sorted({kernel.op for kernel in registry.kernels()}))
def test_every_argument_of_every_op(op, form):
    packet, _, overload = op.partition(".")
    function = getattr(getattr(torch.ops.qkernels, packet), overload or "default")
    plain = {"float": 1.0, "bool": True, "str": "none", "ScalarType": torch.float32}
    kinds = [str(argument.type) for argument in function._schema.arguments]
    values = [DENSE if "Tensor" in kind else plain.get(kind, 1) for kind in kinds]
    values = [[v] if "List" in kind else v for kind, v in zip(kinds, values, strict=True)]
    for at, kind in enumerate(kinds):
        if "Tensor" in kind:
            args = list(values)
            args[at] = [FORMS[form]] if isinstance(values[at], list) else FORMS[form]
            name = function._schema.arguments[at].name + ("[0]" if isinstance(values[at], list) else "")
            with pytest.raises(RuntimeError, match=rf"^{re.escape(name)}: got {re.escape(form.strip())}; accepted"):
                function(*args)


def test_other_dtypes():
    for dtype in (torch.complex64, torch.bool, torch.float8_e4m3fn, torch.int8):
        x = DENSE.to(dtype)
        for call in (CALLS["fake_quantize"], qk.fake_quantize_dynamic, CALLS["choose_qparams"]):
            with pytest.raises(RuntimeError, match=rf"^(x|min_val): got {dtype}; accepted: torch\.float32"):
                call(x)
