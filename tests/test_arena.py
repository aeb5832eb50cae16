"""Memory of activations: whose it is, when it is taken again."""

import copy
import gc
import io
import multiprocessing
import threading

import pytest
import torch

from fastft.functional import _arena

pytestmark = pytest.mark.skipif(not _arena.is_plain(torch.empty(0)), reason="this system has no anonymous memory maps")

LIKE = torch.empty(0)
ROWS = (600, 1000)  # 2.4 MB


@pytest.fixture(autouse=True)
def arena(monkeypatch):
    monkeypatch.setattr(_arena, "_ARENAS", [_arena.Arena(), _arena.Arena()])
    monkeypatch.setattr(_arena, "_together", False)
    return _arena._ARENAS[0]


def test_memory_is_taken_again_when_its_tensor_is_gone():
    first = _arena.empty(ROWS, torch.float32, LIKE)
    place = first.data_ptr()
    second = _arena.empty(ROWS, torch.float32, LIKE)
    assert second.data_ptr() != place
    del first
    assert _arena.empty((ROWS[0] - 5, ROWS[1]), torch.float32, LIKE).data_ptr() == place


def test_gradients_have_memory_of_their_own_unless_both_are_kept_together():
    place = _arena.empty(ROWS, torch.float32, LIKE).data_ptr()
    gradient = _arena.empty(ROWS, torch.float32, LIKE, kind=_arena.GRADIENT)
    assert gradient.data_ptr() != place
    _arena.keep_together(True)
    assert _arena.empty(ROWS, torch.float32, LIKE, kind=_arena.GRADIENT).data_ptr() == place


def test_a_view_a_graph_or_a_storage_keeps_it():
    holders = {
        "view": lambda tensor: tensor[3:],
        "storage": lambda tensor: tensor.untyped_storage(),
        "graph": lambda tensor: (torch.ones(1, requires_grad=True) * tensor).sum(),
        "detached": lambda tensor: tensor.detach(),
    }
    for name, hold in holders.items():
        tensor = _arena.empty(ROWS, torch.float32, LIKE).fill_(7)
        place, held = tensor.data_ptr(), hold(tensor)
        del tensor
        gc.collect()
        other = _arena.empty(ROWS, torch.float32, LIKE).fill_(3)
        assert other.data_ptr() != place, name
        del held, other


def test_it_is_a_tensor_like_any_other():
    tensor = _arena.empty(ROWS, torch.bfloat16, LIKE)
    assert tensor.shape == ROWS and tensor.is_contiguous() and tensor._base is None and not tensor.is_inference()
    assert tensor.untyped_storage().nbytes() == tensor.numel() * 2
    with torch.no_grad():
        made = _arena.empty(ROWS, torch.float32, LIKE)
    made.requires_grad_()
    made.data.fill_(2)
    assert torch.equal(copy.deepcopy(made), made)
    file = io.BytesIO()
    torch.save(made, file)
    assert file.tell() < made.numel() * 4 + 10_000


def test_small_tensors_other_devices_and_fakes_are_pytorchs(arena):
    _arena.empty((10,), torch.float32, LIKE)
    assert _arena.empty(ROWS, torch.float32, torch.empty(0, device="meta")).is_meta
    with torch._subclasses.FakeTensorMode():
        assert type(_arena.empty(ROWS, torch.float32, torch.empty(0))) is not torch.Tensor
    assert arena._bytes == 0


def test_there_is_never_more_of_it_than_was_once_in_use_together(arena):
    held = [_arena.empty((size, 1000), torch.float32, LIKE) for size in (600, 1100, 2300)]
    most = arena._bytes
    del held
    for size in (700, 900, 1300, 2900, 400, 3500, 600):
        _arena.empty((size, 1000), torch.float32, LIKE)
        assert arena._bytes <= most * 17 // 16


def test_small_blocks_that_come_beside_a_large_one_do_not_have_it_mapped_anew(arena):
    large = _arena.empty((40_000, 1000), torch.float32, LIKE)
    for _ in range(3):  # the peak is the large one's; the small one is gone by then
        place = large.data_ptr()
        del large
        _arena.empty(ROWS, torch.float32, LIKE)
        large = _arena.empty((40_000, 1000), torch.float32, LIKE)
        assert large.data_ptr() == place


def test_without_memory_the_error_is_pytorchs(monkeypatch):
    def fails(size, asked):
        raise OSError("no memory")

    monkeypatch.setattr(_arena, "_mapped", fails)
    assert _arena.empty(ROWS, torch.float32, LIKE).shape == ROWS  # there is some, but not of ours
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        _arena.empty((1 << 45,), torch.float32, LIKE)


def test_threads_get_memory_of_their_own():
    wrong = []

    def work(value):
        for _ in range(200):
            tensors = [_arena.empty(ROWS, torch.float32, LIKE) for _ in range(2)]
            for index, tensor in enumerate(tensors):
                tensor[::97].fill_(value + index)
            if any((tensor[::97] != value + index).any() for index, tensor in enumerate(tensors)):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(10 * number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _in_a_fork(queue):
    queue.put(_arena.empty(ROWS, torch.float32, LIKE)[0, :5].fill_(1).tolist())  # few: PyTorch's threads do not survive


def test_a_forked_process_has_an_arena_of_its_own():
    with _arena._ARENAS[0]._lock:  # as another thread may hold it at that moment
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        process = context.Process(target=_in_a_fork, args=(queue,))
        process.start()
    process.join(20)
    assert process.exitcode == 0 and queue.get() == [1.0] * 5
