"""What quantization costs in accuracy, and what each method gains: `python -m qkernels bench accuracy`.

Fashion-MNIST, two small CNNs, three seeds; what they train and how: accuracy_runs.py. Each run is written to
bench/results/<device>/<date>-accuracy.json when it is done and not repeated, so the program can be stopped at any time.
`python bench/accuracy_report.py` prints the tables.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accuracy_runs import PLAIN, SHORT_STEPS, STEPS, Qat, Study, accuracy, config
from laps import RESULTS, device_name, machine, record
from torch import nn

import qkernels as qk
from qkernels import demo

Figures = dict[str, float]
Run = Callable[[Study], Figures]
WIDTHS = ((8, 8), (4, 8), (4, 4), (3, 8), (3, 3), (2, 4), (2, 2))
ROUNDINGS: dict[str, Callable[..., object]] = {
    "GPTQ": qk.gptq,
    "AdaRound": functools.partial(qk.adaround, steps=300),
}
CODEBOOKS = {3: ("kmeans",), 4: ("nf4", "kmeans")}  # bits -> quantizers
SECONDS_OF_A_STEP = 0.020  # of QAT on one core of an AMD Zen 3, for the estimate alone


def label(weight: int, given: int) -> str:
    return f"W{weight}A{given}"


def post_training(how: qk.QConfig, rounding: Callable[..., object] | None = None) -> Run:
    return lambda study: {"accuracy": study.post_training(how, rounding)}


def qat(how: qk.QConfig, options: Qat = PLAIN) -> Run:
    return lambda study: {"accuracy": study.qat(how, options)}


def converted(how: qk.QConfig) -> Run:
    def run(study: Study) -> Figures:
        trained, integers = study.converted(how)
        return {"accuracy": trained, "converted": integers}

    return run


def anew(how: qk.QConfig, options: Qat = PLAIN) -> Run:
    """QAT, and then the statistics of the BatchNorms anew."""

    def run(study: Study) -> Figures:
        made = study.prepared(study.half, how)
        before = study.trained(made, options)
        qk.reestimate_bn(made, study.calibration)
        return {"accuracy": accuracy(made, study.data), "running statistics": before}

    return run


def mixed(cost: str, train: bool) -> Run:
    """Widths by ``assign`` that cost what 3 bits everywhere cost."""

    def run(study: Study) -> Figures:
        start = "half" if train else "full"
        plan = study.plan(start, cost)
        made = study.prepared(getattr(study, start), plan.config)
        return {"accuracy": study.trained(made) if train else accuracy(made, study.data), "cost": plan.cost}

    return run


def hybrid(short: bool, all_layers: bool) -> Run:
    """The same widths, with the layers that hold 80 % of the score trained, or all; a whole or a short training."""

    def run(study: Study) -> Figures:
        model = study.full if short else study.half
        found = qk.hybrid(model, study.calibration[:4], study.plan("full" if short else "half", "bits").budget,
                          cost="bits", config=config(8, 8, ends=False))  # fmt: skip
        made = study.prepared(model, found.plan.config) if all_layers else found.model
        value = study.short(made) if short else study.trained(made)
        return {"accuracy": value, "layers trained": len(found.trained)}

    return run


def late(weight: float, count: int) -> Callable[[int], float]:
    """From 0 to the weight by half a cosine behind the first quarter, as the authors of dampening do."""
    begin = count // 4
    return lambda step: weight * (1 - math.cos(math.pi * max(0, step - begin) / (count - begin))) / 2


def dampened(made: nn.Module, count: int, _: Study) -> qk.QuantLoss:
    return qk.QuantLoss(made, dampening=late(0.1, count))


def consistent(made: nn.Module, count: int, _: Study) -> qk.QuantLoss:
    return qk.QuantLoss(made, consistency=1.0)


def distilled(made: nn.Module, count: int, study: Study) -> qk.QuantLoss:
    return qk.QuantLoss(made, distillation=qk.losses.Term(1.0, teacher=study.full, temperature=2.0))


def frozen_late(made: nn.Module, count: int) -> qk.OscillationTracker:
    """The authors' threshold: off in the first quarter, then from 0.1 to 0.011 by half a cosine."""
    begin = count // 4

    def threshold(step: int) -> float | None:
        share = (step - begin) / (count - begin)
        return None if share < 0 else 0.011 + (0.1 - 0.011) * (1 + math.cos(math.pi * share)) / 2

    return qk.OscillationTracker(made, momentum=0.004, threshold=threshold)


def scheduled(pattern: str, width: Callable[[int], Any]) -> Qat:
    """A schedule for the layers between the first and the last."""
    return Qat(others=[lambda made, count: qk.BitSchedule(made, {pattern: width(count)})])


def last_fifth(*freeze: str, **switches: Any) -> Qat:
    """A recipe whose last fifth of the steps is another phase."""

    def recipe(made: nn.Module, count: int) -> qk.Recipe:
        rest = count // 5
        phases = [qk.Phase(steps=count - rest), qk.Phase(steps=rest, freeze=freeze, **switches)]
        found = qk.Recipe(made, phases)
        found.start()
        return found

    return Qat(others=[recipe])


def longer(how: qk.QConfig, *, tuned: bool) -> Run:
    """A short training behind QAT, of the prepared model or of the converted one's scales, biases and norms."""

    def run(study: Study) -> Figures:
        made = study.prepared(study.half, how)
        before = study.trained(made)
        if not tuned:
            return {"accuracy": study.short(made), "before": before}
        tuning = qk.ScaleTuning(qk.convert(made))
        return {"accuracy": study.short(tuning.model, [tuning]), "before": before}

    return run


def behind_float(how: qk.QConfig, qat: Qat = PLAIN) -> Run:
    """A short QAT of the float model of all steps."""

    def run(study: Study) -> Figures:
        made = study.prepared(study.full, how)
        penalty = None if qat.penalty is None else qat.penalty(made, SHORT_STEPS, study)
        return {"accuracy": study.short(made, penalty=penalty)}

    return run


def final_tuning() -> Iterator[tuple[str, str, str, Run]]:
    """The three ways of docs/recipes.md."""
    for widths in ((2, 4), (3, 3), (4, 8), (8, 8)):
        name, how = label(*widths), config(*widths)
        yield "cnn", name, "QAT, frozen grid", qat(how, last_fifth("scales"))
        yield "cnn", name, "QAT, float tail", qat(how, last_fifth("scales", "batch_norm", fake_quant=False))
        yield "cnn", name, "QAT, 100 more steps", longer(how, tuned=False)
        yield "cnn", name, "QAT, 100 steps of its scales", longer(how, tuned=True)


def runs() -> Iterator[tuple[str, str, str, Run]]:
    """Network, widths, method and what to run, one of each for every seed; what answers most comes first."""
    yield "cnn", "float", "float", lambda study: {"accuracy": accuracy(study.full, study.data)}
    for widths in WIDTHS[:-1]:
        yield "cnn", label(*widths), "PTQ", post_training(config(*widths))
        yield "cnn", label(*widths), "QAT", converted(config(*widths))
    for bits, quantizers in CODEBOOKS.items():
        for quantizer in quantizers:
            how = config(bits, 8, quantizer=quantizer)
            yield "cnn", label(bits, 8), f"PTQ, {quantizer}", post_training(how)
    for widths in ((3, 3), (2, 4)):
        how = config(*widths)
        yield "cnn", label(*widths), "PTQ, AdaRound", post_training(how, ROUNDINGS["AdaRound"])
        yield "cnn", label(*widths), "QAT, consistency", qat(how, Qat(consistent))

    name, how = label(3, 8), config(3, 8, ends=False)
    yield "cnn", f"{name} everywhere", "PTQ", post_training(how)
    yield "cnn", f"{name} everywhere", "PTQ, mixed at equal bits", mixed("bits", train=False)
    yield "cnn", f"{name} everywhere", "hybrid of 100 steps", hybrid(short=True, all_layers=False)
    yield "cnn", f"{name} everywhere", "mixed, QAT of 100 steps", hybrid(short=True, all_layers=True)
    yield "cnn", f"{name} everywhere", "QAT", qat(how)
    yield "cnn", f"{name} everywhere", "QAT, mixed at equal bits", mixed("bits", train=True)
    yield "cnn", "W3A3 everywhere", "PTQ", post_training(config(3, 3, ends=False))
    yield "cnn", "W3A3 everywhere", "PTQ, mixed at equal bitops", mixed("bitops", train=False)

    cyclic = scheduled("body.*", lambda n: qk.schedules.cyclic(3, 4, period=n // 8, steps=n))
    yield "cnn", "W4A4", "QAT, cyclic 3 to 4", qat(config(4, 4), cyclic)
    falling = scheduled("body.*weight_fake_quant", lambda n: qk.schedules.progressive(4, 2, steps=n // 2))
    yield "cnn", "W2A4", "QAT, falling 4 to 2", qat(config(4, 4), falling)

    yield "depthwise", "float", "float", lambda study: {"accuracy": accuracy(study.full, study.data)}
    for widths in ((3, 3), (4, 4)):
        name, how = label(*widths), config(*widths)
        yield "depthwise", name, "PTQ", post_training(how)
        yield "depthwise", name, "QAT", anew(how)
        yield "depthwise", name, "QAT, dampening", anew(how, Qat(dampened))
        yield "depthwise", name, "QAT, freezing", anew(how, Qat(others=[frozen_late]))
        if widths == (3, 3):  # the rest of the tables of the first network
            yield from more_of_the_cnn()


def more_of_the_cnn() -> Iterator[tuple[str, str, str, Run]]:
    for bits, quantizers in CODEBOOKS.items():
        for quantizer in quantizers:
            yield "cnn", label(bits, 8), f"QAT, {quantizer}", qat(config(bits, 8, quantizer=quantizer))
    yield "cnn", "W2A2", "PTQ", post_training(config(2, 2))
    yield "cnn", "W2A2", "QAT", converted(config(2, 2))
    falling = scheduled("body.*", lambda n: qk.schedules.progressive(4, 2, steps=n // 2))
    yield "cnn", "W2A2", "QAT, falling 4 to 2", qat(config(4, 4), falling)
    for rounding, function in ROUNDINGS.items():
        for widths in WIDTHS:
            if widths[0] <= 4 and (rounding == "GPTQ" or widths not in ((3, 3), (2, 4))):
                yield "cnn", label(*widths), f"PTQ, {rounding}", post_training(config(*widths), function)
    yield "cnn", "W3A3 everywhere", "QAT", qat(config(3, 3, ends=False))
    yield "cnn", "W3A3 everywhere", "QAT, mixed at equal bitops", mixed("bitops", train=True)
    yield "cnn", "W2A2", "QAT, consistency", qat(config(2, 2), Qat(consistent))
    yield "cnn", "W2A2", "QAT, distillation", qat(config(2, 2), Qat(distilled))
    yield "cnn", "W3A8 everywhere", "hybrid", hybrid(short=False, all_layers=False)
    yield "cnn", "W3A3", "QAT, dampening", qat(config(3, 3), Qat(dampened))
    yield from final_tuning()
    for widths in ((2, 4), (2, 2)):
        name, how = label(*widths), config(*widths)
        yield "cnn", name, "QAT of 100 steps", behind_float(how)
        yield "cnn", name, "QAT of 100 steps, consistency", behind_float(how, Qat(consistent))
        yield "cnn", name, "QAT of 100 steps, distillation", behind_float(how, Qat(distilled))


def case_of(net: str, widths: str, method: str, seed: int) -> str:
    return f"{net}, {widths}: {method}; seed {seed}"


def done() -> set[str]:
    """The cases that are in the file of today already."""
    here = machine()
    path = RESULTS / device_name(here) / f"{here['date']}-accuracy.json"
    return {row["case"] for row in json.loads(path.read_text())["rows"]} if path.exists() else set()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m qkernels bench accuracy", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="*", metavar="GLOB", help="on the cases, such as 'cnn, W2*'")
    parser.add_argument("--list", action="store_true", help="print what is left to run, and for how long, alone")
    parser.add_argument("--quick", action="store_true", help="50 steps for each run, and nothing is recorded")
    options = parser.parse_args(argv)
    if not demo.FASHION_MNIST.is_dir():
        print("bench accuracy: Fashion-MNIST is missing; run: apt-get install dataset-fashion-mnist", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # so that the same machine gives the same figures
    steps = 50 if options.quick else STEPS
    there = set() if options.quick else done()
    left = [
        (seed, *run)
        for run in runs()
        for seed in options.seeds
        if (case := case_of(*run[:3], seed)) not in there and fnmatch.fnmatchcase(case, options.only)
    ]
    long = sum("QAT" in run[3] or run[3] in ("float", "hybrid") for run in left)
    minutes = (long * steps / 2 * SECONDS_OF_A_STEP + 2 * len(left)) / 60  # 2: of an evaluation and of rounding
    print(f"{len(left)} runs, about {minutes:.0f} minutes on one core", flush=True)
    if options.list:
        print(*(case_of(*run[1:4], run[0]) for run in left), sep="\n")
        return 0
    data = demo.load_idx(demo.FASHION_MNIST)
    studies: dict[tuple[str, int], Study] = {}
    for seed, net, widths, method, run in left:
        study = studies.setdefault((net, seed), Study(data, net == "depthwise", seed, steps))
        start = time.process_time()
        figures = run(study)
        row = {"op": "accuracy", "case": case_of(net, widths, method, seed), "net": net, "widths": widths,
               "method": method, "seed": seed, "figures": figures,
               "cpu_seconds": round(time.process_time() - start, 1)}  # fmt: skip
        if not options.quick:
            record("accuracy", [row])
        shown = ", ".join(f"{name} {value:.6g}" for name, value in figures.items())
        print(f"{row['case']:<64} {shown} ({row['cpu_seconds']} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
