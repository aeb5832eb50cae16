"""The build: writes one ninja file and runs it.

csrc/cpu/*.cpp is compiled once per instruction set, csrc/cuda/*.cu by nvcc where there is one, csrc/binding/*.cpp
against torch's stable ABI; everything is linked into fastft/libfastft.so, which holds no Python, so that one wheel
(py3-none-<platform>) serves every Python and every torch from 2.10 on.

    python setup.py develop_native      build in place: the checkout is then importable and complete
    pip wheel . --no-deps               one wheel

README.md explains the environment variables FASTFT_NATIVE, _CUDA, _CUDA_ARCHS, _TORCH, _WERROR, CXX and MAX_JOBS.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "native"
LIBRARY = "libfastft.so"
BUILD_INFO = "_build.json"  # beside the library: what it holds, or why there is none; fastft/_library.py reads it

OLDEST_TORCH = (2, 10)
TORCH_TARGET_VERSION = "0x020a000000000000"  # the stable ABI as of 2.10

AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2")
# GCC 12 warns of its own AVX-512 header (bug 105593); the same sources are checked when compiled for the other sets.
QUIET = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512", *QUIET)
ISA_FLAGS = {"baseline": (), "avx2": AVX2, "avx512": AVX512, "avx512_bf16": (*AVX512, "-mavx512bf16")}

INCLUDES = tuple(f"-I{CSRC / folder}" for folder in ("", "common", "cpu", "cuda"))
CXX_FLAGS = (
    *("-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"),
)
NVCC_FLAGS = (  # -O1 is for the host's code, which only launches
    *("-O1", "-std=c++17", "--expt-relaxed-constexpr", "-cudart", "static"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"),
)
LINK_FLAGS = ("-shared", "-Wl,--exclude-libs,ALL", "-Wl,-z,defs", "-Wl,-z,relro,-z,now")
DEFAULT_CUDA_ARCHS = "sm_80 sm_90 compute_80"  # compute_80: PTX that any other GPU compiles for itself


class BuildError(BaseError):
    """Ends the build; the last line of its text is the remedy."""


# ---- what this machine offers


def choice(name: str) -> str:
    """An environment variable that is "0", "1" or "auto" (also when unset or empty)."""
    value = os.environ.get(name) or "auto"
    if value not in ("0", "1", "auto"):
        raise BuildError(f"{name} is {value!r}\nset {name} to 0, 1 or auto")
    return value


def find_compiler() -> tuple[str, ...] | None:
    """The C++ compiler's command (CXX may hold a launcher too, as in "ccache g++"), or None."""
    if named := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(named[0]) is None:
            raise BuildError(f"CXX is {os.environ['CXX']!r}, which is not on PATH\nunset CXX or let it name a compiler")
        return tuple(named)
    return next(((name,) for name in ("g++", "c++", "clang++") if shutil.which(name)), None)


def why_no_native() -> str | None:
    """Why this installation gets no native library, in words for `fastft env`; None if it gets one."""
    wanted = choice("FASTFT_NATIVE")
    if wanted == "0":
        return "it was installed with FASTFT_NATIVE=0"
    reason = None
    if (sys.platform, platform.machine()) not in (("linux", "x86_64"), ("linux", "AMD64")):
        reason = f"there are no native kernels for {platform.system()} on {platform.machine()}, so no gain here"
    elif find_compiler() is None:
        reason = "no C++ compiler was found at installation (g++, c++, clang++ or the variable CXX)"
    if reason and wanted == "1":
        raise BuildError(f"FASTFT_NATIVE is 1, but {reason}\nset FASTFT_NATIVE=0 to install without native kernels")
    return reason


def package_folders() -> Iterable[Path]:
    """site-packages folders, likeliest first.

    Build isolation hides the target environment, so its traces are followed: variables, the prefixes behind PATH and
    behind the command lines that led here, and the .venv that uv finds beside the sources or above the caller's folder.
    """
    named = [Path(os.environ[name]) for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if os.environ.get(name)]
    behind_path = [Path(entry).parent for entry in os.environ.get("PATH", "").split(os.pathsep) if entry]
    caller = Path(os.environ.get("PWD", ROOT))
    near = [folder / ".venv" for start in (ROOT, caller) for folder in (start, *start.parents)]
    prefixes = [*named, Path(sys.prefix), *prefixes_of_callers(caller), *behind_path, *near, Path(sys.base_prefix)]
    for prefix in prefixes:
        for pattern in ("lib*/python3*/site-packages", "lib*/python3*/dist-packages"):
            yield from sorted(prefix.glob(pattern))
    yield Path(site.getusersitepackages())
    yield from (Path(entry) for entry in sys.path if entry)


def prefixes_of_callers(folder: Path) -> Iterable[Path]:
    """Environments that the processes above this one were told of.

    Those of `VIRTUAL_ENV=env uv pip install .` (uv sets the variable anew), `env/bin/python -m build` and
    `uv pip install --python env/bin/python .` (any <prefix>/bin/<name> in a command line) leave no other trace.
    """
    process = Path("/proc", str(os.getppid()))
    while (process / "cmdline").is_file():
        with contextlib.suppress(PermissionError):  # somebody else's process, such as a container's first
            variables = os.fsdecode((process / "environ").read_bytes()).split("\0")
            yield from (folder / found[1] for word in variables if (found := re.match("VIRTUAL_ENV=(.+)", word)))
        words = os.fsdecode((process / "cmdline").read_bytes()).split("\0")
        yield from ((folder / word).parent.parent for word in words if Path(word).parent.name == "bin")
        process = Path("/proc", re.search(r"^PPid:\s*(\d+)", (process / "status").read_text(), re.MULTILINE)[1])


def torch_version(package: Path) -> tuple[int, int] | None:
    """(major, minor) of the torch package in this folder, or None if there is none with headers."""
    if not (package / "include/torch/csrc/stable/library.h").is_file():
        return None
    found = re.search(r"__version__ = '(\d+)\.(\d+)", (package / "version.py").read_text())
    return (int(found[1]), int(found[2])) if found else None


def find_torch() -> Path:
    """The torch package whose headers and libraries we build against."""
    if named := os.environ.get("FASTFT_TORCH"):
        prefix = Path(named)
        candidates = [prefix, prefix / "torch", *sorted(prefix.glob("lib*/python3*/*-packages/torch"))]
        where = f"FASTFT_TORCH is {named!r}, where"
    else:
        candidates = [folder / "torch" for folder in package_folders()]
        where = "by VIRTUAL_ENV, CONDA_PREFIX, PATH, .venv and this Python's own folders"
    too_old = {}
    for package in candidates:
        if version := torch_version(package):
            if version >= OLDEST_TORCH:
                return package.resolve()
            too_old[package] = f"{version[0]}.{version[1]}"
    oldest = ".".join(map(str, OLDEST_TORCH))
    seen = "".join(f"; {package} is {version}" for package, version in too_old.items())
    remedy = "install torch first, or set FASTFT_TORCH to what `import torch; print(torch.__path__[0])` prints"
    raise BuildError(f"{where} no torch {oldest} or later with headers was found{seen}\n{remedy}")


NO_NVCC = "no nvcc was found (by CUDA_HOME, CUDA_PATH, PATH or as the package nvidia-cuda-nvcc)"


def find_nvcc() -> tuple[str | None, str | None]:
    """(nvcc, None), or (None, why not in words for `fastft env`)."""
    wanted = choice("FASTFT_CUDA")
    if wanted == "0":
        return None, "it was built with FASTFT_CUDA=0"
    homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    packages = [nvcc.parent for folder in package_folders() for nvcc in sorted(folder.glob("nvidia/*/bin/nvcc"))]
    folders = [*map(str, homes), *os.environ.get("PATH", "").split(os.pathsep), *map(str, packages)]
    if nvcc := shutil.which("nvcc", path=os.pathsep.join(filter(None, folders))):
        return nvcc, None
    if wanted == "1":
        remedy = "set CUDA_HOME, install the package nvidia-cuda-nvcc, or set FASTFT_CUDA=0"
        raise BuildError(f"FASTFT_CUDA is 1, but {NO_NVCC}\n{remedy}")
    return None, f"when it was built, {NO_NVCC}"


def cuda_archs() -> tuple[str, ...]:
    """Code to generate, as "sm_90" (machine code) and "compute_80" (PTX); input as torch writes it: "8.0;9.0+PTX"."""
    name = "FASTFT_CUDA_ARCHS" if os.environ.get("FASTFT_CUDA_ARCHS") else "TORCH_CUDA_ARCH_LIST"
    text = os.environ.get(name) or DEFAULT_CUDA_ARCHS
    archs: dict[str, None] = {}
    for entry in re.split(r"[\s;,]+", text.strip()):
        found = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)([af]?)(\+PTX)?|compute_(\d+[af]?)", entry)
        if not found:
            remedy = 'write it as "8.0 9.0+PTX" or "sm_80 sm_90 compute_80"'
            raise BuildError(f"{name} holds {entry!r}\n{remedy}")
        number = found[5] or found[1] + found[2] + found[3]
        if not found[5]:
            archs[f"sm_{number}"] = None
        if found[5] or found[4]:
            archs[f"compute_{number}"] = None
    return tuple(archs)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compiled, by what."""

    cxx: tuple[str, ...]
    isas: tuple[str, ...]  # ascending; those whose flags the compiler knows
    nvcc: str | None = None
    why_no_cuda: str | None = None
    archs: tuple[str, ...] = ()
    werror: bool = False

    @classmethod
    def discover(cls) -> "Config":
        cxx = find_compiler()
        if cxx is None:
            raise BuildError("no C++ compiler was found\ninstall g++, or set CXX")
        known = tuple(isa for isa in ISA_FLAGS if knows_flags(cxx, ISA_FLAGS[isa]))
        if left_out := [isa for isa in ISA_FLAGS if isa not in known]:
            print(f"fastft: {shlex.join(cxx)} does not know {', '.join(left_out)}: left out", file=sys.stderr)
        nvcc, why_no_cuda = find_nvcc()
        werror = os.environ.get("FASTFT_WERROR", "0") == "1"
        return cls(cxx, known, nvcc, why_no_cuda, cuda_archs() if nvcc else (), werror)


def knows_flags(cxx: Sequence[str], flags: Sequence[str]) -> bool:
    command = [*cxx, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return not flags or subprocess.run(command, capture_output=True).returncode == 0


# ---- what is compiled: edges of the ninja file


@dataclasses.dataclass(frozen=True)
class Edge:
    """One command: `rule` is cxx, nvcc or link."""

    rule: str
    output: Path
    inputs: tuple[Path, ...]
    flags: tuple[str, ...] = ()
    after: tuple[Path, ...] = ()  # outputs of others that the command looks for by itself


def parsed_once(header: Path, folder: Path, flags: Sequence[str]) -> Edge:
    """What the compiler has read when it is through with a header: a third of most files' time."""
    return Edge("cxx", folder / f"{header.name}.gch", (header,), (*flags, "-x", "c++-header"))


def beginning_with(parsed: Edge, output: Path, source: Path, flags: Sequence[str]) -> Edge:
    """The object of a source that begins with that header. A compiler that cannot use what was read, for its own
    reasons, finds the header itself in the second folder."""
    first = (f"-I{parsed.output.parent}", f"-I{parsed.inputs[0].parent}", "-include", parsed.inputs[0].name)
    return Edge("cxx", output, (source,), (*first, *flags), (parsed.output,))


def compile_cpu(config: Config, folder: Path, flags: Sequence[str] = ()) -> list[Edge]:
    """csrc/cpu: every file once per instruction set into folder/<isa>/, but isa.cpp, which chooses among them, once.

    `flags` come last, so that a caller can take the same sources with other ones (sanitizers, -O1)."""
    own, parsed = {}, {}
    for isa in reversed(config.isas):
        names = (f"-DFASTFT_NAMESPACE=fastft::cpu::{isa}", f"-DFASTFT_ISA_{isa.upper()}=1")
        own[isa] = (*INCLUDES, *names, *ISA_FLAGS[isa], *flags)
        parsed[isa] = parsed_once(CSRC / "cpu" / "parsed_first.h", folder / isa, own[isa])
    edges = [*parsed.values()]
    for source in largest_first(CSRC.glob("cpu/*.cpp")):
        if source.name == "isa.cpp":
            edges.append(Edge("cxx", folder / "isa.o", (source,), (*INCLUDES, *flags)))
            continue
        for isa in own:
            edges.append(beginning_with(parsed[isa], folder / isa / f"{source.stem}.o", source, own[isa]))
    return edges


def compile_cuda(config: Config, folder: Path, flags: Sequence[str] = ()) -> list[Edge]:
    """csrc/cuda: every .cu once, for all architectures.

    Machine code is made from the oldest one's PTX: a front end's run for each is a fifth of the time, and no kernel
    asks for more. Only an architecture with a letter (sm_90a) is nobody's successor."""
    codes: dict[str, list[str]] = {}
    numbers = {arch: arch.partition("_")[2] for arch in config.archs}
    oldest = min((number for number in numbers.values() if number.isdigit()), key=int, default=None)
    for arch, number in numbers.items():
        successor = arch.startswith("sm_") and number.isdigit()
        codes.setdefault(oldest if successor else number, []).append(arch)
    gencode = [f"-gencode=arch=compute_{number},code=[{','.join(archs)}]" for number, archs in codes.items()]
    own = (*INCLUDES, "-DFASTFT_NAMESPACE=fastft::cuda", *gencode, *flags)
    sources = largest_first(CSRC.glob("cuda/*.cu"))
    return [Edge("nvcc", folder / "cuda" / f"{source.stem}.o", (source,), own) for source in sources]


def compile_binding(torch: Path, folder: Path, with_cuda: bool) -> list[Edge]:
    """csrc/binding: the only files that see torch. They pass pointers on, which -O1 does in 0.7 of the time."""
    own = ("-O1", *INCLUDES, f"-isystem{torch / 'include'}", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}")
    if with_cuda:
        own = (*own, "-DFASTFT_WITH_CUDA=1")
    folder = folder / "binding"
    parsed = parsed_once(CSRC / "binding" / "parsed_first_torch.h", folder, own)
    sources = largest_first(CSRC.glob("binding/*.cpp"))
    return [parsed, *(beginning_with(parsed, folder / f"{source.stem}.o", source, own) for source in sources)]


def largest_first(sources: Iterable[Path]) -> list[Path]:
    """Ninja starts edges in this order when it knows no times yet; a long one started last would run alone."""
    return sorted(sources, key=lambda source: (-source.stat().st_size, source.name))


def link(output: Path, edges: Iterable[Edge], flags: Sequence[str] = ()) -> Edge:
    """A shared library of the objects among `edges`; `flags` (libraries, too) come after them."""
    objects = tuple(edge.output for edge in edges if edge.output.suffix == ".o")
    return Edge("link", output, objects, (*LINK_FLAGS, *flags))


def library_edges(config: Config, torch: Path, folder: Path = BUILD) -> list[Edge]:
    """Everything that makes libfastft.so."""
    cuda = compile_cuda(config, folder) if config.nvcc else []
    objects = [*cuda, *compile_cpu(config, folder), *compile_binding(torch, folder, with_cuda=bool(cuda))]
    # --no-as-needed: in a CUDA build of torch, libtorch.so is what brings in the weak symbol of the current stream.
    flags = [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
    if cuda:
        home = cuda_home(config.nvcc)
        folders = (home / "lib64", home / "lib", home / "targets/x86_64-linux/lib")
        flags += [*(f"-L{path}" for path in folders), "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    return [*objects, link(folder / LIBRARY, objects, flags)]


def cuda_home(nvcc: str) -> Path:
    """Asked of nvcc itself: the file on PATH may be a script that starts another one."""
    dry = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    found = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
    if not found:
        raise BuildError(f"{nvcc} does not work: {dry.stderr.strip()}\nset CUDA_HOME to another CUDA, or FASTFT_CUDA=0")
    return Path(found[1].strip()).resolve()


# ---- ninja


def write_ninja(file: Path, edges: Iterable[Edge], config: Config) -> None:
    """Paths inside the checkout are relative to it, where ninja runs: a moved or copied tree stays up to date."""
    warnings = {"cxx": ["-Werror"], "nvcc": ["-Werror", "all-warnings"]} if config.werror else {"cxx": [], "nvcc": []}
    nvcc = [config.nvcc or "nvcc", "-ccbin", config.cxx[-1]]
    lines = [
        f"builddir = {ninja_path(file.parent)}",
        "rule cxx",
        "  description = $out",
        f"  command = {ninja_words([*config.cxx, *CXX_FLAGS, *warnings['cxx']])} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        "  description = $out",
        f"  command = {ninja_words([*nvcc, *NVCC_FLAGS, *warnings['nvcc']])} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  description = $out",
        f"  command = {ninja_words(config.cxx)} $in -o $out $flags",
    ]
    for edge in edges:
        inputs = " ".join([*map(ninja_path, edge.inputs), *("|" for _ in edge.after), *map(ninja_path, edge.after)])
        lines += [f"build {ninja_path(edge.output)}: {edge.rule} {inputs}", f"  flags = {ninja_words(edge.flags)}"]
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    if not file.is_file() or file.read_text() != text:
        file.write_text(text)


def ninja_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", relative(str(path)))


def ninja_words(words: Iterable[str]) -> str:
    return " ".join(shlex.quote(relative(word)) for word in words).replace("$", "$$")


def relative(text: str) -> str:
    return text.replace(f"{ROOT}{os.sep}", "")


def run_ninja(file: Path) -> None:
    """Runs all edges of the file; MAX_JOBS at a time, by default as many as there are CPUs to run on."""
    ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    with locked(file.parent / "lock"):
        done = subprocess.run([*ninja, "-f", str(file), "-j", jobs], cwd=ROOT)
    if done.returncode:
        remedy = "mend what it names, or do without that part: FASTFT_CUDA=0 or FASTFT_NATIVE=0"
        raise BuildError(f"compiling fastft failed, the reason stands above\n{remedy}")


class locked:
    """Two builds of one checkout at a time would write the same objects: the second waits."""

    def __init__(self, path: Path):
        self.file = path.open("w")

    def __enter__(self):
        import fcntl  # not on Windows, where nothing is compiled

        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_):
        self.file.close()


# ---- into the package


def build_library() -> dict:
    """Brings build/native/libfastft.so up to date; returns what it holds."""
    config, torch = Config.discover(), find_torch()
    edges = library_edges(config, torch)
    write_ninja(BUILD / "build.ninja", edges, config)
    run_ninja(BUILD / "build.ninja")
    return {
        "isas": config.isas,
        "archs": config.archs,
        "why_no_cuda": config.why_no_cuda,
        "torch": ".".join(map(str, torch_version(torch))),
        "compiler": version_line(config.cxx),
        "nvcc": version_line([config.nvcc]) if config.nvcc else None,
    }


def install_native(package: Path) -> None:
    """Puts the library, or the reason why there is none, and what it holds into the package's folder."""
    why_not = why_no_native()
    info = {"native": why_not is None, "why_not": why_not}
    if why_not is None:
        info |= build_library()
        replace(package / LIBRARY, (BUILD / LIBRARY).read_bytes())
    else:
        (package / LIBRARY).unlink(missing_ok=True)
        print(f"fastft: no native kernels: {why_not}", file=sys.stderr)
    replace(package / BUILD_INFO, (json.dumps(info, indent=1) + "\n").encode())


def replace(path: Path, content: bytes) -> None:
    """Never writes into the old file: a running process may have it mapped."""
    if path.is_file() and path.read_bytes() == content:
        return
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_bytes(content)
    fresh.chmod(0o755 if path.suffix == ".so" else 0o644)
    fresh.replace(path)


def version_line(command: Sequence[str]) -> str:
    """The line of `--version` that carries the number: the first of a compiler's, the last but one of nvcc's."""
    lines = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()
    return next((line for line in lines if re.search(r"\d+\.\d+", line)), lines[0])


class BuildPython(build_py):
    """The package's Python files, then the library beside them (in place for an editable install)."""

    def run(self):
        built = Path(self.build_lib) / "fastft"
        if not self.editable_mode and built.is_dir():
            shutil.rmtree(built)  # or modules deleted since the last build would be packed too
        super().run()
        install_native(ROOT / "fastft" if self.editable_mode else built)


class DevelopNative(Command):
    """python setup.py develop_native: the library, built incrementally, into the checkout's own fastft/."""

    user_options: ClassVar[list[tuple[str, str, str]]] = []

    def initialize_options(self):
        pass

    def finalize_options(self):
        pass

    def run(self):
        install_native(ROOT / "fastft")


class Wheel(bdist_wheel):
    """Any Python 3, no Python ABI; one platform if there is a library, else any."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class NativeDistribution(Distribution):
    def has_ext_modules(self):
        return why_no_native() is None


if __name__ == "__main__":
    commands = {"build_py": BuildPython, "develop_native": DevelopNative, "bdist_wheel": Wheel}
    setup(cmdclass=commands, distclass=NativeDistribution)
