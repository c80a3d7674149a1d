"""Every model of wild_models.py all the way: prepared, calibrated, trained, converted, saved, and back to float."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from wild_case import Wild
from wild_models import WILD

import qkernels as qk
from qkernels.nn import FakeQuantize

# Of the largest output: a code of a later layer that falls on the other side of a tie changes an output by a step of
# that layer's input, which is 1/255 of its range. All other outputs are equal to the rounding of the last float sum.
LARGEST, USUAL = 2e-2, 1e-5
NARROW = [name for name, case in WILD.items() if case.narrow]

pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections:UserWarning",
    "ignore:enable_nested_tensor is True:UserWarning",
    "ignore:The PyTorch API of nested tensors:UserWarning",
)


@pytest.mark.parametrize("name", WILD)
def test_8_bits(name: str, tmp_path: Path) -> None:
    all_the_way(WILD[name], 8, tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", NARROW)
def test_weights_of_4_bits(name: str, tmp_path: Path) -> None:
    all_the_way(WILD[name], 4, tmp_path / "model.safetensors")


def all_the_way(case: Wild, bits: int, file: Path) -> None:
    model, inputs = case.make(), case.inputs()
    for norm in model.modules():
        if isinstance(norm, BatchNorm):  # a trained one has factors of both signs, which a convolution takes over
            with torch.no_grad():
                norm.weight[::2].neg_()
    before = [(name, kind_of(module)) for name, module in model.named_modules()]
    state = state_of(model)
    prepared = made(model, case, bits)
    assert_holds(model, state)
    assert_holds(prepared, state)
    reach(prepared, inputs, case)
    state = state_of(prepared)
    qk.report(prepared)
    assert_holds(prepared, state)
    train(prepared, inputs, case)
    prepared.eval()

    expected = outputs(prepared, inputs)
    converted = qk.convert(prepared)
    y = outputs(converted, inputs)
    assert_close(y, expected)
    exact = qk.exact(prepared)
    with torch.no_grad():
        assert equal(list(tensors(exact(*inputs))), y)
    assert_saved(converted, case, bits, inputs, y)
    for stage in (prepared, converted):
        assert_comes_back(stage, case, inputs, outputs(stage, inputs), file)

    back = qk.unprepare(prepared)
    assert [(name, kind_of(module)) for name, module in back.named_modules()] == before
    assert list(back.state_dict()) == list(model.state_dict())
    assert not equal(outputs(back, inputs), expected)
    for stage in (prepared, converted):
        assert_reported(qk.report(stage, inputs, float_model=back), model, case, bits)


def made(model: nn.Module, case: Wild, bits: int) -> nn.Module:
    """Prepared; the warning names the layers that stay in float, and no others."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepared = qk.prepare(model, case.config(bits))
    said = " ".join(str(warning.message) for warning in caught if "prepare:" in str(warning.message))
    assert bool(said) == bool(case.floats), said
    assert all((name or "(model)") in said for name in case.floats), said
    return prepared


def reach(prepared: nn.Module, inputs: tuple[Any, ...], case: Wild) -> None:
    """Calibrates; what no batch reaches is named, and gets a range all the same."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qk.calibrate(prepared, [inputs], fallback=4.0 if case.idle else None)
    said = " ".join(str(warning.message) for warning in caught if "calibrate:" in str(warning.message))
    assert bool(said) == bool(case.idle), said
    assert all(name in said for name in case.idle), said


def train(prepared: nn.Module, inputs: tuple[Any, ...], case: Wild) -> None:
    """Three steps towards a fixed target: the loss falls, and everything that takes part gets a gradient."""
    prepared.train()
    optimizer = torch.optim.Adam(qk.parameter_groups(prepared, lr=2e-3))
    targets = [torch.randn_like(t) for t in tensors(prepared(*inputs))]

    def loss() -> torch.Tensor:
        found = list(tensors(prepared(*inputs)))
        return sum(((y - target).square().mean() for y, target in zip(found, targets, strict=True)), torch.zeros(()))

    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(loss())
        losses[-1].backward()
        optimizer.step()
    with torch.no_grad():
        losses.append(loss())
    assert all(value.isfinite() for value in losses)
    assert losses[-1] < losses[0], losses

    quantized = {id(q.log_scale) for q in prepared.modules() if isinstance(q, FakeQuantize) and q.quantizer == "lsq"}
    scales = 0
    for name, parameter in prepared.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            assert part_of(name, case.idle), f"{name} has no gradient"
            continue
        assert not part_of(name, case.idle), f"{name} has a gradient"
        assert parameter.grad.isfinite().all(), name
        scales += id(parameter) in quantized
        if parameter.dim() > 1 and id(parameter) not in quantized:
            assert parameter.grad.count_nonzero(), f"the gradient of {name} is zero"
    assert scales >= 1


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    errors = []
    for y, target in zip(found, expected, strict=True):
        assert y.dtype == target.dtype
        assert y.shape == target.shape
        errors.append(((y - target).abs() / target.abs().max()).flatten())
    error = torch.cat(errors)
    assert error.max() <= LARGEST
    assert (error > USUAL).double().mean() < 0.5


def assert_saved(
    converted: nn.Module, case: Wild, bits: int, inputs: tuple[Any, ...], expected: list[torch.Tensor]
) -> None:
    """The file of the state fills a model that was converted from other weights; that of the model holds it whole."""
    twin = made(case.make(), case, bits)
    reach(twin, case.inputs(), case)
    twin = qk.convert(twin)
    assert not equal(outputs(twin, inputs), expected)
    file = io.BytesIO()
    torch.save(converted.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file))
    assert equal(outputs(twin, inputs), expected)

    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    assert equal(outputs(torch.load(file, weights_only=False), inputs), expected)


def assert_comes_back(
    model: nn.Module, case: Wild, inputs: tuple[Any, ...], expected: list[torch.Tensor], file: Path
) -> None:
    """The file of qk.save and a new float model make the same model."""
    qk.save(model, file)
    loaded = qk.load(file, case.make().eval())
    assert [kind_of(module) for module in loaded.modules()] == [kind_of(module) for module in model.modules()]
    assert_holds(loaded, state_of(model))
    assert equal(outputs(loaded, inputs), expected)


def assert_reported(report: qk.qat.Report, model: nn.Module, case: Wild, bits: int) -> None:
    """A row for every layer with weights; those in float have a note, and are those that the case names."""
    rows = {row.name: row for row in report.layers}
    assert {name for name, p in owners(model) if p.dim() > 1 and p.is_floating_point()} <= set(rows)
    burnt = {name for name, note in report.notes.items() if note.startswith("float weights that hold quantized values")}
    assert {name for name, row in rows.items() if row.weight_bits is None} - burnt == set(case.floats)
    assert set(case.floats) <= set(report.notes)
    for name, row in rows.items():
        assert row.weight_bits == bits or name in case.floats or name in burnt
        assert row.weight_sqnr is None or row.weight_sqnr > (35 if bits == 8 else 9), row
        never = report.notes.get(name, "").startswith("nothing called it")
        assert never == (part_of(name, case.idle) and name not in burnt), report.notes


def part_of(name: str, modules: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters with the module that a report counts them to: what a parametrization keeps counts to its layer."""
    for name, parameter in model.named_parameters():
        yield name.partition("parametrizations.")[0].rpartition(".")[0], parameter


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_holds(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    found = model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[torch.Tensor]:
    model.eval()
    with torch.no_grad():
        return list(tensors(model(*copy.deepcopy(inputs))))


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The floating tensors in a result, in order."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
        return
    for item in value.values() if isinstance(value, Mapping) else value:
        yield from tensors(item)


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def kind_of(module: nn.Module) -> type[nn.Module] | str:
    """torch makes a class for each parametrized instance: of a copy it is another one, of the same name."""
    kind = type(module)
    return kind.__name__ if kind.__name__.startswith("Parametrized") else kind
