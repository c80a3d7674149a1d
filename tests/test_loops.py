"""Every training loop in one process, by the values that it leaves beside those of the plain loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import lstm_runs_under_autocast
from loop_models import (
    MAKERS,
    MODELS,
    WAYS,
    after,
    assert_close,
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
from torch.utils.checkpoint import checkpoint

import qkernels as qk
from qkernels.nn import FakeQuantize

# Checkpointing. A batch counts once, and what is computed anew has the scale that the forward pass had.


def by_blocks(model: nn.Sequential, x: Tensor, reentrant: bool) -> Tensor:
    half = len(model) // 2
    y = checkpoint(model[:half], x, use_reentrant=reentrant)
    return checkpoint(model[half:], y, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("way", WAYS)
def test_activation_checkpointing_changes_no_bit(way: str, bits: int, reentrant: bool) -> None:
    model, batches = prepared("mlp", way, bits), [x.requires_grad_() for x in batches_of("mlp")]
    expected = after(model, batches)
    whole = lambda m, x: loss_of(lambda x: checkpoint(m, x, use_reentrant=reentrant), x)  # noqa: E731
    assert_same(after(model, batches, loss=whole), expected)
    blocks = lambda m, x: loss_of(lambda x: by_blocks(m, x, reentrant), x)  # noqa: E731
    assert_same(after(model, batches, loss=blocks), expected)


@pytest.mark.parametrize("name", ["cnn", "transformer", "text"])
@pytest.mark.parametrize("way", ["lsq", "ema", "stochastic"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_other_models(name: str, way: str, reentrant: bool) -> None:
    model, batches = prepared(name, way), [x.requires_grad_() for x in batches_of(name)]
    again = lambda m, x: loss_of(lambda x: checkpoint(m, x, use_reentrant=reentrant), x)  # noqa: E731
    got, expected = after(model, batches, loss=again), after(model, batches)
    if name == "cnn":  # torch's BatchNorm counts the second forward pass
        counted = ("running_mean", "running_var", "num_batches_tracked")
        got, expected = ({k: t for k, t in s.items() if not k.endswith(counted)} for s in (got, expected))
    assert_same(got, expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_first_batch_under_checkpointing_starts_the_scales_once(way: str, reentrant: bool) -> None:
    torch.manual_seed(0)
    model = qk.prepare(MAKERS["mlp"](), qk.QConfig(qk.QSpec(4, quantizer=way), qk.QSpec(8, quantizer=way)))
    batches = [x.requires_grad_() for x in batches_of("mlp")]
    again = lambda m, x: loss_of(lambda x: checkpoint(m, x, use_reentrant=reentrant), x)  # noqa: E731
    assert_same(after(model, batches, loss=again), after(model, batches))


# Precision.


@pytest.mark.parametrize(
    ("name", "dtype"),
    # torch's own LSTM does not run in fp16 on a CPU.
    [(n, d) for n in MODELS for d in (torch.bfloat16, torch.float16) if (n, d) != ("text", torch.float16)],
)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    if name == "text" and not lstm_runs_under_autocast(dtype):
        pytest.skip("torch's own LSTM does not run under autocast on this CPU")
    model, batches = prepared(name), batches_of(name)
    expected = after(model, batches)
    optimizer = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, enabled=dtype == torch.float16)
    losses, skipped, i = [], 0, 0
    while i < len(batches):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            y = model(batches[i])
            loss = loss_of(lambda _, y=y: y, batches[i])
        assert y.dtype == dtype
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        finite = all(p.grad.isfinite().all() for p in model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        scaler.step(optimizer)
        scaler.update()
        skipped += not finite
        assert skipped < 25
        if finite:
            losses.append(loss.detach())
            i += 1
    assert not skipped or dtype == torch.float16
    torch.testing.assert_close(torch.stack(losses), expected["losses"], rtol=0.02, atol=0.02)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in scales_of(model))


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_the_grad_scaler_skips_changes_no_parameter(way: str) -> None:
    model = prepared("mlp", way)
    optimizer, scaler = optimizer_of(model), torch.amp.GradScaler("cpu", init_scale=2.0**126)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(model, batches_of("mlp")[0])
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**126
    # Ranges moved in the forward pass, and with a range its zero point.
    kept = [
        torch.equal(p, q) for p, (key, q) in zip(before, model.named_parameters(), strict=True) if "zero" not in key
    ]
    assert all(kept)
    assert all(t.isfinite().all() for t in (*scales_of(model), *model.parameters()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("way", ["lsq", "ema"])
def test_models_of_other_dtypes(name: str, dtype: torch.dtype, way: str) -> None:
    model, batches = prepared(name, way), batches_of(name)
    cast = copy.deepcopy(model).to(dtype)
    losses = torch.stack(train(cast, [x.to(dtype) for x in batches], torch.optim.SGD(cast.parameters(), 0.05)))
    expected = torch.stack(train(model, batches, torch.optim.SGD(model.parameters(), 0.05)))
    tolerance = 1e-3 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(losses.float(), expected, rtol=tolerance, atol=tolerance)
    assert losses[-1] != losses[0]
    assert all(p.dtype == p.grad.dtype == dtype for p in cast.parameters())
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in scales_of(cast))
    assert cast(batches[0].to(dtype)).dtype == dtype


@pytest.mark.parametrize("way", WAYS)
def test_a_cast_amid_training(way: str) -> None:
    """To fp64 and back changes nothing that fp32 can hold; scales stay as they are in any dtype."""
    model, batches = prepared("mlp", way), batches_of("mlp")
    expected = after(model, batches)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    train(model, batches[:1], optimizer)
    before = [t.clone() for t in scales_of(model)]
    model.bfloat16()
    assert all(map(torch.equal, before, scales_of(model)))
    train(model, [x.bfloat16() for x in batches[1:]], torch.optim.SGD(model.parameters(), 0.01))
    assert all(t.dtype == torch.float32 for t in scales_of(model))
    model.float()
    assert torch.isfinite(loss_of(model, batches[0]))
    there = prepared("mlp", way)
    optimizer = optimizer_of(there)
    losses = train(there, batches[:1], optimizer)
    there.double().float()
    losses += train(there, batches[1:], optimizer)
    assert_same({**state_of(there), "losses": torch.stack(losses)}, expected)


# Batches.


@pytest.mark.parametrize("name", ["mlp", "transformer"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", [4, 8])
def test_micro_batches_sum_to_the_batch(name: str, way: str, bits: int) -> None:
    model, (x,) = prepared(name, way, bits), batches_of(name, 1)
    if way == "dynamic":  # a range for each batch would be another function of it
        model = qk.prepare(MAKERS[name](), qk.QConfig(qk.QSpec(bits, quantizer=way), None))
    else:
        qk.freeze_observers(model)
    total = lambda m, x: m(x).square().sum()  # noqa: E731
    joint = copy.deepcopy(model)
    total(joint, x).backward()
    for part in x.split((5, 4, 2, 1)):
        total(model, part).backward()
    assert_close(state_of(model), state_of(joint), 2e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", [4, 8])
def test_batches_of_any_size(way: str, bits: int) -> None:
    """Sizes that change, one sample, and an empty last batch, which leaves no trace."""
    model = prepared("mlp", way, bits)
    x = batches_of("mlp", 1)[0]
    optimizer = optimizer_of(model)
    losses = train(model, [x, x[:5], x[:1], x[:7]], optimizer)
    assert torch.stack(losses).isfinite().all()
    # The range of a weight follows the step that the optimizer has just made, whatever the batch.
    state = {key: t for key, t in state_of(model).items() if not key.endswith(".grad")}
    before = {key: t for key, t in state.items() if "weight_fake_quant." not in key or "log_scale" in key}
    optimizer.zero_grad()
    empty = x[:0].clone().requires_grad_()
    y = model(empty)
    y.square().sum().backward()
    assert y.shape == (0, 5)
    assert empty.grad.shape == empty.shape
    changed = state_of(model)
    assert_same({key: changed[key] for key in before}, before)
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", [4, 8])
def test_an_empty_first_batch_starts_no_scale_and_gives_no_nan(way: str, bits: int) -> None:
    torch.manual_seed(0)
    spec = qk.QSpec(bits, quantizer=way, symmetric=False)
    model, x = qk.prepare(MAKERS["mlp"](), qk.QConfig(spec, spec)), batches_of("mlp", 1)[0]
    expected = after(model, [x])
    empty = x[:0].clone().requires_grad_()
    model(empty).sum().backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    assert_same(after(model, [x]), expected)


# Hooks, averages, optimizers.


def test_hooks_run_and_change_nothing() -> None:
    model, batches = prepared("cnn"), batches_of("cnn")
    expected = after(model, batches)
    seen: dict[str, int] = {}

    def count(kind: str) -> Any:
        def hook(*args: Any) -> None:
            seen[kind] = seen.get(kind, 0) + 1

        return hook

    layers = [layer for layer in model.modules() if isinstance(layer, qk.nn.QATLinear | qk.nn.QATConv2d | FakeQuantize)]
    for layer in layers:
        layer.register_forward_pre_hook(count("forward pre"))
        layer.register_forward_hook(count("forward"))
        if not isinstance(layer, FakeQuantize):
            layer.register_full_backward_pre_hook(count("backward pre"))
            layer.register_full_backward_hook(count("backward"))
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(count("gradient"))
    losses = train(model, batches)
    assert_same({**state_of(model), "losses": torch.stack(losses)}, expected)
    calls = len(batches) * len(layers)
    assert seen["forward"] == seen["forward pre"] == calls
    assert seen["backward"] == seen["backward pre"] == len(batches) * 3
    assert seen["gradient"] == len(batches) * len(list(model.parameters()))


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", [4, 8])
def test_moving_averages_of_the_weights(way: str, bits: int, use_buffers: bool) -> None:
    """The average computes, in eval mode and converted, what a model with its averaged tensors does."""
    model, batches = prepared("mlp", way, bits), batches_of("mlp")
    decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=decay, use_buffers=use_buffers)
    optimizer, states = optimizer_of(model), []
    for x in batches:
        train(model, [x], optimizer)
        average.update_parameters(model)
        states.append({key: t.clone() for key, t in model.named_parameters()})
        last = dict(model.named_buffers())
    expected = states[0]
    for state in states[1:]:
        expected = {key: (0.5 * t.double() + 0.5 * state[key].double()).float() for key, t in expected.items()}
    averaged = average.module
    assert_close(
        {key: p.detach() for key, p in averaged.named_parameters()}, {k: t.detach() for k, t in expected.items()}
    )
    if not use_buffers:
        assert_same(dict(averaged.named_buffers()), {key: t.detach().clone() for key, t in last.items()})
    average.eval()
    with torch.no_grad():
        y = average(batches[0])
        torch.testing.assert_close(y, qk.convert(averaged)(batches[0]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(y, model.eval()(batches[0]), rtol=0.3, atol=0.3)
    restored = copy.deepcopy(average)
    restored.load_state_dict(average.state_dict())
    with torch.no_grad():
        assert torch.equal(restored(batches[0]), y)


OPTIMIZERS: dict[str, Any] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adamw": (torch.optim.AdamW, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adagrad": (torch.optim.Adagrad, {}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_one_by_one_foreach_and_fused(name: str) -> None:
    model, batches = prepared("mlp", bits=4), batches_of("mlp")
    kind, options = OPTIMIZERS[name]
    results = []
    for form in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        if "fused" in form and name == "rmsprop":
            continue
        copied = copy.deepcopy(model)
        optimizer = kind(qk.parameter_groups(copied, lr=0.01, weight_decay=0.01), lr=0.01, **options, **form)
        losses = train(copied, batches, optimizer)
        state = {key: t for key, t in state_of(copied).items() if not key.endswith(".grad")}  # foreach changes them
        results.append({**state, "losses": torch.stack(losses)})
        assert all(p.grad.isfinite().all() for p in copied.parameters())
        assert all(not torch.equal(p, q) for p, q in zip(copied.parameters(), model.parameters(), strict=True))
    for result in results[1:]:
        assert_close(result, results[0], 1e-3)


def test_schedules_act_on_weights_and_scales_and_clipping_counts_both() -> None:
    model, batches = prepared("mlp"), batches_of("mlp", 4)
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 2 else 0.0)
    for i, x in enumerate(batches):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        loss_of(model, x).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        clipped = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        assert norm > 1e-3 > clipped - 1e-6
        assert (norm * clipped / norm - 1e-3).abs() < 1e-5
        optimizer.step()
        schedule.step()
        moved = [
            name for (name, p), old in zip(model.named_parameters(), before, strict=True) if not torch.equal(p, old)
        ]
        assert len(moved) == (len(before) if i < 2 else 0) or (
            i >= 2 and all(name.endswith("zero_point") for name in moved)
        )


def test_parameters_without_a_gradient_stay_and_cost_the_others_nothing() -> None:
    model, (x,) = prepared("mlp"), batches_of("mlp", 1)
    whole = copy.deepcopy(model)
    loss_of(whole, x).backward()
    parts = {"weights": ".weight", "scales": ".log_scale", "zero points": ".zero_point", "first layer": "0."}
    for part, text in parts.items():
        copied = copy.deepcopy(model)
        chosen = [name for name, _ in copied.named_parameters() if text in name or name.startswith(text)]
        for name, p in copied.named_parameters():
            p.requires_grad_(name not in chosen)
        loss_of(copied, x).backward()
        assert chosen, part
        for (name, p), q in zip(copied.named_parameters(), whole.parameters(), strict=True):
            assert (p.grad is None) == (name in chosen), (part, name)
            assert p.grad is None or torch.equal(p.grad, q.grad), (part, name)
        groups = qk.parameter_groups(copied, lr=0.1)
        assert sum(len(group["params"]) for group in groups) == len(list(copied.parameters())) - len(chosen)


# torch.func and inference mode.


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", [4, 8])
def test_functional_gradients(way: str, bits: int) -> None:
    from torch.func import functional_call, grad, jvp, vmap

    model, (x,) = prepared("mlp", way, bits), batches_of("mlp", 1)
    train(model, [x])  # "ema" has a scale now
    model.zero_grad()
    model.eval()
    before = state_of(model)
    parameters = {key: p.detach() for key, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def total(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, (parameters, buffers), (x,)).square().sum()

    def gradients(x: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        found = {key: p.grad.clone() for key, p in model.named_parameters()}
        model.zero_grad()
        return found

    assert_close(grad(total)(parameters, x), gradients(x), 1e-3)
    each = vmap(grad(lambda p, x: total(p, x[None])), (None, 0))(parameters, x)
    for i in range(3):
        assert_close({key: t[i] for key, t in each.items()}, gradients(x[i : i + 1]), 1e-3)
    tangent = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    model(leaf).sum().backward()
    model.zero_grad()
    _, along = jvp(lambda x: functional_call(model, (parameters, buffers), (x,)).sum(), (x,), (tangent,))
    torch.testing.assert_close(along, (leaf.grad * tangent).sum(), rtol=1e-4, atol=1e-4)
    assert_same(state_of(model), before)
    if way == "ema":
        with pytest.raises(RuntimeError, match="x: got a batch of vmap where moving averages are updated in place"):
            vmap(lambda x: functional_call(model.train(), (parameters, buffers), (x[None],)))(x)
        assert_same(state_of(model), before)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", [4, 8])
def test_inference_mode_poisons_no_state(way: str, bits: int) -> None:
    model, batches = prepared("mlp", way, bits), batches_of("mlp")
    expected = after(model, batches)
    optimizer, losses = optimizer_of(model), []
    for x in batches:
        with torch.inference_mode():
            model.eval()(x)
        losses += train(model.train(), [x], optimizer)
    assert_same({**state_of(model), "losses": torch.stack(losses)}, expected)
    with torch.inference_mode():  # what changes tensors of the model
        model(batches[0])
        if way != "dynamic":
            qk.calibrate(model, batches)
        qk.set_bits(model, 5)
        qk.freeze_observers(model)
        qk.freeze_observers(model, False)
    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
    assert torch.stack(train(model, batches)).isfinite().all()
    fresh = qk.prepare(MAKERS["mlp"](), qk.QConfig(qk.QSpec(bits, quantizer=way), qk.QSpec(bits, quantizer=way)))
    with torch.inference_mode():
        fresh(batches[0])  # starts the scales
    assert torch.stack(train(fresh, batches)).isfinite().all()
