"""Rules that derive each example's gradient of a layer's parameters from one call of the layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from evertune.utils.batches import take

_IN_CACHE = 384 * 384
"""Number of elements of a product that stay in a core's cache while they are squared and added."""
_AT_ONCE = 2**22
"""Maximum number of elements of per-example gradients that exist at once (16 MB in fp32)."""

Power = Literal[1, 2]
"""Which power of a gradient's magnitude is summed: absolute values or squares."""


class Call:
    """One call of a module, from which its parameters' gradients follow once the gradient of its output is known.

    Weights are never read (under ZeRO-3 they are released before the backward pass). A subclass implements how the
    input and the gradient of the output, both with the batch first, give the gradient of each example.

    Args:
        module: The module that was called.
        shapes: Name (in the module) to shape of the watched parameters.
        batch: Number of examples. An input that is the same for all of them may have a batch of 1.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Attributes:
        any_layout: Whether the rule also holds for a single example whose input and output have no batch dimension at
            all, or have it elsewhere, once a leading dimension of 1 is put in front of both.
    """

    any_layout = False

    def __init__(
        self,
        module: nn.Module,
        shapes: Mapping[str, torch.Size],
        batch: int,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        self.module: Any = module
        self.shapes = shapes
        inputs = tensors_in((args, dict(kwargs)))[0].detach()
        self.input = inputs.expand(batch, *inputs.shape[1:])

    def per_example(self, parameter: str, rows: slice, gradient: Tensor) -> Tensor:
        """Gradients of the examples ``rows``, ``[rows, *shape]``, from the output's ``gradient`` for these rows."""
        raise NotImplementedError

    def add_powers(self, parameter: str, gradient: Tensor, total: Tensor, power: Power) -> None:
        """Add the magnitude of every example's gradient, to ``power``, to ``total``, of the parameter's shape."""
        for rows in chunks(len(gradient), total.numel()):
            total += raised(self.per_example(parameter, rows, gradient[rows]), power).sum(0)


class LinearCall(Call):
    """``nn.Linear``, with any number of dimensions between the batch and the features."""

    any_layout = True

    def per_example(self, parameter: str, rows: slice, gradient: Tensor) -> Tensor:
        if parameter == "bias":
            return _tokens(gradient).sum(1)
        left, right = self._sides(gradient, self.input[rows])
        return torch.bmm(left.transpose(1, 2), right)

    def add_powers(self, parameter: str, gradient: Tensor, total: Tensor, power: Power) -> None:
        if parameter == "bias":
            super().add_powers(parameter, gradient, total, power)
        else:
            _add_powers_of_products(*self._sides(gradient, self.input), total, power)

    def _sides(self, gradient: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
        return _tokens(gradient), _tokens(activation)


class TransposedLinearCall(LinearCall):
    """The ``Conv1D`` of transformers (GPT-2): a linear layer whose weight is ``[in, out]``."""

    def _sides(self, gradient: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
        return _tokens(activation), _tokens(gradient)


class EmbeddingCall(Call):
    """``nn.Embedding``: only the rows that an example looked up have a gradient."""

    any_layout = True

    def per_example(self, parameter: str, rows: slice, gradient: Tensor) -> Tensor:
        count, (vocabulary, width) = len(gradient), self.shapes[parameter]
        keys, values = self._looked_up(self.input[rows], gradient, vocabulary)
        dense = values.new_zeros(count * vocabulary, width)
        return dense.index_add_(0, keys, values).view(count, vocabulary, width)

    def add_powers(self, parameter: str, gradient: Tensor, total: Tensor, power: Power) -> None:
        keys, values = self._looked_up(self.input, gradient, len(total))
        used, place = torch.unique(keys, return_inverse=True)
        # Sum repeated tokens per example first: the power is of the sum. Never allocates a dense gradient per example.
        summed = values.new_zeros(len(used), values.shape[-1]).index_add_(0, place, values)
        total.index_add_(0, used % len(total), raised(summed, power).to(total.dtype))

    def _looked_up(self, tokens: Tensor, gradient: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        """For every token, its row in the stacked gradients of all examples, and what it adds to that row."""
        example = torch.arange(len(tokens), device=tokens.device).view(-1, *[1] * (tokens.ndim - 1))
        keys, values = (tokens + example * vocabulary).reshape(-1), _wide(gradient).reshape(tokens.numel(), -1)
        if self.module.padding_idx is not None:
            kept = (tokens != self.module.padding_idx).reshape(-1)
            keys, values = keys[kept], values[kept]
        return keys, values


class ConvCall(Call):
    """``nn.Conv1d``, ``Conv2d`` and ``Conv3d``."""

    def per_example(self, parameter: str, rows: slice, gradient: Tensor) -> Tensor:
        gradient = _wide(gradient)
        if parameter == "bias":
            return gradient.flatten(2).sum(2)
        layer, inputs, padding = self.module, _wide(self.input[rows]), self.module.padding
        # torch.nn.grad knows only symmetric zero padding, so pad the input here as the layer does.
        if layer.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            inputs, padding = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode), 0
        name = f"conv{gradient.ndim - 2}d_weight"
        weight_gradient: Callable[..., Tensor] = getattr(torch.nn.grad, name)  # type: ignore[attr-defined]
        geometry = (layer.stride, padding, layer.dilation, layer.groups)
        return torch.stack(
            [
                weight_gradient(x[None], self.shapes[parameter], g[None], *geometry)
                for x, g in zip(inputs, gradient, strict=True)
            ]
        )


class NormCall(Call):
    """A normalisation followed by scale and shift; a subclass defines the normalisation and the shared dimensions."""

    def per_example(self, parameter: str, rows: slice, gradient: Tensor) -> Tensor:
        gradient = _wide(gradient)
        if parameter != "bias":
            gradient = gradient * self.normalised(_wide(self.input[rows]))
        return self.unshare(gradient)

    def normalised(self, inputs: Tensor) -> Tensor:
        """The input before scale and shift."""
        raise NotImplementedError

    def unshare(self, gradient: Tensor) -> Tensor:
        """Sum over the dimensions that share one scale; channels are dimension 1."""
        return gradient.flatten(2).sum(2) if gradient.ndim > 2 else gradient


class LayerNormCall(NormCall):
    """``nn.LayerNorm``."""

    any_layout = True

    def normalised(self, inputs: Tensor) -> Tensor:
        return F.layer_norm(inputs, self.module.normalized_shape, eps=self.module.eps)

    def unshare(self, gradient: Tensor) -> Tensor:
        return gradient.reshape(len(gradient), -1, *self.module.normalized_shape).sum(1)


class RMSNormCall(LayerNormCall):
    """``nn.RMSNorm``."""

    def normalised(self, inputs: Tensor) -> Tensor:
        return F.rms_norm(inputs, self.module.normalized_shape, eps=self.module.eps)


class GroupNormCall(NormCall):
    """``nn.GroupNorm``."""

    def normalised(self, inputs: Tensor) -> Tensor:
        return F.group_norm(inputs, self.module.num_groups, eps=self.module.eps)


class BatchNormCall(NormCall):
    """``nn.BatchNorm1d``, ``2d``, ``3d`` in evaluation mode: with running statistics, examples are independent."""

    def normalised(self, inputs: Tensor) -> Tensor:
        mean, variance = self.module.running_mean.to(inputs), self.module.running_var.to(inputs)
        return F.batch_norm(inputs, mean, variance, eps=self.module.eps)


class AnyCall(Call):
    """A module without submodules and without a rule: its forward is repeated for each example, under autograd.

    This needs the weights, so it keeps a copy of them: meant for small custom layers, such as a cosine head.
    """

    def __init__(
        self,
        module: nn.Module,
        shapes: Mapping[str, torch.Size],
        batch: int,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        self.batch = batch
        self.arguments = tree_map(
            lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, dict(kwargs))
        )
        # A shallow copy with its own parameters: the module's may be partitioned again by the time of the backward
        # pass.
        self.twin = copy.copy(module)
        self.twin.__dict__["_parameters"] = {
            name: None if parameter is None else parameter.detach().clone()
            for name, parameter in module._parameters.items()
        }

    def per_example(self, parameter: str, rows: slice, gradient: Tensor) -> Tensor:
        weight = self.twin._parameters[parameter]
        assert weight is not None
        gradients = []
        with torch.enable_grad():
            weight.requires_grad_()
            for row, output_gradient in enumerate(gradient, start=rows.start):
                args, kwargs = take(self.arguments, [row], self.batch)
                output = self.twin.forward(*args, **kwargs)
                gradients.append(torch.autograd.grad(output, weight, output_gradient[None], materialize_grads=True)[0])
            weight.requires_grad_(False)
        return _wide(torch.stack(gradients))


_RULES: dict[str, type[Call]] = {
    "torch.nn.modules.linear:Linear.forward": LinearCall,
    "transformers.pytorch_utils:Conv1D.forward": TransposedLinearCall,
    "torch.nn.modules.sparse:Embedding.forward": EmbeddingCall,
    "torch.nn.modules.conv:Conv1d.forward": ConvCall,
    "torch.nn.modules.conv:Conv2d.forward": ConvCall,
    "torch.nn.modules.conv:Conv3d.forward": ConvCall,
    "torch.nn.modules.normalization:LayerNorm.forward": LayerNormCall,
    "torch.nn.modules.normalization:RMSNorm.forward": RMSNormCall,
    "torch.nn.modules.normalization:GroupNorm.forward": GroupNormCall,
    "torch.nn.modules.batchnorm:_BatchNorm.forward": BatchNormCall,
}
"""Keyed by the forward function, so that a subclass inherits a rule only if it does not override ``forward``."""


def rule_for(module: nn.Module) -> type[Call] | None:
    """The rule for a module's own parameters, or None if they need autograd over the whole model.

    Raises:
        ValueError: If the layer mixes the examples of a batch, so that there is no per-example gradient.
    """
    forward = type(module).forward
    rule = _RULES.get(f"{forward.__module__}:{forward.__qualname__}")
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
        raise ValueError(
            f"{type(module).__name__}(track_running_stats=False) normalises with the batch's own statistics, so an "
            "example has no gradient of its own; keep running statistics, or use GroupNorm or LayerNorm"
        )
    if isinstance(module, nn.Embedding) and (module.scale_grad_by_freq or module.max_norm is not None):
        return None
    return rule or (None if next(module.children(), None) is not None else AnyCall)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors with at least one dimension in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.ndim > 0]


def chunks(count: int, numel: int) -> Iterator[slice]:
    """Slices of ``count`` examples, small enough that their gradients of ``numel`` elements fit in memory together."""
    step = max(1, _AT_ONCE // max(1, numel))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in at least single precision: squares and sums in 16 bits would overflow or lose small values."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _tokens(tensor: Tensor) -> Tensor:
    """``[batch, ..., features]`` as ``[batch, tokens, features]``."""
    return _wide(tensor).reshape(len(tensor), -1, tensor.shape[-1])


def raised(tensor: Tensor, power: Power) -> Tensor:
    """The magnitudes of a tensor to a power, in place."""
    return tensor.abs_() if power == 1 else tensor.square_()


def _add_powers_of_products(left: Tensor, right: Tensor, total: Tensor, power: Power) -> None:
    """``total += sum_n |left[n].T @ right[n]| ** power`` for ``[n, tokens, rows]`` and ``[n, tokens, columns]``."""
    columns = right.shape[-1]
    if left.shape[1] == 1:  # the power of an outer product is the outer product of the powers
        total.addmm_(left[:, 0].abs().pow(power).T, right[:, 0].abs().pow(power))
    elif total.device.type == "cpu":  # blocked: the product never leaves the cache
        for start in range(0, len(total), max(1, _IN_CACHE // columns)):
            block = total[start : start + max(1, _IN_CACHE // columns)]
            part = left[:, :, start : start + len(block)].transpose(1, 2)
            product = left.new_empty(block.shape)
            for a, b in zip(part.unbind(), right.unbind(), strict=True):
                torch.mm(a, b, out=product)
                if power == 1:
                    block.add_(product.abs_())
                else:
                    block.addcmul_(product, product)
    else:
        for rows in chunks(len(left), total.numel()):
            total += raised(torch.bmm(left[rows].transpose(1, 2), right[rows]), power).sum(0)
