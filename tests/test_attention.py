"""attention beyond its spec: dropout against an independent Philox, packed sequences, layouts, masks, errors."""

import itertools
import re
import sys

import philox
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fastft import _library
from fastft.functional import _dropout, attention
from fastft.functional._choice import use_backend
from fastft.testing import error
from fastft.testing.spec import KernelCalls, TensorMaker

pytestmark = pytest.mark.skipif(not _library.available(), reason=f"no native library: {_library.why_not()}")

op = sys.modules["fastft.functional.attention"]  # functional.attention is the function
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
P = 0.3


@pytest.fixture(autouse=True)
def ours_or_an_error():
    with use_backend("fastft"):
        yield


def heads(*shape, seed=0, dtype=torch.float32, grad=True):
    t = TensorMaker(dtype, seed=seed)
    return [t(*shape).requires_grad_(grad) for _ in range(3)]


def starts(*lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def results(tensors, **options):
    """Output and gradients, with the dropout of seed 5."""
    torch.manual_seed(5)
    output = attention(*tensors, **options)
    grads = torch.autograd.grad(output, tensors, TensorMaker(output.dtype, seed=9)(*output.shape))
    return [output.detach(), *grads]


def assert_same_bits(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_written_past_the_caches_is_what_each_sequence_alone_gives(dtype, each_isa):
    def run(*tensors):
        output = attention(*(tensor.requires_grad_() for tensor in tensors))
        return output, *torch.autograd.grad(output, tensors, torch.ones_like(output))

    tensors = heads(8, 4, 80, 64, dtype=dtype, grad=False)  # 320 KB of bfloat16
    together = run(*(tensor.clone() for tensor in tensors))
    alone = zip(*(run(*(tensor[b : b + 1].clone() for tensor in tensors)) for b in range(8)), strict=True)
    for found, expected in zip(together, alone, strict=True):
        assert torch.equal(found, torch.cat(expected))


# ---- dropout


def numpy_factors(seed, use, p, rows, cols):
    return torch.from_numpy(philox.factors(seed, use, round(65536 * p), rows, cols))


def seed_of(manual_seed):
    torch.manual_seed(manual_seed)
    return _dropout.draw_seed("cpu").item()


@pytest.mark.parametrize("keys", [16, 32, 64, 130, 256])
def test_what_is_dropped_is_what_the_rule_says(keys, each_isa):
    zeros = torch.zeros(2, 3, keys, keys)  # all weights are 1 / keys; the values tell them apart
    torch.manual_seed(5)
    found = attention(zeros, zeros, torch.eye(keys).expand(2, 3, keys, keys), dropout_p=P)
    expected = numpy_factors(seed_of(5), 0, P, 2 * 3 * keys, keys).view(2, 3, keys, keys).float() / keys
    assert torch.equal(found, expected)


def test_what_is_dropped_of_packed_sequences_is_what_the_rule_says(each_isa):
    lengths, N, longest = (32, 256, 1, 128), 3, 256  # powers of two: a weight of 1 / length is exact
    T, identity = sum(lengths), torch.zeros(sum(lengths), 3, 256)
    for start, end in itertools.pairwise(starts(*lengths).tolist()):
        identity[start:end, :, : end - start] = torch.eye(end - start)[:, None]
    torch.manual_seed(5)
    zeros = torch.zeros_like(identity)
    found = attention(zeros, zeros, identity, dropout_p=P, cu_seqlens=starts(*lengths)).transpose(0, 1)
    factors = numpy_factors(seed_of(5), 0, P, N * T, longest).view(N, T, longest).float()
    for start, end in itertools.pairwise(starts(*lengths).tolist()):
        length = end - start
        expected = factors[:, start:end, :length] / length
        assert torch.equal(found[:, start:end, :length], expected)


def composition(query, key, value, factors, scale, mask=None, causal=False):
    scores = query @ key.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1) * factors.to(scores.dtype)) @ value


KINDS = {
    "plain": {},
    "padded": {"attn_mask": torch.arange(150) < torch.tensor([[150], [20]])[:, None, None]},
    "causal": {"is_causal": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_stays_within_the_budget_of_pytorchs_composition(dtype, kind, each_isa):
    budget, yardstick = error.Budget(dtype == torch.float64), torch.float32 if dtype == torch.float64 else dtype
    options = KINDS[kind]
    for seed, (S, D) in enumerate(((131, 40), (150, 64), (33, 7))):
        mask = options.get("attn_mask")
        mask = None if mask is None else mask[..., :S]
        tensors = dict(zip(("query", "key", "value"), heads(2, 2, S, D, seed=seed, dtype=dtype), strict=True))
        factors = numpy_factors(seed_of(seed), 0, P, 2 * 2 * S, S).view(2, 2, S, S)

        def stock(query, key, value, factors=factors, mask=mask, D=D):
            return composition(query, key, value, factors, D**-0.5, mask, "is_causal" in options)

        def ours(query, key, value, mask=mask):
            return attention(query, key, value, dropout_p=P, **(options | ({"attn_mask": mask} if options else {})))

        def grad_output(*shape, seed=seed):
            return TensorMaker(dtype, seed=seed + 100)(*shape)

        if kind == "causal":
            ours = lambda query, key, value: attention(query, key, value, dropout_p=P, is_causal=True)  # noqa: E731
        torch.manual_seed(seed)
        found = error.run(ours, tensors, tensors, grad_output)
        theirs = error.run(stock, error.cast(tensors, yardstick), tensors, grad_output)
        truth = error.run(stock, error.cast(tensors, torch.float64), tensors, grad_output)
        budget.add(found, theirs, truth, case=f"{kind}, S = {S}", seed=seed)
    budget.check()


def test_gradients_under_dropout_are_derivatives():
    def function(*tensors):
        torch.manual_seed(2)
        return attention(*tensors, dropout_p=P)

    leaves = heads(2, 2, 9, 5, dtype=torch.float64)
    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


def test_second_derivatives_under_dropout_of_packed_sequences():
    def function(*tensors):
        torch.manual_seed(2)
        return attention(*tensors, dropout_p=P, cu_seqlens=starts(3, 130, 0, 4))

    assert gradgradcheck(function, heads(137, 2, 3, dtype=torch.float64), fast_mode=True)


def test_dropout_is_reproducible_by_manual_seed_and_new_each_time():
    tensors = heads(2, 2, 40, 16)
    first, again = results(tensors, dropout_p=P), results(tensors, dropout_p=P)
    assert_same_bits(first, again)
    assert not torch.equal(attention(*tensors, dropout_p=P), first[0])


def test_dropped_is_as_much_as_asked_for():
    S = 256
    zeros = torch.zeros(1, 4, S, S)
    for p in (0.1, 0.5):
        dropped = (attention(zeros, zeros, torch.eye(S).expand_as(zeros), dropout_p=p) == 0).sum().item()
        n = 4 * S * S
        assert abs(dropped - n * p) < 5 * (n * p * (1 - p)) ** 0.5  # standard deviations of a fair draw


def test_everything_dropped_gives_zeros():
    assert not any(result.any() for result in results(heads(2, 2, 9, 8), dropout_p=1.0))


def test_no_dropout_draws_no_number():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    attention(*heads(1, 1, 4, 8), dropout_p=0.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit_under_dropout(dtype):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(heads(7 + 150 + 31, 3, 16, dtype=dtype), dropout_p=P, cu_seqlens=starts(7, 150, 31)))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_it_drops_the_same(packed):
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    options = {"cu_seqlens": starts(5, 15), "max_seqlen": 15} if packed else {}
    shape = (20, 2, 8) if packed else (2, 2, 20, 8)
    found = []
    for function in (attention, compiled):
        tensors = heads(*shape)
        torch.manual_seed(5)
        output = function(*tensors, dropout_p=P, **options)
        found.append([output.detach(), *torch.autograd.grad(output, tensors, torch.ones_like(output))])
    assert_same_bits(found[1], found[0])


# ---- packed sequences


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences_have_the_bits_of_each_alone(dtype, is_causal):
    lengths = (5, 140, 1, 0, 32)
    tensors, alone = heads(sum(lengths), 3, 16, dtype=dtype), []
    grad = TensorMaker(dtype, seed=9)(sum(lengths), 3, 16)
    for start, end in itertools.pairwise(starts(*lengths).tolist()):
        views = [t.detach()[start:end].transpose(0, 1)[None].requires_grad_() for t in tensors]
        output = attention(*views, is_causal=is_causal)
        grads = torch.autograd.grad(output, views, grad[start:end].transpose(0, 1)[None])
        alone.append([t[0].transpose(0, 1) for t in (output, *grads)])
    found = results(tensors, cu_seqlens=starts(*lengths), is_causal=is_causal)
    assert_same_bits(found, [torch.cat(parts) for parts in zip(*alone, strict=True)])


def test_packed_sequences_have_the_numbers_of_padded_ones():
    lengths, longest = (5, 140, 1, 32), 140
    tensors = heads(sum(lengths), 3, 16)
    live = torch.arange(longest) < torch.tensor(lengths)[:, None]
    padded = [torch.zeros(len(lengths), longest, 3, 16) for _ in range(3)]
    for full, tensor in zip(padded, tensors, strict=True):
        full[live] = tensor.detach()
    full = attention(*(t.transpose(1, 2) for t in padded), live[:, None, None])
    assert torch.equal(attention(*tensors, cu_seqlens=starts(*lengths)), full.transpose(1, 2)[live])


def test_longest_sequence_is_found_and_int64_is_taken():
    tensors = heads(9, 2, 4)
    expected = results(tensors, cu_seqlens=starts(4, 5), max_seqlen=5, dropout_p=P)
    assert_same_bits(results(tensors, cu_seqlens=starts(4, 5).long(), dropout_p=P), expected)


def test_one_query_of_each_packed_sequence_is_the_first_row_of_all():
    lengths, cu = (5, 140, 1, 32), starts(5, 140, 1, 32)
    q, k, v = heads(sum(lengths), 3, 16, grad=False)
    expected = attention(q, k, v, cu_seqlens=cu)
    first = q[cu[:-1]][:, :, None]  # (B, N, 1, D)
    call = op.Call(scale=0.25, max_k=140)
    output, stats = op.forward(call, first, k, v, None, None, cu, None, keep=True)
    torch.testing.assert_close(output[:, :, 0], expected[cu[:-1]])
    assert stats.shape == (2, 4 * 3)


# ---- layouts


def test_inputs_and_gradients_may_be_parts_of_one_matrix():
    T, N, D, cu = 37, 3, 16, starts(30, 7)
    qkv, grad_output = TensorMaker(torch.float32)(T, 3, N, D), TensorMaker(torch.float32, seed=1)(T, N, D)
    call = op.Call(scale=0.25, max_q=30, max_k=30, threshold=20000, use=7)
    seed = torch.tensor([3])
    found = []
    for copied in (False, True):
        q, k, v = (t.clone() if copied else t for t in qkv.unbind(1))
        grad_qkv = torch.full_like(qkv, torch.nan)
        grads = [t.clone() if copied else t for t in grad_qkv.unbind(1)]
        output, stats = op.forward(call, q, k, v, None, cu, cu, seed, keep=True)
        op.backward(call, grads, grad_output, stats, q, k, v, None, cu, cu, seed)
        found.append([output, stats, torch.stack(grads, 1) if copied else grad_qkv])
    assert_same_bits(*found)


def test_output_and_gradients_lie_as_they_are_needed_next():
    x = torch.randn(2, 9, 3, 4, 8)
    tensors = [t.requires_grad_() for t in x.permute(2, 0, 3, 1, 4)]
    output = attention(*tensors)
    assert output.transpose(1, 2).flatten(2).data_ptr() == output.data_ptr()
    dense = [t.detach().clone().requires_grad_() for t in tensors]
    for given in (tensors, dense):
        for grad, tensor in zip(torch.autograd.grad(attention(*given).sum(), given), given, strict=True):
            assert grad.stride() == torch.empty_like(tensor).stride()


def test_nothing_of_the_size_of_the_scores_is_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attention(*heads(1, 1, 300, 8), dropout_p=P)
    assert kept and max(t.numel() for t in kept) <= 300 * 8


def test_an_expanded_mask_is_not_copied():
    mask = torch.ones(2, 1, 1, 12, dtype=torch.bool).expand(2, 1, 12, 12)
    with KernelCalls() as kernels:
        attention(*heads(2, 3, 12, 8), mask)
    assert kernels.names == ["attention_forward"]
    seen = []

    def record(*args):
        seen.append(args[5])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.fastft, "attention_forward", record)
        attention(*heads(2, 3, 12, 8), mask)
        attention(*heads(2, 3, 12, 8, dtype=torch.float64), torch.ones(2, 1, 1, 12).expand(2, 1, 12, 12))
    assert seen[0].data_ptr() == mask.data_ptr() and seen[0].shape == (2, 3, 12, 12)
    assert seen[1].dtype == torch.float64 and seen[1].untyped_storage().nbytes() == 2 * 12 * 8


# ---- masks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lowest_number_in_a_whole_row_swallows_the_scores(dtype):
    # PyTorch's fused kernel keeps one log-sum-exp, with which such a row's gradients are wrong.
    tensors = heads(1, 2, 4, 8, dtype=dtype)
    mask = torch.zeros(4, 6, dtype=dtype)[:, :4].clone()
    mask[2] = torch.finfo(dtype).min
    output = attention(*tensors, mask)
    assert torch.equal(output[:, :, 2], attention(torch.zeros_like(tensors[0]), *tensors[1:])[:, :, 2])
    weights = torch.autograd.grad(output[:, :, 2].sum(), tensors[2])[0]
    assert torch.equal(weights, torch.full_like(weights, 0.25))


def test_a_row_that_attends_to_nothing_gives_zeros_and_no_gradient():
    tensors = heads(2, 2, 5, 8)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[1, :, 3] = False
    for given in (mask, torch.zeros(2, 1, 5, 5).masked_fill(~mask, -torch.inf)):
        output, *grads = results(tensors, attn_mask=given)
        assert not output[1, :, 3].any() and not grads[0][1, :, 3].any()
        assert all(grad.isfinite().all() for grad in grads)


def test_masked_keys_get_exactly_no_gradient():
    mask = torch.arange(20) < 7
    _, _, grad_key, grad_value = results(heads(2, 2, 20, 8), attn_mask=mask[None])
    assert not grad_key[:, :, 7:].any() and not grad_value[:, :, 7:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [1, 40])
def test_missing_number_in_a_query_stays_in_its_row(dtype, keys):
    q, k, v = heads(1, 2, 40, 8, dtype=dtype)
    k, v = k.detach()[:, :, :keys].clone(), v.detach()[:, :, :keys].clone()
    expected = attention(q, k, v)
    broken = q.detach().clone()
    broken[0, 1, 3, 2] = torch.nan
    broken.requires_grad_()
    output = attention(broken, k, v)
    grad = torch.autograd.grad(output.sum(), broken)[0]
    for result in (output, grad):
        rows = result.isnan().any(-1)
        assert rows[0, 1, 3] and rows.sum() == 1
    keep = torch.ones(1, 2, 40, dtype=torch.bool)
    keep[0, 1, 3] = False
    assert torch.equal(output[keep], expected[keep])


def test_infinite_score_gives_what_pytorch_gives():
    tensors = heads(1, 1, 4, 4)
    mask = torch.zeros(4, 4)
    mask[1, 2] = torch.inf
    ours = attention(*tensors, mask)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = torch.nn.functional.scaled_dot_product_attention(*tensors, mask)
    assert torch.equal(ours.isnan(), theirs.isnan()) and ours.isnan().any()


@pytest.mark.parametrize("autocast", [False, True])
def test_lowest_float32_number_in_bfloat16_attention_is_what_pytorch_takes_it_for(autocast):
    tensors = heads(1, 2, 4, 8, dtype=torch.float32 if autocast else torch.bfloat16)
    mask = torch.zeros(4, 4)
    mask[2] = torch.finfo(torch.float32).min  # -infinity when autocast has rounded it
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = attention(*tensors, mask)
        theirs = torch.nn.functional.scaled_dot_product_attention(*tensors, mask)
    assert torch.equal(ours[:, :, 2] == 0, theirs[:, :, 2] == 0) and autocast == (not ours[:, :, 2].any())


# ---- what is PyTorch's, and what a user can get wrong

Q = torch.ones(2, 3, 5, 8)
PACKED = torch.ones(6, 3, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "why"),
    [
        ((torch.ones(1, 1, 3, 257),) * 3, {}, "query has heads of 257 elements, more than 256"),
        ((Q, Q, Q[..., :4]), {}, "value has heads of 4 elements, query of 8"),
        ((Q[0],) * 3, {}, "query has 3 dimensions, not 4"),
        ((Q, Q[:, :1], Q[:, :1]), {}, r"query, key and value are broadcast: \(2, 3, 5, 8\), \(2, 1, 5, 8\)"),
        ((Q, Q, Q), {"attn_mask": torch.zeros(5, 5, requires_grad=True)}, "attn_mask requires a gradient"),
    ],
)
def test_what_we_have_no_kernel_for_runs_on_pytorch_or_says_so(arguments, options, why):
    with pytest.raises(RuntimeError, match=f"FASTFT_BACKEND=fastft, but attention would run on PyTorch: {why}"):
        attention(*arguments, **options)
    with use_backend("auto"):
        expected = torch.nn.functional.scaled_dot_product_attention(*arguments, **options)
        assert torch.equal(attention(*arguments, **options), expected)


def test_packed_sequences_on_pytorch_are_the_same():
    tensors, cu = heads(7, 2, 4), starts(3, 4)
    ours = attention(*tensors, cu_seqlens=cu)
    with use_backend("torch"):
        torch.testing.assert_close(attention(*tensors, cu_seqlens=cu), ours)
        assert attention(*heads(0, 2, 4), cu_seqlens=starts()).shape == (0, 2, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((Q, Q[..., :4], Q), {}, "key is (2, 3, 5, 4), query (2, 3, 5, 8) needs (…, 8)"),
        ((Q, Q, Q[:, :, :4]), {}, "value is (2, 3, 4, 8), key (2, 3, 5, 8) needs (…, 5, D)"),
        ((Q, Q[0], Q), {}, "key is (3, 5, 8), query (2, 3, 5, 8)"),
        ((Q, Q.double(), Q), {}, "key is torch.float64, query torch.float32"),
        ((Q, Q, Q.to("meta")), {}, "value is on meta, query on cpu"),
        ((Q.long(),) * 3, {}, "query is torch.int64, must be a floating-point tensor"),
        ((Q[0, 0, 0],) * 3, {}, "query is (8,), needs (B, N, S, D)"),
        ((Q, Q, Q), {"dropout_p": 1.5}, "dropout_p is 1.5, must be between 0 and 1"),
        ((Q, Q, Q), {"attn_mask": torch.ones(4, 5)}, "attn_mask is (4, 5), must be broadcastable to (2, 3, 5, 5)"),
        ((Q, Q, Q), {"attn_mask": torch.ones(5)}, "attn_mask is (5,), must be broadcastable to (2, 3, 5, 5)"),
        ((Q, Q, Q), {"attn_mask": torch.ones(5, 5).long()}, "attn_mask is torch.int64, must be torch.bool"),
        ((Q, Q, Q), {"attn_mask": torch.ones(5, 5).double()}, "attn_mask is torch.float64, must be torch.bool"),
        ((Q, Q, Q), {"max_seqlen": 5}, "max_seqlen is 5, but there are no cu_seqlens"),
        ((Q, Q, Q), {"cu_seqlens": starts(6)}, "query is (2, 3, 5, 8), with cu_seqlens it needs (T, N, D)"),
        ((PACKED, PACKED[:5], PACKED[:5]), {"cu_seqlens": starts(6)}, "key is (5, 3, 8), cu_seqlens need query's"),
        ((PACKED,) * 3, {"cu_seqlens": starts(5)}, "cu_seqlens is [0, 5], must ascend from 0 to T = 6"),
        ((PACKED,) * 3, {"cu_seqlens": starts(7, -1)}, "cu_seqlens is [0, 7, 6], must ascend from 0 to T = 6"),
        ((PACKED,) * 3, {"cu_seqlens": starts(*12 * [1])}, "cu_seqlens is [0, 1, 2, …, 11, 12], must ascend"),
        ((PACKED,) * 3, {"cu_seqlens": starts(6).float()}, "cu_seqlens is torch.float32 (2,), must be int32"),
        (
            (PACKED,) * 3,
            {"cu_seqlens": starts(2, 4), "max_seqlen": 3},
            "max_seqlen is 3, but cu_seqlens have a sequence of 4",
        ),
        (
            (PACKED,) * 3,
            {"cu_seqlens": starts(6), "attn_mask": torch.ones(6, 6)},
            "attn_mask is (6, 6), packed tensors take none",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=f"^attention: {re.escape(message)}"):
        attention(*arguments, **options)


@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask", "cu_seqlens"])
def test_what_is_no_tensor_is_named(name):
    arguments = {"query": Q, "key": Q, "value": Q, name: [1]}
    with pytest.raises(TypeError, match=f"^attention: {name} must be a tensor, got list"):
        attention(**arguments)


@pytest.mark.parametrize("longest", [torch.tensor(6), 6.0], ids=str)
def test_the_longest_sequence_is_an_integer(longest):
    with pytest.raises(TypeError, match=f"^attention: max_seqlen must be an integer, got {type(longest).__name__}"):
        attention(*(PACKED,) * 3, cu_seqlens=starts(6), max_seqlen=longest)


def test_foreign_memory_is_out_of_reach_of_the_raw_op():
    q = torch.ones(6, 1, 4)
    for cu in ((0, 7), (0, 3), (-1, 6), (0, 8, 6)):
        numbers = torch.tensor(cu, dtype=torch.int32)
        with pytest.raises(RuntimeError, match=r"cu_q.*does not cut the tokens"):
            op.forward(op.Call(1.0, max_q=6, max_k=6), q, q, q, None, numbers, numbers, None, keep=True)
    with pytest.raises(RuntimeError, match=r"cu_q.*does not cut the tokens"):
        op.forward(op.Call(1.0, max_q=5, max_k=5), q, q, q, None, starts(6), starts(6), None, keep=True)
