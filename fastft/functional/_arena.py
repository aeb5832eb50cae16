"""Memory of activations, taken again and again.

What the C library gives back to the system costs a page fault for every 4 KB when it comes anew, and what it keeps it
often does not find again: a freed block is too small, by the alignment, for another request of its size. Here a block
belongs to one tensor's storage for as long as that lives, whoever holds it, so that nothing has to know when an
activation or a gradient is needed no more.
"""

import collections
import math
import mmap
import os
import threading
import weakref

import torch

from fastft import _library

LEAST = 1 << 20  # bytes; below, PyTorch's allocator is fast enough
APART = 1 << 12  # rows a multiple of so many bytes apart share their place in L1
HUGE = 2 << 20  # bytes of a page
_MAPS = hasattr(mmap, "MAP_ANONYMOUS")

# Gradients of weights come back all at once, when the step is over, and activations would take their blocks to pieces.
ACTIVATION, GRADIENT = 0, 1
_together = False


def keep_together(together):
    """Whether both kinds share one arena from now on. Most of either is idle while the other is in use, so that a fifth
    less memory does where memory is lowest; but pages come anew in each step, where it is fast 3 to 6 % of the time."""
    global _together
    _together = together


def empty(shape, dtype, like, kind=ACTIVATION):
    """``like.new_empty(shape, dtype=dtype)``: no view, and no other tensor has its memory."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < LEAST or not is_plain(like):
        return like.new_empty(shape) if dtype is like.dtype else like.new_empty(shape, dtype=dtype)
    try:
        memory = _ARENAS[ACTIVATION if _together else kind].take(size)
    except OSError:
        return like.new_empty(shape, dtype=dtype)  # PyTorch says best that there is none
    return torch.frombuffer(memory, dtype=dtype, count=count).resize_(shape)  # .view() would make it a view


def empty_like(tensor, dtype=None, kind=ACTIVATION):
    """The same, of a tensor's shape, dense."""
    if tensor.numel() * tensor.itemsize < LEAST and dtype in (None, tensor.dtype) and tensor.is_contiguous():
        return torch.empty_like(tensor)  # in half the time
    return empty(tensor.shape, dtype or tensor.dtype, tensor, kind)


def empty_rows(rows, cols, dtype, like):
    """``(rows, cols)`` for ops in a row, which may be a view: a product of rows that share their place in L1 would have
    to copy them first."""
    dense = not like.is_cpu or torch.compiler.is_compiling()
    stride = cols if dense else _row_stride(cols, dtype)
    memory = empty((rows, stride), dtype, like)
    return memory if stride == cols else memory[:, :cols]


def rows_like(tensor):
    """Of a tensor's shape and dtype, and with rows as far apart as it has them."""
    return empty_like(tensor) if tensor.is_contiguous() else empty_rows(*tensor.shape, tensor.dtype, tensor)


def has_rows_apart(tensor):
    """Whether rows lie as :func:`empty_rows` has them."""
    return tensor.is_cpu and tensor.stride() == (_row_stride(tensor.shape[1], tensor.dtype), 1)


def _row_stride(cols, dtype):
    """Elements from one row to the next: 64 bytes further where rows would lie a multiple of 4096 apart."""
    return cols if cols * dtype.itemsize % APART else cols + 64 // dtype.itemsize


def is_plain(like):
    """Whether its memory is there to be had: not that of fake tensors, nor another device's."""
    plain = type(like) in (torch.Tensor, torch.nn.Parameter) and like.is_cpu
    return plain and _MAPS and not torch.compiler.is_compiling()


class Arena:
    """Blocks of memory. Idle ones are given up, the longest idle first, only where there would be more of them and of
    those in use than were once in use together, and a sixteenth: sizes that take turns would map each other's anew."""

    def __init__(self):
        self._lock = threading.Lock()
        self._idle = {}  # by their bytes, each with the number of its return; the longest idle first
        self._returned = collections.deque()  # by whoever drops the last reference, in the middle of anything
        self._returns = 0
        self._taken = {}
        self._bytes = self._idle_bytes = self._most = 0  # of all blocks; of idle ones; of those once in use together

    def take(self, size):
        """At least ``size`` bytes, as a memoryview; they come back when it is gone."""
        asked, size = size, _rounded(size)
        with self._lock:
            while self._returned:
                self._keep(self._returned.popleft())
            self._most = max(self._most, self._bytes - self._idle_bytes + size)
            fitting = min((idle for idle in self._idle if size <= idle <= size * 5 // 4), default=None)
            if fitting is not None:
                block = self._leave(fitting, -1)  # the last used, which caches may hold
            else:
                while self._idle and self._bytes + size > self._most * 17 // 16:
                    longest = min(self._idle, key=lambda idle: self._idle[idle][0][0])
                    self._bytes -= len(self._leave(longest, 0))
                block = _mapped(size, asked)
                self._bytes += size
        memory = memoryview(block)
        reference = weakref.ref(memory, self._give_back)
        self._taken[id(reference)] = reference, block  # memoryviews have no hash
        return memory

    def _keep(self, block):
        self._returns += 1
        self._idle.setdefault(len(block), collections.deque()).append((self._returns, block))
        self._idle_bytes += len(block)

    def _leave(self, size, place):
        """One of the idle blocks of a size: the last used, -1, or the longest idle, 0."""
        blocks = self._idle[size]
        _, block = blocks[place]
        del blocks[place]
        if not blocks:
            del self._idle[size]
        self._idle_bytes -= size
        return block

    def _give_back(self, reference):
        _, block = self._taken.pop(id(reference))
        self._returned.append(block)


def _rounded(size):
    """In steps of an eighth of the power of two below: batches of almost the same size share blocks."""
    step = max(1 << 12, 1 << (size.bit_length() - 4))
    return -(-size // step) * step


def _mapped(size, asked):
    """In huge pages as far as what is asked for fills them: from a page's beginning on."""
    if asked < HUGE:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block = memoryview(mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    begin = -torch.frombuffer(block, dtype=torch.uint8).data_ptr() % HUGE
    block = block[begin : begin + size]
    _library.huge_pages([torch.frombuffer(block[:asked], dtype=torch.uint8)])
    return block


_ARENAS = [Arena(), Arena()]


def _anew():
    _ARENAS[:] = Arena(), Arena()  # of a forked process: another thread may have been inside


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_anew)
