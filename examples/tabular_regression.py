"""Regression on a table: how much of the target an MLP still explains at 8, 4, 3 and 2 bits.

scikit-learn's diabetes data: 442 patients, ten measurements, and how far the disease went within a year. So few rows
make the score of one split a matter of luck: each of five folds is predicted by a model of the other four, and R² is
that of all predictions. All layers have the same width; quantized after training (PTQ) and in training (QAT).
At real size: python examples/tabular_regression.py --hidden 256 --steps 1000 --folds 10
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from shared import at_least, below, bytes_of, study
from torch import Tensor, nn
from torch.nn import functional as F

import qkernels as qk

BITS = (8, 4, 3, 2)


def table(seed: int) -> tuple[Tensor, Tensor]:
    """Rows in random order: x [442, 10] and y [442, 1]."""
    try:
        from sklearn.datasets import load_diabetes
    except ImportError:
        raise SystemExit("this example needs scikit-learn; install with: pip install 'qkernels[examples]'") from None
    x, y = (torch.from_numpy(part).float() for part in load_diabetes(return_X_y=True, scaled=False))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order], y[order, None]


def standardized(values: Tensor, train: Tensor) -> Tensor:
    """By the training rows alone. It also brings all columns to one range, which one scale of the input then suits."""
    return (values - values[train].mean(0)) / values[train].std(0)


def float_model(columns: int, hidden: int) -> nn.Module:
    def layer(inputs: int) -> list[nn.Module]:
        return [nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(0.5)]

    return nn.Sequential(*layer(columns), *layer(hidden), nn.Linear(hidden, 1))


def without_dropout(model: nn.Module) -> None:
    """For the fine-tuning: dropout doubles what it keeps, so input scales would learn values never seen later."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float) -> None:
    """AdamW on all rows at once, with a learning rate that falls to zero."""
    model.train()
    optimizer = torch.optim.AdamW(qk.parameter_groups(model, lr=lr, weight_decay=0.1))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    return model.eval()(x)


def r2(predicted: list[Tensor], targets: list[Tensor]) -> float:
    """The share of the target's variance that the predictions explain."""
    y, p = torch.cat(targets), torch.cat(predicted)
    return 1 - ((y - p).square().sum() / (y - y.mean()).square().sum()).item()


def main() -> None:
    parser = study(__doc__, 150, "of the float model; all then take half as many more", least_steps=2)
    parser.add_argument("--hidden", type=at_least(1), default=64)
    parser.add_argument("--folds", type=at_least(2), default=5)
    options = parser.parse_args()
    if options.quick:
        options.folds, options.steps = 2, 10
    small = below(options, hidden=64, folds=5, steps=150)

    torch.manual_seed(options.seed)
    x, y = table(options.seed)
    if options.folds > len(x):
        parser.error(f"--folds: got {options.folds}; accepted: at most {len(x)}, the number of rows")
    targets: list[Tensor] = []
    predicted: dict[str, list[Tensor]] = defaultdict(list)
    for test in torch.arange(len(x)).chunk(options.folds):
        rest = torch.ones(len(x), dtype=torch.bool)
        rest[test] = False
        inputs, target = standardized(x, rest), standardized(y, rest)
        fit, held_out = (inputs[rest], target[rest]), inputs[test]
        targets.append(target[test])

        model = float_model(x.shape[1], options.hidden)
        train(model, *fit, options.steps, 3e-3)
        for bits in BITS:
            config = qk.QConfig(weight=qk.QSpec(bits), input=qk.QSpec(bits, symmetric=False))
            prepared = qk.prepare(model, config)
            qk.calibrate(prepared, [fit[0]])
            predicted[f"PTQ {bits}"].append(predict(qk.convert(prepared), held_out))
            without_dropout(prepared)
            train(prepared, *fit, options.steps // 2, 3e-4)
            converted = qk.convert(prepared)
            predicted[f"QAT {bits}"].append(predict(converted, held_out))
            assert torch.equal(predict(converted, held_out), qk.exact(prepared)(held_out)), "other integers"
        without_dropout(model)
        train(model, *fit, options.steps // 2, 3e-4)  # as many steps as the quantized models
        predicted["float"].append(predict(model, held_out))

    score = {name: r2(parts, targets) for name, parts in predicted.items()}
    print(f"R² of {len(x)} patients, each predicted by a model that did not see them; float {score['float']:.3f}")
    print("bits    PTQ    QAT")
    for bits in BITS:
        print(f"{bits:>4}  {score[f'PTQ {bits}']:.3f}  {score[f'QAT {bits}']:.3f}")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        qk.save(converted, file)
        loaded = qk.load(file, float_model(x.shape[1], options.hidden))
        sizes = file.stat().st_size / 1e3, bytes_of(model) / 1e3
    print("the last model: a file of {:.1f} kB, {:.1f} kB of tensors in float".format(*sizes))
    assert torch.equal(predict(loaded, held_out), predict(converted, held_out)), "the file lost something"
    if small:
        return
    assert abs(score["PTQ 8"] - score["float"]) < 0.03, "8 bits need no training"
    assert score["QAT 2"] > score["PTQ 2"], "2 bits gain by training"


if __name__ == "__main__":
    main()
