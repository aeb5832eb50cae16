"""What the compiler made of the CUDA kernels, judged without a GPU: registers, stack, occupancy, instructions.

Skipped where there is no nvcc. The disassembler comes with the packages nvidia-cuda-cuobjdump and -nvdisasm."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import simt

import setup


class Kernel(NamedTuple):
    """What is expected of a kernel, of the worst of its instances; fp64, for gradcheck, may keep fewer warps."""

    threads: int  # of a block
    warps: tuple[int, int]  # that an SM holds at a time, at most 64, on sm_80 and on sm_90
    dynamic: int = 0  # bytes of dynamic shared memory, of the instance that takes most
    tensor_cores: bool = False
    wide: bool = False  # moves 16 bytes of global memory at a time, but for NARROW


HELD, TWICE_HELD = 16512, 32896  # bytes that row.cuh asks for: four rows of BERT-large, one number a column or two

TABLE = {
    "adamw.cu scale_kernel": Kernel(256, (32, 32), wide=True),
    "adamw.cu adamw_kernel": Kernel(256, (24, 24), wide=True),
    "adamw.cu norm_kernel": Kernel(256, (64, 64)),
    "adamw.cu squares_kernel": Kernel(256, (40, 40), wide=True),
    "attention.cu grad_key_kernel": Kernel(128, (16, 16)),
    "attention.cu grad_query_kernel": Kernel(128, (16, 16)),
    "attention.cu forward_kernel": Kernel(128, (16, 16)),
    "attention_sm80.cu tensor_grad_key_kernel": Kernel(128, (4, 8), dynamic=88064, tensor_cores=True, wide=True),
    "attention_sm80.cu tensor_grad_query_kernel": Kernel(128, (4, 8), dynamic=88064, tensor_cores=True, wide=True),
    "attention_sm80.cu tensor_forward_kernel": Kernel(128, (8, 8), dynamic=70656, tensor_cores=True, wide=True),
    "cross_entropy.cu backward_kernel": Kernel(256, (16, 16), wide=True),  # of soft targets in 16 bits
    "cross_entropy.cu reduce_kernel": Kernel(256, (48, 48)),
    "cross_entropy.cu forward_kernel": Kernel(256, (16, 16), wide=True),
    "embedding.cu embedding_backward_kernel": Kernel(128, (16, 16), dynamic=TWICE_HELD, wide=True),
    "embedding.cu embedding_forward_kernel": Kernel(128, (20, 20), dynamic=HELD, wide=True),
    "embedding.cu embedding_partial_kernel": Kernel(256, (16, 16), wide=True),
    "embedding.cu embedding_runs_kernel": Kernel(256, (32, 32), wide=True),
    "embedding.cu embedding_scatter_kernel": Kernel(128, (28, 28), wide=True),
    "gemm_sm80.cu add_splits_kernel": Kernel(128, (64, 64)),
    "gemm_sm80.cu product_kernel": Kernel(128, (8, 8), dynamic=81920, tensor_cores=True, wide=True),
    "head.cu head_backward_kernel": Kernel(256, (16, 16), wide=True),
    "head.cu head_forward_kernel": Kernel(256, (24, 24), wide=True),
    "head.cu head_parameters_kernel": Kernel(256, (16, 16), wide=True),
    "layer_norm.cu layer_norm_sum_kernel": Kernel(256, (64, 64)),
    "layer_norm.cu layer_norm_partial_kernel": Kernel(256, (32, 32), wide=True),
    "layer_norm.cu layer_norm_backward_kernel": Kernel(128, (16, 16), dynamic=TWICE_HELD, wide=True),
    "layer_norm.cu layer_norm_forward_kernel": Kernel(128, (16, 16), dynamic=HELD, wide=True),
    "linear_act.cu column_sums_kernel": Kernel(256, (64, 64)),
    "linear_act.cu grad_preact_kernel": Kernel(256, (40, 40), wide=True),
    "linear_act.cu product_kernel": Kernel(256, (16, 16)),  # of data gradients; the others 24
    "packing.cu pack_kernel": Kernel(128, (64, 64), wide=True),
    "packing.cu unpack_kernel": Kernel(128, (64, 64), wide=True),
}

# Instances of wide kernels for rows off any grid, for rows of few classes, which are a thread's, and of fp64.
NARROW = re.compile(r"<1, |, 1>\(|<unsigned short>|<double")

ARCHS = ("sm_80", "sm_90")
SHARED = (164 << 10, 228 << 10)  # bytes of an SM
RESERVED = 1 << 10  # bytes of it for each block, which are in the report of sm_90 already


class Usage(NamedTuple):
    """Of an instance of a kernel."""

    REG: int
    STACK: int  # bytes; spilled registers lie there
    SHARED: int
    is_double: bool


def tool(name):
    """A program of CUDA's: from its package, or where nvcc is."""
    packages = [str(path.parent) for site in setup.package_folders() for path in site.glob(f"nvidia/*/bin/{name}")]
    nvcc = setup.find_nvcc()[0]
    return shutil.which(name, path=os.pathsep.join([*packages, str(Path(nvcc).resolve().parent) if nvcc else ""]))


@pytest.fixture(scope="module")
def objects():
    """The library's objects of csrc/cuda, for the architectures of ARCHS at least."""
    nvcc, why_not = setup.find_nvcc()
    if setup.why_no_native() or not nvcc:
        pytest.skip(setup.why_no_native() or why_not)
    if not set(ARCHS) <= set(setup.cuda_archs()):
        pytest.skip(f"built for {', '.join(setup.cuda_archs())} only")
    if not (tool("cuobjdump") and tool("nvdisasm")):
        pytest.skip("no cuobjdump and nvdisasm: install nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm")
    setup.build_library()
    return sorted((setup.BUILD / "cuda").glob("*.o"))


def cuobjdump(*arguments):
    paths = os.pathsep.join([str(Path(tool("nvdisasm")).parent), os.environ["PATH"]])
    command = [tool("cuobjdump"), *arguments]
    environment = {**os.environ, "PATH": paths}
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def instances(text, header):
    """(name of the kernel, instance, what is said of it) for each; other functions are left out."""
    _, *parts = re.split(header, text)
    for instance, body in zip(parts[::2], parts[1::2], strict=True):
        found = re.search(
            r"\(anonymous namespace\)::(\w+)", instance
        )  # the first: others are arguments of its template
        if found and found[1] in {name for _, name in simt.declared()}:
            yield found[1], instance, body


def is_double(instance):
    return bool(re.match(r"[^(]*\(anonymous namespace\)::\w+<[^(]*\bdouble\b", instance))


@pytest.fixture(scope="module")
def usage(objects):
    """(file, kernel) -> for each architecture, registers, stack and shared memory of its instances."""
    found = {}
    for path in objects:
        for at, arch in enumerate(ARCHS):
            text = cuobjdump("--dump-resource-usage", "-arch", arch, path)
            for name, instance, body in instances(text, r" Function (.*):\n"):
                numbers = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", body))
                entry = found.setdefault(f"{path.stem}.cu {name}", ([], []))
                entry[at].append(Usage(*(int(numbers[key]) for key in Usage._fields[:3]), is_double(instance)))
    return found


def warps_resident(registers, shared, threads, arch):
    """As CUDA's occupancy calculator: registers go to warps by 256, in each of an SM's four parts."""
    warps = -(-threads // 32)
    by_registers = 4 * (16384 // (-(-registers * 32 // 256) * 256)) // warps
    by_shared = SHARED[arch] // shared
    return warps * min(by_registers, by_shared, 64 // warps, 32)


def reserved(shared, arch):
    return shared + RESERVED if ARCHS[arch] == "sm_80" else max(shared, RESERVED)


def test_table_names_every_kernel(usage):
    assert usage.keys() == TABLE.keys()
    assert {tuple(name.split()) for name in usage} == simt.declared()


@pytest.mark.parametrize("name", TABLE)
def test_registers_and_shared_memory_leave_room_for_as_many_warps_as_expected(name, usage):
    expected = TABLE[name]
    for at, arch in enumerate(ARCHS):
        found = [
            warps_resident(of.REG, expected.dynamic + reserved(of.SHARED, at), expected.threads, at)
            for of in usage[name][at]
            if not of.is_double
        ]
        if found:
            assert min(found) >= expected.warps[at], (arch, usage[name][at])


@pytest.mark.parametrize("name", TABLE)
def test_no_register_is_spilled(name, usage):
    for entry in usage[name]:
        assert entry and not any(of.STACK for of in entry), entry


def test_instructions_are_those_of_tensor_cores_and_wide_loads_where_they_should_be(objects):
    tensor_cores, wide, narrow = set(), set(), []
    for path in objects:
        for name, instance, body in instances(cuobjdump("-sass", "-arch", ARCHS[0], path), r"Function : (.*)\n"):
            kernel = f"{path.stem}.cu {name}"
            if re.search(r"\bHMMA\.", body):
                tensor_cores.add(kernel)
            if re.search(r"\b(LDG|STG|LDGSTS)\.[A-Z0-9.]*\b128\b", body):
                wide.add(kernel)
            elif TABLE[kernel].wide and not NARROW.search(instance):
                narrow.append(instance)
    assert tensor_cores == {name for name, kernel in TABLE.items() if kernel.tensor_cores}
    assert wide == {name for name, kernel in TABLE.items() if kernel.wide}
    assert not narrow


@pytest.mark.slow
@pytest.mark.parametrize("front_end", ["compute_80", "its own"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_compiles_for_every_architecture_without_a_warning_or_a_spill(arch, front_end, tmp_path):
    """From compute_80's PTX, as the library's machine code is and what a driver compiles; and for this one alone."""
    nvcc, why_not = setup.find_nvcc()
    if not nvcc or not tool("cuobjdump"):
        pytest.skip(why_not or "no cuobjdump: install nvidia-cuda-cuobjdump")
    archs = (arch,) if front_end == "its own" else (arch, front_end)
    config = setup.Config(setup.find_compiler(), (), nvcc, None, archs, werror=True)
    edges = setup.compile_cuda(config, tmp_path)
    setup.write_ninja(tmp_path / "build.ninja", edges, config)
    setup.run_ninja(tmp_path / "build.ninja")
    for edge in edges:
        usage = cuobjdump("--dump-resource-usage", "-arch", arch, edge.output)
        used = re.findall(r"Function (.*):\n.*STACK:(\d+)", usage)
        assert used and not [function for function, stack in used if int(stack)], edge.output
