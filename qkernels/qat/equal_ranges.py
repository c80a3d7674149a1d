"""Ranges that follow the data, under ``fully_shard``: every rank takes those of the first one."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..nn.fake_quantize import FakeQuantize


def send_ranges(model: nn.Module, args: Any, output: Any) -> None:
    """A forward hook of a prepared model. It does nothing unless ``fully_shard`` has sharded the model or its parts.

    In training each rank moves the ranges of inputs by its own batch. DistributedDataParallel then sends all buffers of
    its first rank; fully_shard sends none. One broadcast at the root does it for the quantizers that a batch can move.
    All ranks reach it, whichever layers they have called, because the forward pass of a sharded model gathers its
    weights from all of them. It comes after the forward pass, so that evaluation and a checkpoint, to which every rank
    may contribute, find equal ranges.
    """
    if torch.compiler.is_compiling() or not (dist.is_available() and dist.is_initialized()):
        return
    mesh = _mesh_of(model)
    if mesh is None or mesh.size() == 1:
        return
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantize) and module.training]
    moved = [quantizer for quantizer in quantizers if not quantizer.is_weight and quantizer.quantizer != "dynamic"]
    buffers = [t for quantizer in moved for t in quantizer.buffers(recurse=False)]
    if buffers:
        _send(buffers, mesh)


def _send(buffers: list[Tensor], mesh: Any) -> None:
    """The buffers as bytes, in one message for each dim of the mesh: their dtypes differ."""
    message = torch.cat([t.detach().reshape(-1).view(torch.uint8) for t in buffers])
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        dist.broadcast(message, dist.get_global_rank(group, 0), group=group)
    for t, part in zip(buffers, message.split([t.nbytes for t in buffers]), strict=True):
        # .data hides the write from autograd: an earlier forward pass of this step may have saved the tensor.
        t.data.copy_(part.clone().view(t.dtype).view(t.shape))


def _mesh_of(model: nn.Module) -> Any:
    """The mesh over which ``fully_shard`` has sharded the model or its first sharded part; None: it has not.

    Parameters do not tell: while a forward pass runs, those of the root are whole.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever shards has imported it; nobody else needs it
    if fsdp is None or not hasattr(fsdp, "FSDPModule"):
        return None
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            if groups[0] is not None:  # a part without parameters of its own has none
                return groups[0].mesh_info.mesh
    return None


def remove_sending(model: nn.Module) -> None:
    """Takes the hook off, from a model that has no quantizers any more."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if hook is send_ranges:
                del module._forward_hooks[key]
