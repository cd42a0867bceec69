"""A translator of the tuned lens that learns the divergence itself, by gradient descent from the closed form on.

Source: Belrose et al. 2023, arXiv 2303.08112, whose translators are trained on the divergence of what they read from
what the model says, with a rate that falls to zero. Here Adam takes the steps, on inputs turned so that their second
moment is the identity and in units of what is left to add, so that one rate suits every layer and model; and it starts
at the least squares, which the paper's does not have. The rows of every step are drawn anew.

Shapes: N rows to learn from, P of one step, C hidden width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from layerwise.measure.linear_map import ridged, with_one
from layerwise.measure.logit_lens_kl import divergence
from layerwise.measure.seen import Reading

RATE = 1e-3


def learned(read: Callable[[Tensor], Reading], h_NC: Tensor, final_NC: Tensor, map_CC: Tensor, *, steps: int,
            rows: int, ridge: float, seed: int = 0) -> Tensor:
    """`map_CC` ([C + 1, C], see `tuned_lens.translator`) after `steps` on `rows` of KL(final || translated), float64.

    `read` turns states into what the model would say, with a gradient.
    """
    x_NC = with_one(h_NC)
    root_CC = ridged(x_NC.T @ x_NC / len(x_NC), ridge)
    z_NC = torch.linalg.solve_triangular(root_CC, x_NC.T, upper=False).T.float()
    start_NC = h_NC.double() + x_NC @ map_CC
    spread, start_NC = float((final_NC.double() - start_NC).std()), start_NC.float()
    change_CC = torch.zeros(map_CC.shape, device=h_NC.device, requires_grad=True)
    optimizer = torch.optim.Adam([change_CC], lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
        pick_P = torch.randint(len(h_NC), (min(rows, len(h_NC)),), generator=generator).to(h_NC.device)
        own = read(final_NC[pick_P])
        with torch.enable_grad():
            loss = divergence(own, read(start_NC[pick_P] + spread * (z_NC[pick_P] @ change_CC))).mean()
            (change_CC.grad,) = torch.autograd.grad(loss, change_CC)
        optimizer.step()
    turned_CC: Tensor = torch.linalg.solve_triangular(root_CC.T, change_CC.detach().double(), upper=True)
    return map_CC + spread * turned_CC
