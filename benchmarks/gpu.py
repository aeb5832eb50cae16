"""Everything worth doing in the first ten minutes on a GPU, in one command: build, test, tune, measure.

    python -m benchmarks.gpu               all parts, nine minutes at most
    python -m benchmarks.gpu --dry-run     what they are, and how long each may take; needs no GPU
    python -m benchmarks.gpu --part step   one of them (repeatable)

Each part is a process of its own with a budget, so that a crash, a hang or a fault of the GPU costs that part alone; it
writes its results after every row into benchmarks/results/<GPU>-<date>/, as JSON, and tables and plots in the end.
``gpu.md`` says how each part went.

- build: the library with CUDA, unless it is there
- test: every op's spec within the error budget, the same bits twice, whole toy models, a captured step
- sanitize: the same, shortened, under compute-sanitizer's memcheck and racecheck, where there is one
- tune: which kernel is faster, into the user's file (fastft bench --tune has more sizes)
- ops: our kernels and PyTorch's beside the floor: a measured matrix product, a measured copy
- peers: Liger's cross-entropy and LayerNorm, flash-attention's LayerNorm, where they are installed
- step: BERT-base, BERT-large and MiniLM: Transformers under autocast and in pure bfloat16, torch.compile, fastft, and
  fastft's step as a CUDA graph
- memory: the most that a step has allocated
"""

import argparse
import contextlib
import datetime
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.cells import Cell, Training
from fastft import _library, functional
from fastft.functional import _choice, _shadow
from fastft.testing import Timed, all_specs, error, tune
from fastft.testing.measure import Measurement, measure
from fastft.testing.spec import OpSpec, TensorMaker
from fastft.testing.timing import BeatsPeak, Comparison, Peaks, compare, conditions

TOTAL_S = 530.0  # of all parts; nine minutes with what comes between them
GRACE_S = 8.0  # a part that has not ended that long after its budget is killed
NO_GPU = 2  # exit status

Row = dict[str, Any]


@dataclass
class Run:
    """What a part is told: where to measure, until when, where results go."""

    device: str
    deadline: float  # of time.monotonic()
    folder: Path
    tiny: bool  # a rehearsal: sizes at which only mistakes show

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def save(self, benchmark: str, rows: list[Row], peaks: Peaks | None = None) -> None:
        """Called after every row: whatever happens next, these are there."""
        limits = {} if peaks is None else {self.device: peaks.as_dict()}
        results = {"benchmark": benchmark, "conditions": conditions(), "peaks": limits, "rows": rows}
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{benchmark}.json"
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(results, indent=1) + "\n")
        fresh.replace(file)


# ---- the parts: each returns in a few words how it went, and raises where it failed


def build(run: Run) -> str:
    """Brings it up to date, where there is a compiler of CUDA's."""
    if run.device == "cpu":
        return "the library was there"
    command = [sys.executable, "setup.py", "--quiet", "develop_native"]
    done = subprocess.run(
        command,
        cwd=report.ROOT,
        env={**os.environ, "FASTFT_CUDA": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output = done.stdout.decode(errors="replace")
    if done.returncode and not (_library.has_cuda() and "no nvcc was found" in output):
        raise RuntimeError(f"setup.py failed: {output[-2000:]}")
    asked = [sys.executable, "-c", "from fastft import _library; print(_library.why_not_gpu() or '')"]
    if why_not := subprocess.run(asked, cwd=report.ROOT, stdout=subprocess.PIPE, text=True).stdout.strip():
        raise RuntimeError(why_not)
    return "the library was there, and there is no nvcc" if done.returncode else "built"


def test(run: Run) -> str:
    """Raises AssertionError: with the first line of every failure."""
    done, failures, left = 0, [], 0
    with _choice.use_backend("fastft"):
        for name, check in checks(run):
            if run.left < 0:
                left += 1
                continue
            done += 1
            try:
                check()
            except Exception as failure:
                failures.append(f"{name}: {type(failure).__name__}: {str(failure)[:600]}")
                if _is_lost(run.device):
                    failures[-1] += "; nothing more runs in this process"
                    break
            gc.collect()
    unfinished = f", {left} were not reached" if left else ""
    if failures:
        raise AssertionError(f"{len(failures)} of {done} checks failed{unfinished}\n" + "\n".join(failures))
    return f"{done} checks passed{unfinished}"


def _is_lost(device: str) -> bool:
    """Whether an error was one of those after which a process can do nothing more on its GPU."""
    try:
        return torch.ones(1, device=device).item() != 1
    except RuntimeError:
        return True


def checks(run: Run) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, check) of everything that can be right or wrong."""
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64):
        for spec in all_specs():
            if dtype in spec.dtypes_on(run.device):
                small = [i for i, sample in enumerate(spec.outline(dtype)) if spec.small(sample)]
                small = small[:2] if run.tiny else small
                name = f"{spec.name}, {str(dtype).removeprefix('torch.')}"
                yield f"{name}: error budget", lambda s=spec, i=small, d=dtype: error.check_op(s, i, d, run.device)
                yield f"{name}: the same bits", lambda s=spec, i=small, d=dtype: _check_bits(s, i, d, run.device)
    for autocast in (None, torch.bfloat16):
        yield f"toy model, autocast {autocast}", lambda a=autocast: _check_model(run.device, a)
    if run.device == "cuda":
        for spec in all_specs():
            large = [i for i, sample in enumerate(spec.outline()) if isinstance(sample, Timed)]
            name = f"{spec.name}: a benchmark's shape, bfloat16"
            yield name, lambda s=spec, i=large[:1]: error.check_op(s, i, torch.bfloat16, "cuda")
        yield "a captured step: dropout moves on", _check_capture
        yield "AdamW: copies of weights", _check_shadow
    for name, op in FAR.items():
        yield f"{name}: elements far apart", lambda op=op: _check_far(op, 2**14 if run.tiny else 2**31, run.device)


def _check_bits(spec: OpSpec, indices: list[int], dtype: torch.dtype, device: str) -> None:
    for index in indices:
        sample = spec.sample(index, dtype, device)

        def results(sample=sample):
            torch.manual_seed(0)
            make = TensorMaker(dtype, device)
            return error.run(spec.op, spec.named(sample), spec.differentiable(sample), make)

        for (name, first), second in zip(results().items(), results().values(), strict=True):
            if not torch.equal(first.nan_to_num(nan=7), second.nan_to_num(nan=7)):
                raise AssertionError(f"{sample}: {name} differs from run to run")


def _check_model(device: str, autocast: torch.dtype | None) -> None:
    import fastft

    cell = Cell("tiny", 8, 32, "float32", "uneven")
    stock, ours = (cell.classifier(device).train() for _ in range(2))
    fastft.optimize(ours, cls_only=False)
    for module in (*stock.modules(), *ours.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    error.check_model(ours, stock, lambda seed: cell.tensors(device), autocast)


FAR: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "layer_norm": lambda rows: functional.layer_norm(rows, rows.shape[1:]),
    "linear_act": lambda rows: functional.linear_act(rows, rows.new_ones(8, rows.shape[1]), None, "relu"),
}


def _check_far(op: Callable[[torch.Tensor], torch.Tensor], elements: int, device: str) -> None:
    """The last rows of a tensor that no 32-bit number counts have the bits that they have alone."""
    rows = torch.randn(elements // 1024 + 3, 1024, dtype=torch.bfloat16, device=device)
    if not torch.equal(op(rows)[-3:], op(rows[-3:].clone())):
        raise AssertionError(f"{tuple(rows.shape)}: the last rows are not what they are alone")


def _check_capture() -> None:
    """The weights stay, so that nothing but dropout tells one replay's loss from another's."""
    cell = Cell("tiny", 8, 32, "bfloat16", "uneven")
    training = Training(cell, {"cls_only": False}, graphed=True, device="cuda", lr=0.0)
    losses = []
    for _ in range(6):
        training.step()
        losses.append(float(training.loss))
    if len(set(losses)) < len(losses) or not all(loss == loss for loss in losses):
        raise AssertionError(f"losses of six replays: {losses}")


def _check_shadow() -> None:
    cell = Cell("tiny", 8, 32, "bfloat16", "uneven")
    training = Training(cell, {"cls_only": False}, our_optimizer=True, shadow=torch.bfloat16, device="cuda")
    for _ in range(3):
        training.step()
    taken = 0
    for weight in training.parameters:
        found = _shadow.low(weight, torch.bfloat16)
        taken += found is _shadow.low(weight, torch.bfloat16)
        if not torch.equal(found, weight.to(torch.bfloat16)):
            raise AssertionError(f"the copy of a weight {tuple(weight.shape)} is not what the weight is")
    if not taken:
        raise AssertionError("no weight has a copy")


def sanitize(run: Run) -> str:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "left out: there is no compute-sanitizer"
    said, names = [], ["memcheck", "racecheck"]
    for number, name in enumerate(names):
        command = [tool, "--tool", name, "--error-exitcode", "9", "--kernel-regex", "kns=fastft"]
        command += _child("test", run, budget=max(5.0, run.left / (len(names) - number)), tiny=True)
        done = subprocess.run(command, cwd=report.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output = done.stdout.decode(errors="replace")
        if done.returncode:
            raise RuntimeError(f"{name}: {output[-2000:]}")
        checks = re.findall(r"^\d+ checks passed.*", output, re.MULTILINE)  # the tool's own lines stand around it
        said.append(f"{name} found nothing: {checks[-1] if checks else 'but said nothing of any check'}")
    return "; ".join(said)


def tune_kernels(run: Run) -> str:
    tasks = [task for task in tune.tasks() if task.dtype == torch.bfloat16]
    tasks = tasks[:2] if run.tiny else tasks[::5]  # all over the grid
    cells = []
    for cell in tune.measured(tasks, run.device):
        cells.append(cell)
        if run.left < 2:
            break
    if not run.tiny:
        tune.write(cells, run.device)
    return f"{len(cells)} of {len(tasks)} cells, ours is faster in {sum(cell.runs == 'fastft' for cell in cells)}"


def ops(run: Run) -> str:
    peaks, measured, specs = Peaks(device=run.device), [], all_specs()
    for number, spec in enumerate(specs):
        end = time.monotonic() + run.left / (len(specs) - number)  # an equal part of the time for each
        for index, dtype, path in _ops_cases(spec, run.tiny):
            if time.monotonic() < end:
                rounds = 3 if run.tiny else 15
                measured.append(
                    measure(spec, index, dtype, path, device=run.device, rounds=rounds, peaks=peaks, budget_s=1.0)
                )
                run.save("ops", [_ops_row(row, peaks) for row in measured], peaks)
    peaks.finish()  # shares are of the whole run's
    run.save("ops", [_ops_row(row, peaks) for row in measured], peaks)
    return f"{len(measured)} rows, slower than allowed: {sum(row.slower for row in measured)}"


def _ops_cases(spec: OpSpec, tiny: bool) -> Iterator[tuple[int, torch.dtype, str]]:
    timed = [(i, sample) for i, sample in enumerate(spec.outline()) if isinstance(sample, Timed)]
    if tiny:
        yield min(timed, key=lambda case: spec.cost(case[1]))[0], torch.bfloat16, "train"
        return
    for dtype in (torch.bfloat16, torch.float32):
        for index, _ in timed:
            for path in ("forward", "train"):
                yield index, dtype, path


def _ops_row(row: Measurement, peaks: Peaks) -> Row:
    try:
        shares = row.shares(peaks)
    except BeatsPeak:  # FLOPs of causal attention count what is masked
        shares = dict.fromkeys(("alone", "fastft", "torch"))
    return {**row.as_dict(), "isa": peaks.device, "slower": row.slower, "shares": shares}


def peers(run: Run) -> str:
    rows: list[Row] = []
    for name, (op, make) in PEERS.items():
        with contextlib.suppress(ImportError):
            for row in _peer_rows(name, op, make(), run):
                rows.append(row)
                run.save("peers", rows)
    return f"{len(rows)} rows" if rows else "left out: none of them is installed"


def _peer_rows(name: str, op: str, theirs: Callable, run: Run) -> Iterator[Row]:
    (spec,) = (spec for spec in all_specs() if spec.name == op)
    for index, sample in enumerate(spec.outline()):
        if not isinstance(sample, Timed) or run.left < 2 or (run.tiny and spec.cost(sample) > 1e-3):
            continue
        arguments = spec.named(spec.sample(index, torch.bfloat16, run.device))
        leaves = {key: arguments[key].detach().requires_grad_() for key in spec.differentiable(sample)}
        arguments |= leaves

        def train(function: Callable, arguments=arguments, leaves=leaves) -> Callable[[], object]:
            return lambda: torch.autograd.grad(function(**arguments).sum(), list(leaves.values()))

        try:
            runs = {"fastft": train(spec.op), "torch": train(spec.reference), name: train(theirs)}
            times = compare(runs, rounds=11, device=run.device, budget_s=1.0)
        except Exception as failure:  # an argument that they do not have, a GPU that they do not know
            print(f"{name}: {sample.why}: {failure}", file=sys.stderr)
            continue
        for provider in runs:
            yield {
                "op": op,
                "sample": sample.why,
                "dtype": "bfloat16",
                "provider": provider,
                "time": asdict(times[provider]),
                "ratio": asdict(times.ratio(provider, "torch")),
            }


def _liger_cross_entropy() -> Callable:
    from liger_kernel.transformers.functional import liger_cross_entropy

    def run(input, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
        return liger_cross_entropy(
            input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )

    return run


def _liger_layer_norm() -> Callable:
    from liger_kernel.transformers.functional import liger_layer_norm

    return lambda input, normalized_shape, weight=None, bias=None, eps=1e-5: liger_layer_norm(input, weight, bias, eps)


def _flash_layer_norm() -> Callable:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    return lambda input, normalized_shape, weight=None, bias=None, eps=1e-5: layer_norm_fn(input, weight, bias, eps=eps)


PEERS = {
    "Liger": ("cross_entropy", _liger_cross_entropy),
    "Liger, LayerNorm": ("layer_norm", _liger_layer_norm),
    "flash-attention": ("layer_norm", _flash_layer_norm),
}

STOCK = "stock"
PROVIDERS: dict[str, dict[str, Any]] = {  # arguments of Training; stock is Transformers under autocast
    "fastft": {"optimize": {"cls_only": False}},
    "stock, converted": {"converted": True},
    "fastft, converted": {"optimize": {"cls_only": False}, "converted": True},
    "fastft, AdamW": {"optimize": {"cls_only": False}, "our_optimizer": True},
    "fastft, AdamW, shadow": {"optimize": {"cls_only": False}, "our_optimizer": True, "shadow": torch.bfloat16},
    "fastft, graph": {"optimize": {"cls_only": False}, "graphed": True},
    "fastft, converted, graph": {"optimize": {"cls_only": False}, "converted": True, "graphed": True},
    "fastft, first": {"optimize": {}},
}
COMPILED: dict[str, dict[str, Any]] = {
    "torch.compile": {"compiled": True},
    "torch.compile, max-autotune": {"compiled": "max-autotune"},
}
CELLS = [
    Cell("bert-base", 32, 128, "bfloat16"),
    Cell("bert-base", 32, 128, "bfloat16", "uneven"),  # padding-free
    Cell("minilm", 64, 128, "bfloat16"),
    Cell("bert-base", 128, 128, "bfloat16"),
    Cell("bert-base", 16, 512, "bfloat16"),
    Cell("bert-large", 16, 512, "bfloat16"),
]
TINY_CELLS = [Cell("tiny", 4, 32, "bfloat16")]


def step(run: Run) -> str:
    """Every cell without torch.compile first, which may take all the time there is."""
    rows: list[Row] = []
    peaks = Peaks(device=run.device)
    cells = TINY_CELLS if run.tiny else CELLS
    later, failed = [(cell, dict([item])) for cell in cells for item in COMPILED.items()], 0
    for cell, providers in [*((cell, PROVIDERS) for cell in cells), *(() if run.tiny else later)]:
        if run.left < 5:
            break
        try:
            for row in _step_rows(cell, providers, peaks, run):
                rows.append(row)
                run.save("step", rows, peaks)
        except Exception as failure:  # stock itself does not run: out of memory, say
            failed += 1
            print(f"{cell}: {type(failure).__name__}: {failure}", file=sys.stderr)
            _free(run.device)
    return f"{len(rows)} rows" + (f", {failed} cells failed" if failed else "")


def _step_rows(cell: Cell, providers: Mapping[str, dict], peaks: Peaks, run: Run) -> Iterator[Row]:
    """Each provider beside stock, two models in memory at a time."""
    stock, shown = Training(cell, device=run.device), set()
    for name, options in providers.items():
        if run.left < 5 or (options.get("graphed") and run.device != "cuda"):
            continue
        try:
            training = Training(cell, **options, device=run.device)
            runs = {STOCK: stock.step, name: training.step}
            times = compare(runs, rounds=3 if run.tiny else 9, peaks=peaks, device=run.device, budget_s=1.5)
        except Exception as failure:  # one that does not run costs its own row
            print(f"{cell}: {name}: {type(failure).__name__}: {failure}", file=sys.stderr)
            continue
        finally:
            training = runs = None  # before the next one is made
            _free(run.device)
        for provider in {STOCK, name} - shown:
            shown.add(provider)
            yield _step_row(cell, provider, times, peaks, "optimize" not in options)


def _step_row(cell: Cell, name: str, times: Comparison, peaks: Peaks, pytorch: bool) -> Row:
    flops, share = 3 * sum(cell.forward_flops()), None
    if name != "fastft, first":  # which leaves some out
        with contextlib.suppress(BeatsPeak):
            share = peaks.share(flops, 0, times[name].median, torch.bfloat16, pytorch=pytorch)
    row = {**asdict(cell), "provider": name, "time": asdict(times[name]), "ratio": asdict(times.ratio(name, STOCK))}
    return {**row, "kept": None, "flops": flops, "share": share}


def memory(run: Run) -> str:
    if run.device != "cuda":
        return "left out: PyTorch counts a GPU's memory only"
    rows: list[Row] = []
    for cell in TINY_CELLS if run.tiny else CELLS:
        grown = {}
        for name in (STOCK, "fast", "low", "lowest"):
            if run.left < 2:
                break
            options = None if name == STOCK else {"cls_only": False, "activation_memory": name}
            training = Training(cell, options, device="cuda")
            training.step()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            training.step()
            grown[name] = torch.cuda.max_memory_allocated() - before
            del training
            _free("cuda")
        for name, growth in grown.items():
            share = growth / grown[STOCK]
            rows.append({**asdict(cell), "provider": name, "growth": growth, "share": share, "goal": None})
        run.save("memory", rows)
    return f"{len(rows)} rows"


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Part:
    run: Callable[[Run], str]
    budget_s: float


PARTS = {
    "build": Part(build, 75),
    "test": Part(test, 110),
    "sanitize": Part(sanitize, 45),
    "tune": Part(tune_kernels, 30),
    "ops": Part(ops, 80),
    "peers": Part(peers, 20),
    "step": Part(step, 150),
    "memory": Part(memory, 20),
}


# ---- all of them, one after the other


def main() -> int:
    """0; 1 if a part failed; 2 if there is no GPU."""
    options = _options()
    if options.dry_run:
        for name, part in PARTS.items():
            print(f"{name:<9} {part.budget_s:4.0f} s at most")
        print(f"{'together':<9} {TOTAL_S:4.0f} s at most")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"benchmarks.gpu: torch {torch.__version__} finds no GPU that it can use", file=sys.stderr)
        return NO_GPU
    folder = options.folder or report.RESULTS / f"{_gpu_name(options.device)}-{datetime.date.today().isoformat()}"
    if options.child:
        return _run_child(options.part[0], Run(options.device, time.monotonic() + options.budget, folder, options.tiny))
    return _run_all(options, folder)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="list the parts and their budgets")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part (repeatable)")
    parser.add_argument("--folder", type=Path, help="where results go (benchmarks/results/<GPU>-<date>)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a rehearsal, with --tiny")
    parser.add_argument("--tiny", action="store_true", help="sizes at which only mistakes show")
    parser.add_argument("--budget", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _gpu_name(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else "rehearsal"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _run_all(options: argparse.Namespace, folder: Path) -> int:
    run = Run(options.device, time.monotonic() + TOTAL_S, folder, options.tiny)
    rows: list[Row] = []
    for name in options.part or PARTS:
        budget = min(PARTS[name].budget_s, run.left - GRACE_S)
        start = time.monotonic()
        if budget < 5:
            found = ("left out", "no time was left")
        else:
            print(f"{name}: {budget:.0f} s at most", file=sys.stderr, flush=True)
            found = _in_a_process(_child(name, run, budget, run.tiny), budget)
        rows.append({"part": name, "went": found[0], "seconds": f"{time.monotonic() - start:.0f}", "how": found[1]})
        print(f"{name}: {found[0]}: {found[1]}", file=sys.stderr, flush=True)
        run.save("gpu", [{**row, "how": " ".join(row["how"].split())} for row in rows])
        if name == "build" and found[0] != "done":  # what came behind would be PyTorch's, by the name of fastft
            break
    for benchmark in report.TABLES:
        if (folder / f"{benchmark}.json").is_file():
            report.write(folder, benchmark)
            print((folder / f"{benchmark}.md").read_text())
    print(f"saved to {folder}", file=sys.stderr)
    return 1 if any(row["went"] == "failed" for row in rows) else 0


def _child(name: str, run: Run, budget: float, tiny: bool) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--child", "--part", name, "--device", run.device]
    return [*command, "--budget", str(budget), "--folder", str(run.folder), *(["--tiny"] if tiny else [])]


def _run_child(name: str, run: Run) -> int:
    """Prints how it went as its last line."""
    try:
        print(f"\n{PARTS[name].run(run)}")
        return 0
    except Exception as failure:
        print(f"\n{type(failure).__name__}: {failure}")
        return 1


def _in_a_process(command: list[str], budget: float) -> tuple[str, str]:
    """("done", "failed" or "stopped", how)."""
    process = subprocess.Popen(
        command, cwd=report.ROOT, stdout=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=budget + GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own children, too
        process.communicate()
        return "stopped", f"took longer than {budget:.0f} s; what it had saved is there"
    if process.returncode:
        return "failed", output.strip()[-3000:] or f"exit status {process.returncode}"
    return "done", output.strip().splitlines()[-1]


if __name__ == "__main__":
    sys.exit(main())
