"""Builds the C++ libraries on Linux when torch and a compiler are there; without them the package is pure Python."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f'qkernels: setuptools {setuptools.__version__} is too old; run: pip install "setuptools>=77"')

TORCH_TARGET_VERSION = "0x020a000000000000"  # the stable ABI of torch 2.10: one binary for it and all later torch
BUILD_ID = "csrc/build_id.cpp"  # the one file that is told what all of csrc was, so that the others need no recompile
SOURCES = sorted(path for path in Path("csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh"))
DEFAULT_ARCHES = "8.0;8.6;8.9;9.0a;10.0a;12.0+PTX"
# The names that torch takes in TORCH_CUDA_ARCH_LIST; longer ones first, as each is replaced wherever it stands.
NAMED_ARCHES = {
    "Kepler+Tesla": "3.7",
    "Kepler": "3.5+PTX",
    "Maxwell+Tegra": "5.3",
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}


def say(text: str) -> None:
    print(f"qkernels: {text}", file=sys.stderr)


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


class BuildInParallel(build_ext):
    """Compiles all files at once, each again only if it, a header or a flag changed.

    A failed compilation leaves a pure-Python package and says so; QKERNELS_STRICT_BUILD=1 makes it an error.
    """

    def build_extensions(self) -> None:
        jobs = self.parallel or int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            objects = [[pool.submit(self.compile, ext, source) for source in ext.sources] for ext in self.extensions]
        for extension, futures in zip(self.extensions, objects, strict=True):
            library = Path(self.get_ext_fullpath(extension.name))
            # Whoever has the old one open keeps it whole, and none is ever half written.
            unfinished = library.with_suffix(f".{os.getpid()}.so")
            try:
                self.link(extension, [future.result() for future in futures], str(unfinished))
                unfinished.replace(library)
            except (CompileError, LinkError) as error:
                library.unlink(missing_ok=True)
                if not extension.optional:
                    raise
                say(
                    f"{extension.name} did not compile ({error}); the reference kernels serve in its place. "
                    "`python -m qkernels info` gives the command that compiles it."
                )

    def get_ext_filename(self, fullname: str) -> str:
        """Without the tag of a Python version: the libraries are loaded by torch and know nothing of Python."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def link(self, extension: Extension, objects: list[str], library: str) -> None:
        if extension.name == CUDA:  # by nvcc, which knows where its own runtime library lies
            Path(library).parent.mkdir(parents=True, exist_ok=True)
            named = [*(f"-L{path}" for path in extension.library_dirs), *(f"-l{name}" for name in extension.libraries)]
            run([nvcc(), "-shared", "-cudart", "static", "-Xcompiler", "-fPIC", "-o", library, *objects, *named])
            return
        self.compiler.link_shared_object(
            objects,
            library,
            libraries=extension.libraries,
            library_dirs=extension.library_dirs,
            build_temp=self.build_temp,
            target_lang="c++",
        )

    def compile(self, extension: Extension, source: str) -> str:
        flags = [*extension.extra_compile_args, *(f"-D{name}={value}" for name, value in extension.define_macros)]
        if source == BUILD_ID:
            everything = digest(*(path.read_bytes() for path in SOURCES))
            flags = [f'-DQKERNELS_BUILD_ID="{self.distribution.get_version()}+{everything}"']
            flags += [f'-DQKERNELS_BUILD_TORCH="{torch_version()}"']
        is_cuda = source.endswith(".cu")
        other = Path("csrc", "cpu" if is_cuda else "cuda")  # neither includes what is the other's
        headers = [path.read_bytes() for path in SOURCES if path.suffix in (".h", ".cuh") and other not in path.parents]
        if is_cuda:
            flags += [f"-I{path}" for path in extension.include_dirs]
        compiler = repr(
            (
                extension.name,
                nvcc_version() if is_cuda else self.compiler.compiler_so_cxx,
                extension.include_dirs,
                flags,
            )
        )
        folder = Path(self.build_temp, digest(Path(source).read_bytes(), *headers, compiler.encode()))
        built = folder / Path(source).with_suffix(".o")
        if built.exists():
            return str(built)
        if is_cuda:
            built.parent.mkdir(parents=True, exist_ok=True)
            unfinished = built.with_suffix(f".{os.getpid()}.part")
            run([nvcc(), "-c", source, "-o", str(unfinished), *flags])
            unfinished.rename(built)
        else:
            self.compiler.compile([source], str(folder), include_dirs=extension.include_dirs, extra_postargs=flags)
        return str(built)


class WheelForAnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


CUDA = "qkernels._cuda"


def torch_version() -> str:
    import torch

    return str(torch.__version__)


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"{' '.join(command[:4])} … failed:\n{done.stdout}{done.stderr}")


def nvcc() -> str:
    """The CUDA compiler: of CUDA_HOME, else on PATH, else where toolkits install themselves; empty: there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=str(Path(home, "bin"))) or ""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin") or ""


def nvcc_version() -> str:
    return subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout


def buildable(arches: str) -> str:
    """Those of a TORCH_CUDA_ARCH_LIST that can be compiled here, each other one named; ValueError where none is."""
    if arches == "native":
        import torch

        gpus = {torch.cuda.get_device_capability(at) for at in range(torch.cuda.device_count())}
        if not gpus:
            raise ValueError("TORCH_CUDA_ARCH_LIST: got 'native', but torch sees no GPU")
        arches = ";".join(f"{major}.{minor}" for major, minor in sorted(gpus)) + "+PTX"
    for name, numbers in NAMED_ARCHES.items():
        arches = arches.replace(name, numbers)
    listed = subprocess.run([nvcc(), "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    kept = []
    for arch in dict.fromkeys(re.split("[; ,]+", arches.strip("; ,"))):
        found = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", arch)
        if found is None:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST: got {arch!r}; accepted: {DEFAULT_ARCHES} and their like, or torch's names"
            )
        if int(found[1]) < 8:
            say(f"TORCH_CUDA_ARCH_LIST: {arch} is left out: the CUDA kernels need 8.0 or later")
        elif known and found[1] + found[2] not in known:
            say(f"TORCH_CUDA_ARCH_LIST: {arch} is left out: {nvcc()} does not know it")
        else:
            kept.append(arch)
    if not kept:
        raise ValueError(
            f"TORCH_CUDA_ARCH_LIST: got {arches!r}; accepted: one at least that compiles, as in {DEFAULT_ARCHES}"
        )
    return ";".join(kept)


def gencode(arches: str) -> list[str]:
    """nvcc's flags for a list such as "8.0;9.0a;12.0+PTX"."""
    flags = []
    for arch in arches.split(";"):
        number, _, ptx = arch.replace(".", "").partition("+")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cuda_extension(torch_root: Path, has_cuda: bool, optional: bool) -> Extension | None:
    wanted = os.environ.get("QKERNELS_BUILD", "auto")
    if wanted == "cpu" or (wanted == "auto" and not has_cuda):
        return None
    if not nvcc():
        missing = "no nvcc in CUDA_HOME/bin, PATH or /usr/local/cuda/bin: install the CUDA toolkit or set CUDA_HOME"
        if wanted == "cuda" and not optional:
            sys.exit(f"qkernels: {missing}")
        say(f"{missing}; building without the CUDA kernels")
        return None
    try:
        arches = buildable(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHES)
    except ValueError as error:
        if wanted == "cuda" or not optional:
            sys.exit(f"qkernels: {error}")
        say(f"{error}; building without the CUDA kernels")
        return None
    return Extension(
        CUDA,
        sources=[*sorted(str(path) for path in Path("csrc/cuda").glob("*.cu")), BUILD_ID],
        include_dirs=["csrc", str(torch_root / "include")],
        library_dirs=[str(torch_root / "lib")],
        # Without libtorch_cuda the library links with symbols missing: enough to check it where there is no GPU.
        libraries=["torch_cpu", "c10", *(["torch_cuda"] if has_cuda else [])],
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
            ("USE_CUDA", "1"),
            ("NDEBUG", "1"),
            ("QKERNELS_CUDA_ARCHES", f'"{arches}"'),
        ],
        # No contraction to FMA: it would move ties and so the bits of the result.
        extra_compile_args=[
            "-std=c++17",
            "-O3",
            "-fmad=false",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            *gencode(arches),
        ],
        optional=optional,
    )


def unbuildable() -> str | None:
    """Why no library can be compiled here, or None."""
    if sys.platform in ("win32", "cygwin", "darwin"):
        return f"the C++ kernels compile on Linux only, this is {platform.system()}"
    try:
        version = torch_version()
    except ImportError:
        return "no torch in the build environment"
    if tuple(map(int, version.split(".")[:2])) < (2, 10):
        return f"torch {version} is too old for the C++ kernels (accepted: >= 2.10)"
    return None


def extensions() -> list[Extension]:
    if (wanted := os.environ.get("QKERNELS_BUILD", "auto")) not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"qkernels: QKERNELS_BUILD: got {wanted!r}; accepted: auto, cpu, cuda, none")
    if wanted == "none":
        return []
    optional = os.environ.get("QKERNELS_STRICT_BUILD") != "1"
    if reason := unbuildable():
        if not optional:
            sys.exit(f"qkernels: {reason}")
        say(f"{reason}: installing as pure Python; `python -m qkernels info` says what would compile the kernels")
        return []
    import torch

    torch_root = Path(torch.__file__).parent
    flags = ["-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    flags += [
        "-Wall",
        "-Wno-maybe-uninitialized",
        "-Wno-psabi",
        "-g0",
        *os.environ.get("QKERNELS_CXXFLAGS", "").split(),
    ]
    cpu = Extension(
        "qkernels._cpu",
        sources=[*sorted(str(path) for path in Path("csrc/cpu").rglob("*.cpp")), BUILD_ID],
        include_dirs=["csrc", str(torch_root / "include")],
        library_dirs=[str(torch_root / "lib")],
        libraries=["torch_cpu", "c10"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=["-O3", *flags],
        optional=optional,
    )
    cuda = cuda_extension(torch_root, torch.version.cuda is not None, optional)
    return [cpu, *([cuda] if cuda is not None else [])]


commands = {"build_ext": BuildInParallel}
if libraries := extensions():
    commands["bdist_wheel"] = WheelForAnyPython
setup(ext_modules=libraries, cmdclass=commands)
