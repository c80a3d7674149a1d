"""Schemas, fakes, autograd and public functions of every op; importing this defines them and loads the kernels."""

from .. import library
from . import fake_quantize, quantize

library.load()

__all__ = ["fake_quantize", "quantize"]
