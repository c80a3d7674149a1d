"""Granularities: which elements share a scale. Kernels never see these objects, only the shape of scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: scale is ``[1]``."""

    def scale_shape(self, shape: Sequence[int] | None) -> tuple[int, ...]:
        return (1,)


@dataclass(frozen=True)
class PerChannel:
    """One scale for each index of dim ``axis``: ``[N, 1]`` for a Linear weight, ``[O, 1, 1, 1]`` for a Conv2d.

    Several axes, as a tuple: one scale for each combination of indices: (0, 1) gives expert weights [E, N, K] the
    scales ``[E, N, 1]``.
    """

    axis: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        if isinstance(self.axis, tuple):
            if not self.axis:
                raise ValueError("axis: got (); accepted: at least one axis")
            for axis in self.axis:
                _check_int("axis", axis)
        else:
            _check_int("axis", self.axis)

    def scale_shape(self, shape: Sequence[int] | None) -> tuple[int, ...]:
        shape = _known(self, shape)
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        if not all(-len(shape) <= axis < len(shape) for axis in axes):
            raise ValueError(f"granularity: got {self}; accepted: an axis of the tensor, whose shape is {list(shape)}")
        channels = {axis % len(shape) for axis in axes}
        return tuple(n if dim in channels else 1 for dim, n in enumerate(shape))


@dataclass(frozen=True)
class PerGroup:
    """One scale for each ``size`` consecutive elements of the last dim: scale is ``[N, K/size]``."""

    size: int

    def __post_init__(self) -> None:
        _check_int("size", self.size)

    def scale_shape(self, shape: Sequence[int] | None) -> tuple[int, ...]:
        shape = _known(self, shape)
        if self.size < 1 or shape[-1] % self.size:
            raise ValueError(f"granularity: got {self}; accepted: a size that divides the last dim, {shape[-1]}")
        return (*shape[:-1], shape[-1] // self.size)


@dataclass(frozen=True)
class PerToken:
    """One scale for each row, taken from the row itself (quantizer="dynamic" only)."""

    def scale_shape(self, shape: Sequence[int] | None) -> tuple[int, ...]:
        raise ValueError('granularity: got PerToken() with fixed scales; accepted: quantizer="dynamic", or PerTensor()')


Granularity = PerTensor | PerChannel | PerGroup | PerToken


def _known(granularity: Granularity, shape: Sequence[int] | None) -> Sequence[int]:
    if shape is None:
        raise ValueError(f"shape: got None with granularity={granularity}; accepted: the shape of the tensor")
    return shape


def _check_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, a {type(value).__name__}; accepted: an integer")
