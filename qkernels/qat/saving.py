"""save and load: a prepared or converted model in one file, and the model again from that and the float model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..nn.fake_quantize import FakeQuantize
from ..nn.quantized import QuantizedLayer
from ..version import __version__
from . import model_file
from .copying import copy_of, is_sharded_model
from .described import describe
from .files import as_path
from .fuse import fuse
from .rebuilt import OtherModelError, rebuild, refuse

FORMATS = {"channels_last": (torch.channels_last, 4), "channels_last_3d": (torch.channels_last_3d, 5)}  # and their dims
EXTRA_STATE = "_extra_state"  # the last part of a key by which a module of the user's saves something of its own


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a model that ``convert`` or ``prepare`` returned to one safetensors file, for ``load``.

    The file holds the tensors of ``model.state_dict()`` under their names, tensors that are one in the model once, and
    in its metadata, as JSON under ``qkernels``, all that tells the model from the float one: the class, geometry,
    widths and granularities of its layers, their quantizers, folded and frozen BatchNorms, which tensors are shared,
    which parameters get gradients, the version of the format, and digests of the whole and of each tensor. It holds no
    code, so to load it runs none. The file is written beside ``path``, and renamed when it is whole: a file that was
    there before stays until then.

    Whether a model trains, and hooks, are not saved.

    Args:
        model: on any device.
        path: the file; ``.safetensors`` is its usual ending.

    Raises:
        ValueError: a model without layers of this package, one under ``fully_shard`` (save what ``convert`` returns),
            or a layer or tensor that the file cannot hold. The text names it.
        FileNotFoundError: the folder does not exist.
        ImportError: the safetensors package is not installed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}; accepted: a torch.nn.Module")
    path = as_path(path)
    if path.is_dir() or not path.parent.is_dir():
        error: type[OSError] = IsADirectoryError if path.is_dir() else FileNotFoundError
        raise error(f"path: got {str(path)!r}; accepted: the name of a file in a folder that exists")
    if is_sharded_model(model):
        raise ValueError("model: got one under fully_shard; accepted: one with whole tensors, as convert returns")
    found = describe(model)
    if not found["layers"]:
        raise ValueError(
            "model: holds no layer of this package; accepted: what qk.convert or qk.prepare returned (torch.save saves "
            "the state_dict of a float model)"
        )
    state = dict(model.state_dict())
    first: dict[tuple[Any, ...], str] = {}
    shared: dict[str, str] = {}
    for name, t in state.items():
        _check_tensor(name, t)
        if t.numel():
            place = (t.device, t.data_ptr(), t.dtype, t.shape, t.stride())
            if place in first:
                shared[name] = first[place]
            first.setdefault(place, name)
    whole = {name: t for name, t in state.items() if name not in shared}
    formats = {name: form for name, t in whole.items() if (form := _memory_format(t)) is not None}
    learning = [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    model_file.write(
        path,
        {name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, t in whole.items()},
        {"version": __version__, **found, "shared": shared, "memory_formats": formats, "gradients": learning},
    )


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """The model that ``save`` wrote, made of the float model: the same classes of layers, the same outputs.

    The float model gives the architecture, the forward passes, and what no state_dict holds. Its weights do not count;
    it may be on the meta device, where it takes no memory. A converted model comes back in eval mode; the layers of a
    prepared one keep the modes of the float model's.

    Which parameters get gradients is as in the saved model, and which BatchNorms are frozen.

    Everything in the file is compared with the float model before anything is loaded.

    Args:
        path: a file of ``save``.
        model: the float model that was prepared, or one like it: with the names, classes and settings of its modules,
            and the shapes and dtypes of its tensors.

    Returns:
        A new model, on the device of ``model`` (on the CPU, if that is on the meta device). ``model`` is never changed.

    Raises:
        ValueError: a file that is cut off, changed, of a newer version, or not of ``save``; or another model. The text
            names the modules or tensors that differ, and what to do.
        FileNotFoundError, IsADirectoryError, PermissionError: no file that can be read.
        ImportError: the safetensors package is not installed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}; accepted: the float model, a torch.nn.Module")
    path = as_path(path)
    found, tensors = model_file.read(path)
    device = _device_of(model)
    try:
        loaded = rebuild(_without_memory(model), found)
        _check_tensors(loaded, tensors, found)
    except OtherModelError as error:
        raise ValueError(
            f"model: not the one that was saved in {str(path)!r}: {error}. Nothing was loaded; accepted: the float "
            "model that was prepared, with the modules, settings, shapes and dtypes that it had"
        ) from None
    _fill(loaded, tensors, found)
    if not found["prepared"]:
        fuse(loaded.eval())
    return loaded if device.type == "cpu" else loaded.to(device)


def _check_tensor(name: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise ValueError(
            f"model: its state_dict holds {name!r}, a {type(t).__name__}; accepted: tensors, so let the module's "
            "get_extra_state return one, or none"
        )
    if t.is_meta or t.layout != torch.strided or t.is_quantized or t.is_nested or t.dtype == torch.complex128:
        kind = "on the meta device" if t.is_meta else "nested" if t.is_nested else f"{t.dtype}, {t.layout}"
        raise ValueError(f"model: its tensor {name!r} is {kind}; accepted: dense tensors with values")


def _memory_format(t: Tensor) -> str | None:
    """The format of a tensor that has other strides than those in a file.

    Strides tell more than ``is_contiguous``: a weight with one channel is contiguous in both formats, and torch's
    convolutions look at its strides for the format of their result.
    """
    forms = [
        (None, torch.contiguous_format),
        *((name, form) for name, (form, dim) in FORMATS.items() if dim == t.dim()),
    ]
    fitting = [
        name for name, form in forms if torch.empty_like(t, device="meta", memory_format=form).stride() == t.stride()
    ]
    return fitting[0] if fitting else None


def _device_of(model: nn.Module) -> torch.device:
    """Where the loaded model goes."""
    held = (*model.parameters(), *model.buffers())
    lazy = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if is_lazy(t)]
    if lazy:
        raise ValueError(
            f"model: its tensor {lazy[0]!r} has no shape yet; accepted: a model that knows its shapes, so call it once"
        )
    if is_sharded_model(model):
        raise ValueError(
            "model: got one under fully_shard; accepted: a model with whole tensors, or on the meta device"
        )
    devices = {t.device for t in held if not t.is_meta}
    if len(devices) > 1:
        raise ValueError(
            f"model: its tensors are on {', '.join(sorted(map(str, devices)))}; accepted: one device, or the meta "
            "device, and to move the parts of what load returns"
        )
    return devices.pop() if devices else torch.device("cpu")


def _without_memory(model: nn.Module) -> nn.Module:
    """A copy whose parameters and persistent buffers, which the file holds, are on the meta device.

    Raises:
        ValueError: the model has on the meta device what no file holds.
    """
    memo: dict[int, Tensor] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        integers = isinstance(module, QuantizedLayer)
        for parameter in module._parameters.values():
            if parameter is not None:
                meta = torch.empty_like(parameter, device="meta")
                memo[id(parameter)] = nn.Parameter(meta, parameter.requires_grad)
        for key, buffer in module._buffers.items():
            if buffer is not None and (integers or key not in module._non_persistent_buffers_set):
                memo[id(buffer)] = torch.empty_like(buffer, device="meta")
        others = {key: value for key, value in module._buffers.items() if id(value) not in memo}
        if not module._forward_pre_hooks:  # by which weight_norm sets its weight anew
            others.update(vars(module))
        for key, value in others.items():
            if isinstance(value, Tensor) and value.is_meta and id(value) not in memo:
                raise ValueError(
                    f"model: {prefix + key!r} is on the meta device, and no state_dict holds it, so no file does; "
                    "accepted: a model that has its values, so make it on the CPU, or let it be a persistent buffer"
                )
    return copy_of(model, memo)


def _check_tensors(model: nn.Module, tensors: dict[str, Tensor], found: dict[str, Any]) -> None:
    """Compares the file's tensors with those that the model is going to take."""
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantize) and f"{name}.exact_zero_point" in tensors:  # only some states hold it
            module.exact_zero_point = torch.empty_like(module.scale)
    wanted: dict[str, Any] = dict(model.state_dict())
    names = {**{name: name for name in tensors}, **found["shared"]}
    refuse(list(_differing(wanted, {name: tensors.get(source) for name, source in names.items()})))


def _differing(wanted: dict[str, Any], given: dict[str, Tensor | None]) -> Iterator[str]:
    for name, t in given.items():
        if name not in wanted:
            yield f"the tensor {name!r} is in the file and not in the model"
        elif t is None:
            yield f"the tensor {name!r} is not in the file, which says that another name holds it"
    for name, own in wanted.items():
        t = given.get(name)
        if t is None:
            if name not in given:
                yield f"the tensor {name!r} is in the model and not in the file"
        elif name.rpartition(".")[2] == EXTRA_STATE:
            continue
        elif not isinstance(own, Tensor) or own.shape != t.shape:
            shape = list(own.shape) if isinstance(own, Tensor) else type(own).__name__
            yield f"the tensor {name!r} has shape {list(t.shape)} in the file, and {shape} in the model"
        elif own.dtype != t.dtype:
            yield (
                f"the tensor {name!r} is {t.dtype} in the file, and {own.dtype} in the model (cast the model first, by "
                f"model.to({t.dtype}), if it was cast)"
            )


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, Tensor], found: dict[str, Any]) -> None:
    """Loads the tensors, in memory of their own, shared as they were."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if (learning := found.get("gradients")) is not None:  # older files do not say it
        names = set(learning)
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in names)
    state: dict[str, Tensor] = {}
    for name, t in tensors.items():
        form = found["memory_formats"].get(name)
        value = t.clone(memory_format=FORMATS[form][0] if form in FORMATS else torch.contiguous_format)
        own = parameters.get(name)
        # load_state_dict takes a Parameter as it is, so that several names get the same one.
        state[name] = value if own is None else nn.Parameter(value, own.requires_grad)
    for name, source in found["shared"].items():
        state[name] = state[source]
    model.load_state_dict(state, assign=True)
    for name, own in parameters.items():
        parent, _, key = name.rpartition(".")
        module = model.get_submodule(parent)
        now = module._parameters.get(key)
        if now is not None and now.dtype != own.dtype:  # a quantizer's learned scale, which files hold in fp32
            module._parameters[key] = nn.Parameter(now.to(own.dtype), now.requires_grad)
    empty = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not empty, f"{empty[0]}: has got no values"
