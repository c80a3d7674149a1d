"""Compiled training loops: their values, and what makes torch.compile compile anew."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.testing
from loop_models import WAYS, after, assert_close, batches_of, loss_of, prepared, state_of, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qkernels as qk


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, **options: object) -> tuple[nn.Module, torch._dynamo.testing.CompileCounterWithBackend]:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, backend=counter, **options), counter  # type: ignore[call-overload,no-any-return]


def values(losses: list[Tensor], model: nn.Module) -> dict[str, Tensor]:
    return {**state_of(model), "losses": torch.stack(losses)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_compiled_loop_of_any_batch_size_is_compiled_once(way: str, bits: int) -> None:
    model = prepared("mlp", way, bits)
    big = batches_of("mlp", 4)
    batches = [x[:size] for x, size in zip(big, (12, 7, 9, 3), strict=True)]
    expected = after(model, batches)
    graph, counter = compiled(model)
    for x in batches:
        torch._dynamo.mark_dynamic(x, 0)
    optimizer = torch.optim.Adam(qk.parameter_groups(model, lr=0.01, weight_decay=0.01))
    losses, counts = [], []
    for x in batches:
        losses += train(model, [x], optimizer, loss=lambda _, x: loss_of(graph, x))
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1], counts
    assert_close(values(losses, model), expected, 1e-4)


def test_a_compiled_convolutional_network_and_transformer_train_as_eager_ones() -> None:
    for name in ("cnn", "transformer"):
        model, batches = prepared(name), batches_of(name)
        if name == "transformer":  # compiled layers that share an input each count it
            qk.freeze_observers(model)
        expected = after(model, batches)
        graph, counter = compiled(model)
        losses = train(model, batches, loss=lambda _, x, graph=graph: loss_of(graph, x))  # type: ignore[misc]
        assert_close(values(losses, model), expected, 1e-3)
        assert counter.frame_count <= 2


def test_checkpointing_within_compiled_code_where_ranges_stay() -> None:
    model, batches = prepared("mlp"), [x.requires_grad_() for x in batches_of("mlp")]
    qk.freeze_observers(model)
    expected = after(model, batches)
    graph, _ = compiled(lambda x: checkpoint(model, x, use_reentrant=False))  # type: ignore[arg-type]
    losses = train(model, batches, loss=lambda _, x: loss_of(graph, x))
    assert_close(values(losses, model), expected, 1e-4)


SCHEDULE = (8, 4, 3, 2)


@pytest.mark.parametrize("way", WAYS)
def test_a_width_that_was_seen_before_is_not_compiled_again(way: str) -> None:
    model, (x,) = prepared("mlp", way), batches_of("mlp", 1)
    eager = copy.deepcopy(model)
    graph, counter = compiled(model)
    counts = []
    for bits in (*SCHEDULE, *SCHEDULE, 8, 4):
        addresses = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
        for each in (model, eager):
            qk.set_bits(each, bits)
            each.zero_grad()
        assert [t.data_ptr() for t in (*model.parameters(), *model.buffers())] == addresses
        loss, expected = loss_of(graph, x), loss_of(eager, x)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        assert_close(state_of(model), state_of(eager), 1e-4)
        counts.append(counter.frame_count)
    assert counts[len(SCHEDULE) - 1] == counts[-1] <= counts[0] + len(SCHEDULE) - 1, counts
