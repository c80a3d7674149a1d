"""Plans for the tests of int8_program: lines and constants, written as a network's layers are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qkernels import layouts


class Plan:
    """Adds a line per call. Values are named f0, q1, …, and methods return the names."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.constants: list[Tensor] = []
        self.values = self.quantizers = self.outputs = self.inputs = 0

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def name(self, kind: str) -> str:
        self.values += 1
        return f"{kind}{self.values - 1}"

    def constant(self, t: Tensor) -> int:
        self.constants.append(t)
        return len(self.constants) - 1

    def add(self, step: str, **values: Any) -> None:
        def text(value: Any) -> str:
            if isinstance(value, Tensor):
                return str(self.constant(value))
            return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

        self.lines.append(
            " ".join([step, *(f"{key}={text(value)}" for key, value in values.items() if value is not None)])
        )

    def quantizer(
        self,
        scale: float = 0.03,
        zero_point: int | None = None,
        low: int = -128,
        high: int = 127,
        dtype: Any = torch.int32,
    ) -> int:
        number = None if zero_point is None else torch.tensor([zero_point], dtype=dtype)
        self.quantizers += 1
        self.add("quantizer", id=self.quantizers - 1, scale=torch.tensor(scale), zero_point=number, low=low, high=high)
        return self.quantizers - 1

    def input(self) -> str:
        self.inputs += 1
        x = self.name("f")
        self.add("input", out=x, index=self.inputs - 1)
        return x

    def output(self, x: str, channels_last: bool = True) -> None:
        self.add("output", x=x, index=self.outputs, channels_last="input" if channels_last else None)
        self.outputs += 1

    def quantize(self, x: str, q: int) -> str:
        return self.move("quantize", x, "q", q=q)

    def move(self, step: str, x: str, kind: str | None = None, **values: Any) -> str:
        """A step from x to one value: of x's kind, if none is given."""
        out = self.name(kind or x[0])
        self.add(step, out=out, x=x, **values)
        return out

    def keep(
        self, step: str, q: int | None, floats: bool | None = None, **values: Any
    ) -> tuple[str | None, str | None]:
        """A step whose result is kept as floats, as codes of q, or both: their names."""
        out = self.name("f") if (q is None if floats is None else floats) else None
        codes = None if q is None else self.name("q")
        self.add(step, out=out, codes=codes, q=q, **values)
        return out, codes

    def codes(self, step: str, q: int, **values: Any) -> str:
        name = self.keep(step, q, **values)[1]
        assert name is not None
        return name

    def floats(self, step: str, **values: Any) -> str:
        name = self.keep(step, None, **values)[0]
        assert name is not None
        return name

    def conv(
        self,
        x: str,
        c_in: int,
        c_out: int,
        kernel: Sequence[int] = (1, 1, 1),
        *,
        stride: Sequence[int] = (1, 1, 1),
        padding: Sequence[int] = (0, 0, 0),
        after: Sequence[int] | None = None,
        dilation: Sequence[int] = (1, 1, 1),
        groups: int = 1,
        bias: bool = True,
        step: str = "conv",
    ) -> dict[str, Any]:
        """The arguments of ``keep`` for a convolution with random weights."""
        q = torch.randint(-128, 128, (c_out, c_in // groups, *kernel), dtype=torch.int8)
        values = self.product(x, c_in, c_out, q, layouts.conv_pack(q, groups), q.flatten(1).sum(1, dtype=torch.int32))
        if not bias:
            del values["bias"]
        if step == "conv":
            values |= {"kernel": kernel, "stride": stride, "padding": padding, "padding_after": after or padding}
            values |= {"dilation": dilation, "groups": groups}
        return values

    def conv_transpose(
        self,
        x: str,
        c_in: int,
        c_out: int,
        kernel: Sequence[int],
        *,
        stride: Sequence[int] = (1, 1, 1),
        padding: Sequence[int] = (0, 0, 0),
        output_padding: Sequence[int] = (0, 0, 0),
        dilation: Sequence[int] = (1, 1, 1),
        groups: int = 1,
    ) -> dict[str, Any]:
        q = torch.randint(-128, 128, (c_in, c_out // groups, *kernel), dtype=torch.int8)
        values = self.product(x, c_in, c_out, q, *layouts.conv_transpose_pack(q, groups, stride, dilation))
        values |= {"kernel": kernel, "stride": stride, "padding": padding, "output_padding": output_padding}
        return values | {"dilation": dilation, "groups": groups}

    def product(self, x: str, c_in: int, c_out: int, q: Tensor, data: Tensor, colsum: Tensor) -> dict[str, Any]:
        scale = torch.rand(c_out) / (1000 * q[0].numel() ** 0.5)
        values = {"x": x, "data": data, "colsum": colsum, "scale": scale, "bias": torch.randn(c_out)}
        return values | {"in": c_in, "out_channels": c_out}
