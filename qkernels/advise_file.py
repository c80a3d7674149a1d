"""python -m qkernels advise FILE: qk.advise for the model and data that a Python file defines.

FILE defines
  model     a trained float model
  batches   batches to calibrate with, as for qk.calibrate
  evaluate  a function of a model to its score, the higher the better
and may define
  loss      a function of the model's output and a batch, to time a training step
  config    a qk.QConfig or the name of one of qk.presets
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import traceback
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

from .qat import advise

NEEDED, OPTIONAL = ("model", "batches", "evaluate"), ("loss", "config")


class FileError(Exception):
    """What is wrong with the file, in one line."""


def names_of(path: Path) -> dict[str, Any]:
    """What the file defines of the names that count; it may import its neighbours, as if it ran by itself."""
    if not path.is_file():
        raise FileError("there is no such file")
    sys.path.insert(0, str(path.resolve().parent))
    loader = SourceFileLoader("advised_file", str(path))
    module = sys.modules[loader.name] = module_from_spec(spec_from_loader(loader.name, loader))  # type: ignore[arg-type]
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise FileError(_line_of(error, path)) from error
    defined = vars(module)
    missing = [name for name in NEEDED if name not in defined]
    if missing:
        raise FileError(f"does not define {', '.join(missing)}; it has to define {', '.join(NEEDED)}")
    return {name: defined[name] for name in (*NEEDED, *OPTIONAL) if name in defined}


def _line_of(error: BaseException, path: Path) -> str:
    """The error, with the last line of the file that was running."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path and frame.lineno is not None]
    if isinstance(error, SyntaxError) and error.lineno is not None:
        lines = [error.lineno]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {' '.join(str(error).split())}"


def widths(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(argv: list[str]) -> int:
    """Returns 0 with the advice on stdout, 2 with one line on stderr if the file or an option is of no use."""
    parser = argparse.ArgumentParser(
        prog="python -m qkernels advise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="runs as a module of its own, not as __main__")
    parser.add_argument("--tolerance", type=float, help="loss of score that is accepted (default: 1 %% of the score)")
    parser.add_argument("--budget", type=float, metavar="BYTES", help="most bytes of the weights in the model's file")
    parser.add_argument("--bits", type=widths, default="8,4,3,2", help="widths of weights (default: %(default)s)")
    parser.add_argument("--training-steps", type=int, default=1000, metavar="N",
                        help="of QAT, to estimate its time (default: %(default)s)")  # fmt: skip
    parser.add_argument("--max-batches", type=int, metavar="N", help="how many of the batches to take")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    options = vars(parser.parse_args(argv))
    path, as_json = options.pop("file"), options.pop("json")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what the file prints is no part of the advice
            names = names_of(path)
            advice = advise(names.pop("model"), names.pop("batches"), **names, **options)
    except FileError as error:
        print(f"advise: {path}: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # of the user's functions too
        print(f"advise: {path}: {_line_of(error, path)}", file=sys.stderr)
        return 2
    print(json.dumps(advice.to_dict(), indent=2, allow_nan=False) if as_json else advice)
    return 0
