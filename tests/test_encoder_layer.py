"""The encoder layer as one node: its composition's numbers, with the same elements dropped, whole and by halves."""

import pytest
import torch

from fastft import activations
from fastft.functional import _arena
from fastft.functional import encoder_layer as node
from fastft.functional._choice import use_backend
from fastft.testing import error
from fastft.testing.spec import TensorMaker

B, S, H, N, F = 3, 37, 48, 4, 80
HALVES = {"layer": (True, True), "attention": (True, False), "feed-forward": (False, True)}
each_half = pytest.mark.parametrize("halves", HALVES.values(), ids=HALVES)


@pytest.fixture(autouse=True)
def ours():
    with use_backend("fastft"):
        yield


def options(halves, p=0.1):
    attention, feed_forward = halves
    return (
        node.AttentionOptions(N, (H // N) ** -0.5, p, p, 1e-12) if attention else None,
        node.FeedForwardOptions("gelu", p, 1e-12) if feed_forward else None,
    )


def tensors(halves, dtype, seed=0, rows=B * S):
    """Input and parameters by name, scaled as a trained layer's."""
    t = TensorMaker(dtype, seed=seed)
    found = {"input": t(rows, H)}
    if halves[0]:
        for name in ("query", "key", "value"):
            found[f"{name}_weight"] = t(H, H, scale=H**-0.5)
        for name in ("query", "key", "value"):
            found[f"{name}_bias"] = t(H)
        found |= {"attention_weight": t(H, H, scale=H**-0.5), "attention_bias": t(H)}
        found |= {"attention_norm_weight": t(H) + 1, "attention_norm_bias": t(H)}
    if halves[1]:
        found |= {"inner_weight": t(F, H, scale=H**-0.5), "inner_bias": t(F)}
        found |= {"output_weight": t(H, F, scale=F**-0.5), "output_bias": t(H)}
        found |= {"norm_weight": t(H) + 1, "norm_bias": t(H)}
    return found


def mask_of(layout):
    """Mask and cu_seqlens."""
    lengths = torch.tensor([S, 5, 20])
    if layout.startswith("packed"):
        return None, torch.tensor([0, *lengths.cumsum(0)], dtype=torch.int32)
    if layout.startswith("padded"):
        return (torch.arange(S) < lengths[:, None])[:, None, None].expand(B, N, S, S), None
    return None, None


def layer(run, layout, seed):
    mask, cu_seqlens = mask_of(layout)
    return lambda input, **parameters: node._Layer.apply(run, mask, cu_seqlens, seed, input, *parameters.values())


def composition(run, layout, seed):
    mask, cu_seqlens = mask_of(layout)
    return lambda input, **parameters: run.composition(mask, cu_seqlens, seed, input, *parameters.values())


def run_of(halves, layout, dtype, p=0.1):
    return node._Run(
        *options(halves, p), node._Layout(B, S, layout.startswith("packed"), layout.endswith("first")), dtype
    )


@each_half
@pytest.mark.parametrize("layout", ["full", "padded", "packed", "full, first", "padded, first", "packed, first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_outputs_and_gradients_are_the_composition_s_under_the_same_dropout(halves, layout, dtype):
    if layout.endswith("first") and not halves[0]:
        pytest.skip("only attention knows of sequences")
    key = torch.tensor([987654321])
    single = torch.float32 if dtype == torch.float64 else dtype
    rows = 62 if layout.startswith("packed") else B * S

    def evaluate(seed):
        arguments = tensors(halves, dtype, seed, rows)

        def grad(*shape):
            return TensorMaker(dtype, seed=seed + 10**6)(*shape)

        return (
            error.run(layer(run_of(halves, layout, dtype), layout, key), arguments, arguments, grad),
            error.run(
                composition(run_of(halves, layout, single), layout, key), error.cast(arguments, single), arguments, grad
            ),
            error.run(
                composition(run_of(halves, layout, torch.float64), layout, key),
                error.cast(arguments, torch.float64),
                arguments,
                grad,
            ),
        )

    error.check(evaluate, double=dtype == torch.float64)


@each_half
def test_bfloat16_products_with_float32_parameters_stay_within_autocast_s_budget(halves):
    key = torch.tensor([5])

    def evaluate(seed):
        arguments = tensors(halves, torch.float32, seed)

        def grad(*shape):
            return TensorMaker(torch.float32, seed=seed + 10**6)(*shape)

        def autocast(**arguments):
            with torch.autocast("cpu", torch.bfloat16):
                return composition(run_of(halves, "full", torch.float32), "full", key)(**arguments)

        return (
            error.run(layer(run_of(halves, "full", torch.bfloat16), "full", key), arguments, arguments, grad),
            error.run(autocast, arguments, arguments, grad),
            error.run(
                composition(run_of(halves, "full", torch.float64), "full", key),
                error.cast(arguments, torch.float64),
                arguments,
                grad,
            ),
        )

    error.check(evaluate)


@each_half
def test_second_derivatives_see_the_same_masks(halves):
    arguments = tensors(halves, torch.float64, rows=2 * 5)
    run = node._Run(*options(halves, 0.2), node._Layout(2, 5, False, False), torch.float64)
    leaves = [tensor.requires_grad_() for tensor in arguments.values()]
    apply = lambda *x: node._Layer.apply(run, None, None, torch.tensor([3]), *x)  # noqa: E731
    assert torch.autograd.gradcheck(apply, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(apply, leaves, fast_mode=True)


@each_half
def test_each_gradient_alone_is_the_one_of_all(halves):
    arguments, run = tensors(halves, torch.float32), run_of(halves, "full", torch.float32)
    key = torch.tensor([1])
    everything = error.run(layer(run, "full", key), arguments, arguments, torch.ones)
    for name in arguments:
        alone = error.run(layer(run, "full", key), arguments, [name], torch.ones)
        assert all(torch.equal(alone[key], everything[key]) for key in alone), name


@each_half
def test_without_autograd_the_output_has_the_same_bits(halves):
    arguments = tensors(halves, torch.float32)
    first, second = options(halves, 0.0)
    values = list(arguments.values())[1:]
    count = len(node.AttentionParameters._fields) if first else 0
    attention = (node.AttentionParameters(*values[:count]), first) if first else None
    feed_forward = (node.FeedForwardParameters(*values[count:]), second) if second else None
    batch = node.Batch(B, S)
    with torch.no_grad():
        plain = node.encoder_layer(arguments["input"], batch, attention, feed_forward)
    arguments["input"].requires_grad_()
    recorded = node.encoder_layer(arguments["input"], batch, attention, feed_forward)
    assert recorded.requires_grad and torch.equal(plain, recorded)


@pytest.mark.parametrize("layout", ["full", "padded", "packed"])
def test_the_first_rows_alone_are_those_of_all_rows(layout):
    """Without dropout, whose numbers differ with the number of rows."""

    def evaluate(seed):
        arguments = tensors(HALVES["layer"], torch.float32, seed, 62 if layout == "packed" else B * S)
        starts = [0, 37, 42] if layout == "packed" else [0, S, 2 * S]
        double = error.cast(arguments, torch.float64)

        def first(function):
            return lambda **arguments: function(**arguments)[starts]

        run, alone = (run_of(HALVES["layer"], name, torch.float32, 0.0) for name in (layout, f"{layout}, first"))
        exact = run_of(HALVES["layer"], layout, torch.float64, 0.0)
        return (
            error.run(layer(alone, layout, None), arguments, arguments, torch.ones),
            error.run(first(composition(run, layout, None)), arguments, arguments, torch.ones),
            error.run(first(composition(exact, layout, None)), double, arguments, torch.ones),
        )

    error.check(evaluate)


@each_half
@pytest.mark.parametrize("layout", ["padded", "packed, first"])
@pytest.mark.parametrize("memory", ["low", "lowest"])
def test_keeping_less_changes_no_bit_of_float32(halves, layout, memory):
    if layout.endswith("first") and not halves[0]:
        pytest.skip("only attention knows of sequences")
    arguments = tensors(halves, torch.float32, rows=62 if layout.startswith("packed") else B * S)
    run, key = run_of(halves, layout, torch.float32), torch.tensor([3])
    kept, found = {}, {}
    for name in ("fast", memory):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, into=sizes: into.append(t.numel()) or t, lambda t: t):
            leaves = {key: tensor.clone().requires_grad_() for key, tensor in arguments.items()}
            output = layer(run._replace(memory=name), layout, key)(**leaves)
        output.backward(torch.ones_like(output))
        kept[name], found[name] = sum(sizes), [output, *(leaf.grad for leaf in leaves.values())]
        assert _arena._together == (name == "lowest")
    given = sum(tensor.numel() for tensor in arguments.values())
    assert kept[memory] < kept["fast"]
    if memory == "lowest" and not layout.startswith("padded"):  # where there is a mask
        assert kept[memory] <= given + 100  # and the seed, and where sequences begin
    assert all(torch.equal(a, b) for a, b in zip(found["fast"], found[memory], strict=True))


@pytest.mark.parametrize("memory", node.MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_what_is_inside_may_lie_apart(dtype, memory, monkeypatch):
    arguments, found, made = tensors(HALVES["layer"], dtype), [], []
    run, empty_rows = run_of(HALVES["layer"], "full", dtype)._replace(memory=memory), _arena.empty_rows
    monkeypatch.setattr(_arena, "empty_rows", lambda *given: made.append(empty_rows(*given)) or made[-1])
    for bytes_of_a_row, lies in ((_arena.APART, torch.Tensor.is_contiguous), (F * dtype.itemsize, is_spread)):
        monkeypatch.setattr(_arena, "APART", bytes_of_a_row)
        leaves = {key: tensor.clone().requires_grad_() for key, tensor in arguments.items()}
        output = layer(run, "full", torch.tensor([3]))(**leaves)
        output.backward(torch.ones_like(output))
        found.append([output, *(leaf.grad for leaf in leaves.values())])
        assert made and all(map(lies, made))
        made.clear()
    assert all(map(torch.equal, *found))


def is_spread(tensor):
    return _arena.has_rows_apart(tensor) and not tensor.is_contiguous()


def test_gradients_share_no_memory():
    """Autograd keeps the first gradient of a parameter as it gets it."""
    arguments = tensors(HALVES["layer"], torch.float32)
    leaves = [tensor.requires_grad_() for tensor in arguments.values()]
    output = node._Layer.apply(run_of(HALVES["layer"], "full", torch.float32), None, None, torch.tensor([1]), *leaves)
    output.backward(torch.ones_like(output))
    addresses = [leaf.grad.untyped_storage().data_ptr() for leaf in leaves]
    assert len(set(addresses)) == len(addresses)
    assert all(leaf.grad.untyped_storage().nbytes() == leaf.numel() * 4 for leaf in leaves)


@pytest.mark.parametrize("activation", [name for name in activations.NAMES if name != "identity"])
def test_every_activation_is_made_again_for_the_backward(activation):
    run = node._Run(None, node.FeedForwardOptions(activation, 0.0, 1e-12), None, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in tensors(HALVES["feed-forward"], torch.float64, rows=7).values()]
    assert torch.autograd.gradcheck(lambda *x: node._Layer.apply(run, None, None, None, *x), leaves, fast_mode=True)


def test_the_number_of_threads_changes_no_bit():
    arguments, before, found = tensors(HALVES["layer"], torch.float32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            run = run_of(HALVES["layer"], "padded", torch.float32)
            found.append(error.run(layer(run, "padded", torch.tensor([1])), arguments, arguments, torch.ones))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other[name], found[0][name]) for other in found[1:] for name in found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_joined_weights_are_no_views_and_have_storages_of_their_own(dtype):
    joined = torch.randn(3 * 600, 1000).to(dtype)
    expected = [part.clone() for part in joined.chunk(3)]
    parts = node._parts(joined, 3, dtype)
    del joined
    assert not any(part._is_view() for part in parts)
    assert all(part.untyped_storage().nbytes() == part.numel() * part.itemsize for part in parts)
    parts[1].zero_()
    expected[1].zero_()
    parts[2] = None
    assert all(torch.equal(part, want) for part, want in zip(parts[:2], expected, strict=False))
