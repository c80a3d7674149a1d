"""QATEmbedding and QATEmbeddingBag: tables whose looked-up rows are quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fake_quantize import FakeQuantize
from .qat_layer import QATLayer, Role
from .tracing import call_as_leaf


class QATTable(QATLayer):
    """What both layers share: by default each row of the table has a scale.

    Where the quantizer treats each row by itself (``FakeQuantize.rows_apart``) and a batch looks up fewer rows than the
    table has, only the looked-up rows are quantized: the values and the gradient of the weight are bit for bit those of
    a lookup in the quantized table, which costs as much as the table is large. ``sparse=True`` is accepted for such
    quantizers alone: gradients, those of learned scales too, then stay sparse.

    ``max_norm`` scales the looked-up rows of the float weight in place, as torch does, before they are quantized.
    ``convert`` scales all rows of its copy so.
    """

    weight_fake_quant: FakeQuantize | None
    max_norm: float | None
    __call__ = call_as_leaf

    @classmethod
    def roles(cls, layer: nn.Module) -> dict[str, Role]:
        return {"weight": Role("weight", "weight"), "output": Role("output", per_token=True)}

    def _prepared(self) -> None:
        quantizer = self.weight_fake_quant
        if self.sparse and quantizer is not None and not quantizer.rows_apart:
            raise ValueError(
                f'sparse: got True with quantizer="{quantizer.quantizer}", {quantizer.granularity}, which needs the '
                "whole table at each step; accepted: sparse=False, or a scale for each row (PerChannel(0) or "
                "PerGroup(size)) by a quantizer such as lsq, minmax or dynamic"
            )

    def _baked(self) -> None:
        self.max_norm = None  # all rows are scaled now

    def unquantized(self, parameter: str) -> Tensor:
        value = super().unquantized(parameter)
        if self.max_norm is None or value.is_meta:
            return value
        scaled = value.detach().clone()
        every = torch.arange(len(scaled), device=scaled.device)
        return torch.embedding_renorm_(scaled, every, self.max_norm, self.norm_type)  # type: ignore[arg-type]

    def _scale_to_max_norm(self, weight: Tensor, input: Tensor) -> None:
        if self.max_norm is not None:
            with torch.no_grad():
                torch.embedding_renorm_(weight.detach(), input.contiguous(), self.max_norm, self.norm_type)  # type: ignore[arg-type]

    def _row_quantizer(self, rows: int) -> FakeQuantize | None:
        """The weight's quantizer, if it is to quantize these many looked-up rows instead of the table."""
        quantizer = self.weight_fake_quant
        if quantizer is None or not quantizer.rows_apart or "forward" in vars(quantizer):  # calibrate replaces it
            return None
        return quantizer if self.sparse or rows < self.num_embeddings else None  # type: ignore[operator]

    def _table(self, weight: Tensor) -> tuple[Tensor, bool]:
        """The quantized table, and whether the gradient of a lookup in it may be sparse."""
        saved = weight
        if self.max_norm is not None and self.weight_fake_quant is not None:
            saved = weight.clone()  # the next call may scale the weight in place before this one's backward pass
        table = self.passed("weight", saved)
        return table, bool(self.sparse) and table is weight

    def _lookup(self, index: Tensor) -> Callable[[Tensor], Tensor]:
        """A function that takes the rows ``index`` of a tensor, with the gradient that the float layer gives it."""
        options = self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse
        return lambda t: F.embedding(index, t, *options)  # type: ignore[arg-type]


class QATEmbedding(QATTable, nn.Embedding):
    """nn.Embedding whose weight and output pass through quantizers (see ``QATLayer`` and ``QATTable``)."""

    float_class = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        self._scale_to_max_norm(weight, input)
        quantizer = self._row_quantizer(input.numel())
        if quantizer is None:
            table, sparse = self._table(weight)
            y = F.embedding(input, table, self.padding_idx, None, 2.0, self.scale_grad_by_freq, sparse)
        else:
            index = input.reshape(-1)
            y = quantizer.of_rows(weight, index, self._lookup(index)).view(*input.shape, self.embedding_dim)
        return self.passed("output", y)


class QATEmbeddingBag(QATTable, nn.EmbeddingBag):
    """nn.EmbeddingBag whose weight and output pass through quantizers (see ``QATLayer`` and ``QATTable``)."""

    float_class = nn.EmbeddingBag

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        weight = self.weight
        self._scale_to_max_norm(weight, input)
        quantizer = self._row_quantizer(input.numel())
        bag: dict[str, Any] = {"mode": self.mode, "include_last_offset": self.include_last_offset}
        bag["per_sample_weights"] = per_sample_weights
        if quantizer is None:
            table, bag["sparse"] = self._table(weight)
            bag.update(scale_grad_by_freq=self.scale_grad_by_freq, padding_idx=self.padding_idx)
        else:
            input, table = self._gathered(quantizer, weight, input, bag)
        return self.passed("output", F.embedding_bag(input, table, offsets, **bag))

    def _gathered(
        self, quantizer: FakeQuantize, weight: Tensor, input: Tensor, bag: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Quantized rows and the indices into them that stand for ``input``."""
        index = input.reshape(-1)
        places = torch.arange(index.numel(), dtype=input.dtype, device=input.device).view(input.shape)
        if self.padding_idx is not None:  # such entries all stand for one more row, which the bags leave out
            bag["padding_idx"] = index.numel()
            places = places.masked_fill(input == self.padding_idx, index.numel())
            index = torch.cat([index, index.new_full((1,), self.padding_idx)])
        return places, quantizer.of_rows(weight, index, self._lookup(index))
