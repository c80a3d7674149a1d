"""Schemas, fakes, autograd and public functions of every op; the import defines the ops and loads their kernels."""

import importlib
import pkgutil

from .. import library

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

library.load()
