"""calibrate in two processes: the same scales in both, those of one process that saw all batches."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import qkernels as qk
from qkernels.qat.calibrate import METHODS

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


class Experts(nn.Module):
    """The sign of a batch's sum decides which expert runs; ``none`` never does.

    DistributedDataParallel sends the buffers of ``norm`` in the first forward pass, in which all ranks must take part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.stem = nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.positive, self.negative, self.none = nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        return self.positive(y) if x.sum() > 0 else self.negative(y)


CONFIG = qk.QConfig(
    qk.QSpec(4, symmetric=False),
    qk.QSpec(8, symmetric=False, quantizer="minmax"),
    rules=[("stem", {"input": {"bits": 3}})],
)


def model_and_batches() -> tuple[nn.Module, list[list[Tensor]]]:
    """Two batches for rank 0, all positive, three of other sizes for rank 1, of which one reaches ``negative``."""
    torch.manual_seed(0)
    model = qk.prepare(Experts().eval(), CONFIG)
    tails = torch.distributions.StudentT(4)
    first = [tails.sample((rows, 6)).abs() for rows in (30, 50)]
    second = [tails.sample((20, 6)).abs() * 3, -tails.sample((10, 6)).abs(), tails.sample((64, 6)).abs()]
    return model, [first, second]


def quantizers_of(model: nn.Module) -> dict[str, Tensor]:
    parts = ("scale", "zero_point", "magnitude", "start", "calibrated")
    return {key: value.detach().clone() for key, value in model.state_dict().items() if key.rpartition(".")[2] in parts}


def calibrated(model: nn.Module, batches: Any, **options: Any) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qk.calibrate(model, batches, **options)
    return quantizers_of(model)


def refused(model: nn.Module, batches: Any, **options: Any) -> tuple[str, bool]:
    """The error, and whether the scales stayed."""
    before = quantizers_of(model)
    text = "no error"
    try:
        qk.calibrate(model, batches, **options)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    after = quantizers_of(model)
    return text, all(torch.equal(before[key].nan_to_num(7), after[key].nan_to_num(7)) for key in before)


def work(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/rendezvous")
    model, parts = model_and_batches()
    mine = parts[rank]
    found: dict[str, Any] = {method: calibrated(model, iter(mine), method=method) for method in METHODS}
    found["none on rank 1"] = calibrated(model, [] if rank else mine)
    found["fallback"] = calibrated(model, mine, fallback=(-2, 8))
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    found["DistributedDataParallel"] = calibrated(wrapped, [] if rank else mine)
    sharded = copy.deepcopy(model)
    fully_shard(sharded)  # the root alone: both ranks gather all weights at once, whichever expert they call
    qk.calibrate(sharded, mine[:2])
    state = {key: t.full_tensor() if hasattr(t, "full_tensor") else t for key, t in sharded.state_dict().items()}
    found["fully_shard"] = {key: state[key] for key in quantizers_of(model)}
    alone = [dist.new_group([each]) for each in range(2)]
    found["alone"] = calibrated(model, mine, group=alone[rank])
    found["NaN"] = refused(model, [*mine, mine[0] * torch.nan] if rank else mine)
    found["no batches"] = refused(model, None if rank else mine)
    found["no data"] = refused(model, iter(()))
    other = model if rank else qk.prepare(Experts().eval(), qk.QConfig(rules=[("none", None)]))
    found["other model"] = refused(other, mine)
    found["other group"] = refused(model, mine, group=alone[1 - rank])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("ranks"))
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(2)]


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 0.0) -> None:
    assert got.keys() == expected.keys()
    for key in got:
        torch.testing.assert_close(got[key], expected[key], rtol=rtol, atol=0, equal_nan=True, msg=key)


@pytest.mark.parametrize("method", METHODS)
def test_scales_are_equal_and_those_of_all_batches(method: str, found: list[dict[str, Any]]) -> None:
    assert_equal(found[0][method], found[1][method])
    model, parts = model_and_batches()
    assert not found[0][method]["none.input_fake_quant.calibrated"]
    if method != "moving_average":  # the order of a sum decides its last bits
        assert_equal(found[0][method], calibrated(model, [*parts[0], *parts[1]], method=method), rtol=1e-6)
        return
    averages = []
    for part in parts:
        average = [part[0].min(), part[0].max()]
        for batch in part[1:]:
            average = [a + 0.1 * (b - a) for a, b in zip(average, (batch.min(), batch.max()), strict=True)]
        averages.append(torch.stack(average))
    low, high = torch.stack(averages).mean(0)
    expected = (high - low.clamp(max=0)) / 7
    torch.testing.assert_close(found[0][method]["stem.input_fake_quant.scale"], expected.view(1))


def test_a_rank_without_batches_gets_the_scales_of_the_other(found: list[dict[str, Any]]) -> None:
    assert_equal(found[0]["none on rank 1"], found[1]["none on rank 1"])
    model, parts = model_and_batches()
    assert_equal(found[0]["none on rank 1"], calibrated(model, parts[0]), rtol=1e-6)


def test_the_fallback_goes_where_no_rank_got_values(found: list[dict[str, Any]]) -> None:
    assert_equal(found[0]["fallback"], found[1]["fallback"])
    for key, value in found[0]["auto"].items():
        if not key.startswith("none.input_fake_quant"):
            assert torch.equal(found[0]["fallback"][key].nan_to_num(7), value.nan_to_num(7)), key
    assert found[0]["fallback"]["none.input_fake_quant.scale"].item() == pytest.approx(10 / 255)


def test_distributed_data_parallel(found: list[dict[str, Any]]) -> None:
    wrapped = [{key.removeprefix("module."): t for key, t in each["DistributedDataParallel"].items()} for each in found]
    assert_equal(wrapped[0], wrapped[1])
    assert_equal(wrapped[0], found[0]["none on rank 1"])


def test_fully_shard(found: list[dict[str, Any]]) -> None:
    assert_equal(found[0]["fully_shard"], found[1]["fully_shard"])
    model, parts = model_and_batches()
    assert_equal(found[0]["fully_shard"], calibrated(model, [*parts[0], *parts[1][:2]]), rtol=1e-6)


def test_a_group_of_one_combines_nothing(found: list[dict[str, Any]]) -> None:
    model, parts = model_and_batches()
    for rank in range(2):
        assert_equal(found[rank]["alone"], calibrated(model, parts[rank]))
    assert not torch.equal(*(each["alone"]["stem.input_fake_quant.scale"] for each in found))


def test_an_error_reaches_every_rank_and_changes_no_scale(found: list[dict[str, Any]]) -> None:
    nan = r"batches[3]: the input of layer 'stem' holds NaN"
    expected = {
        "NaN": (f"RuntimeError: batches: rank 1 failed: Unusable: {nan}", f"Unusable: {nan}"),
        "no batches": (
            "RuntimeError: batches: rank 1 failed: TypeError: batches: got a None",
            "TypeError: batches: got a No",
        ),
        "no data": ("ValueError: batches: got none", "ValueError: batches: got none"),
        "other model": (
            "RuntimeError: model: rank 1 has other quantizers (none.",
            "RuntimeError: model: rank 0 has other",
        ),
        "other group": ("ValueError: group: got one that this process is not in",) * 2,
    }
    for case, texts in expected.items():
        for rank in range(2):
            text, same = found[rank][case]
            assert text.startswith(texts[rank]), (case, rank, text)
            assert same, (case, rank)
