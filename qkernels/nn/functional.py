"""Modules in place of functions of activations, which ``prepare`` can then quantize; and their QAT layers."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .qat_layer import QATLayer, Role
from .tracing import call_as_leaf


class MatMul(nn.Module):
    """``torch.matmul(left, right)`` of two activations: ``prepare`` quantizes both, with the spec of "input"."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.matmul(left, right)


class ScaledDotProductAttention(nn.Module):
    """``F.scaled_dot_product_attention``, with its arguments, for models that compute their own projections.

    ``prepare`` quantizes query, key and value, with the spec that a rule gives for "attention", else that of "input".
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)


class Add(nn.Module):
    """``left + right``: ``prepare`` quantizes the sum if the config or a rule gives a spec for "residual"."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.add(left, right)


class Cat(nn.Module):
    """``torch.cat(tensors, dim)``: ``prepare`` quantizes the result if the config or a rule gives "residual"."""

    def forward(self, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        return torch.cat(tuple(tensors), dim)


class QATMatMul(QATLayer, MatMul):
    """MatMul whose operands pass through the quantizers "left" and "right"."""

    float_class = MatMul
    __call__ = call_as_leaf

    @classmethod
    def roles(cls, layer: nn.Module) -> dict[str, Role]:
        return {name: Role("input", feature_dims=2, per_token=True) for name in ("left", "right")}

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return super().forward(self.passed("left", left), self.passed("right", right))


class QATScaledDotProductAttention(QATLayer, ScaledDotProductAttention):
    """ScaledDotProductAttention whose operands pass through the quantizers "query", "key" and "value"."""

    float_class = ScaledDotProductAttention
    __call__ = call_as_leaf

    @classmethod
    def roles(cls, layer: nn.Module) -> dict[str, Role]:
        return {name: Role("attention", per_token=True, like="input") for name in ("query", "key", "value")}

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        operands = self.passed("query", query), self.passed("key", key), self.passed("value", value)
        return super().forward(*operands, *args, **options)


class _QATResult(QATLayer):
    """A module whose result passes through the quantizer "output"."""

    @classmethod
    def roles(cls, layer: nn.Module) -> dict[str, Role]:
        return {"output": Role("residual", per_token=True)}

    def forward(self, *args: Any, **options: Any) -> Tensor:
        return self.passed("output", super().forward(*args, **options))


class QATAdd(_QATResult, Add):
    """Add whose sum passes through the quantizer "output"."""

    float_class = Add
    __call__ = call_as_leaf


class QATCat(_QATResult, Cat):
    """Cat whose result passes through the quantizer "output"."""

    float_class = Cat


QAT_FUNCTIONS: tuple[type[QATLayer], ...] = (QATMatMul, QATScaledDotProductAttention, QATAdd, QATCat)

with contextlib.suppress(ImportError):  # torch.ao may leave torch for a package of its own
    from torch.ao.nn.quantized import FloatFunctional

    class QATFloatFunctional(QATLayer, FloatFunctional):
        """torch's FloatFunctional: the results that it observes pass through the quantizer "output"."""

        float_class = FloatFunctional
        redefined_names = frozenset(("activation_post_process",))

        @classmethod
        def roles(cls, layer: nn.Module) -> dict[str, Role]:
            return {"output": Role("residual", per_token=True)}

        @property
        def activation_post_process(self) -> nn.Module:  # type: ignore[override]
            """What torch's methods call with their result."""
            quantizer = self.quantizer_of("output")
            return nn.Identity() if quantizer is None else quantizer

    QAT_FUNCTIONS += (QATFloatFunctional,)
