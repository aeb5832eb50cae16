"""AdamW in one pass over all parameters, gradients and moments, and one over the gradients for their norm."""

import operator

import torch
from torch.optim.adamw import adamw
from torch.optim.optimizer import _use_grad_for_differentiable

from fastft.functional import _choice, _shadow
from fastft.optim import clip


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW, its state_dict included, which torch's loads and whose this one loads.

    On the CPU, results have the same bits whatever the number of threads.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused: torch's.
            ``foreach`` and ``fused`` choose among PyTorch's implementations, where one of them runs (:meth:`report`).
        max_grad_norm: None, or the norm that all gradients together may have in a step; larger ones count in it as if
            clip_grad_norm_ had scaled them. ``.grad`` stays as it is, except where PyTorch's implementation runs. It
            is no part of the state_dict.
        shadow: None, or a dtype of autocast, torch.bfloat16 or torch.float16: where our kernel updates float32 weights
            on a GPU (:meth:`report`), it also writes a copy in that dtype of those that our products convert, which
            these take until the weight is written to again. That is seen where it raises the tensor's version, as
            operations in place and ``load_state_dict`` do. It is not seen through ``.data`` or NumPy, by another
            optimizer with ``fused=True`` or by a CUDA graph other than :class:`fastft.GraphedStep`'s: where there is
            such a thing between two steps, leave it None. It is no part of the state_dict.
    Attributes:
        grad_norm: with ``max_grad_norm``, the norm in the last step before clipping, a scalar tensor; None before.
    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> optimizer = AdamW([weight], lr=0.1, weight_decay=0.0, max_grad_norm=1.0)
        >>> optimizer.step()
        >>> weight.data, optimizer.grad_norm
        (tensor([0.9000, 0.9000]), tensor(5.))
    """

    grad_norm = shadow = _shadows = None  # of those, too, that were pickled before there was one

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        amsgrad=False,
        *,
        maximize=False,
        foreach=None,
        capturable=False,
        differentiable=False,
        fused=None,
        max_grad_norm=None,
        shadow=None,
    ):
        if max_grad_norm is not None and not max_grad_norm >= 0:
            raise ValueError(f"AdamW: max_grad_norm is {max_grad_norm}, must be at least 0, or None")
        if shadow not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"AdamW: shadow is {shadow}, must be torch.bfloat16, torch.float16 or None")
        options = {"maximize": maximize, "foreach": foreach, "capturable": capturable}
        options |= {"differentiable": differentiable, "fused": fused}
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)
        self.max_grad_norm, self.shadow = max_grad_norm, shadow
        self._step_supports_amp_scaling = False  # a GradScaler divides gradients itself, before their norm is taken

    def __getstate__(self):
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm, "shadow": self.shadow}

    @_use_grad_for_differentiable
    def step(self, closure=None):
        """One step of every parameter that has a gradient.

        Args:
            closure: computes the gradients anew; its result is returned.
        """
        self._check_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [_Group(self, options) for options in self.param_groups]
        if self.shadow is not None and self._shadows is None:
            self._shadows = _shadow.Shadows(self.shadow)
        ours = [_choice.runs("AdamW", group.why_not) for group in groups if group.params]
        factor = None
        if self.max_grad_norm is not None and ours:
            if all(ours):
                self.grad_norm = clip.total_norm([grad for group in groups for grad in group.grads])
                factor = clip.clip_factor(self.grad_norm, self.max_grad_norm)
            else:
                params = [param for group in groups for param in group.params]
                self.grad_norm = clip.clip_grad_norm_(params, self.max_grad_norm)
        for group, is_ours in zip((group for group in groups if group.params), ours, strict=True):
            if is_ours:
                group.step(factor, self._shadows)
            else:
                group.step_in_torch()
        return loss

    def report(self):
        """What would run in a step now, by parameter group: ``{"runs": "fastft" | "torch", "reason": str | None}``.

        Parameters without gradient are judged, too.
        """
        if _choice.backend() == "torch":
            reasons = ["FASTFT_BACKEND is torch" for _ in self.param_groups]
        else:
            reasons = [self._why_not(options) for options in self.param_groups]
        return [{"runs": "fastft" if reason is None else "torch", "reason": reason} for reason in reasons]

    def _why_not(self, options):
        """What :class:`_Group` finds out, of all parameters, whether they have a gradient or a state or none."""
        params = options["params"]
        moving = [param for param in params if param.grad is not None]
        kept = [param for param in params if self.state.get(param)]
        moments = ([self.state[param][name] for param in kept] for name in ("exp_avg", "exp_avg_sq", "step"))
        return (
            _why_not_options(options)
            or _choice.unsupported(*clip.one_of_each(params))
            or _why_not_gradients(moving, [param.grad for param in moving])
            or _why_not_state(kept, *moments)
        )

    def _check_capture(self):
        """Raises: RuntimeError: a CUDA graph is being captured, which would hold the number of this step for ever."""
        name = "_accelerator_graph_capture_health_check"
        getattr(self, name if hasattr(self, name) else "_cuda_graph_capture_health_check")()


class _Group:
    """The parameters of one group that have gradients, with these and their state, made where missing."""

    def __init__(self, optimizer, options):
        self.options = options
        self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs, self.steps = lists = tuple(
            [] for _ in range(6)
        )
        self.has_complex = optimizer._init_group(options, *lists)
        self.why_not = (
            _why_not_options(options)
            or _why_not_gradients(self.params, self.grads)
            or _why_not_state(self.params, self.exp_avgs, self.exp_avg_sqs, self.steps)
        )

    def step(self, factor, shadows):
        """By our kernel, with gradients times ``factor`` unless it is None."""
        lists, copies = (self.params, self.grads, self.exp_avgs, self.exp_avg_sqs), []
        if not all(all(map(torch.Tensor.is_contiguous, tensors)) for tensors in lists):
            lists = zip(*(_dense(tensors, copies) for tensors in zip(*lists, strict=True)), strict=True)
        kinds = list(zip(map(_KIND, self.params), map(_DTYPE, self.grads), strict=True))
        alike = dict.fromkeys(kinds)
        lists = [list(tensors) for tensors in (*lists, self.steps, self.params)]
        lr, beta1, beta2 = (float(value) for value in (self.options["lr"], *self.options["betas"]))
        options = (lr, beta1, beta2, self.options["eps"], self.options["weight_decay"], self.options["maximize"])
        for kind in alike:
            some = lists
            if len(alike) > 1:
                some = [[t for t, other in zip(tensors, kinds, strict=True) if other == kind] for tensors in lists]
            *some, params = some
            (device, dtype), _ = kind
            own = None if factor is None else factor.to(device, torch.promote_types(dtype, torch.float32))
            low = None if shadows is None else shadows.to_write(params)
            torch.ops.fastft.adamw(*some, own, *options, low)
        for tensor, copy in copies:
            tensor.copy_(copy)
        torch.autograd.graph.increment_version([*self.params, *self.exp_avgs, *self.exp_avg_sqs])
        if shadows is not None:
            shadows.written(self.params)

    def step_in_torch(self):
        """By PyTorch's function."""
        options, (beta1, beta2) = self.options, self.options["betas"]
        named = ("amsgrad", "lr", "weight_decay", "eps", "maximize", "foreach", "capturable", "differentiable", "fused")
        adamw(
            *(self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs, self.steps),
            **{name: options[name] for name in named},
            has_complex=self.has_complex,
            beta1=beta1,
            beta2=beta2,
        )
        if options["fused"] and not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(self.params)  # as its other two do


_KIND = operator.attrgetter("device", "dtype")
_DTYPE = operator.attrgetter("dtype")
_STEP = operator.attrgetter("is_cpu", "dtype")


def _why_not_options(options):
    if torch.compiler.is_compiling():
        return "torch.compile makes its own kernels for many tensors"
    for name in ("amsgrad", "capturable", "differentiable"):
        if options[name]:
            return f"{name} is PyTorch's"
    for value in (options["lr"], *options["betas"]):
        if isinstance(value, torch.Tensor) and not value.is_cpu:
            return f"lr or betas are on {value.device}"
    return None


def _why_not_gradients(params, grads):
    for dtype, grad_dtype in set(zip(map(_DTYPE, params), map(_DTYPE, grads), strict=True)):
        if grad_dtype != dtype and (dtype != torch.float32 or grad_dtype == torch.float64):
            return f"a gradient is {grad_dtype}, its parameter {dtype}"
    return _choice.unsupported(*clip.one_of_each(params), *clip.one_of_each(grads)) or clip.why_not_apart(params)


def _why_not_state(params, exp_avgs, exp_avg_sqs, steps):
    expected = list(map(_KIND, params))
    for moments in (exp_avgs, exp_avg_sqs):
        found = list(map(_KIND, moments))
        if found != expected:
            (own, of) = next(pair for pair in zip(found, expected, strict=True) if pair[0] != pair[1])
            return f"a moment is {own[1]} on {own[0]}, its parameter {of[1]} on {of[0]}"
    for is_cpu, dtype in set(map(_STEP, steps)):
        if not is_cpu or dtype not in (torch.float32, torch.float64):
            return f"a step's number is {dtype}{'' if is_cpu else ', not on the CPU'}"
    return None


def _dense(tensors, copies):
    """(parameter, gradient, moments) contiguous in one order; ``copies`` gets (tensor, copy) of what is written."""
    ordered = clip.in_memory_order(*tensors)
    dense = [tensor.contiguous() for tensor in ordered]
    pairs = list(zip(ordered, dense, strict=True))
    copies += [(tensor, copy) for tensor, copy in (pairs[0], *pairs[2:]) if tensor is not copy]
    return dense
