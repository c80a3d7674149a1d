"""python -m qkernels info | demo | bench | selfcheck | tune | advise"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path


def bench(arguments: list[str]) -> int:
    folder = Path(__file__).parent.parent / "bench"
    if not folder.is_dir():
        print("bench: the benchmarks are not part of the installed package; run this from a source checkout")
        return 2
    if arguments[:1] in (["gemm"], ["model"], ["accuracy"]):
        path = os.pathsep.join(filter(None, [str(folder.parent), os.environ.get("PYTHONPATH")]))
        gpu = arguments[0] == "gemm" and "--gpu" in arguments
        script = folder / ("gpu/gemm.py" if gpu else f"{arguments[0]}.py")
        rest = [argument for argument in arguments[1:] if not (gpu and argument == "--gpu")]
        command = [sys.executable, str(script), *rest]  # in the caller's folder, for their CSV
        return subprocess.call(command, env=os.environ | {"PYTHONPATH": path})
    if importlib.util.find_spec("pytest_benchmark") is None:
        print(f'bench: pytest-benchmark is missing; run: pip install -e "{folder.parent}[bench]"')
        return 2
    return subprocess.call([sys.executable, "-m", "pytest", "-q", str(folder), *arguments], cwd=folder.parent)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m qkernels", description=__doc__)
    commands = {
        "info": "what runs on this machine and what is missing; one block for a bug report",
        "demo": "train, quantize and compare a small model; all options: demo --help",
        "bench": "time kernels against their peers; options go to pytest. Alone: bench gemm [--gpu], model or accuracy",
        "selfcheck": "every kernel that can run here against the reference",
        "tune": "time the int8 GEMM's tiles on this machine's GPU and keep the fastest; options: tune --help",
        "advise": "whether a model needs quantization-aware training, and for which layers; options: advise --help",
    }
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in commands.items():
        subparsers.add_parser(name, help=text, add_help=name in ("info", "selfcheck"))
    options, rest = parser.parse_known_args(argv)
    if rest and options.command in ("info", "selfcheck"):
        parser.error(f"{options.command} takes no arguments, got {' '.join(rest)}")
    if options.command == "bench":
        return bench(rest)
    if options.command == "demo":
        from . import demo

        return demo.main(rest)
    if options.command == "tune":
        from . import tune

        return tune.main(rest)
    if options.command == "advise":
        from . import advise_file

        return advise_file.main(rest)
    from . import info

    if options.command == "info":
        return info.main()
    passed, lines = info.verdict(quick=False)
    print("\n".join(lines))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
