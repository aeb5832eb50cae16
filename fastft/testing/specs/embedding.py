"""Cases of embeddings without dropout, which PyTorch would draw otherwise: tests/test_embedding.py has it."""

import torch

from fastft.functional.embedding import embeddings, reference
from fastft.testing.spec import OpSpec, Sample, Timed


def samples(t):
    def positions(S):
        return torch.arange(S, device=t.device)

    def ids(M, *rows):
        return (t.indices(count, M) for count in rows)

    def tables(H, *rows):
        """Of so many rows each, and LayerNorm's parameters."""
        return *(t(count, H) for count in rows), t(H) + 1, t(H)

    yield Sample("an encoder's", t.indices(30, 3, 13), positions(13), t.indices(2, 3, 13), *tables(48, 30, 16, 2), 0.0)
    yield Sample("odd tail", t.indices(11, 5, 7), positions(7)[None], t.indices(3, 5, 7), *tables(103, 11, 9, 3), 0.0)
    word, position, *parameters = tables(40, 17, 12)
    yield Sample("no types", t.indices(17, 4, 12), positions(12), None, word, position, None, *parameters, 0.0)
    yield Sample("not training", *ids(40, 9, 7, 2), *tables(32, 9, 7, 2), 0.5, False)
    yield Sample("more rows of an id than a partial sum's", *ids(190, 3, 3, 3), *tables(20, 3, 3, 3), 0.0, eps=1e-5)
    yield Sample("more columns than a task's", *ids(90, 3, 3, 3), *tables(192, 3, 3, 3), 0.0)
    yield Sample("more rows of a table than few", *ids(30, 2100, 5, 5), *tables(8, 2100, 5, 5), 0.0)
    strided = t.indices(9, 7, 5).mT, positions(7), t.indices(2, 7, 5).mT
    yield Sample("strided", *strided, *tables(24, 9, 7, 2), 0.0)
    for B, S, H in ((16, 128, 768), (32, 64, 384)):
        taken = t.indices(30522, B, S), positions(S), t.indices(1, B, S)
        yield Timed(f"{B}x{S}x{H}", *taken, *tables(H, 30522, 512, 2), 0.0)


def sizes(input, word, position, type, **_):
    tables = (word, position, type)
    return input.numel(), word.shape[1], sum(len(table) for table in tables if table is not None)


SPEC = OpSpec(
    op=embeddings,
    reference=reference,
    samples=samples,
    sizes=sizes,
    flops=lambda M, H, rows: 10 * M * H,
    bytes=lambda M, H, rows, size: 2 * M * H * size,
    gradients={
        **{name: lambda M, H, rows: 7 * M * H for name in ("word", "position", "type")},
        "weight": lambda M, H, rows: 2 * M * H,
        "bias": lambda M, H, rows: M * H,
    },
    backward_bytes=lambda M, H, rows, size: (2 * M + rows) * H * size,
    kernel="embedding",
)
