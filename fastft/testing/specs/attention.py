"""Cases of attention: masks of every kind, packed sequences, layouts, and sizes at the edges of tiles and blocks."""

import itertools

import torch

from fastft import functional
from fastft.functional.attention import reference
from fastft.functional.attention import sizes as sizes_of
from fastft.testing.spec import OpSpec, Sample, Timed


def heads(t, B, N, S, D, keys=None):
    """Query, key and value."""
    return t(B, N, S, D), t(B, N, keys or S, D), t(B, N, keys or S, D)


def projected(t, B, N, S, D):
    """Of one matrix of rows (3, N, D), as a layer computes them."""
    return t(B, S, 3, N, D).permute(2, 0, 3, 1, 4)


def packed(t, N, D, *lengths):
    """Three views of one (T, 3, N, D), and where sequences begin."""
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=t.device)
    options = {"cu_seqlens": starts, "max_seqlen": max(lengths)}
    return t(sum(lengths), 3, N, D).unbind(1), options


def padding(t, *lengths, most=None):
    """True up to each sequence's length: (B, 1, 1, S)."""
    keys = torch.arange(most or max(lengths), device=t.device)
    return torch.stack([keys < length for length in lengths])[:, None, None]


def samples(t):
    yield Sample("every size prime", *heads(t, 2, 3, 17, 13))
    yield Sample("BERT's heads, projected together", *projected(t, 2, 2, 32, 64))
    yield Sample("one of everything", *heads(t, 1, 1, 1, 1))
    yield Sample("one query of BERT's: the first row alone", *heads(t, 3, 2, 1, 64, keys=19))
    yield Sample("one key: its value", *heads(t, 2, 2, 5, 16, keys=1))
    yield Sample("queries in several blocks", *heads(t, 1, 2, 150, 32, keys=37))
    yield Sample("keys in several blocks", *heads(t, 1, 2, 40, 32, keys=300))
    yield Sample("one more than a block", *heads(t, 1, 1, 129, 33))
    yield Sample("heads of more than a block", *heads(t, 1, 1, 31, 200))
    yield Sample("the largest heads", *heads(t, 1, 2, 20, 256, keys=23))
    yield Sample("odd heads", *heads(t, 2, 1, 33, 5))
    yield Sample("scale given", *heads(t, 2, 2, 9, 16), scale=-0.3)
    yield Sample("scale zero: the mean", *heads(t, 2, 2, 9, 16), scale=0.0)
    yield Sample("padding", *heads(t, 3, 2, 20, 16), padding(t, 20, 7, 1))
    expanded = padding(t, 19, 3).expand(2, 1, 19, 19)
    yield Sample("padding as transformers expands it", *projected(t, 2, 2, 19, 16), expanded)
    alone = padding(t, 9, 0, 4)
    yield Sample("a sequence of padding only", *heads(t, 3, 2, 9, 8), alone)
    by_row = t(1, 2, 25, 21) > -1
    by_row[..., 3, :] = False
    yield Sample("a mask for each row, one of them empty", *heads(t, 2, 2, 25, 12, keys=21), by_row)
    yield Sample("a mask of two dimensions, strided", *heads(t, 2, 2, 25, 12, keys=21), (t(42, 25) > -1)[::2].mT)
    yield Sample("an additive mask", *heads(t, 2, 3, 18, 16, keys=130), t(2, 1, 18, 130))
    yield Sample("an additive mask, the same for all queries", *heads(t, 2, 3, 18, 16), t(2, 3, 1, 18))
    yield Sample("one number added: nothing changes", *heads(t, 2, 1, 7, 16), t(1, 1))
    infinite = torch.zeros_like(t(2, 1, 11, 13)).masked_fill(t(2, 1, 11, 13) < -1, -torch.inf)
    infinite[0, 0, 4] = -torch.inf
    yield Sample("an additive mask of infinities, one row of them", *heads(t, 2, 2, 11, 16, keys=13), infinite)
    yield Sample("causal", *heads(t, 2, 2, 40, 16), is_causal=True)
    yield Sample("causal, several blocks", *heads(t, 1, 1, 150, 16), is_causal=True)
    yield Sample("causal, more queries than keys", *heads(t, 1, 2, 150, 8, keys=37), is_causal=True)
    yield Sample("causal, fewer queries than keys", *heads(t, 1, 2, 37, 8, keys=150), is_causal=True)
    yield Sample("causal and padded", *heads(t, 3, 2, 20, 16), padding(t, 20, 7, 1), is_causal=True)
    for lengths, why in (((5, 30, 1, 17), "of any length"), ((3, 0, 140), "one of them empty"), ((21,), "only one")):
        tensors, options = packed(t, 3, 16, *lengths)
        yield Sample(f"packed sequences, {why}", *tensors, **options)
    tensors, options = packed(t, 2, 16, 5, 30, 1)
    yield Sample("packed, causal, from contiguous tensors", *(x.clone() for x in tensors), is_causal=True, **options)
    yield Sample("heads last but one in memory", *(t(2, 9, 3, 8).transpose(1, 2) for _ in range(3)))
    yield Sample("heads' elements apart in memory", *(t(2, 3, 8, 9).mT for _ in range(3)))
    yield Sample("expanded keys and values", t(2, 3, 9, 8), *(t(2, 1, 9, 8).expand(2, 3, 9, 8) for _ in range(2)))
    yield Sample("no queries", *heads(t, 2, 3, 0, 8, keys=5))
    yield Sample("no keys", t(2, 3, 4, 8), *(t(2, 3, 0, 8) for _ in range(2)))
    yield Sample("no sequences", *heads(t, 0, 3, 4, 8))
    yield Sample("far apart: most weights vanish", t(2, 2, 40, 32, scale=30), *heads(t, 2, 2, 40, 32)[1:])
    shift = torch.full_like(t(1, 1), 9984)  # which bfloat16 holds
    yield Sample("scores near 1e4: a log-sum-exp would lose all digits", *heads(t, 2, 2, 20, 16), shift)
    for B, S in ((16, 128), (8, 512), (64, 32)):
        yield Timed(f"{B}x12x{S}x64", *projected(t, B, 12, S, 64))
    yield Timed("16x12x128x64, padding", *projected(t, 16, 12, 128, 64), padding(t, *(8 * i for i in range(1, 17))))
    tensors, options = packed(t, 12, 64, *(16 * [128]))
    yield Timed("packed 16x128x12x64", *tensors, **options)
    yield Timed("16x12x128x32", *projected(t, 16, 12, 128, 32))  # MiniLM
    yield Timed("2x8x1024x64, causal", *projected(t, 2, 8, 1024, 64), is_causal=True)


def grid(t, rows=(2, 32, 512, 8192), lengths=(1, 8, 32, 128, 512), dims=(32, 64)):
    for M, (S, D) in itertools.product(rows, itertools.product(lengths, dims)):
        yield Timed(f"{M}x{S}x{D}", *heads(t, 1, max(1, M // S), min(M, S), D, keys=S))


def sizes(query, key, value, max_seqlen=None, **_):
    return sizes_of(query, key, max_seqlen)


SPEC = OpSpec(
    op=functional.attention,
    reference=reference,
    samples=samples,
    grid=grid,
    sizes=sizes,
    flops=lambda M, S, D: 4 * M * S * D,
    bytes=lambda M, S, D, size: 4 * M * D * size,  # where there are as many keys as queries
    gradients={
        # Scores are computed again for each, and so is their gradient but for value's.
        "query": lambda M, S, D: 4 * M * S * D,
        "key": lambda M, S, D: 4 * M * S * D,
        "value": lambda M, S, D: 2 * M * S * D,
    },
    backward_bytes=lambda M, S, D, size: 8 * M * D * size,
)
