"""Python numbers as tensors on the device that computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def placed(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`values` (a number or nested lists) on `device`; copies to a GPU are from pinned memory and do not wait."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype).to(device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
