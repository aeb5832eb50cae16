"""What fastft runs on: for `fastft env`, and beside every benchmark figure."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import fastft
from fastft import _library

PRODUCTS = {"dot": "by VDPBF16PS", "widen": "in float32"}  # of bfloat16


def describe():
    """Facts about this machine and installation, ready for JSON.

    ``native`` and ``cuda`` are booleans, each with a sentence in ``…_why_not`` where it is False; ``isas_held`` are the
    instruction sets in the library, ``isas`` those that can run here, ``isa`` the one in use; ``bf16`` is how products
    of bfloat16 are made, "dot" or "widen".
    """
    import torch

    build = _library.build_info()
    native, cuda = _library.available(), _library.has_cuda()
    return {
        "fastft": fastft.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate", "numpy")},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "native": native,
        "native_why_not": _library.why_not(),
        "isas_held": build.get("isas", []),
        "isas": _library.isas(),
        "isa": _library.isa() if native else None,
        "cuda": cuda,
        "cuda_why_not": None if cuda else _library.why_not() or build["why_no_cuda"],
        "cuda_archs": build.get("archs", []),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "backend": os.environ.get("FASTFT_BACKEND", "auto"),
        "choice": choice(),
        "bf16": _library.bf16() if native else None,  # after choice(), which reads what was measured
        "compiler": build.get("compiler"),
        "nvcc": build.get("nvcc"),
        "oldest_gpu_driver": oldest_driver(build.get("nvcc")),
    }


def choice():
    """By what kernels are chosen on the CPU, in a few words: ``"facts measured here: 864"`` or ``"shipped rule"``."""
    from fastft.functional import _choice, _tuning

    if not _tuning.enabled():
        return "shipped rule: FASTFT_TUNE is 0"
    if _tuning.in_group():
        return "shipped rule: several processes work together"
    count = len(_choice.facts_in_force().cells)
    return f"facts measured here: {count}" if count else "shipped rule: nothing was measured here yet"


def oldest_driver(nvcc):
    """The oldest NVIDIA driver that runs what this nvcc built (``"release 13.0, V13.0.88"``), as far as it is known."""
    release = re.search(r"release (\d+)", nvcc or "")
    return {"12": "525", "13": "580"}.get(release[1]) if release else None


def cpu_model():
    """Name, family and model: names alone do not tell AMD's generations apart."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor() or platform.machine()
    first = cpuinfo.read_text().split("\n\n")[0]
    fields = dict(map(str.strip, line.split(":", 1)) for line in first.splitlines() if ":" in line)
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name
