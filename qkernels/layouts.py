"""How the ops lay data out in memory; a comment draws each layout beside the function that makes it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def mask_like(x: Tensor) -> Tensor:
    """Uninitialised memory for a mask: one bit per element of x, eight to a byte."""
    return x.new_empty(((x.numel() + 7) // 8,), dtype=torch.uint8)


def storage_flat(t: Tensor) -> Tensor:
    """The elements of a dense tensor in memory order."""
    return torch.as_strided(t, (t.numel(),), (1,))


def pack_mask(inside: Tensor, like: Tensor) -> Tensor:
    """Packs a mask: one bit per element in the memory order of ``like``, low bit first."""
    flat = storage_flat(torch.empty_like(like, dtype=torch.bool).copy_(inside))
    bits = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).reshape(-1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=flat.device)  # a list would be copied, which synchronises
    return (bits * weights).sum(1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, like: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = ((mask.reshape(-1, 1) >> shifts) & 1).reshape(-1)[: like.numel()].bool()
    inside = torch.empty_like(like, dtype=torch.bool)
    storage_flat(inside).copy_(bits)
    return inside


# Rows of codes for a matrix unit, which loads a row in one piece if it begins at a multiple of 16 bytes.

ALIGNMENT = 16  # bytes of a kernel's widest access


def empty_aligned_rows(like: Tensor, rows: int, columns: int) -> Tensor:
    """Uninitialised int8 memory [rows, columns] whose rows begin at multiples of 16 bytes."""
    stride = (columns + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    return like.new_empty_strided((rows, columns), (stride, 1), dtype=torch.int8)


# A packed weight [N, K] has one of two layouts: panels of 32 output channels for a CPU, rows for a GPU. The kernels of
# a device take only its layout. PackedInt8 and PackedInt4 carry the layout's name. An op gets only tensors; there
# int8_layout and int4_layout, and no other code, tell the layout from the dims. The number in a name changes when the
# order of bytes changes.

PANELS = "panels-1"
PLANES = "planes-1"  # panels of 2 and 3 bits
ROWS = "rows-1"  # int8
HALVES = "halves-1"  # int4
PANEL = 32  # output channels of one panel


def panels_of(n: int) -> int:
    return (n + PANEL - 1) // PANEL


# int8 in panels: the four codes along k that one dot-product instruction adds lie together, and so on for the panel's
# channels in order. Missing channels and k are zeros.
#
#     data[panel][k // 4][channel % 32][k % 4]
#     panel 0, step 0:  c0: k0 k1 k2 k3 | c1: k0 k1 k2 k3 | … | c31: k0 k1 k2 k3
#              step 1:  c0: k4 k5 k6 k7 | …
#
# int8 in rows: [N, K], with K padded by zeros to a multiple of the 16 bytes that a GPU copies at a time.


def int8_layout(data: Tensor) -> str:
    """The layout of an int8 weight's data."""
    return ROWS if data.dim() == 2 else PANELS


def int8_layout_on(device: torch.device) -> str:
    """The layout that the kernels of a device take."""
    return ROWS if device.type == "cuda" else PANELS


def int8_shape(layout: str, n: int, k: int) -> tuple[int, ...]:
    return (
        (n, (k + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT) if layout == ROWS else (panels_of(n), (k + 3) // 4, PANEL, 4)
    )


def int8_pack(q: Tensor) -> Tensor:
    """Codes [N, K] in panels."""
    n, k = q.shape
    n_panels, steps, _, _ = int8_shape(PANELS, n, k)
    padded = torch.nn.functional.pad(q, (0, steps * 4 - k, 0, n_panels * PANEL - n))
    return padded.view(n_panels, PANEL, steps, 4).permute(0, 2, 1, 3).clone(memory_format=torch.contiguous_format)


def int8_to_rows(q: Tensor) -> Tensor:
    """Codes [N, K] in rows."""
    data = q.new_zeros(int8_shape(ROWS, *q.shape))
    data[:, : q.shape[1]] = q
    return data


def int8_unpack(data: Tensor, n: int, k: int) -> Tensor:
    """The codes [N, K] of either layout."""
    if int8_layout(data) == PANELS:
        n_panels, steps, _, _ = data.shape
        data = data.permute(0, 2, 1, 3).reshape(n_panels * PANEL, steps * 4)
    return data[:n, :k].clone(memory_format=torch.contiguous_format)


# int8 of a convolution [C_out, C_in/groups, *kernel]: K is cut into runs, which are codes that lie side by side in an
# image with the channels innermost; zeros fill each run up to a multiple of 4. A run is a row of the kernel with all
# channels. In a grouped convolution it is one pixel with the channels of a block of groups: as many as fit into one
# panel, at least one. In a block each output channel has zeros for the channels of the other groups.
#
#     data[block][panel][run][i // 4][channel % 32][i % 4], in one dim
#
# With one filter per channel a product adds up 4 taps: those of 4 rows of one of the kernel's columns, where the rows
# of all depths follow each other and missing ones are zeros. A last row that is left alone is taken 4 columns at a
# time. Channels form blocks of 64, the last one of 64, 32 or 16, whose order is that in which the kernels unpack bytes.
#
#     data[block][product][channel // 4 % 4][channel // 16 % (block's width // 16)][channel % 4][tap], in one dim


def _is_depthwise(shape: Sequence[int], groups: int) -> bool:
    n, c, *kernel = shape
    return n == groups > 1 == c and 0 < math.prod(kernel) <= 65536


def _depthwise_products(kernel: Sequence[int]) -> tuple[int, int, int]:
    """(rows, products of 2 to 4 rows, all products)."""
    rows = math.prod(kernel[:-1])
    products = (rows + 2) // 4 * kernel[-1]
    return rows, products, products + (rows % 4 == 1) * -(-kernel[-1] // 4)


def _depthwise_width(channels: int) -> int:
    """Of the block that begins with so many channels left."""
    return 64 if channels > 32 else 32 if channels > 16 else 16


def _depthwise_bytes(n: int, kernel: Sequence[int]) -> int:
    last = (n - 1) // 64 * 64
    return (last + _depthwise_width(n - last)) * _depthwise_products(kernel)[2] * 4


def _depthwise_places(n: int, kernel: Sequence[int], device: torch.device) -> Tensor:
    rows, below, products = _depthwise_products(kernel)
    channel, tap = torch.arange(n, device=device)[:, None], torch.arange(math.prod(kernel), device=device)
    row, column = tap // kernel[-1], tap % kernel[-1]
    single = (row == rows - 1) & (rows % 4 == 1)
    product = torch.where(single, below + column // 4, row // 4 * kernel[-1] + column)
    first = channel // 64 * 64
    left = n - first
    width = torch.where(left > 32, 64, torch.where(left > 16, 32, 16))
    place = (channel // 4 % 4 * (width // 16) + (channel - first) // 16) * 16 + channel % 4 * 4
    return first * products * 4 + product * width * 4 + place + torch.where(single, column % 4, row % 4)


def _conv_layout(shape: Sequence[int], groups: int) -> tuple[int, ...]:
    """(groups of a block, panels of a block, runs, codes of a run); one block has kernel rows for runs."""
    n, c, *kernel = shape
    group_out = n // groups
    block_groups = max(1, min(PANEL // max(group_out, 1), groups))
    run = c * block_groups
    runs = math.prod(kernel)
    if block_groups >= groups:
        runs, run = math.prod(kernel[:-1]), run * kernel[-1]
    return block_groups, panels_of(group_out * block_groups), runs, run


def conv_bytes(shape: Sequence[int], groups: int) -> int:
    """How many bytes a packed convolution has."""
    if _is_depthwise(shape, groups):
        return _depthwise_bytes(shape[0], shape[2:])
    block_groups, panels, runs, run = _conv_layout(shape, groups)
    return -(-groups // block_groups) * panels * runs * -(-run // 4) * 4 * PANEL


def conv_places(shape: Sequence[int], groups: int, device: torch.device) -> Tensor:
    """Where in a packed convolution each of its codes lies: int64 of the weight's shape."""
    n, c, *kernel = shape
    if math.prod(shape) == 0:
        return torch.empty(list(shape), dtype=torch.int64, device=device)
    if _is_depthwise(shape, groups):
        return _depthwise_places(n, kernel, device).reshape(*shape)
    block_groups, panels, runs, run = _conv_layout(shape, groups)
    group_out, width = n // groups, kernel[-1]

    def numbers(count: int, dim: int) -> Tensor:
        return torch.arange(count, device=device).view([-1 if i == dim else 1 for i in range(3)])

    channel, tap = numbers(n, 0), numbers(math.prod(kernel), 2)
    group = channel // max(group_out, 1)
    block, code = group // block_groups, group % block_groups * c + numbers(c, 1)
    if block_groups >= groups:
        tap, code = tap // width, code + tap % width * (c * groups)
    channel = channel - block * (group_out * block_groups)
    step = (block * panels + channel // PANEL) * (runs * -(-run // 4)) + tap * -(-run // 4) + code // 4
    return ((step * PANEL + channel % PANEL) * 4 + code % 4).reshape(n, c, *kernel)


def conv_pack(q: Tensor, groups: int) -> Tensor:
    """Codes [C_out, C_in/groups, *kernel] as packed convolution."""
    data = q.new_zeros(conv_bytes(q.shape, groups))
    data[conv_places(q.shape, groups, q.device).flatten()] = q.flatten()
    return data


def conv_unpack(data: Tensor, shape: Sequence[int], groups: int) -> Tensor:
    """The codes of a packed convolution of this shape."""
    return data.flatten()[conv_places(shape, groups, data.device)]


# int8 of a transposed convolution [C_in, C_out/groups, *kernel]: outputs whose places differ by multiples of the stride
# see the same taps. So each class of outputs, by place modulo stride, is an ordinary convolution with some of the taps
# in reverse order. The packed convolutions of the classes follow each other, and so do their sums of codes.


def _class_taps(
    kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Iterator[tuple[list[int], ...]]:
    """For each class its taps along each dim, in its order."""

    def taps(dim: int) -> list[list[int]]:
        return [
            [k for k in reversed(range(kernel[dim])) if k * dilation[dim] % stride[dim] == place]
            for place in range(stride[dim])
        ]

    return itertools.product(*map(taps, range(len(kernel))))


def _class_weights(q: Tensor, groups: int, stride: Sequence[int], dilation: Sequence[int]) -> Iterator[Tensor]:
    """The weight [C_out, C_in/groups, taps] of each class."""
    c_in, _, *kernel = q.shape
    w = q.unflatten(0, (groups, c_in // groups)).transpose(1, 2).flatten(0, 1)
    for chosen in _class_taps(kernel, stride, dilation):
        part = w
        for dim, indices in enumerate(chosen, 2):
            part = part.index_select(dim, torch.tensor(indices, dtype=torch.int64, device=q.device))
        yield part


def conv_transpose_bytes(shape: Sequence[int], groups: int, stride: Sequence[int], dilation: Sequence[int]) -> int:
    """How many bytes a packed transposed convolution has."""
    c_in, group_out, *kernel = shape
    weight = group_out * groups, c_in // groups
    return sum(conv_bytes((*weight, *map(len, taps)), groups) for taps in _class_taps(kernel, stride, dilation))


def conv_transpose_pack(
    q: Tensor, groups: int, stride: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Codes [C_in, C_out/groups, *kernel] as packed transposed convolution, and the sums of codes of its classes."""
    parts = list(_class_weights(q, groups, stride, dilation))
    sums = [part.flatten(1).sum(1, dtype=torch.int32) for part in parts]
    return torch.cat([conv_pack(part, groups) for part in parts]), torch.cat(sums)


def conv_transpose_unpack(
    data: Tensor, shape: Sequence[int], groups: int, stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """The codes of a packed transposed convolution of this shape."""
    # Of each code its place among all codes: packed as codes are, these say where a packed code belongs.
    places = torch.arange(math.prod(shape), device=data.device).view(*shape)
    q, begin = data.new_empty(math.prod(shape)), 0
    for part in _class_weights(places, groups, stride, dilation):
        end = begin + conv_bytes(part.shape, groups)
        q[part.flatten()] = conv_unpack(data[begin:end], part.shape, groups).flatten()
        begin = end
    return q.view(*shape)


def outputs_first(t: Tensor, groups: int) -> Tensor:
    """A transposed convolution's weight [C_in, C_out/groups, *kernel] as [C_out, C_in/groups, *kernel]."""
    c_in, group_out, *kernel = t.shape
    rows = t.reshape(groups, c_in // groups, group_out, *kernel).transpose(1, 2)
    return rows.reshape(group_out * groups, c_in // groups, *kernel)


def inputs_first(t: Tensor, groups: int) -> Tensor:
    """The reverse of ``outputs_first``."""
    c_out, group_in, *kernel = t.shape
    rows = t.reshape(groups, c_out // groups, group_in, *kernel).transpose(1, 2)
    # A view of a 1×1 kernel may have strides that torch takes for channels_last.
    return rows.reshape(group_in * groups, c_out // groups, *kernel).clone(memory_format=torch.contiguous_format)


# int4 in panels: a byte holds the code of channel c, plus 8, in its low bits and that of channel c + 16 in its high
# bits, so that 64 bytes give two vectors of 16 channels. Bytes of missing channels and k are 0. Scales, zero points and
# minima are [panels, groups, 32].
#
#     data[panel][k // 4][channel % 16][k % 4]
#     panel 0, step 0:  c0|c16: k0 k1 k2 k3 | c1|c17: k0 k1 k2 k3 | … | c15|c31: k0 k1 k2 k3
#
# Codes of 2 and 3 bits in planes: panels with a block of 64 or 96 bytes for each 8 k. The first 64 hold the low two
# bits of a code plus 2, or of 3 bits plus 4, so that a mask makes int4 panels of 4 k of them, and a shift of the other
# 4. Three bits have a second plane with the highest bits: its byte i belongs to the bytes i and 32 + i of the first.
#
#     data[panel][k // 8][channel % 16 · 4 + k % 4]
#     panel 0, block 0, from the low bits on:  byte 0: c0 k0 | c0 k4 | c16 k0 | c16 k4; byte 1: c0 k1 | c0 k5 | …
#     second plane:  byte 0: c0 k0 | c8 k0 | c0 k4 | c8 k4 | c16 k0 | c24 k0 | c16 k4 | c24 k4; byte 1: c0 k1 | …
#
# int4 in halves: rows in which a byte holds the codes of k and k + half. So the low bits of ``half`` bytes are one
# operand of tensor cores and the high bits another, without reordering, each within one group. Scales, zero points and
# minima are [groups, N].
#
#     data[n][k // (2·half)][k % half]
#     half 32:  k0|k32 k1|k33 … k31|k63 | k64|k96 …


def int4_layout(data: Tensor) -> str:
    """The layout of a weight of 2 to 4 bits."""
    return {2: HALVES, 3: PLANES}.get(data.dim(), PANELS)


def int4_bits(data: Tensor) -> int:
    """How many bits the layout has room for in a code: halves hold 2- and 3-bit codes as int4 codes."""
    return (2 if data.shape[2] == 64 else 3) if int4_layout(data) == PLANES else 4


def int4_layout_on(device: torch.device, bits: int = 4) -> str:
    """The layout that the kernels of a device take."""
    return HALVES if device.type == "cuda" else PANELS if bits == 4 else PLANES


def groups_of(k: int, group_size: int) -> int:
    return k // group_size if k else 1


def half_of(group_size: int, k: int) -> int:
    """The distance in k between the two codes of a byte."""
    return 64 if group_size == k else next((half for half in (64, 32, 16) if group_size % half == 0), 64)


def int4_shape(layout: str, n: int, k: int, group_size: int, bits: int = 4) -> tuple[int, ...]:
    if layout == PLANES:
        return panels_of(n), (k + 7) // 8, 32 * bits
    if layout == PANELS:
        return panels_of(n), (k + 3) // 4, PANEL // 2, 4
    half = half_of(group_size, k)
    return n, (k + 2 * half - 1) // (2 * half) * half


def groups_shape(layout: str, n: int, groups: int) -> tuple[int, ...]:
    """The shape of an int4 weight's scales, zero points or minima."""
    return (groups, n) if layout == HALVES else (panels_of(n), groups, PANEL)


def _shifts(bits: int, device: torch.device) -> Tensor:
    """Where in a byte codes of so many bits begin."""
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)


def int4_pack(q: Tensor, bits: int = 4) -> Tensor:
    """Codes [N, K] in panels, or of 2 and 3 bits in planes."""
    n, k = q.shape
    offset, step = 1 << bits - 1, 4 if bits == 4 else 8
    codes = torch.nn.functional.pad((q + offset).to(torch.uint8) & 2 * offset - 1, (0, -k % step, 0, -n % PANEL))
    codes = codes.view(panels_of(n), 2, PANEL // 2, -(-k // step), step)
    if bits == 4:
        low, high = codes.unbind(1)
        return (low | high << 4).permute(0, 2, 1, 3).clone(memory_format=torch.contiguous_format)
    # panel, block, byte of the first plane, place in it
    blocks = codes.unflatten(-1, (2, 4)).permute(0, 3, 2, 5, 1, 4).flatten(4).flatten(2, 3)
    plane = ((blocks & 3) << _shifts(2, q.device)).sum(-1, dtype=torch.uint8)
    if bits == 2:
        return plane
    highest = (blocks >> 2).unflatten(2, (2, 32)).permute(0, 1, 3, 4, 2).flatten(3)
    return torch.cat((plane, (highest << _shifts(1, q.device)).sum(-1, dtype=torch.uint8)), 2)


def int4_to_halves(q: Tensor, group_size: int) -> Tensor:
    """Codes [N, K] in halves."""
    n, k = q.shape
    half = half_of(group_size, k)
    _, length = int4_shape(HALVES, n, k, group_size)
    low, high = (
        torch.nn.functional.pad(q, (0, 2 * length - k)).view(n, length // half, 2, half).to(torch.uint8).unbind(2)
    )
    return (low & 15 | high << 4).reshape(n, length)


def int4_unpack(data: Tensor, n: int, k: int, group_size: int) -> Tensor:
    """The codes [N, K] of any layout."""
    layout = int4_layout(data)
    if layout == PLANES:
        bits = int4_bits(data)
        blocks = data[:, :, :64, None] >> _shifts(2, data.device) & 3
        if bits == 3:
            highest = data[:, :, 64:, None] >> _shifts(1, data.device) & 1
            blocks = blocks | highest.unflatten(-1, (4, 2)).permute(0, 1, 4, 2, 3).flatten(2, 3) << 2
        rows = blocks.unflatten(-1, (2, 2)).unflatten(2, (PANEL // 2, 4)).permute(0, 4, 2, 1, 5, 3)
        codes = rows.reshape(data.shape[0] * PANEL, data.shape[1] * 8)
        return codes[:n, :k].to(torch.int8) - (1 << bits - 1)
    if layout == PANELS:
        n_panels, steps, half, _ = data.shape
        codes = torch.stack((data & 15, data >> 4), 1).permute(0, 1, 3, 2, 4).reshape(n_panels * 2 * half, steps * 4)
        return codes[:n, :k].to(torch.int8) - 8
    half = half_of(group_size, k)
    blocks = data.view(n, data.shape[1] // half, half)
    codes = torch.stack((blocks & 15, blocks >> 4), 2).flatten(1)[:, :k]
    return ((codes ^ 8).to(torch.int8) - 8).clone(memory_format=torch.contiguous_format)


def to_panels(t: Tensor) -> Tensor:
    """Scales, zero points or minima [N, groups] in panels; those of missing channels are 0."""
    n, groups = t.shape
    padded = torch.nn.functional.pad(t, (0, 0, 0, panels_of(n) * PANEL - n))
    return padded.view(panels_of(n), PANEL, groups).transpose(1, 2).clone(memory_format=torch.contiguous_format)


def by_group(t: Tensor, n: int, layout: str) -> Tensor:
    """Scales, zero points or minima of any layout as [N, groups]."""
    return t.t() if layout == HALVES else t.transpose(1, 2).reshape(-1, t.shape[1])[:n]


# Files hold codes as a stream of b-bit two's complement numbers along the last dim, low bits first.

BITS = (2, 3, 4)


def code_range(bits: int) -> tuple[int, int]:
    return -(1 << bits - 1), (1 << bits - 1) - 1


def packed_length(k: int, bits: int) -> int:
    """How many bytes a row of k codes takes; the bits behind the last code are zero."""
    return (k * bits + 7) // 8
