"""Dropout's factors in NumPy, written from csrc/common/philox.h's rule and the paper alone."""

import numpy


def words(counter, key):
    """Philox4x32-10 of four uint32 arrays and two numbers."""
    c, k = [numpy.asarray(word, numpy.uint64) for word in counter], [int(word) for word in key]
    low, shift = numpy.uint64(0xFFFFFFFF), numpy.uint64(32)
    for _ in range(10):
        first, second = c[0] * numpy.uint64(0xD2511F53), c[2] * numpy.uint64(0xCD9E8D57)
        c = [
            second >> shift ^ c[1] ^ numpy.uint64(k[0]),
            second & low,
            first >> shift ^ c[3] ^ numpy.uint64(k[1]),
            first & low,
        ]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return [word.astype(numpy.uint32) for word in c]


def factors(seed, use, threshold, rows, cols):
    """``(rows, cols)``, float64: 0 or 65536 / (65536 - threshold)."""
    seed %= 2**64
    pitch = 16 if cols <= 16 else 32 if cols <= 32 else 64 if cols <= 64 else -(-cols // 128) * 128
    groups = -(-rows * pitch // 128)
    call = numpy.arange(groups * 16, dtype=numpy.uint64)
    parts = words(
        (call & numpy.uint64(0xFFFFFFFF), call >> numpy.uint64(32), numpy.full_like(call, use), numpy.zeros_like(call)),
        (seed % 2**32, seed // 2**32),
    )
    numbers = numpy.stack([half for word in parts for half in (word & 0xFFFF, word >> 16)])  # (slot, call)
    numbers = numbers.reshape(8, groups, 16).swapaxes(0, 1).reshape(-1)[: rows * pitch].reshape(rows, pitch)[:, :cols]
    return (numbers >= threshold) * (65536 / (65536 - threshold) if threshold < 65536 else 0.0)
