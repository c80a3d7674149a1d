"""int8_program as a whole: batches, threads, NaN, constants that change, and plans that it refuses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from compare import same
from program_plans import Plan
from torch import Tensor

import qkernels.ops  # noqa: F401  defines the ops
from qkernels.reference import int8_program as reference

pytestmark = pytest.mark.sanitized


def run(plan: Plan, *inputs: Tensor) -> list[Tensor]:
    return torch.ops.qkernels.int8_program(list(inputs), plan.constants, plan.text)


def network() -> Plan:
    """Two branches that are added, a concatenation, a gate, pools and a linear layer; outputs of every origin."""
    plan = Plan()
    image, features = plan.input(), plan.input()
    q, other = plan.quantizer(0.03, 5), plan.quantizer(0.04, -128)
    x = plan.codes("conv", q, **plan.conv(plan.quantize(image, q), 4, 16, (1, 3, 3), padding=(0, 1, 1)), first="relu")
    x = plan.move("max_pool", x, kernel=(1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
    branch = plan.codes("conv", other, **plan.conv(x, 16, 24, (1, 3, 3), padding=(0, 1, 1)), first="relu")
    short, _ = plan.keep("conv", None, **plan.conv(x, 16, 16))
    y, codes = plan.keep(
        "conv", other, True, **plan.conv(branch, 24, 16, (1, 3, 3), padding=(0, 1, 1)), residual=short, second="relu"
    )
    joined = plan.name("q")
    plan.add("cat", out=joined, xs=[branch, str(codes), branch])
    gate = plan.floats(
        "linear", **plan.conv(plan.codes("mean", q, x=y, keep=0), 16, 64, step="linear"), first="sigmoid"
    )
    gated, gated_codes = plan.keep("binary", other, True, kind="mul", a=joined, b=gate)
    pooled = plan.codes("adaptive_avg_pool", q, x=gated, size=(1, 2, 2))
    flat = plan.move("flatten", pooled)
    head = plan.floats("linear", **plan.conv(flat, 256, 10, step="linear"))
    shifted = plan.floats("binary", kind="add", a=head, b=features)
    for value in (str(y), str(gated), head, shifted, head):
        plan.output(value)
    plan.output(plan.move("dequantize", str(gated_codes), "f"), channels_last=False)
    plan.output(image)
    return plan


@pytest.mark.parametrize("size", [1, 3, 7])
def test_sums_on_their_terms(size: int) -> None:
    """Each sum of a stream of floats may lie on its last term; the first one is read again."""
    plan = Plan()
    x = plan.input()
    q = plan.quantizer(0.05, 3)
    codes = plan.quantize(x, q)
    stream = first = plan.floats("conv", **plan.conv(codes, 20, 40))
    for _ in range(3):
        sums, codes = plan.keep("conv", q, True, **plan.conv(codes, 20 if stream == first else 40, 40),
                                residual=stream, second="relu")  # fmt: skip
        stream = str(sums)
    plan.output(plan.floats("binary", kind="add", a=stream, b=first))
    plan.output(plan.move("dequantize", str(codes), "f"))
    image = torch.randn(3, 20, size, size)
    for one, other in zip(run(plan, image), reference.int8_program([image], plan.constants, plan.text), strict=True):
        same(one, other)


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 4, 13, 11), torch.randn(batch, 10)


def close(got: list[Tensor], want: list[Tensor]) -> None:
    """The mean adds up in another order than torch's."""
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_network(channels_last: bool) -> None:
    plan = network()
    for batch in (0, 1, 3, 5):
        image, features = inputs(batch)
        if channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        close(run(plan, image, features), reference.int8_program([image, features], plan.constants, plan.text))


def test_images_do_not_depend_on_their_batch() -> None:
    """One by one, some at a time on each thread, and all threads on each step."""
    plan = network()
    image, features = inputs(29)
    torch.set_num_threads(1)
    want = [
        torch.cat(parts)
        for parts in zip(*(run(plan, image[i : i + 1], features[i : i + 1]) for i in range(29)), strict=True)
    ]
    for threads in (1, 2, 3, 8, 30, 64):
        torch.set_num_threads(threads)
        same(run(plan, image, features), want)


def test_large_images_on_several_threads() -> None:
    plan = network()
    image, features = torch.randn(3, 4, 190, 170), torch.randn(3, 10)
    torch.set_num_threads(1)
    want = run(plan, image, features)
    for threads in (2, 4):
        torch.set_num_threads(threads)
        same(run(plan, image, features), want)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("threads", [1, 2, 8])
def test_nan_fills_its_image(which: int, threads: int) -> None:
    plan = network()
    torch.set_num_threads(threads)
    values = inputs(5)
    clean = run(plan, *values)
    values[which].view(5, -1)[3, -1] = torch.nan
    for got, want in zip(run(plan, *values), clean, strict=True):
        assert got[3].isnan().all()
        same(got[[0, 1, 2, 4]], want[[0, 1, 2, 4]])


def test_nan_in_an_input_that_nothing_reads() -> None:
    plan = Plan()
    x = plan.input()
    plan.input()
    plan.output(x)
    values = torch.randn(2, 3), torch.tensor([[1.0], [torch.nan]])
    got = run(plan, *values)
    same(got, reference.int8_program(values, plan.constants, plan.text))
    assert got[0][1].isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_constants_that_are_not_finite(value: float) -> None:
    plan = network()
    values = inputs(3)
    clean = run(plan, *values)
    for at, constant in enumerate(plan.constants):
        if not constant.is_floating_point():
            continue
        kept = constant.clone()
        constant.view(-1)[-1] = value
        assert all(y.isnan().all() for y in run(plan, *values)), at
        constant.copy_(kept)
        same(run(plan, *values), clean)  # constants are read at each call


@pytest.mark.parametrize("value", [-0.5, 0.0])
def test_odd_scales(value: float) -> None:
    plan = Plan()
    plan.output(plan.move("dequantize", plan.quantize(plan.input(), plan.quantizer(value, 3)), "f"))
    x = torch.randn(2, 7)
    same(run(plan, x), reference.int8_program([x], plan.constants, plan.text))


def test_threads_call_one_plan_at_once() -> None:
    large = torch.randn(1, 4, 190, 170), torch.randn(1, 10)  # all its steps are one parallel region
    plan, values = network(), [large, *(inputs(batch) for batch in (2, 5))]
    want = [run(plan, *value) for value in values]

    def call(i: int) -> None:
        torch.set_num_threads(1 + i % 4)
        same(run(plan, *values[i % 3]), want[i % 3])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(60)))


def test_more_plans_and_sizes_than_are_kept() -> None:
    for round_ in range(2):
        for i in range(70):
            plan = Plan()
            plan.output(plan.floats("activate", x=plan.input(), first=f"clamp:-{i}.0:{i}.0"))
            for size in range(1, 20 if i == round_ else 3):
                x = torch.randn(2, 3, size) * 100
                same(run(plan, x), [x.clamp(-i, i)])


# What is wrong with a plan, and what the error says.
START = "quantizer id=0 scale=0 low=-128 high=127\ninput out=f0 index=0\nquantize out=q0 x=f0 q=0\n"
CONV = "conv x=q0 data=1 colsum=2 scale=3 in=4 out_channels=5 kernel=1,3,3 stride=1,1,1 padding=0,1,1 out=f1"
MALFORMED = {
    "blur x=f0": "line 4: got the step 'blur'; accepted: .*conv",
    "quantize out=q1 x=f9 q=0": r"line 4 \(quantize\): x: got 'f9'; accepted: a value that an earlier line makes",
    "quantize out=q1 x=q0 q=0": "x: got the codes 'q0'; accepted: floats",
    "quantize out=f1 x=f0 q=0": "out: got 'f1'; accepted: q and a number, since it holds codes",
    "quantize out=q0 x=f0 q=0": "out: got 'q0', which an earlier line makes; accepted: a new name",
    "quantize out=q1 x=f0 q=3": "q: got '3'; accepted: a quantizer of an earlier line",
    "quantize out=q1 x=f0 q=0 shape=3": "got the key 'shape'; accepted: a key of this step",
    "quantize out=q1 x=f0": "got no q; accepted: q=…",
    "quantize out=q1 x=f0 x=f0 q=0": "x: got two values; accepted: one",
    "quantize out=q1 x": "got 'x'; accepted: key=value",
    "dequantize out=f1 x=f0": "x: got the floats 'f0'; accepted: codes",
    "activate x=f0 first=relu": "got neither out nor codes; accepted: one, or both",
    "activate out=f1 x=f0 first=softsign": "first: got 'softsign'; accepted: relu, clamp:low:high",
    "activate out=f1 x=f0 first=clamp:0.0": "first: got 'clamp:0.0'",
    "binary kind=div out=f1 a=f0 b=f0": "kind: got 'div'; accepted: add, sub, mul",
    "max_pool out=q1 x=q0 kernel=3,3 stride=1,1,1": "kernel: got '3,3'; accepted: 3 integers",
    "max_pool out=q1 x=q0 kernel=1,3,0 stride=1,1,1": "kernel: got '1,3,0'; accepted: 3 integers",
    "max_pool out=q1 x=q0 kernel=1,3,3 stride=1,1,1 padding=0,2,0": "padding: got 2; accepted: at most half",
    "max_pool out=q1 x=q0 kernel=1,9,9 stride=1,1,1": "x: got a padded side of 6; accepted: .* 9",
    "cat out=f1 xs=f0,q0": "xs: got 'f0,q0'; accepted: all floats, or all codes of one quantizer",
    "slice out=q1 x=q0 begin=2 end=2": "end: got '2'; accepted: an integer from 3",
    "slice out=q1 x=q0 begin=2 end=5": "end: got 5; accepted: at most x's channels, 4",
    "shuffle out=q1 x=q0 groups=3": "groups: got 3; accepted: a divisor of x's channels, 4",
    "upsample out=q1 x=q0 scale=1,2147483647,2147483647": r"got a value of shape \[N, 4, \d+, \d+\]; accepted: .*2\^40",
    "upsample out=q1 x=q0 size=2147483647,2147483647,4": r"line 4 \(upsample\): got a value of shape",
    f"{CONV} groups=3": "groups: got 3; accepted: a divisor",
    CONV.replace("kernel=1,3,3", "kernel=1,9,1"): "x: got padded height 8; accepted: at least the dilated kernel's, 9",
    CONV.replace("padding=0,1,1", "padding=0,2000000000,2000000000"): r"got a value of shape \[N, .*2\^40",
    CONV.replace("in=4", "in=8"): "x: got 4 channels; accepted: 8",
    CONV.replace("data=1", "data=2"): "data: got constant 2, torch.int32 of shape .*; accepted: contiguous torch.int8",
    CONV.replace("data=1", "data=9"): "data: got constant 9; accepted: below 4",
    CONV.replace("scale=3", "scale=0"): "scale: got constant 0, .*; accepted: contiguous torch.float32 with 5 elements",
    f"{CONV} residual=f0": r"residual: got \[N, 4, 6, 6\]; accepted: the output's shape \[N, 5, 6, 6\]",
    "batch_norm out=f1 x=f0 mean=3 var=3 eps=1e-05": "mean: got constant 3, .* with 4 elements",
    "output x=f0 index=1": "got no output with index 0; accepted: every index from 0 on",
    "output x=f0 index=0\noutput x=f0 index=0": "index: got 0, which an earlier line gives",
    "output x=f0 index=0 channels_last=yes": "channels_last: got 'yes'; accepted: input",
    "input out=f1 index=0": "index: got 0, which an earlier line takes; accepted: each input once",
    "input out=f1 index=2": "inputs: got 1 tensors; accepted: 3",
    "equal a=0 b=3": "b: got constant 3, .* with 1 elements",
    "quantizer id=0 scale=0 low=-128 high=127": "id: got 0, which an earlier line defines",
    "quantizer id=1 scale=0 low=-129 high=127": "low: got '-129'",
    "quantizer id=1 scale=0 low=5 high=5": "high: got '5'; accepted: an integer from 6 to 127",
    "quantizer id=1 scale=0 zero_point=4 low=0 high=127": "constant 4; accepted: below 4",
}


@pytest.mark.parametrize("line", MALFORMED)
def test_malformed_plans_are_refused_by_line(line: str) -> None:
    constants = [
        torch.tensor(0.1),
        torch.zeros(1152, dtype=torch.int8),
        torch.zeros(5, dtype=torch.int32),
        torch.ones(5),
    ]
    with pytest.raises(RuntimeError, match=MALFORMED[line]):
        torch.ops.qkernels.int8_program([torch.randn(2, 4, 6, 6)], constants, START + line)


BAD_CALLS: dict[str, tuple[list[Tensor], str]] = {
    "no input": ([], "inputs: got none; accepted: at least one tensor"),
    "one input": ([torch.ones(2, 4)], "inputs: got 1 tensors; accepted: 2, as the plan reads input 1"),
    "dtype": ([torch.ones(2, 4), torch.ones(2, 4).double()], r"inputs\[1\]: got torch.float64 of shape \[2, 4\]"),
    "rank": ([torch.ones(4), torch.ones(2, 4)], r"inputs\[0\]: got torch.float32 of shape \[4\]"),
    "images": ([torch.ones(2, 4), torch.ones(3, 4)], r"inputs\[1\]: got 3 images; accepted: .* 2"),
    "shapes": ([torch.ones(2, 4, 6), torch.ones(2, 4, 5)], r"a, b: got \[N, 4, 6\] and \[N, 4, 5\]"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_refused(case: str) -> None:
    plan = Plan()
    plan.quantizer()
    plan.output(plan.floats("binary", kind="add", a=plan.input(), b=plan.input()))
    inputs_, message = BAD_CALLS[case]
    with pytest.raises(RuntimeError, match=message):
        run(plan, *inputs_)


def test_quantizers_that_are_not_equal_any_more() -> None:
    plan = Plan()
    q = plan.quantizer(0.1, 3), plan.quantizer(0.1, 3)
    plan.add("equal", a=0, b=2)
    plan.add("equal", a=1, b=3)
    plan.output(plan.move("dequantize", plan.quantize(plan.input(), q[0]), "f"))
    x = torch.randn(2, 3)
    run(plan, x)
    for at in (0, 1):
        plan.constants[at] += 1
        with pytest.raises(RuntimeError, match="differ; accepted: equal ones"):
            run(plan, x)
        plan.constants[at] -= 1


def test_parts_of_a_concatenation_are_written_in_place() -> None:
    """Nested, shared by two concatenations, viewed, read through borders of their own, taken from inputs, given out."""
    plan = Plan()
    image = plan.input()
    q = plan.quantizer(0.03, 5)
    x = plan.quantize(image, q)
    geometry = {"kernel": (1, 3, 3), "padding": (0, 1, 1)}
    parts = [plan.codes("conv", q, **plan.conv(x, 8, c, **geometry)) for c in (5, 33, 16)]
    pool = plan.move("max_pool", parts[1], kernel=(1, 3, 3), stride=(1, 1, 1), padding=(0, 1, 1))

    def cat(*xs: str) -> str:
        plan.add("cat", out=(out := plan.name(xs[0][0])), xs=xs)
        return out

    inner = cat(parts[0], pool, x)
    outer = cat(parts[2], inner, plan.move("shuffle", parts[2], groups=4))
    twice = cat(parts[0], inner, plan.move("slice", outer, begin=3, end=30))
    for y in (parts[0], parts[2], inner, outer, twice):
        plan.output(plan.move("dequantize", y, "f"))
    for y, channels in ((parts[0], 4), (inner, 44), (outer, 76), (twice, 76)):
        part = plan.move("slice", y, begin=0, end=channels)
        plan.output(plan.floats("conv", **plan.conv(part, channels, 7, **geometry)))
    floats = [plan.floats("conv", **plan.conv(x, 8, c, **geometry), first="silu") for c in (3, 20)]
    joined = cat(floats[0], image, floats[1], plan.floats("activate", x=image, first="relu"))
    for y in (joined, floats[0], image):
        plan.output(y)
    for value in (torch.randn(3, 8, 7, 9), torch.randn(2, 8, 5, 4).contiguous(memory_format=torch.channels_last)):
        same(run(plan, value), reference.int8_program([value], plan.constants, plan.text))
