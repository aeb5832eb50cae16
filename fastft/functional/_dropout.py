"""Dropout by a seed tensor; csrc/common/philox.h has the rule that the kernels and this module follow."""

import torch

LANES, GROUP = 16, 128
NONE = (None, 0, 0)  # no dropout, as (seed, threshold, use)


def threshold(p):
    """Of 65536: an element is dropped where its 16-bit number is below. The scale belongs to this quantised p."""
    return round(65536 * p)


def scale(threshold):
    """What kept elements are multiplied with."""
    return 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def draw_seed(device):
    """A seed of its own for one call, from PyTorch's generator of that device: ``(1,)``, int64."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def check_probability(op, name, p):
    """Raises: ValueError: ``dropout_add_layer_norm: p is 1.5, must be between 0 and 1``"""
    if not 0 <= p <= 1:
        raise ValueError(f"{op}: {name} is {p}, must be between 0 and 1")


def factors(seed, use, threshold, rows, cols):
    """What dropout multiplies a (rows, cols) matrix with, in PyTorch's functions: ``(rows, cols)``, float64.

    For compositions, which must drop what the kernel dropped; the kernels themselves draw where they consume.
    """
    row = torch.arange(rows, device=seed.device)[:, None]
    col = torch.arange(cols, device=seed.device)[None, :]
    number = row * _pitch(cols) + col
    words = torch.stack(_philox(number // GROUP * LANES + number % LANES, use, seed))
    slot = number % GROUP // LANES
    word = words.gather(0, (slot // 2)[None])[0]
    number = word >> 16 * (slot % 2) & 0xFFFF
    return (number >= threshold).double() * scale(threshold)


def _pitch(cols):
    """Numbers from one row to the next."""
    return next((pitch for pitch in (16, 32, 64) if cols <= pitch), -(-cols // GROUP) * GROUP)


def _philox(call, use, seed):
    low = 0xFFFFFFFF
    c = [call & low, call >> 32 & low, torch.full_like(call, use), torch.zeros_like(call)]
    key = [seed & low, seed >> 32 & low]
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57  # int64 wraps, whose bits are those of uint64
        c = [p1 >> 32 & low ^ c[1] ^ key[0], p1 & low, p0 >> 32 & low ^ c[3] ^ key[1], p0 & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return c
