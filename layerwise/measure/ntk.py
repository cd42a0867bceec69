"""The empirical neural tangent kernel, part by part: K = sum over parameters of J_p J_p^T, on N inputs.

Four routes to the same parts, for a network with one output per input:

    together    all Jacobians at once, by vectorised gradients: memory N x all parameters
    one_by_one  one parameter tensor at a time: memory N x the largest, a backward for each
    by_hooks    linear layers of any network, from their inputs and the gradients at their outputs: one backward
    explicit    multilayer perceptrons in closed form: the same products, with the recursion written out

Source: arXiv 2205.12372 and its official code. That code's condition for bias parts is never true, so it leaves
them out; here they are included.

Shapes: N inputs, P entries of a parameter, F features, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from layerwise.errors import BadModel

Parts = dict[str, Tensor]
"""Parameter name to its kernel, [N, N]; the sum is the whole kernel."""
Read = Callable[[Tensor], Tensor]
"""The model's output for a batch, [N, K], to one number an input, [N]."""


def first_logit(logits_NK: Tensor) -> Tensor:
    """The first output of every input."""
    return logits_NK[:, 0]


def logit_sum(logits_NK: Tensor) -> Tensor:
    """The sum of all outputs of every input."""
    return logits_NK.sum(1)


def total(parts: Mapping[str, Tensor]) -> Tensor:
    """The whole kernel, [N, N]."""
    return torch.stack(list(parts.values())).sum(0)


def together(model: nn.Module, x_N: Tensor, read: Read = first_logit, chunk: int | None = None) -> Parts:
    """All parts from all Jacobians at once; `chunk` inputs go backward together."""
    state = _state(model)
    jacobians = vmap(grad(partial(_value, model, read)), in_dims=(None, 0), chunk_size=chunk)(state, x_N)
    return {name: _gram(j_N.flatten(1)) for name, j_N in jacobians.items()}


def one_by_one(model: nn.Module, x_N: Tensor, read: Read = first_logit, chunk: int | None = None) -> Parts:
    """The same with the Jacobian of a single parameter tensor in memory at a time."""
    state, parts = _state(model), {}
    for name, tensor in state.items():
        rest = {key: value for key, value in state.items() if key != name}

        def value(weight: Tensor, x: Tensor, name: str = name, rest: Parts = rest) -> Tensor:
            return _value(model, read, {**rest, name: weight}, x)

        j_N = vmap(grad(value), in_dims=(None, 0), chunk_size=chunk)(tensor, x_N)
        parts[name] = _gram(j_N.flatten(1))
    return parts


def all_logits(model: nn.Module, x_N: Tensor, chunk: int | None = None) -> Parts:
    """The kernel between all outputs of all inputs, [N K, N K], part by part; row n K + k is output k of input n."""
    def values(state: Parts, x: Tensor) -> Tensor:
        found: Tensor = functional_call(model, state, (x[None],))[0]
        return found

    jacobians = vmap(jacrev(values), in_dims=(None, 0), chunk_size=chunk)(_state(model), x_N)
    return {name: _gram(j_NK.flatten(2).flatten(0, 1)) for name, j_NK in jacobians.items()}


def fisher(model: nn.Module, x_N: Tensor, read: Read = first_logit, largest: int = 4096) -> Parts:
    """J_p^T J_p, [P, P], of every parameter tensor of at most `largest` entries.

    Its eigenvalues other than zero are those of the kernel's part, so that it is the smaller of both where N > P.
    """
    state = _state(model)
    small = {name: tensor for name, tensor in state.items() if tensor.numel() <= largest}
    rest = {name: tensor for name, tensor in state.items() if name not in small}

    def value(weights: Parts, x: Tensor) -> Tensor:
        return _value(model, read, {**rest, **weights}, x)

    jacobians = vmap(grad(value), in_dims=(None, 0))(small, x_N)
    return {name: _gram(j_N.flatten(1).T) for name, j_N in jacobians.items()}


def looped(model: nn.Module, x_N: Tensor, read: Read = first_logit) -> Parts:
    """The plain way: a backward for every input, all Jacobians kept."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows: list[list[Tensor]] = [[] for _ in names]
    for x in x_N:
        found = torch.autograd.grad(read(model(x[None]))[0], parameters)
        for row, gradient in zip(rows, found, strict=True):
            row.append(gradient.flatten())
    return {name: _gram(torch.stack(row)) for name, row in zip(names, rows, strict=True)}


def by_hooks(model: nn.Module, x_N: Tensor, read: Read = first_logit) -> Parts:
    """Parts of the linear layers only, of any network in which inputs do not mix: (S S^T) * (X X^T).

    Where a layer runs at T positions of each input, products are summed over all pairs of positions.
    """
    layers = {path: part for path, part in model.named_modules() if isinstance(part, nn.Linear)}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [layer.register_forward_hook(partial(_keep, seen, path)) for path, layer in layers.items()]
    try:
        with torch.enable_grad():
            value = read(model(x_N.detach().requires_grad_())).sum()
    finally:
        for handle in handles:
            handle.remove()
    sensitivities = torch.autograd.grad(value, [output for _, output in seen.values()])
    parts: Parts = {}
    for (path, (input_N, _)), s_N in zip(seen.items(), sensitivities, strict=True):
        x_NTF = input_N.detach().reshape(len(x_N), -1, input_N.shape[-1])
        s_NTO = s_N.reshape(len(x_N), -1, s_N.shape[-1])
        parts[f"{path}.weight"] = _pairs(s_NTO, x_NTF)
        if layers[path].bias is not None:
            parts[f"{path}.bias"] = _gram(s_NTO.sum(1))
    return parts


@torch.no_grad()
def explicit(model: nn.Sequential, x_N: Tensor) -> Parts:
    """A perceptron of linear layers and element-wise activations, one output; last layer first.

    K_W = (S S^T) * (X X^T), K_b = S S^T; S at the layer below is phi'(its output) * (S W). Raises BadModel for
    other parts or more outputs.
    """
    inputs: list[tuple[str, nn.Linear, Tensor]] = []
    slopes: list[Tensor | None] = []
    h_NF = x_N.flatten(1)
    for name, part in model.named_children():
        if isinstance(part, nn.Flatten):
            continue
        if isinstance(part, nn.Linear):
            inputs.append((name, part, h_NF))
            slopes.append(None)
        elif list(part.parameters()) or not slopes:
            raise BadModel(f"a perceptron with {type(part).__name__}", expected="linear layers and activations",
                           do="use one_by_one")
        else:
            slopes[-1] = _slope(part, h_NF)
        h_NF = part(h_NF)
    if h_NF.shape[1] != 1:
        raise BadModel(f"a perceptron with {h_NF.shape[1]} outputs", expected="one", do="use one_by_one")
    parts: Parts = {}
    s_NO: Tensor = torch.ones_like(h_NF) if slopes[-1] is None else slopes[-1]
    for place in reversed(range(len(inputs))):
        name, layer, x_NI = inputs[place]
        parts[f"{name}.weight"] = _gram(s_NO) * _gram(x_NI)
        if layer.bias is not None:
            parts[f"{name}.bias"] = _gram(s_NO)
        if place:
            below = slopes[place - 1]
            s_NO = s_NO @ layer.weight if below is None else below * (s_NO @ layer.weight)
    return parts


def conditioning(kernel_NN: Tensor) -> float:
    """Smallest over largest eigenvalue, in float64: the reciprocal of the usual condition number."""
    values_N = torch.linalg.eigvalsh(kernel_NN.double())
    return float(values_N[0].clamp(min=0) / values_N[-1])


def alignment(kernel_NN: Tensor, y_N: Tensor) -> float:
    """<K, y y^T> / (|K| |y|^2): 1 where the kernel is y y^T."""
    y_N = y_N.to(kernel_NN)
    return float(y_N @ kernel_NN @ y_N / (kernel_NN.norm() * y_N.square().sum()))


def drift(before_NN: Tensor, after_NN: Tensor) -> float:
    """1 - cosine of two kernels on the same inputs."""
    return float(1 - (before_NN * after_NN).sum() / (before_NN.norm() * after_NN.norm()))


def trace_shares(parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Every part's share of the trace."""
    traces = {name: float(kernel_NN.trace()) for name, kernel_NN in parts.items()}
    return {name: trace / sum(traces.values()) for name, trace in traces.items()}


def kernel_ridge(kernel_NN: Tensor, y_N: Tensor, kernel_MN: Tensor, ridge: float = 1e-3) -> Tensor:
    """Predictions [M] for inputs whose kernel with the N known ones is given; `ridge` is relative to the mean trace."""
    regular_NN = kernel_NN.double() + ridge * float(kernel_NN.diagonal().mean()) * torch.eye(len(y_N)).double()
    found_M: Tensor = kernel_MN.double() @ torch.linalg.solve(regular_NN, y_N.double())
    return found_M


def _state(model: nn.Module) -> Parts:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _value(model: nn.Module, read: Read, state: Parts, x: Tensor) -> Tensor:
    found: Tensor = read(functional_call(model, state, (x[None],)))[0]
    return found


def _keep(seen: dict[str, tuple[Tensor, Tensor]], path: str, _: nn.Module, args: Any, output: Tensor) -> None:
    seen[path] = args[0], output


def _gram(j_NP: Tensor) -> Tensor:
    return j_NP @ j_NP.T


def _pairs(s_NTO: Tensor, x_NTF: Tensor) -> Tensor:
    """Sum over positions t of one input and s of another of (s_t s_s)(x_t x_s), [N, N]."""
    if s_NTO.shape[1] == 1:
        return _gram(s_NTO[:, 0]) * _gram(x_NTF[:, 0])
    outer_NP = torch.einsum("nto,ntf->nof", s_NTO, x_NTF).flatten(1)
    return _gram(outer_NP)


def _slope(activation: nn.Module, x_NF: Tensor) -> Tensor:
    """The derivative of an element-wise activation."""
    with torch.enable_grad():
        x_NF = x_NF.detach().requires_grad_()
        (slope_NF,) = torch.autograd.grad(activation(x_NF).sum(), x_NF)
    found_NF: Tensor = slope_NF
    return found_NF
