"""Int4Embedding and Int8Embedding: tables of codes, of which a lookup dequantizes the rows that it takes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import checks, gemm_checks, layouts
from ..ops.dynamic import quantize_dynamic
from ..ops.packing import pack_bits, unpack_bits
from ..ops.quantize import dequantize
from ..ops.weight_groups import quantize_groups, resolved_group_size
from .quantized import Logical, QuantizedLayer, check_finite, frozen
from .replacing import take_over


class IntegerEmbedding(QuantizedLayer):
    """What both layers share: settings, scales and the lookup."""

    data: Tensor
    scale: nn.Parameter
    zero_point: Tensor | None
    private_buffers = ("data",)

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        weight_bits: int,
        group_size: int,
        symmetric: bool,
        scale_dtype: torch.dtype,
        dtype: torch.dtype,
    ) -> None:
        super().__init__((num_embeddings, embedding_dim), weight_bits, dtype)
        # nn.Embedding checks padding_idx and resolves a negative one.
        table = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device="meta")
        self.padding_idx = table.padding_idx
        self.max_norm, self.norm_type = table.max_norm, table.norm_type
        self.scale_grad_by_freq, self.sparse = table.scale_grad_by_freq, table.sparse
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.group_size = group_size
        groups = (num_embeddings, layouts.groups_of(embedding_dim, group_size))
        self.scale = frozen(torch.zeros(groups, dtype=scale_dtype))
        self.register_buffer("zero_point", None if symmetric else torch.zeros(groups, dtype=torch.int8))
        self._register_private()

    @property
    def codes(self) -> Tensor:
        """The integers [num_embeddings, embedding_dim] in int8."""
        return self._codes_of(self.data)

    def _codes_of(self, rows: Tensor) -> Tensor:
        """The codes of some rows of ``data``."""
        raise NotImplementedError

    def _weight_in(self, dtype: torch.dtype) -> Tensor:
        return self._rows(self.data, self._scale_of("scale"), self.zero_point, dtype)

    def compute(self, input: Tensor) -> Tensor:
        rows, scale = F.embedding(input, self.data), F.embedding(input, self._scale_of("scale"))
        zero_point = None if self.zero_point is None else F.embedding(input, self.zero_point)
        return self._rows(rows, scale, zero_point, self.dtype)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, {padding}weight_bits={self.weight_bits}, "
            f"group_size={self.group_size}, {'symmetric' if self.zero_point is None else 'zero_point'}, "
            f"dtype={self.dtype}"
        )

    def _rows(self, rows: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
        codes = self._codes_of(rows)
        return dequantize(codes, scale.float(), None if zero_point is None else zero_point.int(), dtype=dtype)

    def _pack(self, logical: dict[str, Tensor]) -> dict[str, Tensor | None]:
        return {"data": logical["codes"]}

    def _unpack(self) -> dict[str, Tensor]:
        return {"codes": self.data}


class Int4Embedding(IntegerEmbedding):
    """An embedding on codes of 2 to 4 bits: it looks up packed rows, and unpacks and scales only those.

    Args:
        num_embeddings, embedding_dim, padding_idx: as nn.Embedding; the row at padding_idx is stored like any other,
            and a row of zeros stays zeros.
        weight_bits, group_size, symmetric, scale_dtype: as ``Int4Linear``, with groups along embedding_dim.
        dtype: dtype of the output. A cast of the model (``model.bfloat16()``) changes it, but not that of the scales.

    state_dict: ``codes`` (uint8, as ``pack_bits`` packs them; version 0.1.0 calls them ``weight``), ``scale``
    [num_embeddings, embedding_dim/group_size] and, if not symmetric, ``zero_point`` (int8) of scale's shape.

    Indices [...], int32 or int64 → [..., embedding_dim] of dtype: (code − zero_point)·scale in fp32, rounded once. Not
    differentiable. An index outside 0…num_embeddings − 1 raises IndexError on the CPU.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        weight_bits: int = 4,
        group_size: int = 32,
        symmetric: bool = True,
        scale_dtype: torch.dtype = torch.float32,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        group_size = resolved_group_size(weight_bits, group_size, embedding_dim, scale_dtype)
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, weight_bits, group_size, symmetric, scale_dtype, dtype
        )

    @classmethod
    def from_float(
        cls,
        embedding: nn.Embedding,
        group_size: int = 32,
        symmetric: bool = True,
        *,
        weight_bits: int = 4,
        scale_dtype: torch.dtype = torch.float32,
    ) -> Int4Embedding:
        """Quantizes a trained embedding by the range of each group; its weight's dtype becomes that of the output.

        The new layer takes over the hooks of ``embedding`` and whatever else was set on it.

        Raises:
            ValueError: the weight holds NaN or infinity, or the embedding has a max_norm, which changes its weight at
                every call.
            RuntimeError: a group_size, weight_bits or scale_dtype that the layer does not accept.
        """
        weight = _weight_of(embedding)
        codes, scale, zero_point = quantize_groups(weight, weight_bits, group_size, symmetric, scale_dtype)
        layer = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            weight_bits=weight_bits,
            group_size=group_size,
            symmetric=symmetric,
            scale_dtype=scale_dtype,
            dtype=weight.dtype,
        ).to(weight.device)
        layer.set_weight(codes, scale, zero_point)
        return take_over(layer, embedding, ("weight",)).train(embedding.training)

    def set_weight(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Takes codes [num_embeddings, embedding_dim] int8, with scales and zero points as in the state_dict.

        Raises:
            RuntimeError: another shape or dtype.
        """
        state = {"codes": pack_bits(codes, self.weight_bits), "scale": scale}
        self.load_state_dict(state if zero_point is None else {**state, "zero_point": zero_point})

    def _codes_of(self, rows: Tensor) -> Tensor:
        return unpack_bits(rows, self.weight_bits, self.embedding_dim)

    def _logical(self) -> Logical:
        n, k = self.weight_shape
        return {"codes": (torch.uint8, (n, layouts.packed_length(k, self.weight_bits)))}


class Int8Embedding(IntegerEmbedding):
    """An embedding on codes of 5 to 8 bits, a byte each: it looks up rows, and scales only those.

    Args:
        num_embeddings, embedding_dim, padding_idx: as nn.Embedding; the row at padding_idx is stored like any other,
            and a row of zeros stays zeros.
        weight_bits: width of a code.
        group_size: how many neighbours in a row share a scale: −1 for all, or a divisor of embedding_dim.
        symmetric: True: a weight is code·scale. False: a weight is (code − zero_point)·scale.
        scale_dtype: dtype of scales: torch.float32, torch.bfloat16 or torch.float16.
        dtype: dtype of the output. A cast of the model (``model.bfloat16()``) changes it, but not that of the scales.

    state_dict: ``codes`` (int8), ``scale`` [num_embeddings, embedding_dim/group_size] and, if not symmetric,
    ``zero_point`` (int8) of scale's shape.

    Indices [...], int32 or int64 → [..., embedding_dim] of dtype: (code − zero_point)·scale in fp32, rounded once. Not
    differentiable. An index outside 0…num_embeddings − 1 raises IndexError on the CPU.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        weight_bits: int = 8,
        group_size: int = -1,
        symmetric: bool = True,
        scale_dtype: torch.dtype = torch.float32,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        checks.require(5 <= weight_bits <= 8, f"weight_bits: got {weight_bits}; accepted: 5 to 8")
        gemm_checks.scale_dtype("scale_dtype", torch.empty(0, dtype=scale_dtype))
        size = embedding_dim if group_size == -1 else group_size
        checks.require(
            size == embedding_dim or (size > 0 and embedding_dim % size == 0),
            f"group_size: got {group_size}; accepted: -1, or a divisor of {embedding_dim}",
        )
        super().__init__(num_embeddings, embedding_dim, padding_idx, weight_bits, size, symmetric, scale_dtype, dtype)

    @classmethod
    def from_float(
        cls, embedding: nn.Embedding, group_size: int = -1, symmetric: bool = True, *, weight_bits: int = 8
    ) -> Int8Embedding:
        """Quantizes a trained embedding by the range of each row or group; its dtype becomes that of the output.

        The new layer takes over the hooks of ``embedding`` and whatever else was set on it.

        Raises:
            ValueError: the weight holds NaN or infinity, or the embedding has a max_norm, which changes its weight at
                every call.
            RuntimeError: a group_size or weight_bits that the layer does not accept.
        """
        weight = _weight_of(embedding)
        layer = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            weight_bits=weight_bits,
            group_size=group_size,
            symmetric=symmetric,
            dtype=weight.dtype,
        ).to(weight.device)
        codes, scale, zero_point = quantize_dynamic(
            weight.detach().float().contiguous(), bits=weight_bits, group_size=group_size, symmetric=symmetric
        )
        layer.set_weight(codes, scale, None if symmetric else zero_point.to(torch.int8))
        return take_over(layer, embedding, ("weight",)).train(embedding.training)

    def set_weight(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Takes codes [num_embeddings, embedding_dim] int8, with scales and zero points as in the state_dict.

        Raises:
            RuntimeError: another shape or dtype.
        """
        state = {"codes": codes, "scale": scale}
        self.load_state_dict(state if zero_point is None else {**state, "zero_point": zero_point})

    def _codes_of(self, rows: Tensor) -> Tensor:
        return rows

    def _logical(self) -> Logical:
        return {"codes": (torch.int8, self.weight_shape)}


def _weight_of(embedding: nn.Embedding) -> Tensor:
    if embedding.max_norm is not None:
        raise ValueError(f"embedding: got max_norm={embedding.max_norm}; accepted: None")
    return check_finite(embedding.weight)
