"""What users install: one wheel, on a copy of the checkout that shares its compiled objects."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import fastft
import setup

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
LEFT_OUT = (".git", ".venv", ".*_cache", "__pycache__", "*.egg-info", "dist", "lib", "lib.*", "bdist.*", "demo")
# Runs our kernels on numbers that are exact in any order of summation.
SMOKE = """
import torch, fastft
from fastft.functional import linear_act
x, w = torch.arange(6.0).view(2, 3).requires_grad_(), torch.ones(4, 3)
y = linear_act(x, w, torch.zeros(4), "relu")
y.sum().backward()
assert y.tolist() == [[3.0] * 4, [12.0] * 4] and x.grad.tolist() == [[4.0] * 3] * 2
print(fastft.__file__)
"""


def copied(checkout, folder):
    """A copy of a checkout with its objects; time stamps are kept, so that ninja finds them up to date."""
    return shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))


def run(command, cwd, **variables):
    """Runs a command outside of the checkout; a variable that is None is unset."""
    environment = {**os.environ, **variables}
    environment.pop("PYTHONPATH", None) if "PYTHONPATH" not in variables else None
    environment = {name: str(value) for name, value in environment.items() if value is not None}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def make_wheel(checkout, *options, **variables):
    """pip wheel; returns the finished process and the wheels it left."""
    dist = checkout / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    done = run([*PIP, "wheel", ".", "--no-deps", "--wheel-dir", dist, *options], checkout, **variables)
    return done, sorted(dist.glob("*.whl"))


def installed(wheel, folder):
    """The wheel unpacked where PYTHONPATH can point at."""
    subprocess.run([*PIP, "install", "--quiet", "--no-deps", "--target", folder, wheel], check=True)
    return folder


def env(site, *options):
    """What `fastft env` says of an installation."""
    done = run([sys.executable, "-m", "fastft", "env", *options], site, PYTHONPATH=site, COLUMNS="500")
    assert done.returncode == 0, done.stderr
    return done.stdout


def smoke(site, **variables):
    done = run([sys.executable, "-c", SMOKE], site, PYTHONPATH=site, **variables)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent.parent == site


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    if setup.why_no_native() is None:
        setup.build_library()
    return copied(setup.ROOT, tmp_path_factory.mktemp("build") / "checkout")


@pytest.fixture(scope="session")
def wheel(checkout):
    """The wheel that pip builds, in isolation as for a user."""
    start = time.perf_counter()
    done, wheels = make_wheel(checkout)
    print(f"pip wheel, objects reused: {time.perf_counter() - start:.1f} s")
    assert done.returncode == 0, done.stderr
    assert len(wheels) == 1
    return wheels[0]


@pytest.fixture(scope="session")
def site(wheel, tmp_path_factory):
    return installed(wheel, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def library(site):
    if reason := setup.why_no_native():
        pytest.skip(reason)
    return site / "fastft" / setup.LIBRARY


# ---- the wheel


def test_one_wheel_serves_every_python(wheel):
    platform = "any" if setup.why_no_native() else "linux_x86_64"
    assert wheel.name == f"fastft-{fastft.__version__}-py3-none-{platform}.whl"


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    modules = {str(file.relative_to(setup.ROOT)) for file in setup.ROOT.glob("fastft/**/*.py")}
    native = {f"fastft/{setup.BUILD_INFO}"} | (set() if setup.why_no_native() else {f"fastft/{setup.LIBRARY}"})
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == modules | native


def test_the_installed_wheel_runs(site, library):
    smoke(site, FASTFT_BACKEND="fastft")
    assert json.loads(env(site, "--json"))["isas_held"] == list(setup.Config.discover().isas)
    assert re.search("native kernels +loaded", env(site))


def test_the_library_needs_only_torchs_stable_abi(library):
    listing = subprocess.run(
        ["nm", "-D", "--demangle", "--undefined-only", library], capture_output=True, text=True, check=True
    )
    names = [line.split(maxsplit=1)[1] for line in listing.stdout.splitlines()]
    assert [name for name in names if re.match(r"_?Py|(non-virtual thunk to )?(at|c10|torch|pybind11)::", name)] == []
    dynamic = subprocess.run(
        ["readelf", "--dynamic", "--wide", library], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    assert "libtorch.so" in needed
    assert needed - {"libtorch.so", "libtorch_cpu.so"} <= {
        *("libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "ld-linux-x86-64.so.2"),
        *("libpthread.so.0", "libdl.so.2", "librt.so.1"),  # of a C library before 2.34
    }
    assert not re.search("RPATH|RUNPATH", dynamic)


def test_the_library_exports_nothing(library):
    listing = subprocess.run(
        ["nm", "-D", "--demangle", "--defined-only", library], capture_output=True, text=True, check=True
    )
    assert [line for line in listing.stdout.splitlines() if "fastft" in line or "cuda" in line] == []


def fatbin_archs(library):
    """Architectures of the CUDA code in a library, read from the fat binaries' own headers."""
    data, found, magic = library.read_bytes(), set(), struct.pack("<I", 0xBA55ED50)
    start = data.find(magic)
    while start >= 0:
        header, size = struct.unpack_from("<6xHQ", data, start)
        entry, end = start + header, start + header + size
        while entry < end:
            kind, header, size, arch = struct.unpack_from("<H2xIQ12xI", data, entry)
            found.add(f"{ {1: 'compute', 2: 'sm'}[kind] }_{arch}")
            entry += header + size
        start = data.find(magic, end)
    return found


def test_cuda_code_is_for_the_architectures_asked_for_or_its_absence_is_explained(site, library):
    nvcc, why_no_cuda = setup.find_nvcc()
    assert fatbin_archs(library) == set(setup.cuda_archs() if nvcc else ())
    facts = json.loads(env(site, "--json"))
    assert (facts["cuda"], facts["cuda_why_not"]) == (nvcc is not None, why_no_cuda)


# ---- installations that lack something


def test_without_native_kernels_it_installs_and_says_so(checkout, tmp_path):
    done, wheels = make_wheel(checkout, "--no-build-isolation", FASTFT_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert [wheel.name for wheel in wheels] == [f"fastft-{fastft.__version__}-py3-none-any.whl"]
    site = installed(wheels[0], tmp_path)
    smoke(site)
    assert "none, PyTorch's run instead: fastft has no native library: it was installed with FASTFT_NATIVE=0" in env(
        site
    )


def test_without_a_compiler_it_installs_and_says_so(checkout, tmp_path):
    done, wheels = make_wheel(checkout, "--no-build-isolation", PATH=str(tmp_path), CXX=None)
    assert done.returncode == 0, done.stderr
    site = installed(wheels[0], tmp_path / "site")
    smoke(site)
    assert "fastft has no native library: no C++ compiler was found at installation" in env(site)


def test_without_cuda_it_installs_and_says_so(checkout, library, tmp_path):
    done, wheels = make_wheel(copied(checkout, tmp_path / "checkout"), "--no-build-isolation", FASTFT_CUDA="0")
    assert done.returncode == 0, done.stderr
    site = installed(wheels[0], tmp_path / "site")
    smoke(site, FASTFT_BACKEND="fastft")
    assert fatbin_archs(site / "fastft" / setup.LIBRARY) == set()
    assert re.search("CUDA kernels +none: it was built with FASTFT_CUDA=0", env(site))


def test_a_broken_compile_is_an_error_that_ends_with_the_remedy(checkout, library, tmp_path):
    broken = copied(checkout, tmp_path / "checkout")
    with (broken / "csrc/cpu/isa.cpp").open("a") as source:
        source.write("this is not C++\n")
    done = run([sys.executable, "setup.py", "bdist_wheel"], broken)
    assert done.returncode == 1
    assert not list(broken.glob("dist/*"))
    remedy = "mend what it names, or do without that part: FASTFT_CUDA=0 or FASTFT_NATIVE=0"
    assert done.stderr.splitlines()[-1] == remedy
    assert make_wheel(broken, "--no-build-isolation")[0].returncode == 1


def test_a_second_build_has_nothing_to_do(checkout, library):
    done = run([sys.executable, "setup.py", "develop_native"], checkout)
    assert done.returncode == 0
    assert "ninja: no work to do." in done.stdout


# ---- other ways to build, from nothing


@pytest.mark.slow
def test_python_m_build_makes_the_same_wheel(wheel, checkout, tmp_path):
    done = run([sys.executable, "-m", "build", "--outdir", tmp_path, "."], checkout)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / wheel.name).is_file()
    assert zipfile.ZipFile(tmp_path / wheel.name).namelist() == zipfile.ZipFile(wheel).namelist()


@pytest.mark.slow
def test_uv_installs_beside_a_torch_that_only_the_target_has(checkout, library, tmp_path):
    done = run([sys.executable, "-m", "uv", "pip", "install", "--no-deps", "--target", tmp_path, "."], checkout)
    assert done.returncode == 0, done.stderr
    smoke(tmp_path, FASTFT_BACKEND="fastft")


# ---- what the build finds


@pytest.fixture
def clean(monkeypatch):
    for name in ("FASTFT_TORCH", "FASTFT_NATIVE", "FASTFT_CUDA", "FASTFT_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def fake_torch(folder, version):
    header = folder / "include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (folder / "version.py").write_text(f"__version__ = '{version}+cpu'\n")
    return folder


def test_torch_is_found_where_fastft_torch_says(clean, tmp_path):
    package = fake_torch(tmp_path / "env/lib/python3.12/site-packages/torch", "2.10.1")
    for named in (package, package.parent, tmp_path / "env"):
        clean.setenv("FASTFT_TORCH", str(named))
        assert setup.find_torch() == package


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX", "PATH", "PWD"])
def test_torch_is_found_from_inside_build_isolation(clean, tmp_path, variable):
    folder = tmp_path / ".venv"
    package = fake_torch(folder / "lib/python3.12/site-packages/torch", "2.11.0")
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX", "PATH", "PWD"):
        clean.delenv(name, raising=False)
    clean.setattr(sys, "prefix", str(tmp_path / "isolated"))
    clean.setattr(setup, "prefixes_of_callers", lambda folder: [])
    clean.setattr(setup, "ROOT", tmp_path / "isolated" / "checkout")  # this one may have a .venv, which would be found
    clean.setenv(variable, str({"PATH": folder / "bin", "PWD": tmp_path / "some/folder"}.get(variable, folder)))
    assert setup.find_torch() == package


@pytest.mark.skipif(not Path("/proc/self/cmdline").is_file(), reason="needs Linux's /proc")
@pytest.mark.parametrize("trace", ["command line", "variable"])
def test_torch_is_found_by_the_front_end_that_runs_the_build(tmp_path, trace):
    package = fake_torch(tmp_path / "env/lib/python3.12/site-packages/torch", "2.11.0")
    front_end = tmp_path / "env/bin/python"
    front_end.parent.mkdir()
    front_end.symlink_to(sys.executable)
    build = "import sys, setup; sys.prefix = ''; print(setup.find_torch())"
    # A front end replaces VIRTUAL_ENV for the build that it starts.
    start = "import os, subprocess, sys; del os.environ['VIRTUAL_ENV']; subprocess.run([sys.executable, *sys.argv[1:]])"
    program, named = (front_end, tmp_path) if trace == "command line" else (sys.executable, tmp_path / "env")
    path = os.pathsep.join([str(setup.ROOT), *sys.path])
    unset = {"CONDA_PREFIX": None, "FASTFT_TORCH": None, "PATH": ""}
    done = run([program, "-c", start, "-c", build], tmp_path, VIRTUAL_ENV=named, PYTHONPATH=path, **unset)
    assert done.stdout.strip() == str(package), done.stderr


def test_without_torch_the_last_line_is_the_remedy(clean, tmp_path):
    clean.setattr(setup, "package_folders", lambda: [tmp_path])
    with pytest.raises(setup.BuildError) as error:
        setup.find_torch()
    assert str(error.value).splitlines()[-1].startswith("install torch first, or set FASTFT_TORCH to")
    fake_torch(tmp_path / "torch", "2.9.1")
    with pytest.raises(setup.BuildError, match=r"no torch 2\.10 or later with headers was found; .*torch is 2\.9\n"):
        setup.find_torch()


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("", ("sm_80", "sm_90", "compute_80")),
        ("8.0;9.0a+PTX", ("sm_80", "sm_90a", "compute_90a")),
        ("sm_86, compute_86", ("sm_86", "compute_86")),
        ("12.0 10.0f", ("sm_120", "sm_100f")),
    ],
)
def test_cuda_architectures(clean, text, archs):
    clean.setenv("FASTFT_CUDA_ARCHS", text)
    assert setup.cuda_archs() == archs


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FASTFT_NATIVE": "yes"}, "FASTFT_NATIVE is 'yes'\nset FASTFT_NATIVE to 0, 1 or auto"),
        ({"FASTFT_NATIVE": "1", "PATH": ""}, "FASTFT_NATIVE is 1, but no C++ compiler was found"),
        ({"FASTFT_CUDA": "1", "PATH": "", "CUDA_HOME": "", "CUDA_PATH": ""}, "FASTFT_CUDA is 1, but no nvcc was found"),
        ({"FASTFT_CUDA_ARCHS": "hopper"}, "FASTFT_CUDA_ARCHS holds 'hopper'\nwrite it as"),
        ({"CXX": "no-such-compiler"}, "CXX is 'no-such-compiler', which is not on PATH"),
        ({"FASTFT_TORCH": "/nowhere"}, "FASTFT_TORCH is '/nowhere', where no torch 2.10 or later"),
    ],
)
def test_a_wrong_variable_is_named_with_its_value(clean, variables, message):
    clean.setattr(setup, "package_folders", list)
    for name, value in variables.items():
        clean.setenv(name, value)
    with pytest.raises(setup.BuildError, match=re.escape(message)):
        for find in (setup.why_no_native, setup.find_compiler, setup.find_nvcc, setup.cuda_archs, setup.find_torch):
            find()


@pytest.mark.parametrize(("system", "machine"), [("linux", "aarch64"), ("darwin", "arm64"), ("win32", "AMD64")])
def test_other_platforms_are_told_that_there_is_no_gain(clean, system, machine):
    clean.setattr(sys, "platform", system)
    clean.setattr("platform.machine", lambda: machine)
    assert "so no gain here" in setup.why_no_native()
