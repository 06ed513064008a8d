"""Squares or magnitudes of per-example gradients within one backward pass, layer by layer.

The gradient of a batch is the sum over its examples, which cannot be separated afterwards. Before the sum, they can: a
layer's gradient follows from its input and the gradient of its output, and both have a batch dimension. Hooks record
the two at every layer, square the gradient of each example and sum the squares (Goodfellow, 2015, "Efficient
per-example gradient computations", which does so for the norms).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from evertune.importance.rules import Call, Power, chunks, raised, rule_for, tensors_in


@dataclass(frozen=True)
class Use:
    """One use of a parameter in a forward pass: the call, the parameter's name there, the output's gradient."""

    call: Call
    parameter: str
    gradient: Tensor


def add_powers(uses: list[Use], total: Tensor, power: Power) -> None:
    """Add the magnitude of each example's gradient, to ``power``, to ``total``.

    A parameter's gradient is the sum over its uses.
    """
    if len(uses) == 1:
        uses[0].call.add_powers(uses[0].parameter, uses[0].gradient, total, power)
        return
    for rows in chunks(len(uses[0].gradient), total.numel()):
        total += raised(_per_example(uses, rows), power).sum(0)


def add_sums(uses: list[Use], total: Tensor) -> None:
    """Add the gradient of each example, not squared, to ``total``."""
    for rows in chunks(len(uses[0].gradient), total.numel()):
        total += _per_example(uses, rows).sum(0)


class PerExampleHooks:
    """Hooks that report, for every parameter and backward pass, its uses and the gradients of their outputs.

    The parameters themselves are not part of the graph (``requires_grad`` must be off while the hooks are active), so
    that no ``grad`` is allocated and no hook of DDP or DeepSpeed fires; instead, the graph starts at the first outputs
    of the hooked modules.

    Example::

        hooks = PerExampleHooks(module, shapes, receive=lambda name, uses: add_powers(uses, totals[name], 2))
        with hooks.installed():
            hooks.probe(forward)
            with hooks.recording(batch_size):
                logits = module(batch)
            hooks.backward(logits, gradient)

    Args:
        module: The model.
        shapes: Name to shape of the parameters to watch, with the names of ``module.named_parameters()``.
        receive: Function called with a parameter's name and its uses, in the same order on all ranks.

    Attributes:
        unreached: Names of the parameters that no rule covers, and of those that :meth:`probe` found used outside their
            own module. Only autograd over the whole model can compute their gradients.
        one_by_one: Names among ``unreached`` whose rule holds all the same in a forward pass of a single example, as
            for relative positions, which T5 computes once for all examples, and for layers with the batch second.
    """

    def __init__(
        self, module: nn.Module, shapes: Mapping[str, torch.Size], receive: Callable[[str, list[Use]], None]
    ) -> None:
        self._receive = receive
        self._shapes = shapes
        self._names = {id(p): name for name, p in module.named_parameters() if name in shapes}
        self._rules: dict[nn.Module, type[Call]] = {}
        self._owned: dict[nn.Module, dict[str, str]] = {}
        self.unreached: set[str] = set()
        self.one_by_one: set[str] = set()
        for layer in module.modules():
            owned = {local: self._names[id(p)] for local, p in layer._parameters.items() if id(p) in self._names}
            rule = rule_for(layer) if owned else None
            if rule is not None:
                self._rules[layer], self._owned[layer] = rule, owned
            else:
                self.unreached.update(owned.values())
        self._batch = 0
        self._single = False
        self._reset()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Install the hooks; outside of :meth:`recording` they do nothing."""
        with ExitStack() as stack:
            for layer in self._rules:
                handle = layer.register_forward_hook(self._after_forward, with_kwargs=True, prepend=True)
                stack.callback(handle.remove)
            yield

    def probe(self, forward: Callable[[int], object]) -> None:
        """Find the parameters that the rules do not reach, and add them to ``unreached``.

        A rule is valid if its layer's input and output have the batch first (or a batch of 1 for all examples), and if
        the parameter is used only in its own layer. Two batch sizes are run to distinguish the batch from other
        dimensions.

        Args:
            forward: Function that runs the model on a batch with the given number of examples.
        """
        strays: set[str] = set()
        for batch in (2, 3):
            with torch.no_grad(), _Observer(self._owned, self._names, batch) as observer:
                forward(batch)
            self.unreached |= observer.strays | observer.elsewhere
            self.one_by_one |= observer.elsewhere
            strays |= observer.strays
        for layer, rule in self._rules.items():
            if not rule.any_layout:
                strays.update(self._owned[layer].values())
        self.one_by_one -= strays

    @contextmanager
    def recording(self, batch: int, *, single: bool = False) -> Iterator[None]:
        """Record the forward pass of ``batch`` examples inside the context for :meth:`backward`.

        Args:
            batch: Number of examples.
            single: Record the parameters that are reached ``one_by_one``, and only those; ``batch`` is 1.
        """
        self._reset()
        self._batch, self._single = batch, single
        try:
            yield
        finally:
            self._batch, self._single = 0, False

    def backward(self, output: Tensor, gradient: Tensor, *, again: bool = False) -> None:
        """Backpropagate through the recorded graph from ``output``, and report every watched parameter that it reaches.

        Args:
            output: Output of the recorded forward pass.
            gradient: Gradient of ``output``.
            again: Whether there will be another backward pass over the same graph. Default: False.
        """
        if output.requires_grad:
            torch.autograd.grad(output, self._leaves, gradient, retain_graph=again, allow_unused=True)
            for name in list(self._arrived):  # some of their uses do not contribute to the output
                self._receive(name, self._arrived.pop(name))
        if not again:
            self._reset()

    def _reset(self) -> None:
        self._leaves: list[Tensor] = []
        self._uses: Counter[str] = Counter()
        self._arrived: defaultdict[str, list[Use]] = defaultdict(list)

    def _after_forward(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> Tensor | None:
        single = self._single
        owned = {
            local: name
            for local, name in self._owned[layer].items()
            if (name in self.one_by_one if single else name not in self.unreached)
        }
        if not self._batch or not owned or not torch.is_grad_enabled():
            return None
        if not single and len(output) not in (1, self._batch):
            raise ValueError(
                f"the output of {type(layer).__name__} has shape {list(output.shape)}, which does not start with the "
                f"batch of {self._batch} examples; put the batch first"
            )
        if not single and len(output) != self._batch:  # the same for all examples, such as position embeddings
            output = output.repeat(self._batch, *[1] * (output.ndim - 1))
        if not output.requires_grad:
            self._leaves.append(output.detach().requires_grad_())
            output = self._leaves[-1].clone()  # a leaf must not be modified in place, and the next layer may do so
        shapes = {local: self._shapes[name] for local, name in owned.items()}
        if single:
            args, kwargs = (tensors_in((args, dict(kwargs)))[0][None],), {}
        call = self._rules[layer](layer, shapes, self._batch, args, kwargs)
        self._uses.update(owned.values())

        def after_backward(gradient: Tensor) -> None:
            with torch.no_grad():
                for local, name in owned.items():
                    self._arrived[name].append(Use(call, local, gradient[None] if single else gradient))
                    # Report a parameter as soon as its last use has arrived, so that the gradients of one layer are
                    # freed early.
                    if len(self._arrived[name]) == self._uses[name]:
                        self._receive(name, self._arrived.pop(name))

        output.register_hook(after_backward)  # type: ignore[no-untyped-call]
        return output


class _Observer(TorchFunctionMode):
    """Finds uses of parameters in a forward pass that the rules would miss."""

    def __init__(self, owned: Mapping[nn.Module, Mapping[str, str]], names: Mapping[int, str], batch: int) -> None:
        super().__init__()
        self.strays: set[str] = set()  # used outside their own layer
        self.elsewhere: set[str] = set()  # of layers whose input or output does not have the batch first
        self._owned, self._names, self._batch = owned, dict(names), batch
        self._running: list[nn.Module] = []
        self._handles: list[Any] = []

    def __enter__(self) -> _Observer:
        for layer in self._owned:
            self._handles.append(layer.register_forward_pre_hook(self._before, prepend=True))
            self._handles.append(layer.register_forward_hook(self._after, with_kwargs=True, always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def _before(self, layer: nn.Module, args: Any) -> None:
        self._running.append(layer)

    def _after(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._running.pop()
        leading = [len(t) for t in (*tensors_in((args, kwargs))[:1], *tensors_in(output))]
        if not isinstance(output, Tensor):
            self.strays.update(self._owned[layer].values())
        elif any(length not in (1, self._batch) for length in leading):
            self.elsewhere.update(self._owned[layer].values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if tensors_in(result) and func not in _NO_GRADIENT:
            here = self._owned[self._running[-1]].values() if self._running else ()
            used = (self._name(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            self.strays.update(name for name in used if name is not None and name not in here)
        return result

    def _name(self, tensor: Tensor) -> str | None:
        if isinstance(tensor, nn.Parameter) and id(tensor) not in self._names:
            # FSDP2 puts other parameters in place while a layer runs, and keeps them.
            self._names |= {
                id(layer._parameters[one]): name for layer, own in self._owned.items() for one, name in own.items()
            }
        return self._names.get(id(tensor))


_NO_GRADIENT = (torch.Tensor.detach, torch.Tensor.data.__get__)  # type: ignore[attr-defined]


def _per_example(uses: list[Use], rows: slice) -> Tensor:
    first, *others = (use.call.per_example(use.parameter, rows, use.gradient[rows]) for use in uses)
    for other in others:
        first += other
    return first
