"""Schemas, fakes, autograd and public functions of every op; importing this defines them and loads the kernels."""

import importlib
import pkgutil

from .. import library

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

library.load()
