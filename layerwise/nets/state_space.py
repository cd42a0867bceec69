"""Mamba-2: a causal convolution, a state that every token decays and adds to, a gated norm (arXiv 2405.21060).

The state is float32 whatever the dtype of the model. Prompts pass it in chunks: within a chunk the recurrence is a
product with a lower triangular matrix, between chunks it is the state. A single token is one step of the recurrence.

Shapes: B batch, T new tokens, Q tokens of a chunk, C hidden width, I inner channels, E convolved channels, K tokens of
the convolution before the new ones, H heads, P head width, N state width, G groups of heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise import spec
from layerwise.nets.dense import Dense
from layerwise.nets.flow import Flow

CHUNK = 64
"""Tokens whose mutual influence is computed as a matrix."""

Kept = tuple[Tensor, ...]


class StateSpace(nn.Module):
    """One state space layer; its two matrices may be dense or packed linear layers.

    `in_proj` makes, one above the other, the gate, the channels of the convolution (input, write and read vectors) and
    the time steps.
    """

    in_proj: nn.Module
    out_proj: nn.Module

    def __init__(self, mixer: spec.StateSpace, hidden: int, norm: spec.Norm) -> None:
        super().__init__()
        self.spec, self.eps = mixer, norm.eps
        for name, (outputs, inputs) in mixer.matrices(hidden).items():
            self.add_module(name, Dense(inputs, outputs, bias=mixer.bias))
        self.conv_weight = nn.Parameter(torch.ones(mixer.channels, 1, mixer.conv) / mixer.conv)
        self.conv_bias = nn.Parameter(torch.zeros(mixer.channels)) if mixer.conv_bias else None
        self.dt_bias = nn.Parameter(torch.zeros(mixer.heads))
        self.A_log = nn.Parameter(torch.zeros(mixer.heads))
        self.D = nn.Parameter(torch.ones(mixer.heads))
        self.norm_weight = nn.Parameter(torch.ones(mixer.inner))

    def forward(self, x_BTC: Tensor, flow: Flow, layer: int) -> Tensor:
        gate_BTI, u_BTU = self.in_proj(x_BTC).tensor_split((self.spec.inner,), -1)
        y_BTI = flow.recur(layer, self.advance, u_BTU)
        return self.out_proj(self._normed(y_BTI, gate_BTI).to(x_BTC.dtype))  # type: ignore[no-any-return]

    def _normed(self, y_BTI: Tensor, gate_BTI: Tensor) -> Tensor:
        """y * silu(gate), its root mean square one in every group of heads; float32."""
        gated = (y_BTI * F.silu(gate_BTI.float())).unflatten(-1, (self.spec.groups, -1))
        return F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2) * self.norm_weight.float()

    def start(self, batch: int, dtype: torch.dtype, device: torch.device) -> Kept:
        """What is kept of sequences without tokens: convolution inputs [B, K, E] in `dtype`, states [B, H, P, N]."""
        tail, state = self.spec.kept
        return torch.zeros(batch, *tail, dtype=dtype, device=device), torch.zeros(batch, *state, device=device)

    def advance(self, u_BTU: Tensor, kept: Kept | None, counts_B: Tensor | None) -> tuple[Tensor, Kept]:
        """Outputs [B, T, I] in float32 of convolved channels and time steps, and what is kept after them.

        Of row b only the first `counts_B[b]` tokens are real; None: all are.
        """
        s = self.spec
        tail_BKE, state_BHPN = self.start(len(u_BTU), u_BTU.dtype, u_BTU.device) if kept is None else kept
        with torch.autocast(u_BTU.device.type, enabled=False):
            in_BTE, dt_BTH = u_BTU.split([s.channels, s.heads], -1)
            seen_BSE = torch.cat([tail_BKE.to(in_BTE.dtype), in_BTE], 1)
            x_BTI, write_BTW, read_BTW = self._convolved(seen_BSE).split(
                [s.inner, s.groups * s.state, s.groups * s.state], -1)
            x_BTHP = x_BTI.unflatten(-1, (s.heads, -1))
            write_BTGN, read_BTGN = (v.unflatten(-1, (s.groups, -1)) for v in (write_BTW, read_BTW))
            dt_BTH = self._steps(dt_BTH, counts_B)
            y_BTHP, state_BHPN = scan(x_BTHP, dt_BTH, -self.A_log.float().exp(), write_BTGN, read_BTGN, state_BHPN)
            y_BTHP = y_BTHP + x_BTHP * self.D.float()[:, None]
        return y_BTHP.flatten(-2), (_last(seen_BSE, s.conv - 1, counts_B), state_BHPN)

    def _convolved(self, seen_BSE: Tensor) -> Tensor:
        """Every channel's sum over the last tokens, each with its weight; float32."""
        weight_EK, new = self.conv_weight[:, 0].float(), seen_BSE.shape[1] - self.spec.conv + 1
        seen_BSE = seen_BSE.float()
        total = sum(seen_BSE[:, place : place + new] * weight_EK[:, place] for place in range(self.spec.conv))
        return F.silu(total if self.conv_bias is None else total + self.conv_bias.float())  # type: ignore[arg-type]

    def _steps(self, dt_BTH: Tensor, counts_B: Tensor | None) -> Tensor:
        """Positive time steps; zero, which leaves the state as it is, for tokens that are not real."""
        dt_BTH = F.softplus(dt_BTH.float() + self.dt_bias.float())
        dt_BTH = dt_BTH.clamp(self.spec.shortest, self.spec.longest)
        if counts_B is None:
            return dt_BTH
        real_BT = torch.arange(dt_BTH.shape[1], device=dt_BTH.device) < counts_B[:, None]
        return dt_BTH * real_BT[..., None]


def scan(x_BTHP: Tensor, dt_BTH: Tensor, decay_H: Tensor, write_BTGN: Tensor, read_BTGN: Tensor, state_BHPN: Tensor,
         chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, P] and the last state of state = exp(dt decay) state + dt x write', y = state read.

    `decay_H` is negative. Work and memory of a chunk grow with its square.
    """
    if x_BTHP.shape[1] == 1:
        y_BHP, state_BHPN = _step(x_BTHP[:, 0], dt_BTH[:, 0], decay_H, write_BTGN[:, 0], read_BTGN[:, 0], state_BHPN)
        return y_BHP[:, None], state_BHPN
    outputs = []
    for parts in zip(*(v.split(chunk, 1) for v in (x_BTHP, dt_BTH, write_BTGN, read_BTGN)), strict=True):
        x_BQHP, dt_BQH, write_BQGN, read_BQGN = parts
        y_BQHP, state_BHPN = _chunk(x_BQHP, dt_BQH, decay_H, write_BQGN, read_BQGN, state_BHPN)
        outputs.append(y_BQHP)
    return torch.cat(outputs, 1), state_BHPN


def _step(x_BHP: Tensor, dt_BH: Tensor, decay_H: Tensor, write_BGN: Tensor, read_BGN: Tensor,
          state_BHPN: Tensor) -> tuple[Tensor, Tensor]:
    """One token."""
    groups = write_BGN.shape[1]
    added_BGhPN = (x_BHP * dt_BH[..., None]).unflatten(1, (groups, -1))[..., None] * write_BGN[:, :, None, None]
    state_BHPN = torch.addcmul(added_BGhPN.flatten(1, 2), state_BHPN, (dt_BH * decay_H).exp()[..., None, None])
    y_BGhP = state_BHPN.unflatten(1, (groups, -1)) @ read_BGN[:, :, None, :, None]
    return y_BGhP.flatten(1, 2)[..., 0], state_BHPN


def _chunk(x_BQHP: Tensor, dt_BQH: Tensor, decay_H: Tensor, write_BQGN: Tensor, read_BQGN: Tensor,
           state_BHPN: Tensor) -> tuple[Tensor, Tensor]:
    """Some tokens at once: what they get from one another and from the state before, and the state after."""
    groups, size = write_BQGN.shape[2], x_BQHP.shape[1]
    log_BHQ = (dt_BQH * decay_H).cumsum(1).transpose(1, 2)  # logarithm of what is left of the state before
    later = torch.ones(size, size, dtype=torch.bool, device=x_BQHP.device).triu(1)
    left_BHQQ = (log_BHQ[..., None] - log_BHQ[..., None, :]).masked_fill(later, float("-inf")).exp()
    write_BGQN, read_BGQN = write_BQGN.transpose(1, 2), read_BQGN.transpose(1, 2)
    met_BGQQ = read_BGQN @ write_BGQN.transpose(-1, -2)
    weights_BHQQ = (met_BGQQ[:, :, None] * left_BHQQ.unflatten(1, (groups, -1))).flatten(1, 2)
    added_BHQP = (x_BQHP * dt_BQH[..., None]).transpose(1, 2)
    before_BGhQP = read_BGQN[:, :, None] @ state_BHPN.unflatten(1, (groups, -1)).transpose(-1, -2)
    y_BHQP = weights_BHQQ @ added_BHQP + log_BHQ.exp()[..., None] * before_BGhQP.flatten(1, 2)
    last_BHPQ = (added_BHQP * left_BHQQ[:, :, -1, :, None]).transpose(-1, -2)
    new_BGhPN = last_BHPQ.unflatten(1, (groups, -1)) @ write_BGQN[:, :, None]
    return y_BHQP.transpose(1, 2), log_BHQ[..., -1].exp()[..., None, None] * state_BHPN + new_BGhPN.flatten(1, 2)


def _last(seen_BSE: Tensor, count: int, counts_B: Tensor | None) -> Tensor:
    """The last `count` tokens of each row before those that are not real."""
    if counts_B is None:
        return seen_BSE[:, seen_BSE.shape[1] - count :].clone()  # a view would keep the whole prompt alive
    places_BK = counts_B[:, None] + torch.arange(count, device=seen_BSE.device)
    return seen_BSE.gather(1, places_BK[..., None].expand(-1, -1, seen_BSE.shape[2]))
