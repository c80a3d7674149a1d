"""Int4Embedding, Int8Embedding, Int8EmbeddingBag: tables of codes, of which a lookup dequantizes the rows it takes."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from .. import checks, embedding_checks, gemm_checks, layouts
from ..ops.frozen import wants_gradient
from ..ops.int8_embedding_bag import int8_embedding_bag
from ..ops.packing import pack_bits, unpack_bits
from ..ops.quantize import dequantize
from ..ops.weight_groups import quantize_groups, resolved_group_size
from .quantized import Logical, QuantizedLayer, check_finite, frozen
from .replacing import take_over
from .tracing import node_of

Table = TypeVar("Table", bound="IntegerEmbedding")


class IntegerEmbedding(QuantizedLayer):
    """What the layers share: settings, scales, and the values of looked-up rows."""

    float_class: ClassVar[type[Any]] = nn.Embedding
    settings: ClassVar[tuple[str, ...]] = ("num_embeddings", "embedding_dim", "padding_idx")
    defaults: ClassVar[tuple[int, int]]  # weight_bits and group_size of from_float
    data: Tensor
    scale: nn.Parameter
    zero_point: Tensor | None
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    private_buffers = ("data",)

    def __init__(
        self,
        table: Any,
        weight_bits: int,
        group_size: int,
        symmetric: bool,
        scale_dtype: torch.dtype,
        dtype: torch.dtype,
    ) -> None:
        """table: the float layer, which has checked its arguments and resolved a negative padding_idx."""
        super().__init__((table.num_embeddings, table.embedding_dim), weight_bits, dtype)
        for name in table.__constants__:
            setattr(self, name, getattr(table, name))
        self.group_size = group_size
        groups = (self.num_embeddings, layouts.groups_of(self.embedding_dim, group_size))
        self.scale = frozen(torch.zeros(groups, dtype=scale_dtype))
        self.register_buffer("zero_point", None if symmetric else torch.zeros(groups, dtype=torch.int8))
        self._register_private()

    @classmethod
    def like(cls: type[Table], embedding: nn.Module, **codes: Any) -> Table:
        """A layer with the settings of a float one, without weights yet; ``codes``: the keyword arguments."""
        weight: Any = embedding.weight
        settings = {name: getattr(embedding, name) for name in cls.settings}
        return cls(**settings, **codes, dtype=weight.dtype).to(weight.device)

    @classmethod
    def from_float(
        cls: type[Table],
        embedding: nn.Module,
        group_size: int | None = None,
        symmetric: bool = True,
        *,
        weight_bits: int | None = None,
        scale_dtype: torch.dtype = torch.float32,
    ) -> Table:
        """Quantizes a trained table by the range of each group or row; its dtype becomes that of the output.

        The new layer takes over the hooks of ``embedding`` and whatever else was set on it.

        Args:
            group_size, weight_bits: None: what the class takes by default.

        Raises:
            ValueError: the weight holds NaN or infinity, a scale that scale_dtype does not hold, or the embedding has a
                max_norm, which changes its weight at every call.
            RuntimeError: a group_size, weight_bits or scale_dtype that the layer does not accept.
        """
        bits, size = cls.defaults
        bits, size = bits if weight_bits is None else weight_bits, size if group_size is None else group_size
        if embedding.max_norm is not None:
            raise ValueError(f"embedding: got max_norm={embedding.max_norm}; accepted: None")
        weight = check_finite(embedding.weight)  # type: ignore[arg-type]
        codes = {"weight_bits": bits, "group_size": size, "symmetric": symmetric, "scale_dtype": scale_dtype}
        layer = cls.like(embedding, **codes)
        layer.set_weight(*quantize_groups(weight, bits, size, symmetric, scale_dtype))
        return take_over(layer, embedding, ("weight",)).train(embedding.training)

    def set_weight(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Takes codes [num_embeddings, embedding_dim] int8, with scales and zero points as in the state_dict.

        Raises:
            RuntimeError: another shape or dtype.
        """
        state = {"codes": self._saved(codes), "scale": scale}
        self.load_state_dict(state if zero_point is None else {**state, "zero_point": zero_point})

    @property
    def codes(self) -> Tensor:
        """The integers [num_embeddings, embedding_dim] in int8."""
        return self._codes_of(self.data)

    def _codes_of(self, rows: Tensor) -> Tensor:
        """The codes of some rows of ``data``."""
        return rows

    def _saved(self, codes: Tensor) -> Tensor:
        """Codes as the state_dict holds them."""
        return pack_bits(codes, self.weight_bits) if self.weight_bits in layouts.BITS else codes

    def _logical(self) -> Logical:
        n, k = self.weight_shape
        packed = torch.uint8, (n, layouts.packed_length(k, self.weight_bits))
        return {"codes": packed if self.weight_bits in layouts.BITS else (torch.int8, (n, k))}

    def _weight_in(self, dtype: torch.dtype) -> Tensor:
        return self._rows(self.data, self._scale_of("scale"), self.zero_point, dtype)

    def compute(self, input: Tensor) -> Tensor:
        return self._looked_up(input, self.dtype)

    def _looked_up(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        rows, scale = F.embedding(index, self.data), F.embedding(index, self._scale_of("scale"))
        zero_point = None if self.zero_point is None else F.embedding(index, self.zero_point)
        return self._rows(rows, scale, zero_point, dtype)

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

    defaults = 4, 32

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
        table = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device="meta")
        super().__init__(table, weight_bits, group_size, symmetric, scale_dtype, dtype)

    def _codes_of(self, rows: Tensor) -> Tensor:
        return unpack_bits(rows, self.weight_bits, self.embedding_dim)


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

    defaults = 8, -1

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
        size = whole_group_size(group_size, embedding_dim, scale_dtype)
        table = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device="meta")
        super().__init__(table, weight_bits, size, symmetric, scale_dtype, dtype)


class Int8EmbeddingBag(IntegerEmbedding):
    """An nn.EmbeddingBag on int8 codes: it sums, averages or compares rows without a table of floats.

    Args:
        num_embeddings, embedding_dim, mode, include_last_offset, padding_idx: as nn.EmbeddingBag.
        weight_bits: width of a code, 2 to 8. The kernels take a byte for each; files pack codes of 2 to 4 bits.
        group_size, symmetric, scale_dtype, dtype: as ``Int8Embedding``.

    state_dict: as that of ``Int8Embedding``, or of ``Int4Embedding`` at 2 to 4 bits.

    input, offsets, per_sample_weights: as of nn.EmbeddingBag → [B, embedding_dim] of dtype, rounded once from sums in
    fp32 (see ``int8_embedding_bag``). Differentiable in per_sample_weights.
    """

    float_class = nn.EmbeddingBag
    settings = (*IntegerEmbedding.settings, "mode", "include_last_offset")
    defaults = 8, -1
    mode: str
    include_last_offset: bool

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        mode: str = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        *,
        weight_bits: int = 8,
        group_size: int = -1,
        symmetric: bool = True,
        scale_dtype: torch.dtype = torch.float32,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        checks.require(2 <= weight_bits <= 8, f"weight_bits: got {weight_bits}; accepted: 2 to 8")
        checks.require(mode in embedding_checks.MODES, f"mode: got {mode!r}; accepted: sum, mean, max")
        size = whole_group_size(group_size, embedding_dim, scale_dtype)
        options: Any = {"mode": mode, "include_last_offset": include_last_offset, "padding_idx": padding_idx}
        table = nn.EmbeddingBag(num_embeddings, embedding_dim, **options, device="meta")
        super().__init__(table, weight_bits, size, symmetric, scale_dtype, dtype)

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy):  # see ``root_as_leaf``
            others = {"offsets": offsets, "per_sample_weights": per_sample_weights}
            return node_of(self, input, **{key: value for key, value in others.items() if value is not None})  # type: ignore[return-value]
        return self._output(self.compute(input, offsets, per_sample_weights))

    forward.__annotations__ = {}  # noqa: RUF012 (code of a graph that was traced from the layer would repeat them)

    def compute(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        checks.dense("input", input)
        if input.dim() not in (1, 2):
            raise RuntimeError(f"input: got {input.dim()} dims; accepted: 1 with offsets, or 2")
        if (offsets is None) != (input.dim() == 2):
            got, accepted = "None" if offsets is None else "a tensor", "a tensor with 1 dim, None with 2"
            raise RuntimeError(f"offsets: got {got} with an input of {input.dim()} dims; accepted: {accepted}")
        last, weights = self.include_last_offset, per_sample_weights
        if weights is not None:
            if weights.shape != input.shape:
                got, accepted = str(list(weights.shape)), str(list(input.shape))
                raise RuntimeError(f"per_sample_weights: got shape {got}; accepted: input's, {accepted}")
            weights = weights.reshape(-1)
        if offsets is None:
            count, length = input.shape
            offsets, last = torch.arange(count, dtype=input.dtype, device=input.device) * length, False
        index, padding = input.reshape(-1), self.padding_idx
        if self.dtype == torch.float64 or (weights is not None and wants_gradient(weights)):
            return self._by_torch(index, offsets, weights, last)
        y = int8_embedding_bag(
            self.data,
            self._scale_of("scale"),
            self.zero_point,
            index,
            offsets,
            weights=weights,
            mode=self.mode,
            padding_idx=-1 if padding is None else padding,
            include_last_offset=last,
        )
        return y if self.dtype == torch.float32 else y.to(self.dtype)

    def _by_torch(self, index: Tensor, offsets: Tensor, weights: Tensor | None, last: bool) -> Tensor:
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        rows, places = self._looked_up(index, dtype), torch.arange(len(index), device=index.device)
        if self.padding_idx is not None:  # such entries stand for one more row, which the bags leave out
            places = places.masked_fill(index == self.padding_idx, len(index))
        return F.embedding_bag(
            places,
            torch.cat([rows, rows.new_zeros(1, rows.shape[1])]),
            offsets.long(),
            mode=self.mode,
            per_sample_weights=None if weights is None else weights.to(dtype),
            include_last_offset=last,
            padding_idx=len(index),
        ).to(self.dtype)

    def _pack(self, logical: dict[str, Tensor]) -> dict[str, Tensor | None]:
        codes = logical["codes"]
        packed = self.weight_bits in layouts.BITS
        return {"data": unpack_bits(codes, self.weight_bits, self.embedding_dim) if packed else codes}

    def _unpack(self) -> dict[str, Tensor]:
        return {"codes": self._saved(self.data)}


def whole_group_size(group_size: int, k: int, scale_dtype: torch.dtype) -> int:
    """Checks the groups of a table whose codes have a byte each and returns the group size, with −1 resolved."""
    gemm_checks.scale_dtype("scale_dtype", torch.empty(0, dtype=scale_dtype))
    size = k if group_size == -1 else group_size
    accepted = f"accepted: -1, or a divisor of {k}"
    checks.require(size == k or (size > 0 and k % size == 0), f"group_size: got {group_size}; {accepted}")
    return size
