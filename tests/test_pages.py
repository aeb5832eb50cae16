"""Pages of 2 MB: asked for where products gain by them, and never a change of what is stored or of where it is."""

import mmap
import platform
from pathlib import Path

import pytest
import torch

import fastft
from fastft import _library
from fastft.functional import _arena

MODES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes(tensor):
    """Of the mappings in which a tensor lies, the bytes in huge pages; None where the system gives none on request."""
    version = tuple(map(int, platform.release().split(".")[:2]))
    if not _library.available() or version < (6, 1) or not MODES.is_file() or "[never]" in MODES.read_text():
        return None
    begin, found, inside = tensor.data_ptr(), 0, False
    end = begin + tensor.numel() * tensor.itemsize
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            low, high = (int(address, 16) for address in first.split("-"))
            inside = low < end and begin < high
        elif inside and first == "AnonHugePages:":
            found += int(rest.split()[0]) << 10
    return found


def test_what_is_written_moves_into_huge_pages_as_it_is():
    memory = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    everything = torch.frombuffer(memory, dtype=torch.float32)
    torch.arange(everything.numel(), out=everything)
    weights = everything[1 << 20 : 2 << 20], everything[2 << 20 : 3 << 20]  # neighbours, in the midst of others
    places, before = [weight.data_ptr() for weight in weights], huge_bytes(weights[0])
    _library.huge_pages(list(weights), written=True)
    assert [weight.data_ptr() for weight in weights] == places
    assert torch.equal(everything, torch.arange(everything.numel(), dtype=torch.float32))
    assert before is None or huge_bytes(weights[0]) >= before + (2 << 20)


def test_large_blocks_of_the_arena_begin_with_a_huge_page():
    block = torch.frombuffer(_arena._mapped(5 << 20, 5 << 20), dtype=torch.uint8)
    assert block.numel() == 5 << 20 and block.data_ptr() % _arena.HUGE == 0
    before = huge_bytes(block)
    block.fill_(1)
    assert before is None or huge_bytes(block) >= before + (2 << 20)


@pytest.mark.parametrize("make", [torch.nn.Linear, lambda *sizes: torch.nn.Linear(*sizes, device="meta")])
def test_optimize_leaves_large_weights_where_they_are(make):
    model = torch.nn.Sequential(make(1024, 1024), make(1024, 8))
    parameters = list(model.parameters())
    if not parameters[0].is_meta:
        kept, places = [p.detach().clone() for p in parameters], [p.data_ptr() for p in parameters]
    fastft.optimize(model)
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    if not parameters[0].is_meta:
        assert all(map(torch.equal, parameters, kept)) and [p.data_ptr() for p in parameters] == places
