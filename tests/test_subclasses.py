"""A subclass of each layer that has a QAT class: quantized where it calls the parent's forward, else named."""

import copy
import pickle

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.nn import QAT_CLASSES, QATLayer

# By the float class: the arguments of the constructor and those of a call.
SAMPLES = {
    "Linear": ((12, 6), lambda: (torch.randn(4, 12),)),
    "NonDynamicallyQuantizableLinear": ((12, 6), lambda: (torch.randn(4, 12),)),
    "Conv1d": ((4, 6, 3), lambda: (torch.randn(2, 4, 8),)),
    "Conv2d": ((4, 6, 3), lambda: (torch.randn(2, 4, 8, 8),)),
    "Conv3d": ((2, 3, 2), lambda: (torch.randn(2, 2, 4, 4, 4),)),
    "ConvTranspose1d": ((4, 6, 3), lambda: (torch.randn(2, 4, 8),)),
    "ConvTranspose2d": ((4, 6, 3), lambda: (torch.randn(2, 4, 5, 6),)),
    "ConvTranspose3d": ((2, 3, 2), lambda: (torch.randn(2, 2, 4, 4, 4),)),
    "Bilinear": ((8, 7, 4), lambda: (torch.randn(4, 8), torch.randn(4, 7))),
    "Embedding": ((9, 8), lambda: (torch.arange(9),)),
    "EmbeddingBag": ((9, 8), lambda: (torch.arange(9).view(3, 3),)),
    "LSTM": ((8, 6), lambda: (torch.randn(5, 2, 8),)),
    "GRU": ((8, 6), lambda: (torch.randn(5, 2, 8),)),
    "RNN": ((8, 6), lambda: (torch.randn(5, 2, 8),)),
    "LSTMCell": ((8, 6), lambda: (torch.randn(2, 8),)),
    "GRUCell": ((8, 6), lambda: (torch.randn(2, 8),)),
    "RNNCell": ((8, 6), lambda: (torch.randn(2, 8),)),
    "MultiheadAttention": ((8, 2), lambda: (torch.randn(3, 2, 8),) * 3),
    "MatMul": ((), lambda: (torch.randn(4, 8), torch.randn(8, 4))),
    "ScaledDotProductAttention": ((), lambda: (torch.randn(1, 2, 4, 8),) * 3),
    "Add": ((), lambda: (torch.randn(4, 8), torch.randn(4, 8))),
    "Cat": ((), lambda: ([torch.randn(4, 8), torch.randn(4, 8)],)),
}
CONFIG = qk.QConfig(qk.QSpec(4), residual=qk.QSpec())
LAYERS = [kind for kind in QAT_CLASSES if kind.float_class.__name__ != "FloatFunctional"]  # its methods are called
# Their forward runs as it is, with its product quantized: a trial of it decides, not a call of the parent's.
TRIED = {"Linear", "NonDynamicallyQuantizableLinear", "Conv1d", "Conv2d", "Conv3d"}
each_layer = pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.float_class.__name__)


def tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value if item is not None for t in tensors(item)]


def doubled(value, factor: float = 2.0):
    return (
        factor * value if isinstance(value, torch.Tensor) else tuple(doubled(v, factor) for v in value if v is not None)
    )


def subclasses(base: type[nn.Module]) -> dict[str, type[nn.Module]]:
    class Plain(base):
        """Has no forward of its own."""

        note = "kept"

    class Twice(base):
        def forward(self, *args):
            return doubled(super().forward(*args))

    class Old(base):
        """Names its parent as one did in Python 2."""

        def forward(self, *args):
            return doubled(super(Old, self).forward(*args))  # noqa: UP008

    class Again(Twice):
        def forward(self, *args):
            return doubled(super().forward(*args), 0.5)

    class Inherited(Twice):
        """The forward of its parent, in which super() is meant."""

    class More(base):
        """Takes another argument than the layer, with a default."""

        def forward(self, *args, factor=2.0):
            return doubled(super().forward(*args), factor)

    return {kind.__name__: kind for kind in (Plain, Twice, Old, Again, Inherited, More)}


FACTORS = {"Plain": 1.0, "Twice": 2.0, "Old": 2.0, "Again": 1.0, "Inherited": 2.0, "More": 2.0}


def prepared_of(layer: nn.Module, x) -> nn.Module:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, *args, **kwargs):
            return self.layer(*args, **kwargs)

    prepared = qk.prepare(Holder(), CONFIG)
    qk.calibrate(prepared, [x])
    return prepared.eval()


def same(a, b) -> bool:
    return all(torch.equal(t, u) for t, u in zip(tensors(a), tensors(b), strict=True))


@each_layer
@pytest.mark.parametrize("form", FACTORS)
def test_a_subclass_that_calls_its_parent_is_quantized(kind, form) -> None:
    """It computes its own function of what the parent's QAT layer computes, and keeps its class."""
    arguments, call = SAMPLES[kind.float_class.__name__]
    x = call()
    cls = subclasses(kind.float_class)[form]
    layer = cls(*arguments)
    plain = kind.float_class(*arguments)
    plain.load_state_dict(layer.state_dict())
    prepared, parent = prepared_of(layer, x), prepared_of(plain, x)
    made = prepared.layer
    assert isinstance(made, QATLayer)
    assert isinstance(made, cls)
    assert [name for name, _, _ in made.own_quantizers()] == [name for name, _, _ in parent.layer.own_quantizers()]
    with torch.no_grad():
        want = doubled(parent(*x), FACTORS[form])
        assert same(prepared(*x), want)
        assert not same(want, doubled(plain.eval()(*x), FACTORS[form]))
        for other in (copy.deepcopy(made), qk.unprepare(prepared).layer):
            assert isinstance(other, cls)
        converted = qk.convert(prepared)
        for t, u in zip(tensors(converted(*x)), tensors(want), strict=True):
            torch.testing.assert_close(t, u, rtol=1e-5, atol=1e-5 * float(u.abs().max()))


@each_layer
def test_extra_arguments_reach_the_forward(kind) -> None:
    arguments, call = SAMPLES[kind.float_class.__name__]
    x = call()
    prepared = prepared_of(subclasses(kind.float_class)["More"](*arguments), x)
    with torch.no_grad():
        assert same(prepared(*x, factor=6.0), doubled(prepared(*x), 3.0))


@each_layer
def test_a_subclass_that_does_not_call_its_parent_stays_in_float(kind) -> None:
    base = kind.float_class
    arguments, call = SAMPLES[base.__name__]
    x = call()

    class Other(base):
        def forward(self, *args):
            return args[0]

    class Below(Other):
        """Calls a parent that does not call the layer."""

        def forward(self, *args):
            return super().forward(*args)

    for cls in (Other, Below):
        model = nn.Sequential(nn.Linear(2, 2), cls(*arguments))
        words = "does not use its weight in one product" if base.__name__ in TRIED else "does not call that of"
        with pytest.warns(UserWarning, match=rf"stay in float: 1 \(the forward of {cls.__name__} {words}"):
            prepared = qk.prepare(model, CONFIG)
        assert type(prepared[1]) is cls
        assert same(prepared[1](*x), x[0])


def test_a_subclass_of_float_functional() -> None:
    """Its methods are called, not its forward."""

    class Twice(torch.ao.nn.quantized.FloatFunctional):
        def add(self, x, y):
            return 2 * super().add(x, y)

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.functional = Twice()

        def forward(self, x, y):
            return self.functional.add(x, y)

    x, y = torch.randn(4, 8), torch.randn(4, 8)
    prepared = qk.prepare(Sum(), qk.QConfig(residual=qk.QSpec(4)))
    qk.calibrate(prepared, [(x, y)])
    made = prepared.eval().functional
    assert isinstance(made, Twice)
    assert torch.equal(prepared(x, y), 2 * made.output_fake_quant(x + y))
    assert not torch.equal(prepared(x, y), 2 * (x + y))


class OfLSTM(nn.LSTM):
    def forward(self, input, hx=None, *, factor=2.0):
        y, state = super().forward(input, hx)
        return factor * y, state


class OfEmbedding(nn.Embedding):
    def forward(self, input):
        return super().forward(input) + 1


@pytest.mark.parametrize(
    ("cls", "arguments", "x"), [(OfLSTM, (8, 6), torch.randn(5, 2, 8)), (OfEmbedding, (9, 8), torch.arange(9))]
)
def test_a_subclass_can_be_pickled(cls, arguments, x) -> None:
    prepared = qk.prepare(cls(*arguments), CONFIG)
    qk.calibrate(prepared, [x])
    again = pickle.loads(pickle.dumps(prepared.eval()))
    assert isinstance(again, cls)
    assert same(again(x), prepared(x))
