"""The suites of torch.ao and compressed-tensors, each with torch's own kernels and under override_torch, compared.

`make upstream`. Sources come from the package indices that this machine is set up for: torch.ao's tests of torch 2.6 by
apt-get (Debian's source package; pip's has none), compressed-tensors' by pip. What runs on the torch at hand runs; a
test that fails either way says nothing here, but is listed. So is every test whose outcome differs, and only those of
known.txt may: torch's own faults, each with its reason. A run of all files writes outcomes.txt, which is committed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import site
import subprocess
import sys
import time
import venv
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUTCOMES = HERE / "outcomes.txt"
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "upstream"
PYTHON = BUILD / "venv" / "bin" / "python"
RELEASE, VERSION = "trixie", "2.6.*"  # where Debian keeps the torch whose tests these are
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# transformers and the rest are what the suites import.
PACKAGES = ("pytest", "expecttest", "hypothesis", "numpy", "scipy", "parameterized", "transformers", "accelerate",
            "loguru", "pydantic", "psutil", "pyyaml")  # fmt: skip
TIMEOUT = 1200  # seconds for one file
# (suite, file or folder, pytest -k): what reaches a fake-quantize op, and what stands on it.
SUITES = (
    ("torch", "quantization/core/test_workflow_module.py", ""),
    ("torch", "quantization/core/test_workflow_ops.py", ""),
    ("torch", "quantization/core/test_utils.py", ""),
    ("torch", "quantization/core/test_top_level_apis.py", ""),
    ("torch", "quantization/eager/test_quantize_eager_qat.py", ""),
    ("torch", "quantization/eager/test_fuse_eager.py", "qat or train"),
    ("torch", "quantization/eager/test_model_numerics.py", ""),
    ("torch", "quantization/fx/test_quantize_fx.py", "qat or QAT or fake or train"),
    ("torch", "quantization/fx/test_numeric_suite_fx.py", "qat"),
    ("torch", "quantization/fx/test_model_report_fx.py", ""),
    ("torch", "quantization/fx/test_equalize_fx.py", ""),
    ("torch", "quantization/bc/test_backward_compatibility.py", ""),
    ("compressed-tensors", "test_quantization", ""),
    ("compressed-tensors", "test_compressors", "not distributed and not transformers"),
    ("compressed-tensors", "test_configs", ""),
)
HELPERS = "test_only_"  # functions so named are no tests: the files import them
Outcomes = dict[str, tuple[str, str]]  # of a test: how it ended, the first line of its error
NOT_RUN = ("not run", "")


def run(*command: object, **rest: object) -> None:
    subprocess.run([str(part) for part in command], check=True, **rest)  # type: ignore[call-overload]


def make_venv() -> None:
    """A venv of its own for what the suites need, on top of the packages of this Python."""
    venv.create(BUILD / "venv", with_pip=True)
    (found,) = (BUILD / "venv" / "lib").glob("python*/site-packages")
    (found / "below.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    run(PYTHON, "-m", "pip", "install", "-q", *PACKAGES)


def fetch_torch() -> Path:
    folder = BUILD / "torch"
    if not folder.exists():
        apt = BUILD / "apt"
        (apt / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (apt / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        fields = ("$(REPO_URI) $(LABEL)", "Created-By: Packages")
        listed = subprocess.run(["apt-get", "indextargets", "--format", *fields], capture_output=True, text=True)
        archives = {line.split()[0] for line in listed.stdout.splitlines() if line.endswith(" Debian")}
        if not archives:
            raise SystemExit("apt is set up for no archive of Debian: torch's tests cannot be fetched here")
        signed = f"[signed-by={KEYRING}] " if KEYRING.exists() else ""
        lines = [f"deb-src {signed}{uri} {RELEASE} main\n" for uri in sorted(archives)]
        (apt / "sources.list").write_text("".join(lines))
        options = [
            f"-oDir::State::lists={apt}/lists", f"-oDir::Cache={apt}/cache", "-oDir::Etc::sourceparts=/dev/null",
            f"-oDir::Etc::sourcelist={apt}/sources.list", "-oAPT::Sandbox::User=",
        ]  # fmt: skip
        run("apt-get", *options, "-qq", "update", cwd=apt)
        run("apt-get", *options, "-qq", "--download-only", "source", f"pytorch={source_version(options)}", cwd=apt)
        (archive,) = apt.glob("pytorch_*.orig.tar.xz")
        folder.mkdir()
        members = ("--strip-components=2", "--wildcards", "*/test/quantization")
        run("tar", "-xJf", archive, "-C", folder, *members)
    return folder


def source_version(options: list[str]) -> str:
    shown = subprocess.run(["apt-cache", *options, "showsrc", "pytorch"], capture_output=True, text=True, check=True)
    versions = [line.split()[1] for line in shown.stdout.splitlines() if line.startswith("Version:")]
    return next(version for version in versions if version.startswith(VERSION.removesuffix("*")))


def fetch_compressed_tensors() -> Path:
    folder = BUILD / "compressed-tensors"
    if not folder.exists():
        sdist = BUILD / "sdist"
        run(PYTHON, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", sdist,
            "compressed-tensors")  # fmt: skip
        (archive,) = sdist.glob("*.tar.gz")
        run(PYTHON, "-m", "pip", "install", "-q", "--no-deps", archive)
        folder.mkdir()
        run("tar", "-xzf", archive, "-C", folder, "--strip-components=1")
    return folder / "tests"


def outcomes(folder: Path, path: str, only: str, override: bool) -> Outcomes:
    """How each test of a file ended; what ran when the time was up ends as a timeout."""
    log = BUILD / "outcomes.jsonl"
    log.unlink(missing_ok=True)
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "PYTHONPATH": f"{ROOT}:{HERE}:{folder}",
        "HF_HUB_OFFLINE": "1",  # tests that want a model of the hub fail at once, not after minutes
        "QKERNELS_OUTCOMES": str(log), "QKERNELS_OVERRIDE": "1" if override else "",
    }  # fmt: skip
    command = [
        str(PYTHON), "-m", "pytest", "-q", "-p", "record", "-p", "no:cacheprovider", "--hypothesis-seed=0",
        "--rootdir", str(folder), "-c", os.devnull, "-k", f"({only or 'test'}) and not {HELPERS}", path,
    ]  # fmt: skip
    with (BUILD / "pytest.log").open("a") as out, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, cwd=folder, env=environment, stdout=out, stderr=out, timeout=TIMEOUT)
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return {test: (outcome, error) for test, outcome, error in lines}


def known_faults() -> dict[str, str]:
    lines = [line for line in (HERE / "known.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {test: reason.strip() for test, _, reason in (line.partition("  ") for line in lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("only", nargs="*", help="parts of the names of the files to run; all of them without")
    only = parser.parse_args().only
    BUILD.mkdir(parents=True, exist_ok=True)
    if not PYTHON.exists():
        make_venv()
    if shutil.which("apt-get") is None:
        raise SystemExit("needs apt-get: torch's tests are taken from Debian's source package")
    folders = {"torch": fetch_torch(), "compressed-tensors": fetch_compressed_tensors()}
    known = known_faults()
    differing: dict[str, tuple[str, str]] = {}
    failing: Counter[str] = Counter()  # either way: a known test, or a file and its tests' error
    total: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    lines = []
    for suite, path, selected in SUITES:
        if only and not any(part in path for part in only):
            continue
        started = time.time()
        own = outcomes(folders[suite], path, selected, override=False)
        ours = outcomes(folders[suite], path, selected, override=True)
        counts = []
        for override, found in ((False, own), (True, ours)):
            counts.append(Counter(outcome for outcome, _ in found.values()))
            total[override].update(counts[-1])
        before = len(differing)
        for test in own | ours:
            (without, error), (under, _) = own.get(test, NOT_RUN), ours.get(test, NOT_RUN)
            if without != under:
                differing[f"{suite}/{test}"] = without, under
            elif without == "failed":
                name = f"{suite}/{test}"
                failing[f"{name}: {known[name]}" if name in known else f"{name.partition('::')[0]}: {error}"] += 1
        lines.append(f"{suite} {path}: {said(counts[0])}; override_torch {said(counts[1])}; "
                     f"{len(differing) - before} differ")  # fmt: skip
        print(f"{lines[-1]}; {time.time() - started:.0f} s", flush=True)
    files = len(lines)
    lines += [f"torch's kernels: {said(total[False])}", f"override_torch: {said(total[True])}"]
    lines += [f"{number} failed either way: {name}" for name, number in failing.items()]
    for test, (without, under) in differing.items():
        lines.append(f"{test}: {without} -> {under}: {known.get(test, 'NOT KNOWN')}")
    new = len(differing.keys() - known.keys())
    lines.append(f"{len(differing)} tests differ, {new} of them not known")
    print("\n".join(lines[files:]))
    if not only:
        OUTCOMES.write_text("\n".join((*versions(), *lines, "")))
    sys.exit(1 if new or not total[True] else 0)


def versions() -> tuple[str, ...]:
    """What ran, and when."""
    command = "import torch; from importlib.metadata import version; print(torch.__version__, version('{}'))"
    torch, compressed = subprocess.run([PYTHON, "-c", command.format("compressed-tensors")], text=True, check=True,
                                       capture_output=True).stdout.split()  # fmt: skip
    return (
        "# Written by `make upstream` when it runs every file: how the tests ended with torch's kernels and under",
        "# override_torch, and which ended in another way.",
        f"{datetime.date.today()}, torch {torch}, Python {platform.python_version()}, {platform.machine()}; "
        f"tests of torch {VERSION} and compressed-tensors {compressed}",
    )


def said(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())) or "nothing ran"


if __name__ == "__main__":
    main()
