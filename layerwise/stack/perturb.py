"""Changing the weights of one part of a network for a while: reset, rewind, zero, noise, shuffle, truncate.

A perturbation takes a part's path and module and gives new tensors by the names of the part's own
`state_dict`. The part's tensors are replaced, never written to, so they come back bit for bit.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from layerwise.errors import BadOption

Perturbation = Callable[[str, nn.Module], Mapping[str, Tensor]]

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def parts(root: nn.Module, kinds: tuple[type[nn.Module], ...] = WEIGHTED) -> dict[str, nn.Module]:
    """The modules of the given kinds by path, in the order in which they were added."""
    return {path: module for path, module in root.named_modules() if isinstance(module, kinds)}


@contextmanager
def perturbed(module: nn.Module, path: str, perturbation: Perturbation) -> Iterator[None]:
    """Give `module` the tensors of `perturbation` while the context lasts; always restored.

    Raises BadOption for a tensor the module does not have, or one of another shape.
    """
    old: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = []
    try:
        for name, value in perturbation(path, module).items():
            store, key = _place(module, name)
            before = store.get(key)
            if before is None or before.shape != value.shape:
                have = "nothing" if before is None else tuple(before.shape)
                raise BadOption(f"{tuple(value.shape)} for {path}.{name}, which holds {have}",
                                expected="a tensor of the same name and shape",
                                do="perturb with the state of a network of the same build")
            old.append((store, key, before))
            store[key] = _like(before, value)
        yield
    finally:
        for store, key, before in reversed(old):
            store[key] = before


def reset(state: Mapping[str, Tensor]) -> Perturbation:
    """The part's tensors in `state`, a whole network's: a fresh one re-initialises, a stored one rewinds."""

    def change(path: str, module: nn.Module) -> dict[str, Tensor]:
        return {name: state[f"{path}.{name}"] for name in module.state_dict()}

    return change


def zero(_: str, module: nn.Module) -> dict[str, Tensor]:
    """All parameters zero."""
    return {name: torch.zeros_like(weight) for name, weight in module.named_parameters()}


def noise(share: float, seed: int) -> Perturbation:
    """Gaussian noise on every parameter, of standard deviation `share` times the parameter's root mean square."""

    def change(path: str, module: nn.Module) -> dict[str, Tensor]:
        generator = _generator(seed, path)
        return {name: weight.detach() + share * weight.detach().float().square().mean().sqrt().to(weight)
                * torch.randn(weight.shape, generator=generator).to(weight)
                for name, weight in module.named_parameters()}

    return change


def shuffled(seed: int) -> Perturbation:
    """The entries of every parameter permuted: the same values without structure."""

    def change(path: str, module: nn.Module) -> dict[str, Tensor]:
        generator = _generator(seed, path)
        return {name: weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view_as(weight)
                for name, weight in module.named_parameters()}

    return change


def truncated(share: float) -> Perturbation:
    """Matrices cut to their largest singular values, `share` of the full rank and at least one.

    Convolution kernels are cut as [outputs, inputs x window]; vectors are left as they are.
    """

    def change(_: str, module: nn.Module) -> dict[str, Tensor]:
        return {name: _cut(weight.detach(), share) for name, weight in module.named_parameters() if weight.dim() > 1}

    return change


def _cut(weight: Tensor, share: float) -> Tensor:
    u_OR, s_R, v_RI = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
    rank = max(1, round(share * len(s_R)))
    cut_OI: Tensor = (u_OR[:, :rank] * s_R[:rank]) @ v_RI[:rank]
    return cut_OI.view_as(weight).to(weight)


def _place(module: nn.Module, name: str) -> tuple[dict[str, Tensor | None], str]:
    """The dictionary of parameters or buffers that holds `name`, and the key in it."""
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    return (owner._parameters if key in owner._parameters else owner._buffers), key  # type: ignore[return-value]


def _like(before: Tensor, value: Tensor) -> Tensor:
    value = value.detach().to(before)
    return nn.Parameter(value, requires_grad=before.requires_grad) if isinstance(before, nn.Parameter) else value


def _generator(seed: int, path: str) -> torch.Generator:
    """The same draw for the same path, whichever other parts are perturbed."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {path}".encode()))
