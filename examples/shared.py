"""What several examples share: options that say what they accept, the size and the time of a model."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn


def at_least(least: int, multiple_of: int = 1) -> Callable[[str], int]:
    """The type of an argument that is a size."""
    accepted = f"a whole number of at least {least}" + (f", a multiple of {multiple_of}" if multiple_of > 1 else "")

    def size(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least or int(text) % multiple_of:
            raise argparse.ArgumentTypeError(f"got {text}; accepted: {accepted}")
        return int(text)

    return size


def below(options: argparse.Namespace, **sizes: int) -> bool:
    """Whether an option is below the size from which on the example's claims about accuracy hold; it then says so."""
    small = [f"--{name.replace('_', '-')} {least}" for name, least in sizes.items() if getattr(options, name) < least]
    if small:
        print(f"what this example claims about accuracy is not checked below {', '.join(small)}")
    return bool(small)


def study(doc: str | None, steps: int, of_steps: str, least_steps: int) -> argparse.ArgumentParser:
    """The options of the programs that train a model at several widths."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=at_least(least_steps), default=steps, help=of_steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="so few steps that scores say nothing: to see that all runs"
    )
    return parser


def bytes_of(model: nn.Module) -> int:
    """Of all tensors of the model, one that has several names once."""
    tensors = {t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}
    return sum(tensors.values())


@torch.inference_mode()
def microseconds(model: nn.Module, *arguments: object) -> float:
    """The fastest of 50 calls: what else runs on the machine makes the others slower."""
    times = []
    for _ in range(50):
        start = time.perf_counter()
        model(*arguments)
        times.append(time.perf_counter() - start)
    return min(times) * 1e6
