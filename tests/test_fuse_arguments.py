"""Programs for calls with optional arguments: masks, caches of keys, switches, arguments by name."""

from __future__ import annotations

import copy
import enum
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_fuse import made, own, tensors
from test_fuse_transformers import assert_close, assert_ran
from test_fuse_written_out import ids
from torch import Tensor, nn
from written_transformers import Bert, BertBlock, Llama

import qkernels as qk
from qkernels.qat.call_patterns import KINDS
from qkernels.qat.fuse import FusedForward, fused_parts


def own_named(model: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    class Call(nn.Module):
        def forward(self):
            return model(*args, **kwargs)

    holder = Call()
    holder.model = model
    return own(holder)


def counted(part: FusedForward) -> list[int]:
    """How many programs there are for each kind of calls that there was."""
    return [0 if built is None else len(built.parts) for built in part._built.values()]


def padding(batch: int, length: int) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length - 2 :] = 0
    return mask


@pytest.mark.parametrize(("make", "programs"), [(Bert, 4), (Llama, 3)])
def test_masks(make: Any, programs: int) -> None:
    """By position and by name, in every combination; what is padding changes nothing before it."""
    torch.manual_seed(0)
    prepared, converted = made(make(), (ids(3, 9),))
    (part,) = fused_parts(converted).values()
    x, mask = ids(3, 9), padding(3, 9)
    with torch.no_grad():
        for args, kwargs in (
            ((x, mask), {}),
            ((x,), {list(part._arguments.names)[1]: mask}),
            ((x, None), {}),
            ((x,), {}),
        ):
            for got, want, whole in zip(
                tensors(converted(*args, **kwargs)),
                own_named(converted, *args, **kwargs),
                tensors(prepared(*args, **kwargs)),
                strict=True,
            ):
                assert_close(got, want)
                assert_close(got, whole)
            assert_ran(converted)
        assert counted(part) == [programs, programs]  # one kind of calls with a mask, and one without
        other = x.clone()
        other[0, -1] = (x[0, -1] + 1) % 40
        before, after = tensors(converted(x, mask))[0], tensors(converted(other, mask))[0]
        assert torch.equal(before if make is Bert else before[:, :7], after if make is Bert else after[:, :7])
        assert not torch.equal(tensors(converted(x))[0], before)


def test_a_cache_of_keys() -> None:
    """A sequence token by token gives what it gives at once."""
    torch.manual_seed(0)
    _, converted = made(Llama(), (ids(2, 12),))
    (part,) = fused_parts(converted).values()
    x = ids(2, 12)
    with torch.no_grad():
        whole, _ = converted(x)
        steps, past = [], None
        for t in range(x.shape[1]):
            y, past = converted(x[:, t : t + 1], past=past)
            steps.append(y)
        assert_close(torch.cat(steps, 1), whole)
        assert_ran(converted)
        assert counted(part) == [3, 3]
        (got, *_), (want, *_) = tensors(converted(x[:, :1], past=past)), own_named(converted, x[:, :1], past=past)
        assert_close(got, want)


def test_gradients_with_a_mask() -> None:
    torch.manual_seed(0)
    _, converted = made(BertBlock(), (torch.randn(2, 5, 32),))
    apart = copy.deepcopy(converted)
    for module in apart.modules():
        vars(module).pop("forward", None)
    mask, found = torch.randn(2, 1, 1, 5), []
    for model in (converted, apart):
        x, m = torch.linspace(-1, 1, 320).view(2, 5, 32).requires_grad_(), mask.clone().requires_grad_()
        model(x, attention_mask=m).square().sum().backward()
        found.append((x.grad, m.grad, model.out.bias.grad))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert_ran(converted)


class Switched(nn.Module):
    """A switch, a number and an argument by name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, both=True, times=1, *, last=None, kind="relu"):
        x = self.b(self.a(x).relu() if kind == "relu" else self.a(x).sigmoid())
        x = x * times
        if both:
            x = self.c(x.relu())
        return x if last is None else x + last


def test_switches_numbers_and_names() -> None:
    torch.manual_seed(0)
    prepared, converted = made(Switched(), (torch.randn(4, 8),))
    x, last = torch.randn(4, 8), torch.randn(4, 8)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x,), {}), ((x, False), {}), ((x, True, 3), {}), ((x,), {"last": last}), ((x,), {"kind": "sigmoid"}),
        ((), {"x": x, "times": 2.5, "last": None}), ((x, False), {"last": last, "kind": "relu"}),
    ]  # fmt: skip
    with torch.no_grad():
        for args, kwargs in calls + calls[::-1]:
            got, (want,) = converted(*args, **kwargs), own_named(converted, *args, **kwargs)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
            assert_close(got, prepared(*args, **kwargs))
            assert_ran(converted)
    (part,) = fused_parts(converted).values()
    assert min(counted(part)) >= 1
    assert len(counted(part)) == 6


class Mode(str, enum.Enum):
    PLAIN, TWICE = "plain", "twice"


class Named(nn.Module):
    def __init__(self, twice: Callable[[Any], Any]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.last, self.twice = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), twice

    def forward(self, x, name: Any = Mode.PLAIN):
        x = self.first(x)
        return self.last(x * 2 if self.twice(name) else x)


@pytest.mark.parametrize("how", ["==", "in a set", "in a dict"])
def test_texts_of_other_types(how: str) -> None:
    """Members of an Enum are arguments like any other, which a forward cannot decide by while it is traced."""
    torch.manual_seed(0)
    ways: dict[str, Callable[[Any], Any]] = {
        "==": lambda name: name == "twice",
        "in a set": lambda name: name in {"twice", "more"},
        "in a dict": lambda name: {"twice": True}.get(name),
    }
    x = torch.randn(4, 8)
    _, converted = made(Named(ways[how]), (x,))
    with torch.no_grad():
        before = converted(x)
        assert torch.equal(converted(x, Mode.PLAIN), before)
        assert counted(fused_parts(converted)[""]) == [1]
        for name in ("twice", Mode.TWICE, "twice"):
            assert_close(converted(x, name), *own(converted, x, name))
            assert not torch.equal(converted(x, name), before)
    reason = "symbolically traced variables" if how == "==" else "it looks for what it is given in a dict or a set"
    assert (
        f"with name given: {'torch.fx cannot trace its forward (TraceError: ' if how == '==' else ''}{reason}"
        in (qk.report(converted).notes[""])
    )
    assert list(fused_parts(converted)) == ["", "first", "last"]


def test_more_kinds_of_calls_than_are_kept() -> None:
    """The forward then runs as it is written, and the modules inside run programs."""
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    _, converted = made(Named(lambda name: str(name)[-1] in "02468"), (x,))
    whole = fused_parts(converted)[""]
    with torch.no_grad():
        for i in range(3 * KINDS):
            y = converted(x, f"a user's {i}")
            assert_close(y, *own(converted, x, f"a user's {i}"))
            assert (len(fused_parts(converted)) == 1) == (i < KINDS - 1)
        *kinds, more = counted(whole)
        assert (len(kinds), min(kinds), more) == (KINDS, 1, 0)
        assert "more than 16 kinds of calls" in qk.report(converted).notes[""]
        parts = dict(fused_parts(converted))
        assert list(parts) == ["", "first", "last"]
        converted(x, "another")
        assert dict(fused_parts(converted)) == parts
        assert_close(converted(x, "a user's 2"), *own(converted, x, "a user's 2"))


def test_wrong_arguments_are_the_own_forwards_errors() -> None:
    _, converted = made(Switched(), (torch.randn(4, 8),))
    x = torch.randn(4, 8)
    for args, kwargs in (((), {}), ((x, True, 1, x), {}), ((x,), {"mask": x}), ((x,), {"x": x})):
        with pytest.raises(TypeError, match="argument"):
            converted(*args, **kwargs)
    assert converted(x).shape == x.shape


class Decides(Bert):
    """As transformers' BERT extends its mask: by its number of dims, which a trace does not know."""

    def forward(self, input_ids, attention_mask=None):
        if attention_mask is not None and attention_mask.dim() == 3:
            attention_mask = attention_mask[:, 0]
        return super().forward(input_ids, attention_mask)


def test_a_kind_of_calls_that_cannot_be_traced_is_named() -> None:
    """The modules inside then run programs of their own, and calls of other kinds that of the whole."""
    torch.manual_seed(0)
    prepared, converted = made(Decides(), (ids(),))
    x, mask = ids(2, 6), padding(2, 6)
    whole = vars(converted)["forward"]
    with torch.no_grad():
        for _ in range(2):
            got, before = converted(x, mask), dict(fused_parts(converted))
            assert_close(got, *own_named(converted, x, mask))
            assert_close(got, prepared(x, mask))
        assert_close(converted(x, mask[:, None]), got)
        assert "with attention_mask given: torch.fx cannot trace its forward" in qk.report(converted).notes[""]
        assert list(before) == ["", "layers.0", "layers.1"]
        assert [counted(before[name]) for name in list(before)[1:]] == [[2, 2]] * 2
        assert_close(converted(x), *own(converted, x))
        assert converted(x, mask).shape == got.shape
        assert dict(fused_parts(converted)) == before  # nothing is made anew
        assert counted(whole) == [4, 0]


class Store:
    """What a forward may get besides tensors."""

    def __init__(self) -> None:
        self.last: Any = None

    def put(self, y: Any) -> Any:  # tensors have a method of this name
        self.last = y
        return y * 2

    __call__ = put


def set_last(cache: Any, y: Any) -> None:
    cache.last = y


def set_item(cache: Any, y: Any) -> None:
    cache["k"] = y


def set_last_of_one_inside(cache: Any, y: Any) -> None:
    cache[0].last = y


def last(cache: Any) -> Any:
    return cache.last


# What a forward does with what it gets and a tensor; what it gets; the tensor in it; and why no program runs.
KEEPS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[], Any], Callable[[Any], Any], str]] = {
    "append": (lambda cache, y: cache.append(y), list, lambda cache: cache[0], "append of an argument"),
    "update": (lambda cache, y: cache.update(k=y), dict, lambda cache: cache["k"], "update of an argument"),
    "an item": (set_item, dict, lambda cache: cache["k"], "does not support item assignment"),
    "add": (lambda cache, y: cache.add(y), set, lambda cache: next(iter(cache)), "add of an argument"),
    "add inside": (lambda c, y: c[0].add(y), lambda: [set()], lambda c: next(iter(c[0])), "add of an argument"),
    "put": (lambda cache, y: cache.put(y), Store, last, "put of an argument"),
    "put, its result read": (lambda cache, y: y + cache.put(y), Store, last, ""),
    "its result read": (lambda cache, y: y + cache.setdefault("k", y), dict, lambda cache: cache["k"], "setdefault of"),
    "a callback": (lambda cache, y: cache(y), Store, last, "calls an argument"),
    "an attribute": (set_last, Store, last, "sets the attribute last"),
    "setattr": (lambda cache, y: setattr(cache, "last", y), Store, last, "sets the attribute last"),
    "an attribute inside": (set_last_of_one_inside, lambda: [Store()], lambda c: c[0].last, "sets the attribute last"),
}


class Keeps(nn.Module):
    """Hands what lies between its layers to what it gets besides."""

    def __init__(self, keep: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.last, self.keep = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), keep

    def forward(self, x, cache=None):
        y = self.first(x).relu()
        if cache is not None:
            kept = self.keep(cache, y)
            y = y if kept is None else y + 1
        return self.last(y)


class KeepsAlways(Keeps):
    def forward(self, x, cache):
        return super().forward(x, cache)


@pytest.mark.parametrize("kind", [Keeps, KeepsAlways])
@pytest.mark.parametrize("how", KEEPS)
def test_what_a_forward_does_to_other_arguments(how: str, kind: type[Keeps]) -> None:
    """It does it to lists, dicts, sets, objects and functions as ever."""
    torch.manual_seed(0)
    keep, empty, kept, reason = KEEPS[how]
    x = torch.randn(4, 8)
    _, converted = made(kind(keep), (x,) if kind is Keeps else (x, empty()))
    with torch.no_grad():
        for _ in range(2):
            cache, other = empty(), empty()
            y, (want,) = converted(x, cache), own(converted, x, other)
            assert torch.equal(kept(cache), kept(other))
            assert torch.equal(y, want)
    assert reason in qk.report(converted).notes.get("", "")
    assert {"first", "last"} <= {*fused_parts(converted)} or not reason


class ReadsACache(nn.Module):
    """Tensors in a dict and in a list, and one that it overwrites at a position."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, cache, values, at):
        y = self.b(self.a(x).relu())
        values.index_copy_(0, at, y)
        return y + cache["k"] + cache["rest"][1] + values.sum(0, keepdim=True) * at.shape[0], cache["rest"][0]


def test_reads_a_cache_and_overwrites_it() -> None:
    torch.manual_seed(0)
    x, at = torch.randn(2, 8), torch.tensor([3, 1])
    cache = {"k": torch.randn(2, 8), "rest": [torch.randn(2, 8), torch.randn(2, 8)]}
    _, converted = made(ReadsACache(), (x, cache, torch.zeros(4, 8), at))
    with torch.no_grad():
        values, others = torch.zeros(4, 8), torch.zeros(4, 8)
        for got, want in zip(converted(x, cache, values, at), own(converted, x, cache, others, at), strict=True):
            assert_close(got, want)
    assert_close(values, others)
    assert values.any(1).tolist() == [False, True, False, True]
    assert [len(part.plans) for part in fused_parts(converted).values()] == [1]
    assert_ran(converted)


def test_changes_copies_and_files() -> None:
    """A changed module is traced again for each kind of calls; copies and files trace what they are asked for."""
    torch.manual_seed(0)
    _, converted = made(Bert(), (ids(),))
    x, mask = ids(2, 6), padding(2, 6)
    with torch.no_grad():
        before = converted(x, mask)
        for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
            assert torch.equal(other(x, mask), before)
            assert_ran(other)
        converted.layers[1].norm1.variance_epsilon = 0.5
        for args in ((x, mask), (x,)):
            assert_close(converted(*args), *own(converted, *args))
        assert not torch.equal(converted(x, mask), before)
        assert_ran(converted)


def test_threads_with_other_kinds_of_calls() -> None:
    torch.manual_seed(0)
    _, converted = made(Bert(), (ids(),))
    x, mask, results = ids(2, 6), padding(2, 6), dict[int, Tensor]()

    def run(i: int) -> None:
        with torch.no_grad():
            results[i] = converted(x, mask) if i % 2 else converted(x)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        wanted = converted(x), converted(x, mask)
    assert all(torch.equal(results[i], wanted[i % 2]) for i in range(6))
    assert_ran(converted)
