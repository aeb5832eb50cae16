"""A whole training step as one CUDA graph: the host starts it by one call, where it would start a thousand kernels.

Not yet run on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed
from transformers import PreTrainedModel

from fastft.models.mask import lengths_of, plain, with_lengths
from fastft.training.tokens import longest_input

IGNORED = -100  # the label of what does not count, as in cross-entropy


class GraphedStep:
    """``loss = step(batch)``: forward, backward, clipping and the optimizer's update; afterwards no gradient is left.

    A graph holds its sizes for ever, so batches are brought to a few: the length up to a multiple of ``multiple``, and
    the number of tokens, as they are packed, up to a multiple of that length, by one more sequence whose label does not
    count. Loss and gradients stay those of the batch. That adds half a sequence on average, and nothing to a batch of
    such a length without padding. Where padding is computed (stock models, ``padding_free=False``), lengths up to
    powers of two would add up to as much again; multiples of 32 are not many more.

    A size is run as usual when it first comes, which prepares what cannot be captured, is captured when it comes again,
    and replayed from then on. All graphs share their memory, beside which first steps have theirs. Every call is one
    step. Dropout's seeds are drawn by PyTorch's generator, which replays move on. Learning rates are read from the
    optimizer at each call, whoever changed them. Where its other options, ``requires_grad``, ``train()`` and ``eval()``
    or the place of a parameter have changed, or its state was loaded, all is captured anew; other changes of the model
    are not seen.

    Args:
        model: one of transformers' or ours, on a CUDA device, with a loss that is the mean of a cross-entropy;
            ``fastft.optimize`` comes first.
        optimizer: one with ``capturable=True``, such as :class:`fastft.optim.AdamW`, whose ``max_grad_norm`` clips and
            whose update is then PyTorch's: fastest with ``fused=True``.
        dtype: torch.bfloat16, of autocast; None is without. One that is around the call is not asked.
        multiple: of lengths.
    Attributes:
        captures: how many graphs were captured.
    Raises: ValueError, RuntimeError: one sentence that says what cannot be captured.

    Example, of a loop with a scheduler, whose collator is that of ``fastft.finetune`` or has the mask on the CPU::

        optimizer = fastft.optim.AdamW(model.parameters(), 2e-5, max_grad_norm=1.0, fused=True, capturable=True)
        step = fastft.GraphedStep(model, optimizer, dtype=torch.bfloat16)
        for batch in loader:
            loss = step(batch)
            scheduler.step()
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        *,
        dtype: torch.dtype | None = None,
        multiple: int = 32,
    ) -> None:
        if dtype not in (None, torch.bfloat16):
            raise ValueError(f"GraphedStep: dtype is {dtype}, must be torch.bfloat16 or None")
        if multiple < 1:
            raise ValueError(f"GraphedStep: multiple is {multiple}, must be at least 1")
        if not all(group.get("capturable", False) for group in optimizer.param_groups):
            raise ValueError(
                f"GraphedStep: {type(optimizer).__name__} counts its steps on the host: give it capturable=True"
            )
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise ValueError("GraphedStep: a step of several processes cannot be captured: take the ordinary loop")
        config = model.config
        kind = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
        if kind != "single_label_classification":
            raise ValueError(f"GraphedStep: the loss of {kind} has no label that does not count")
        self.model, self.optimizer, self.dtype, self.multiple = model, optimizer, dtype, multiple
        self.device, self.captures = _gpu(model), 0
        self._stream = torch.cuda.Stream(self.device)
        self._sizes: dict[Any, _Size] = {}
        self._held = self._state = None
        optimizer._warned_capturable_if_run_uncaptured = True  # PyTorch would say that a first step is not captured

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One step.

        Args:
            batch: ``input_ids`` (B, S), ``labels`` of an integer dtype, and what else the model takes, on any device;
                where there is an ``attention_mask``, its ones are before its zeros, and it is on the CPU or has lengths
                (:func:`fastft.models.mask.with_lengths`).
        Returns: the loss, a scalar, on the GPU.
        """
        if self._state is not self.optimizer.state or self._held != self._holds():
            self._start_anew()
        columns = dict(batch)
        if columns.get("attention_mask") is None:
            rows, longest = columns["input_ids"].shape
            columns["attention_mask"] = with_lengths(torch.ones_like(columns["input_ids"]), [longest] * rows)
        size = self._size(columns)
        self._fill(size, columns)
        for own, group in zip(self._rates, self.optimizer.param_groups, strict=True):
            own.fill_(group["lr"])
        if size.graph is not None:
            size.graph.replay()
        elif size.prepared:
            self._capture(size)
            size.graph.replay()
        else:
            current = torch.cuda.current_stream(self.device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):  # what is captured there finds what this prepares
                size.loss = self._step(size)
            current.wait_stream(self._stream)
            size.prepared = True
        for group in self.optimizer.param_groups:
            torch.autograd.graph.increment_version(group["params"])  # a replay has changed them behind PyTorch's back
        return size.loss.clone()  # the next replay writes there

    def _step(self, size: _Size) -> torch.Tensor:
        mask = with_lengths(size.columns["attention_mask"], size.lengths)
        # Autocast would keep casts of the weights, if one is around the call, from one step for the next.
        autocast = torch.autocast(self.device.type, torch.bfloat16, self.dtype is not None, cache_enabled=False)
        self.model.zero_grad()  # a gradient that is there would be added to
        with autocast:
            loss = self.model(**size.columns | {"attention_mask": mask}).loss
        loss.backward()
        with self._own_rates():
            self.optimizer.step()
        self.model.zero_grad()  # its memory is for other graphs
        return loss.detach()

    def _capture(self, size: _Size) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads of a DataLoader may pin memory meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                size.loss = self._step(size)
        except RuntimeError as error:
            cause = error.__context__ or error  # PyTorch has something to say of the capture's end, too
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            first_line, *_ = str(cause).splitlines()
            raise RuntimeError(
                "GraphedStep: the step cannot be captured; the model must not wait for the GPU, as .item(), .cpu() and "
                f"bool(tensor) do, nor may an earlier loss or output still be held ({first_line})"
            ) from error
        size.graph = graph
        self.captures += 1

    @contextlib.contextmanager
    def _own_rates(self) -> Iterator[None]:
        """The learning rates are where replays read them; the optimizer's own are what schedulers know."""
        given = [group["lr"] for group in self.optimizer.param_groups]
        try:
            for group, own in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = own
            yield
        finally:
            for group, rate in zip(self.optimizer.param_groups, given, strict=True):
                group["lr"] = rate

    def _start_anew(self) -> None:
        self._sizes.clear()
        self._pool = torch.cuda.graph_pool_handle()  # one that lost all its graphs cannot be used again
        self._rates = [torch.zeros((), device=self.device) for _ in self.optimizer.param_groups]
        self._held, self._state = self._holds(), self.optimizer.state

    def _holds(self) -> tuple:
        """What graphs hold for ever, but for the tensors of the optimizer's state."""
        names = self.optimizer.defaults.keys() - {"lr"}
        groups = [{name: group[name] for name in names} for group in self.optimizer.param_groups]
        parameters = [(parameter.data_ptr(), parameter.requires_grad) for parameter in self.model.parameters()]
        return parameters, [module.training for module in self.model.modules()], groups

    # ---- sizes

    def _size(self, columns: Mapping[str, torch.Tensor]) -> _Size:
        """That of a batch, made if it is the first."""
        ids, labels = columns["input_ids"], columns.get("labels")
        if labels is None or labels.is_floating_point():
            found = "not there" if labels is None else labels.dtype
            raise ValueError(f"GraphedStep: labels are {found}, must be of an integer dtype")
        rows, longest = ids.shape
        lengths = _lengths(columns["attention_mask"])
        S = max(longest, longest_input(self.model.config, -(-longest // self.multiple) * self.multiple))
        T = sum(lengths)
        if rows * S > T:
            rows, T = rows + 1, (T // S + 1) * S
        kinds = {name: (_shape(name, column, ids, rows, S), column.dtype) for name, column in columns.items()}
        key = rows, S, T, tuple(sorted(kinds.items()))
        if key not in self._sizes:
            static = {name: torch.empty(shape, dtype=of, device=self.device) for name, (shape, of) in kinds.items()}
            self._sizes[key] = _Size(static, _any_lengths(rows, S, T))
        return self._sizes[key]

    def _fill(self, size: _Size, columns: Mapping[str, torch.Tensor]) -> None:
        """Copies a batch to where its graph reads it; the rest is a sequence of padding tokens, and padding."""
        rest = {"input_ids": getattr(self.model.config, "pad_token_id", None) or 0, "labels": IGNORED}
        for name, column in columns.items():
            static = size.columns[name]
            static.fill_(rest.get(name, 0))
            static[tuple(map(slice, column.shape))].copy_(plain(column), non_blocking=True)
        added = sum(size.lengths) - sum(_lengths(columns["attention_mask"]))
        if added:
            size.columns["attention_mask"][-1, :added].fill_(1)


@dataclass
class _Size:
    """Batches of one size."""

    columns: dict[str, torch.Tensor]  # where the graph reads them
    lengths: list[int]  # what the host believes of them
    prepared: bool = False
    graph: torch.cuda.CUDAGraph | None = None
    loss: torch.Tensor | None = None  # where the graph writes it


def _gpu(model: PreTrainedModel) -> torch.device:
    """Where the model is."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ValueError(f"GraphedStep: the model is on {device}, graphs are of CUDA devices: move it to one")
    return device


def _lengths(mask: torch.Tensor) -> tuple[int, ...] | list[int]:
    """Of the sequences, without waiting for a GPU."""
    lengths = lengths_of(mask)
    if lengths is None:
        if not mask.is_cpu:
            raise ValueError(
                f"GraphedStep: the attention mask is on {mask.device}: leave it on the CPU, or hand its lengths over "
                "by fastft.models.mask.with_lengths"
            )
        counts = (mask != 0).sum(1, keepdim=True)
        if not torch.equal(mask != 0, torch.arange(mask.shape[1]) < counts):
            raise ValueError("GraphedStep: the attention mask is not one up to each length and zero behind it")
        lengths = counts[:, 0].tolist()
    if 0 in lengths:
        raise ValueError(f"GraphedStep: sequence {list(lengths).index(0)} has no token")
    return lengths


def _any_lengths(rows: int, S: int, T: int) -> list[int]:
    """With these numbers, and the greatest maximum that there is. Kernels read the mask for each sequence's length."""
    lengths: list[int] = []
    for behind in reversed(range(rows)):
        lengths.append(min(S, T - sum(lengths) - behind))
    return lengths


def _shape(name: str, column: torch.Tensor, ids: torch.Tensor, rows: int, S: int) -> tuple[int, ...]:
    """Of a column that begins with the rows, or with these and the tokens."""
    if column.shape[:1] != ids.shape[:1] or column.shape[1:2] not in ((), ids.shape[1:]):
        raise ValueError(f"GraphedStep: {name} is {tuple(column.shape)}, input_ids are {tuple(ids.shape)}")
    return rows, *((S,) if column.dim() > 1 else ()), *column.shape[2:]
