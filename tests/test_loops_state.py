"""Models amid training: copies, files, other processes, and runs that are resumed."""

from __future__ import annotations

import copy
import io
import os
import pickle
from typing import Any

import pytest
import torch
from loop_models import (
    MODELS,
    WAYS,
    after,
    assert_same,
    batches_of,
    loss_of,
    optimizer_of,
    prepared,
    scales_of,
    state_of,
    train,
)
from torch import Tensor, nn


def reloaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


COPIES: dict[str, Any] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": reloaded,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_amid_training_goes_on_alike_and_apart(how: str, way: str) -> None:
    model, batches = prepared("cnn", way, 4), batches_of("cnn")
    train(model, batches[:1])
    model.zero_grad()
    copied = COPIES[how](model)
    before = state_of(model)
    result = after(copied, batches[1:])
    train(copied, batches)
    assert_same(state_of(model), before)
    assert_same(after(model, batches[1:]), result)


def test_a_shallow_copy_shares_every_tensor() -> None:
    model, (x,) = prepared("mlp"), batches_of("mlp", 1)
    shallow = copy.copy(model)
    loss_of(shallow, x).backward()
    assert all(p is q and p.grad is not None for p, q in zip(shallow.parameters(), model.parameters(), strict=True))
    assert all(s is t for s, t in zip(scales_of(shallow), scales_of(model), strict=True))
    layer = copy.copy(model[0])
    assert torch.equal(layer.eval()(x), model[0].eval()(x))
    assert layer.weight_fake_quant is model[0].weight_fake_quant


class Quantized(torch.utils.data.Dataset[Tensor]):
    """Samples as the model's first quantizer makes them, in whichever process reads them."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model.eval(), x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tensor:
        with torch.no_grad():
            return self.model(self.x[i : i + 1])[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers_have_the_model(start: str) -> None:
    model, (x,) = prepared("mlp"), batches_of("mlp", 1)
    loss_of(model, x).backward()  # the parent has used its kernels and its threads
    model.zero_grad()
    data = Quantized(model, x[:4])
    loader = torch.utils.data.DataLoader(data, 2, num_workers=2, multiprocessing_context=start)
    got = torch.cat(list(loader))
    torch.testing.assert_close(got, torch.stack([data[i] for i in range(len(data))]), rtol=0, atol=0)
    if start == "fork":
        expected = after(model.train(), [x])
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 12, num_workers=2)
        assert_same(after(model, (batch for (batch,) in loader)), expected)


def test_a_forked_process_trains_as_its_parent() -> None:
    model, batches = prepared("cnn"), batches_of("cnn")
    train(model, batches[:1])
    expected = torch.stack(train(copy.deepcopy(model), batches))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            losses = torch.stack(train(model, batches))
            os.write(writer, pickle.dumps(losses.tolist()))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        got = pickle.loads(file.read())
    os.waitpid(child, 0)
    assert got == expected.tolist()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_run_resumed_at_any_step_goes_on_bit_for_bit(name: str, way: str, bits: int) -> None:
    model, batches = prepared(name, way, bits), batches_of(name, 7)
    optimizer, saved, losses = optimizer_of(model), {}, []
    for step, x in enumerate(batches):
        if step in (0, 1, 5):
            file = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            saved[step] = file
        losses += train(model, [x], optimizer)
    expected = state_of(model)
    for step, file in saved.items():
        file.seek(0)
        state = torch.load(file)
        resumed = prepared(name, way, bits, seed=step + 1)
        result = resumed.load_state_dict(state["model"], strict=True)
        assert not result.missing_keys
        assert not result.unexpected_keys
        again = optimizer_of(resumed)
        again.load_state_dict(state["optimizer"])
        assert torch.equal(torch.stack(train(resumed, batches[step:], again)), torch.stack(losses[step:]))
        assert_same(state_of(resumed), expected)
