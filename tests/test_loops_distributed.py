"""Training on two ranks: equal scales and parameters on both, and the numbers of one process on the joint batch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from loop_models import (
    WAYS,
    assert_close,
    assert_same,
    batches_of,
    loss_of,
    mlp,
    optimizer_of,
    prepared,
    state_of,
    train,
)
from qat_models import config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import qkernels as qk

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

STEPS = 3
MOVING = [("lsq", 4), ("lsq", 8), ("ema", 8), ("minmax", 8), ("dynamic", 8)]
FROZEN = [("cnn", "lsq", 8), ("mlp", "lsq", 4), ("mlp", "ema", 8), ("mlp", "minmax", 8), ("transformer", "lsq", 4)]


class Experts(nn.Module):
    """The sign of a batch's sum decides which expert runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.positive, self.negative = nn.Linear(11, 11), nn.Linear(11, 5), nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        return self.positive(y) if x.sum() > 0 else self.negative(y)


def experts() -> nn.Module:
    torch.manual_seed(0)
    model = qk.prepare(Experts(), config(8))
    qk.calibrate(model, [x * sign for x in batches_of("mlp", 1) for sign in (0.1, -0.1)])
    return model.train()


def frozen_model(name: str, way: str, bits: int) -> nn.Module:
    model = prepared(name, way, bits)
    if way == "ema":
        train(model, [batches_of(name, 1)[0]])
        model.zero_grad()
    qk.freeze_observers(model)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()  # a joint batch has other statistics than its halves
    return model


def joint_batches(name: str) -> list[Tensor]:
    return batches_of(name, STEPS, size=12)


def half(x: Tensor, rank: int) -> Tensor:
    return x[rank * 6 : rank * 6 + 6]


def targets_loss(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A mean over samples, each with a target of its own: the mean of two halves is the mean of the whole."""
    return F.mse_loss(model(x).float(), x.flatten(1)[:, :5].cos())


def sharded(model: nn.Module, blocks: bool = True, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in list(model.children()) if blocks else []:
        if any(True for _ in block.parameters()) and not isinstance(block, nn.ModuleList):
            fully_shard(block, **options)
    return fully_shard(model, **options)


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """``state_of`` with whole tensors, for a model that ``fully_shard`` has sharded."""
    whole = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t  # noqa: E731
    found = {key: whole(t.detach()).clone() for key, t in (*model.named_parameters(), *model.named_buffers())}
    for key, p in model.named_parameters():
        if p.grad is not None:
            found[f"{key}.grad"] = whole(p.grad).clone()
    return found


def stepped(model: nn.Module, batches: list[Tensor], inner: nn.Module | None = None) -> list[Tensor]:
    optimizer = torch.optim.SGD((model if inner is None else inner).parameters(), 0.05)
    return train(model, batches, optimizer, loss=targets_loss)


def work(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # All models before the ranks are joined: calibrate would gather what they see.
    moving = {(way, bits): prepared("mlp", way, bits) for way, bits in MOVING}
    frozen = {case: frozen_model(*case) for case in FROZEN}
    routed, network = experts(), prepared("cnn")
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/rendezvous")
    found: dict[Any, Any] = {}
    mine = batches_of("mlp", STEPS, seed=11 + rank)
    for key, model in moving.items():
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        train(wrapped, mine, optimizer_of(wrapped.module))
        with torch.no_grad():
            wrapped.eval()(mine[0])  # in which the first rank's buffers reach the other
        wrapped.zero_grad()
        found[("ddp", *key)] = state_of(wrapped.module)
        found[("fsdp", *key)] = shard_and_train(copy.deepcopy(model), mine, folder, key)
    for name, way, bits in FROZEN:
        model, batches = frozen[name, way, bits], [half(x, rank) for x in joint_batches(name)]
        inner = copy.deepcopy(model)
        losses = stepped(nn.parallel.DistributedDataParallel(inner), batches)
        found["ddp frozen", name, way, bits] = {**state_of(inner), "losses": torch.stack(losses)}
        inner = sharded(copy.deepcopy(model))
        losses = stepped(inner, batches)
        found["fsdp frozen", name, way, bits] = {**gathered(inner), "losses": torch.stack(losses)}
    accumulated(found, frozen["mlp", "lsq", 4], rank)
    wrapped = nn.parallel.DistributedDataParallel(network)
    train(wrapped, batches_of("cnn", STEPS, seed=rank), optimizer_of(network))
    found["ddp cnn"] = {key: p.detach() for key, p in network.named_parameters()}
    odd_shards(found, moving, routed, mine, rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def shard_and_train(model: nn.Module, mine: list[Tensor], folder: str, key: tuple[str, int]) -> dict[str, Any]:
    """What training leaves, its checkpoints in two forms, and what the model computes then."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = sharded(model)
    train(model, mine, optimizer_of(model))
    model.zero_grad()
    state = gathered(model)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=f"{folder}/{key[0]}{key[1]}")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_model_state_dict(model, options=options)
    with torch.no_grad():
        y = model.eval()(batches_of("mlp", 1)[0])
    return {"state": state, "full": full, "y": y}


def accumulated(found: dict[Any, Any], model: nn.Module, rank: int) -> None:
    """Two batches without an exchange of gradients, and a third with one."""
    batches = [half(x, rank) for x in joint_batches("mlp")]
    inner = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(inner)
    with wrapped.no_sync():
        for x in batches[:-1]:
            targets_loss(wrapped, x).backward()
    targets_loss(wrapped, batches[-1]).backward()
    found["ddp no_sync"] = state_of(inner)
    inner = sharded(copy.deepcopy(model))
    for i, x in enumerate(batches):
        inner.set_requires_gradient_sync(i == len(batches) - 1)  # type: ignore[operator]
        targets_loss(inner, x).backward()
    found["fsdp no_sync"] = gathered(inner)


def odd_shards(
    found: dict[Any, Any], moving: dict[Any, nn.Module], routed: nn.Module, mine: list[Tensor], rank: int
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = sharded(copy.deepcopy(routed), blocks=False)  # both ranks gather all weights at once
    sign = 1 - 2 * rank
    train(model, [x.abs() * sign for x in mine])
    model.zero_grad()
    found["experts"] = gathered(model)
    model = sharded(copy.deepcopy(moving["lsq", 8]))
    found["checkpointed losses"] = torch.stack(
        train(model, mine, loss=lambda m, x: loss_of(lambda x: checkpoint(m, x, use_reentrant=False), x))
    )
    found["checkpointed"] = gathered(model)
    found["plain losses"] = torch.stack(train(sharded(copy.deepcopy(moving["lsq", 8])), mine))
    model = sharded(copy.deepcopy(moving["ema", 8]), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    found["mixed losses"] = torch.stack(train(model, mine))
    found["mixed"] = gathered(model)
    model = sharded(copy.deepcopy(moving["ema", 8]))
    found["mixed expected"] = torch.stack(train(model, mine))
    for shape in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        model = sharded(copy.deepcopy(moving["lsq", 8]), mesh=mesh)
        train(model, mine)
        model.zero_grad()
        found["mesh", shape] = gathered(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("ranks"))
    torch.multiprocessing.spawn(work, (path,), nprocs=2)
    return path


@pytest.fixture(scope="module")
def found(folder: str) -> list[dict[Any, Any]]:
    return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(2)]


def moved(state: dict[str, Tensor], model: nn.Module) -> list[str]:
    """The buffers of quantizers of inputs that differ from those of the model before training."""
    before = state_of(model)
    return [key for key, t in state.items() if "input_fake_quant." in key and not torch.equal(t, before[key])]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize(("way", "bits"), MOVING)
def test_scales_and_parameters_are_equal_on_both_ranks(how: str, way: str, bits: int, found: list[Any]) -> None:
    first, second = (each[how, way, bits] for each in found)
    if how == "fsdp":
        first, second = first["state"], second["state"]
    assert_same(first, second)
    assert (way in ("minmax", "dynamic")) != any("_scale" in key for key in moved(first, prepared("mlp", way, bits)))


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize(("name", "way", "bits"), FROZEN)
def test_two_halves_train_as_the_joint_batch(how: str, name: str, way: str, bits: int, found: list[Any]) -> None:
    model = frozen_model(name, way, bits)
    losses = torch.stack(stepped(model, joint_batches(name)))
    states = [each[f"{how} frozen", name, way, bits] for each in found]
    torch.testing.assert_close((states[0].pop("losses") + states[1].pop("losses")) / 2, losses, rtol=1e-5, atol=1e-6)
    assert_same(*states)
    assert_close(states[0], state_of(model), 1e-4)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_gradients_that_were_not_exchanged_count_in_the_next_exchange(how: str, found: list[Any]) -> None:
    model = frozen_model("mlp", "lsq", 4)
    for x in joint_batches("mlp"):
        targets_loss(model, x).backward()
    for each in found:
        assert_close(each[f"{how} no_sync"], state_of(model), 1e-5)


def test_a_network_with_batch_norm_keeps_equal_parameters(found: list[Any]) -> None:
    assert_same(found[0]["ddp cnn"], found[1]["ddp cnn"])


@pytest.mark.parametrize(("way", "bits"), MOVING)
def test_a_checkpoint_of_two_ranks_loads_in_one_process(way: str, bits: int, found: list[Any], folder: str) -> None:
    import torch.distributed.checkpoint as dcp

    x = batches_of("mlp", 1)[0]
    expected = found[0]["fsdp", way, bits]
    assert torch.equal(expected["y"], found[1]["fsdp", way, bits]["y"])
    assert not found[1]["fsdp", way, bits]["full"]  # torch gives it to the first rank alone
    alone = qk.prepare(mlp(), config(bits, way))
    alone.load_state_dict(expected["full"], strict=True)
    pieces = qk.prepare(mlp(), config(bits, way))
    state = {"model": pieces.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/{way}{bits}")
    pieces.load_state_dict(state["model"], strict=True)
    for model in (alone, pieces):
        assert_same(state_of(model), expected["state"])
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), expected["y"], rtol=1e-5, atol=1e-6)


def test_an_expert_that_one_rank_does_not_call_blocks_nothing(found: list[Any]) -> None:
    # The scale of a weight follows the weight at the next call.
    first, second = ({k: t for k, t in each["experts"].items() if "weight_fake_quant._" not in k} for each in found)
    assert_same(first, second)
    changed = moved(found[0]["experts"], experts())
    assert any(key.startswith("positive.") for key in changed)


def test_checkpointing_under_fully_shard(found: list[Any]) -> None:
    """The first rank computes the same; the other one recomputes with the ranges that it got meanwhile."""
    states = [{key: t for key, t in each["checkpointed"].items() if not key.endswith(".grad")} for each in found]
    assert_same(*states)
    for each in found:
        torch.testing.assert_close(each["checkpointed losses"], each["plain losses"], rtol=0.01, atol=0.01)


def test_mixed_precision_under_fully_shard(found: list[Any]) -> None:
    for each in found:
        torch.testing.assert_close(each["mixed losses"], each["mixed expected"], rtol=0.05, atol=0.05)
        assert all(t.dtype == torch.float32 for key, t in each["mixed"].items() if key.endswith("_scale"))
    buffers = [{key: t for key, t in each["mixed"].items() if "fake_quant." in key} for each in found]
    assert_same(*buffers)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_meshes_of_two_dims(shape: tuple[int, int], found: list[Any]) -> None:
    assert_same(found[0]["mesh", shape], found[1]["mesh", shape])
    for key, t in found[0]["fsdp", "lsq", 8]["state"].items():
        torch.testing.assert_close(found[0]["mesh", shape][key], t, rtol=1e-4, atol=1e-5, msg=key)


assert {way for way, _ in MOVING} == set(WAYS)
