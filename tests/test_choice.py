"""Which kernel runs: facts that were measured, read from a file that may be anything, and the shipped rule without."""

import ctypes
import json
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from typer.testing import CliRunner

import fastft
from fastft import _library, environment
from fastft.cli.main import app
from fastft.functional import _choice, _tuning, attention, linear_act
from fastft.functional._tuning import Cell, Facts
from fastft.testing import tune
from fastft.testing.measure import measure
from fastft.testing.spec import KernelCalls

pytestmark = pytest.mark.skipif(not _library.available(), reason=f"no native library: {_library.why_not()}")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """FASTFT_TUNE on, with a folder of the test's own, empty still."""
    monkeypatch.delenv("FASTFT_TUNE")
    monkeypatch.setenv("FASTFT_CACHE", str(tmp_path / "cache"))
    _tuning.forget()
    with _library.use_bf16(_library.bf16()):
        yield tmp_path / "cache"
    monkeypatch.undo()
    _tuning.forget()


FAKES = FakeTensorMode()
UNASKED = _library.bf16() if _library.available() else None  # how bfloat16 is multiplied without facts


def cell(runs="torch", sizes=(64, 64, 64), path="forward", dtype="float32", op="linear_act"):
    return Cell(op, dtype, path, sizes, runs, fastft_us=2.0, torch_us=1.0)


def store(*cells, bf16=None):
    assert _tuning.store(Facts(cells, bf16), "cpu", torch.get_num_threads())


def ours_runs(M=64, K=64, N=64, dtype=torch.float32, train=False):
    """Whether our kernel runs for such a call."""
    weight = torch.ones(N, K, dtype=dtype, requires_grad=train)
    with KernelCalls() as kernels:
        linear_act(torch.ones(M, K, dtype=dtype), weight)
    return bool(kernels.calls)


def test_without_facts_the_shipped_rule_chooses(cache):
    assert ours_runs() and not ours_runs(M=8)
    assert _choice.facts() == {}
    assert not cache.exists()


def test_attention_of_little_work_is_pytorchs_unless_that_has_no_kernel_for_it(cache):
    def ours(N, S, dtype=torch.float32, train=False, **options):
        shape = (N, S, 16) if options.get("cu_seqlens") is not None else (1, N, S, 16)
        query = torch.ones(shape, dtype=dtype, requires_grad=train)
        with KernelCalls() as kernels:
            attention(query, query, query, **options)
        return bool(kernels.calls)

    threads = torch.get_num_threads()
    assert not ours(2, 8) and not ours(2, 8, torch.bfloat16) and ours(8, 32, torch.bfloat16)
    assert ours(2, 8, dropout_p=0.5) and ours(16, 2, cu_seqlens=torch.tensor([0, 6, 16]))
    assert ours(2 * threads, 128) and not ours(4096, 1)
    assert threads == 1 or not ours(1, 192)


def test_a_fact_overturns_the_shipped_rule_either_way(cache):
    store(cell("torch", (64, 64, 64)), cell("fastft", (16, 384, 768)))
    assert not ours_runs() and ours_runs(16, 384, 768)


def test_facts_are_not_asked_where_asking_would_take_as_long(cache):
    store(cell("fastft", (8, 64, 64)))
    assert not ours_runs(8, 64, 64)


def test_a_fact_is_about_its_dtype_and_pass_only(cache):
    store(cell("torch", path="train", dtype="bfloat16"))
    assert ours_runs() and ours_runs(dtype=torch.bfloat16) and ours_runs(train=True)
    assert not ours_runs(dtype=torch.bfloat16, train=True)


def test_a_fact_under_autocast_is_that_of_autocasts_dtype(cache):
    store(cell("torch", dtype="bfloat16"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not ours_runs()


def test_a_fact_stands_for_similar_sizes(cache):
    store(cell("torch", (128, 96, 96)))
    assert not ours_runs(64) and not ours_runs(255) and not ours_runs(64, 64, 127)
    assert ours_runs(64, 64, 128) and ours_runs(64, 128, 64)


def test_what_holds_for_the_most_rows_holds_for_more(cache):
    store(cell("fastft", (64, 64, 64)), cell("torch", (512, 64, 64)))
    assert ours_runs(64) and not ours_runs(5000)


def test_facts_of_another_number_of_threads_do_not_count(cache):
    store(cell())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert ours_runs()
    finally:
        torch.set_num_threads(before)
    assert not ours_runs()


@pytest.mark.parametrize("what", ("fastft", "torch", "instruction set", "processor"))
def test_facts_of_something_else_do_not_count(cache, monkeypatch, what):
    store(cell())
    if what == "fastft":
        monkeypatch.setattr(fastft, "__version__", "0.0.1")
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "2.10.0")
    elif what == "instruction set":
        monkeypatch.setattr(_library, "isa", lambda: "baseline")
    else:
        monkeypatch.setattr(environment, "cpu_model", lambda: "another")
    _tuning.forget()
    assert ours_runs()


def test_facts_of_others_stay_when_ours_are_written(cache):
    _tuning.store(Facts((cell(),)), "cpu", 77)
    store(cell("fastft", (8, 64, 64)))
    store(cell("fastft", (2, 64, 64)))
    assert _tuning.load("cpu", 77) == Facts((cell(),))
    assert [c.sizes for c in _tuning.load("cpu", torch.get_num_threads()).cells] == [(2, 64, 64)]


DAMAGED = {
    "empty": b"",
    "cut off": b'{"format": 1, "machines": {"',
    "not text": b"\xff\xfe\x00",
    "a list": b"[1, 2]",
    "a number": b"7",
    "another format": b'{"format": 2, "machines": {}}',
    "somebody else's": b'{"name": "sentiment", "version": "5.0.2"}',
    "machines are a list": b'{"format": 1, "machines": [3]}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_one_warning_and_the_shipped_rule(cache, content):
    cache.mkdir()
    _tuning.path().write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"tuning\.json is damaged.*; the shipped rule chooses kernels") as caught:
        assert ours_runs() and not ours_runs(M=8) and ours_runs(M=100)
    assert len(caught) == 1
    store(cell())  # the next measurement replaces it
    assert not ours_runs()


@pytest.mark.parametrize(
    "change",
    (
        {"runs": "tensorflow"},
        {"sizes": [64, 64]},
        {"sizes": [64, -1, 64]},
        {"sizes": 64},
        {"dtype": "float31"},
        {"path": "sideways"},
        {"torch_us": "fast"},
        {"color": "blue"},
        None,
    ),
)
def test_a_damaged_fact_is_one_warning_and_the_shipped_rule(cache, change):
    store(cell(sizes=(64, 64, 64)))
    content = json.loads(_tuning.path().read_text())
    (machine,) = content["machines"].values()
    machine["cells"][0] = {**machine["cells"][0], **change} if change else change
    _tuning.path().write_text(json.dumps(content))
    _tuning.forget()
    if change == {"sizes": [64, 64]}:  # the sizes of another op: nothing to complain of
        assert ours_runs()
        return
    with pytest.warns(RuntimeWarning, match=r"tuning\.json is damaged") as caught:
        assert ours_runs() and ours_runs(M=100)
    assert len(caught) == 1


def test_a_file_that_cannot_be_read_is_one_warning(cache):
    _tuning.path().mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match=r"tuning\.json cannot be read \(Is a directory\)") as caught:
        assert ours_runs() and ours_runs(M=100)
    assert len(caught) == 1


def test_a_file_that_cannot_be_written_is_one_warning_and_leaves_nothing(cache):
    _tuning.path().mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match=r"tuning\.json cannot be written \(Is a directory\)") as caught:
        assert not _tuning.store(Facts((cell(),)), "cpu", 1)
    assert len(caught) == 1
    assert list(cache.iterdir()) == [_tuning.path()]


def test_facts_are_neither_read_nor_written_with_fastft_tune_0(cache, monkeypatch, capsys):
    store(cell())
    before = _tuning.path().read_bytes()
    monkeypatch.setenv("FASTFT_TUNE", "0")
    _tuning.forget()
    assert ours_runs()
    fastft.optimize(torch.nn.Linear(64, 64))
    assert capsys.readouterr().err == "" and _tuning.path().read_bytes() == before
    assert CliRunner().invoke(app, ["bench", "--tune"]).exit_code == 1


def test_in_a_group_of_processes_the_shipped_rule_chooses(cache):
    store(cell())
    assert not ours_runs()
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        assert ours_runs()
        with _choice.use_facts(Facts((cell(),)).as_dict()):  # of a checkpoint, which all of them have
            assert not ours_runs()
        fastft.optimize(torch.nn.Linear(64, 64))
    finally:
        torch.distributed.destroy_process_group()
    assert not ours_runs()


def test_a_checkpoint_carries_its_choices_to_another_machine(cache):
    store(cell(), bf16="widen")
    carried = json.loads(json.dumps(_choice.facts()))
    _tuning.path().unlink()
    _tuning.forget()
    assert ours_runs()
    with _choice.use_facts(carried):
        assert not ours_runs() and _choice.facts() == carried
        assert _library.bf16() == "widen"
        with _choice.use_facts({}):
            assert ours_runs() and _choice.facts() == {}
            assert _library.bf16() == UNASKED
        assert not ours_runs() and _library.bf16() == "widen"
    assert ours_runs()


@pytest.mark.parametrize("given", ({"cells": []}, {"bf16": "often", "cells": []}, [1], {"bf16": None, "cells": [{}]}))
def test_facts_that_are_none_are_refused(given):
    with pytest.raises(ValueError, match="use_facts: these are no facts of fastft's"), _choice.use_facts(given):
        pass


def test_the_backend_goes_before_facts(cache):
    store(cell())
    with _choice.use_backend("fastft"):
        assert ours_runs()


def test_facts_make_torch_compile_compile_no_more_often(cache):
    from torch._dynamo.testing import CompileCounter

    store(*(cell("torch", (rows, 64, 64)) for rows in (64, 256, 1024)))
    counter = CompileCounter()
    compiled = torch.compile(linear_act, backend=counter, fullgraph=True, dynamic=True)
    torch._dynamo.reset()
    for rows in (65, 257, 1025):
        compiled(torch.ones(rows, 64), torch.ones(64, 64))
    assert counter.frame_count == 1


# ---- products of bfloat16


def product(how):
    with _library.use_bf16(how):
        torch.manual_seed(0)
        return linear_act(*(torch.randn(96, 768).bfloat16() for _ in range(2)))


@pytest.mark.skipif(UNASKED == "widen", reason="this CPU has no VDPBF16PS, or FASTFT_ISA leaves it out")
def test_widened_products_are_those_of_the_instruction_set_below():
    widened = product("widen")
    with _library.use_isa("avx512"):
        assert torch.equal(product("dot"), widened)
    assert _library.bf16() == "dot" and not torch.equal(product("dot"), widened)


@pytest.mark.parametrize("how", _tuning.BF16)
def test_a_stored_fact_says_how_bfloat16_is_multiplied(cache, how):
    store(cell(), bf16=how)
    assert not ours_runs()  # which reads the file
    assert _library.bf16() == (how if UNASKED == "dot" else "widen")


def test_a_way_to_multiply_that_there_is_not_is_an_error():
    with pytest.raises(RuntimeError, match="not by 'often'"):
        _library.set_bf16("often")


@pytest.mark.skipif(UNASKED == "widen", reason="this CPU has no VDPBF16PS, or FASTFT_ISA leaves it out")
@pytest.mark.parametrize("how", _tuning.BF16)
def test_the_faster_way_is_in_force_while_cells_are_measured_and_written_down(cache, monkeypatch, how):
    monkeypatch.setattr(tune, "_faster_products", lambda: how)
    seen = []
    monkeypatch.setattr(
        tune, "measure", lambda *args, **options: seen.append(_library.bf16()) or measure(*args, **options)
    )
    fastft.optimize(torch.nn.Linear(32, 32))
    assert set(seen) == {how} and len(seen) > 1
    assert _choice.facts()["bf16"] == how == _library.bf16()


def test_both_ways_are_timed(cache):
    assert tune._faster_products() in _tuning.BF16


# ---- measuring


def test_the_first_optimize_measures_its_layers_once(cache, capsys):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Linear(64, 2))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():  # whatever the caller is in the middle of
        fastft.optimize(model)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(_tuning.path()) in said and "FASTFT_TUNE=0" in said
    found = _choice.facts_in_force().cells
    assert {c.sizes[1:] for c in found} == {(96, 64), (64, 2)}
    assert {c.dtype for c in found} == {"float32", "bfloat16"} and {c.path for c in found} == {"forward", "train"}
    assert all(c.fastft_us > 0 and c.torch_us > 0 for c in found)
    fastft.optimize(torch.nn.Linear(32, 32))
    assert capsys.readouterr().err == ""
    assert fastft.environment.choice() == f"facts measured here: {len(found)}"


@pytest.mark.parametrize("why", ("backend", "meta", "nothing to measure", "no folder"))
def test_optimize_measures_nothing_where_facts_would_not_count(cache, monkeypatch, capsys, why):
    model = torch.nn.Linear(64, 64, device="meta" if why == "meta" else None)
    if why == "nothing to measure":
        model = torch.nn.LayerNorm(64)
    if why == "no folder":
        cache.write_text("a file")
    with _choice.use_backend("torch" if why == "backend" else "auto"):
        fastft.optimize(model)
    assert capsys.readouterr().err == ""
    assert not cache.is_dir()


def test_facts_differ_from_the_shipped_rule_only_for_a_reason(cache):
    """Whatever the times are: within 5 % of each other they leave the rule alone."""
    linear = [task for task in tune.tasks() if task.spec.name == "linear_act"]
    small = [task for task in linear if task.path == "forward" and task.sizes[0] <= 8][:6]
    for task, found in zip(small, tune.measured(small), strict=True):
        assert found.sizes == task.sizes
        shipped = "fastft" if ours_runs(*task.sizes) else "torch"
        ratio = found.fastft_us / found.torch_us if shipped == "fastft" else found.torch_us / found.fastft_us
        assert (found.runs == shipped) == (ratio <= tune.MARGIN) or abs(ratio - tune.MARGIN) < 0.01


def test_bench_tune_writes_what_the_choice_reads(cache, monkeypatch):
    some = [task for task in tune.tasks() if task.sizes[0] == 2][:3]
    monkeypatch.setattr(tune, "tasks", lambda: some)
    done = CliRunner().invoke(app, ["bench", "--tune"])
    assert done.exit_code == 0, done.output
    assert re.search(r"3 facts in .*tuning\.json: fastft's kernel runs in \d, PyTorch's in \d", done.output)
    assert [c.sizes for c in _choice.facts_in_force().cells] == [task.sizes for task in some]


def test_every_op_that_is_chosen_by_facts_is_measured():
    assert {task.spec.name for task in tune.tasks()} == {"attention", "linear_act", "cross_entropy"}


# ---- what is said of it


def test_the_report_names_what_was_measured_to_be_slower(cache):
    store(cell("torch", (2048, 96, 64), "train"))
    model = fastft.optimize(torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Linear(64, 160)))
    modules = fastft.report(model).as_dict()["modules"]
    assert modules["1"] == {"runs": "fastft", "reason": None}
    assert modules["0"] == {"runs": "torch", "reason": "PyTorch's was measured to be faster here: 1 us, ours 2"}
    with _choice.use_facts({}):
        assert fastft.report(model).as_dict()["modules"]["0"]["runs"] == "fastft"


def test_the_report_says_how_bfloat16_is_multiplied(cache):
    store(cell(), bf16="widen")
    report = fastft.report(torch.nn.Linear(2, 2))
    assert report.as_dict()["bf16"] == "widen" and str(report).endswith("bfloat16 on the CPU: products in float32")
    with _choice.use_facts({}):
        assert fastft.report(torch.nn.Linear(2, 2)).bf16 == UNASKED


def test_env_says_what_chooses_and_where_it_is(cache):
    def shown():
        return CliRunner().invoke(app, ["env"], env={"COLUMNS": "300"}).output

    assert "shipped rule: nothing was measured here yet" in shown() and str(_tuning.path()) in shown()
    store(cell())
    assert "facts measured here: 1" in shown()
    assert "bfloat16 products  by VDPBF16PS" in shown() or UNASKED == "widen"
    store(cell(), bf16="widen")
    assert "bfloat16 products  in float32" in shown()


# ---- GPUs that our kernels do not run on, as far as that can be told without one


@pytest.mark.parametrize(
    ("archs", "runs", "does_not"),
    [
        (("sm_80", "sm_90", "compute_80"), [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], [(7, 5)]),
        (("sm_80",), [(8, 0), (8, 6)], [(9, 0), (7, 0)]),
        (("sm_86",), [(8, 6), (8, 9)], [(8, 0)]),
        (("sm_90a",), [(9, 0)], [(10, 0)]),
        (("compute_90",), [(9, 0), (12, 0)], [(8, 0)]),
        ((), [], [(8, 0)]),
    ],
)
def test_a_gpu_without_code_for_it_is_named(archs, runs, does_not):
    for capability in runs:
        assert _library.why_not_capability("a GPU", capability, archs) is None
    for capability in does_not:
        why_not = _library.why_not_capability("a GPU", capability, archs)
        assert f"compute capability {capability[0]}.{capability[1]}" in why_not and "FASTFT_CUDA_ARCHS" in why_not


def test_a_driver_too_old_for_our_cuda_is_named():
    nvcc = "Cuda compilation tools, release 13.0, V13.0.88"
    assert _library.why_not_driver(12080, nvcc).startswith(
        "fastft was built with CUDA 13.0, this NVIDIA driver supports 12.8"
    )
    for version, built in (
        (13000, nvcc),
        (13010, nvcc),
        (12040, nvcc.replace("13", "12")),
        (12080, None),
        (None, nvcc),
    ):
        assert _library.why_not_driver(version, built) is None


class Driver:
    """Stands in for libcuda.so.1."""

    def __init__(self, version):
        self.version = version

    def cuDriverGetVersion(self, pointer):
        pointer._obj.value = self.version or 0
        return 0 if self.version else 999


@pytest.fixture
def gpus(monkeypatch):
    """CUDA answers as with a GPU of Turing, one of Ampere, and a driver whose version may be changed."""
    driver = [13000]
    for name, answer in {
        "is_available": lambda: True,
        "current_device": lambda: 1,
        "get_device_name": ["Tesla T4", "NVIDIA A100"].__getitem__,
        "get_device_capability": [(7, 5), (8, 0)].__getitem__,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(driver[0]))
    info = {"archs": ["sm_80", "sm_90", "compute_80"], "nvcc": "Cuda compilation tools, release 13.0, V13.0.88"}
    monkeypatch.setattr(_library, "build_info", lambda: info)
    monkeypatch.setattr(_library, "has_cuda", lambda: True)
    _library._why_not_gpu.cache_clear()
    yield driver
    _library._why_not_gpu.cache_clear()


def on_gpu(index):
    return FakeTensor(FAKES, torch.empty(3, 3, device="meta"), torch.device("cuda", index))


def test_what_is_wrong_with_a_gpu_is_why_pytorchs_kernels_run_on_it(gpus):
    old, usual = on_gpu(0), on_gpu(1)
    assert _choice.unsupported(usual, usual) is None
    assert _choice.unsupported(usual, old).startswith(
        "fastft has no code for Tesla T4 (compute capability 7.5), only for"
    )
    with (
        _choice.use_backend("fastft"),
        pytest.raises(RuntimeError, match="would run on PyTorch: fastft has no code for"),
    ):
        fastft.functional.linear_act(old, old)
    assert _library.why_not_gpu(None) is None  # the current one


def test_a_driver_that_is_too_old_is_why_pytorchs_kernels_run(gpus):
    gpus[0] = 12080
    assert "this NVIDIA driver supports 12.8: update the driver" in _choice.unsupported(on_gpu(1))


def test_a_driver_that_does_not_tell_is_given_a_try(gpus, monkeypatch):
    gpus[0] = None
    assert _choice.unsupported(on_gpu(1)) is None

    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    _library._why_not_gpu.cache_clear()
    assert _choice.unsupported(on_gpu(1)) is None


def test_a_gpu_is_looked_at_once_and_not_for_every_tensor_of_a_step(gpus, monkeypatch):
    assert _library.why_not_gpu(1) is None
    for module, name in ((torch.cuda, "is_available"), (_library, "has_cuda")):
        monkeypatch.setattr(module, name, lambda: pytest.fail("asked again"))
    assert _choice.unsupported(on_gpu(1)) is None


def test_a_library_without_cuda_is_why_pytorchs_kernels_run(gpus, monkeypatch):
    monkeypatch.setattr(_library, "has_cuda", lambda: False)
    assert _choice.unsupported(on_gpu(1)) == "fastft was built without CUDA"
