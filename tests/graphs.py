"""Where the host would wait for a GPU; and a stand-in for CUDA graphs on the CPU. What runs within a capture is written
down and undone; a replay runs it again, in the same memory and with the same numbers: what a graph would hold for ever,
this one does.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastft.models import encoder


class NeverWaits(TorchDispatchMode):
    """Fails where the host would wait for a GPU: for a number, or for how many there are."""

    WAITS = ("_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "unique")

    def __init__(self):
        super().__init__()
        self.made_of_numbers = []  # torch.tensor's, which the host has

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        indices = args[1] if name.startswith("index") and isinstance(args[1], (list, tuple)) else ()
        masks = [i for i in indices if i is not None and i.dtype == torch.bool]
        if (name.startswith(self.WAITS) or masks) and not any(args[0] is known for known in self.made_of_numbers):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}\nand a stack trace")
        result = func(*args, **(kwargs or {}))
        if name == "lift_fresh":
            self.made_of_numbers.append(result)
        return result


class Graph(NeverWaits):
    def __init__(self):
        super().__init__()
        self.calls, self.before, self.replays = [], [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        schema, kwargs = func._schema, kwargs or {}
        for value, argument in zip(args, schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = [leaf.detach() for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
                self.before += [(tensor, tensor.clone()) for tensor in written]
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if schema.is_mutable or not any(returned.alias_info for returned in schema.returns):  # no view
            self.calls.append((func, args, kwargs, None if schema.is_mutable else result))
        return result

    @torch.no_grad()
    def undo(self):
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, results in self.calls:
            again = func(*args, **kwargs)
            for result, anew in zip(tree_leaves(results), tree_leaves(again), strict=results is not None):
                if isinstance(result, torch.Tensor):
                    result.copy_(anew)


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


def stand_in(monkeypatch):
    """Puts it in the place of torch.cuda's. Returns: the list of graphs, to which captures add."""
    graphs = []

    @contextlib.contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        state = torch.get_rng_state()
        with graph:
            yield
        graph.undo()
        torch.set_rng_state(state)
        graphs.append(graph)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(encoder, "_is_on_gpu", lambda tensor: True)
    monkeypatch.setattr("fastft.training.graphed_step._gpu", lambda model: torch.device("cpu"))
    return graphs
