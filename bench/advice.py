"""How often ``qk.advise`` is right: its verdict on ten small models against what is measured on data it never saw.

python bench/advice.py [--cases WORD …] [--record]

Right is
- "ptq": the advised plan loses at most the tolerance: 1 % of the float score, or if more an accuracy's standard error;
- "more bits": equal widths without training lose more than that, and the advised plan does not;
- "qat": equal widths without training lose more than that, and a short training gains back at least half of the loss.
Without training means the better of ``calibrate`` and ``calibrate, gptq, correct_bias`` on the unseen data.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import sys
import time
from typing import Any

import torch
from advice_cases import CASES, Case, Data, Pair, accuracy
from torch import Tensor, nn

import qkernels as qk

BATCH, CALIBRATION = 64, 512


def batches_of(pair: Pair, steps: int) -> list[Pair]:
    """Steps batches in an order of their own, the data again and again."""
    x, y = pair
    generator = torch.Generator().manual_seed(0)
    epochs = steps * BATCH // len(x) + 1
    order = torch.cat([torch.randperm(len(x), generator=generator) for _ in range(epochs)])[: steps * BATCH]
    return [(x[at], y[at]) for at in order.split(BATCH)]


def train(model: nn.Module, case: Case, data: Data, steps: int, lr: float) -> None:
    """Adam with a cosine down to 0."""
    model.train()
    optimizer = torch.optim.AdamW(qk.parameter_groups(model, lr), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for x, y in batches_of(data.train, steps):
        optimizer.zero_grad()
        case.task.loss(model(x), y).backward()
        optimizer.step()
        schedule.step()


TRAINED: dict[Any, tuple[Data, nn.Module]] = {}


def trained(case: Case, seed: int) -> tuple[Data, nn.Module]:
    """The data and the float model, which cases of one data set and model share."""
    key = case.data, case.build, case.float_steps, seed
    if key not in TRAINED:
        torch.manual_seed(seed)
        data, model = case.data(), case.build()
        train(model, case, data, case.float_steps, lr=3e-3)
        TRAINED[key] = data, model.eval()
    return TRAINED[key]


@torch.no_grad()
def score(model: nn.Module, case: Case, pair: Pair) -> float:
    x, y = pair
    outputs: list[Tensor] = [model.eval()(part) for part in x.split(500)]
    return case.task.score(torch.cat(outputs), y)


def without_training(model: nn.Module, config: qk.QConfig, batches: list[Pair], steps: tuple[str, ...]) -> nn.Module:
    prepared = qk.prepare(model, config)
    qk.calibrate(prepared, batches)
    if "gptq" in steps:
        qk.gptq(prepared, batches)
        qk.correct_bias(prepared, batches, float_model=model)
    return prepared


def tolerance_of(float_score: float, case: Case, data: Data) -> float:
    """1 % of the score; of an accuracy its standard error, where that is more."""
    noise = math.sqrt(float_score * (1 - float_score) / len(data.seen[0])) if case.task.score is accuracy else 0.0
    return max(0.01 * abs(float_score), noise)


def result_of(case: Case, seed: int = 0) -> dict[str, Any]:
    """The verdict, the truth, and the scores behind both."""
    begin = time.perf_counter()
    data, float_model = trained(case, seed)
    model = case.after(copy.deepcopy(float_model))
    calibration = batches_of(data.train, CALIBRATION // BATCH)
    began = time.perf_counter()
    advice = qk.advise(
        model,
        calibration,
        evaluate=lambda other: score(other, case, data.seen),
        tolerance=tolerance_of(score(model, case, data.seen), case, data),
        bits=[case.bits],
        config=case.config,
        loss=lambda output, batch: case.task.loss(output, batch[1]),
        training_steps=case.qat_steps,
    )
    advised = time.perf_counter()
    truth = truth_of(case, model, data, calibration, advice.chosen)
    (each,) = advice.widths
    return {
        "case": f"{case.name}, seed {seed}",
        "verdict": each.verdict,
        "layers": list(each.layers),
        "right": right(each.verdict, advice.tolerance, **truth),
        "tolerance": advice.tolerance,
        "seen": {"float": advice.float_score, "equal": each.plain_score, "advised": each.score},
        "figures": truth,
        "steps": list(each.steps),
        "seconds": {"float": began - begin, "advise": advised - began, "estimated qat": advice.qat_seconds},
    }


def truth_of(
    case: Case, model: nn.Module, data: Data, calibration: list[Pair], advice: qk.qat.WidthAdvice
) -> dict[str, float]:
    """Scores on the data that ``advise`` never saw."""
    assert case.config.weight is not None
    equal = dataclasses.replace(case.config, weight=dataclasses.replace(case.config.weight, bits=case.bits))
    ways = [without_training(model, equal, calibration, steps) for steps in ((), ("gptq",))]
    qat = without_training(model, equal, calibration, ())
    begin = time.perf_counter()
    train(qat, case, data, case.qat_steps, lr=1e-3)
    seconds = time.perf_counter() - begin
    plan = without_training(model, advice.config, calibration, advice.steps)
    return {
        "float": score(model, case, data.unseen),
        "equal": max(score(way, case, data.unseen) for way in ways),
        "advised": score(plan, case, data.unseen),
        "qat": score(qat, case, data.unseen),
        "qat_seconds": seconds,
    }


def right(
    verdict: str, tolerance: float, *, equal: float, advised: float, qat: float, qat_seconds: float, **of: float
) -> bool:
    """Whether the verdict is; ``of`` holds the float score."""
    float_score = of["float"]
    if verdict == "ptq":
        return float_score - advised <= tolerance
    if float_score - equal <= tolerance:
        return False  # nothing but PTQ was needed
    if verdict == "more bits":
        return float_score - advised <= tolerance
    return qat - equal >= 0.5 * (float_score - equal)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python bench/advice.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--cases", nargs="+", metavar="WORD", default=[""], help="those whose name holds one of these")
    parser.add_argument("--seed", type=int, default=0, help="of the float model's start (default: %(default)s)")
    parser.add_argument("--record", action="store_true", help="add the rows to bench/results/<device>, to be committed")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    print(f"{'case':50} {'verdict':10} right  float   equal advised     qat   s", flush=True)
    for case in CASES:
        if not any(word in case.name for word in options.cases):
            continue
        row = result_of(case, options.seed)
        rows.append(row)
        scores = " ".join(f"{row['figures'][key]:7.4f}" for key in ("float", "equal", "advised", "qat"))
        seconds = " + ".join(f"{row['seconds'][key]:.0f}" for key in ("float", "advise"))
        print(f"{case.name:50} {row['verdict']:10} {row['right']!s:5} {scores}  {seconds}", flush=True)
        print(f"    seen: {row['seen']}; {', '.join(row['layers'])}", flush=True)
    print(f"right in {sum(row['right'] for row in rows)} of {len(rows)}")
    if options.record:
        from laps import record

        print(f"wrote {record('advice', rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
