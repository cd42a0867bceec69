"""Small random networks of many shapes, each with an input, to be opened as modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """A module in evaluation mode, the paths of its layers, and the arguments of one call."""

    module: nn.Module
    layers: tuple[str, ...]
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def call(self, function: Callable[..., Any]) -> Any:
        return function(*self.args, **dict(self.kwargs))


class Residual(nn.Module):
    """Two convolutions and a shortcut, which is projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu_(self.bn1(self.conv1(x))))
        y += self.shortcut(x)
        return y


class Stages(nn.Module):
    """A residual network: stem, pooling, three stages of which two change the shape, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(Residual(8, 8, 1), Residual(8, 8, 1))
        self.layer2 = nn.Sequential(Residual(8, 16, 2), Residual(16, 16, 1))
        self.layer3 = nn.Sequential(Residual(16, 32, 2), Residual(32, 32, 1))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 2)
        x = self.layer2(self.layer1(x))
        x = self.layer3(F.relu_(x.mul_(1.5)))  # glue that changes a layer's output in place
        return self.head(x.mean((2, 3)))


class Children(nn.Module):
    """Convolutions as direct children, with pooling and activations between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.relu(self.conv1(x)), 2)
        x = self.relu(self.conv2(x).add_(0.1))
        return self.fc(x.mean((2, 3)))


class Unit(nn.Module):
    """A block that takes and returns a tuple, (hidden, count)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, width), nn.GELU())

    def forward(self, hidden: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        return hidden + scale * self.body(hidden), None


class SkipConnections(nn.Module):
    """U-shaped: what the blocks on the way down return is added on the way up, and changed in place after."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(Unit(12) for _ in range(3))
        self.up = nn.ModuleList(Unit(12) for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        kept = []
        for block in self.down:
            x, _ = block(hidden=x, scale=0.5)
            kept.append(x)
            x = x * 0.9
        for block in self.up:
            x, _ = block(x + kept.pop())
            x *= 1.1
        return {"out": x}


def sequential() -> Network:
    blocks = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in ((6, 16), (16, 16), (16, 16), (16, 16))]
    return Network(nn.Sequential(*blocks, nn.Linear(16, 3)), ("0", "1", "2", "3"), (torch.randn(5, 6),))


def stages() -> Network:
    layers = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1)]
    return Network(Stages(), tuple(layers), (torch.randn(2, 3, 16, 16),))


def children() -> Network:
    return Network(Children(), ("conv1", "conv2", "fc"), (torch.randn(2, 3, 8, 8),))


def skip_connections() -> Network:
    layers = [f"{way}.{block}" for way in ("down", "up") for block in range(3)]
    return Network(SkipConnections(), tuple(layers), (torch.randn(4, 12),))


WIDTHS: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


def tokens() -> Tensor:
    return torch.randint(5, 97, (2, 7), generator=torch.Generator().manual_seed(2))


def bert() -> Network:
    from transformers import BertConfig, BertModel

    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, 5:] = 0
    return Network(BertModel(BertConfig(**WIDTHS, num_hidden_layers=3, vocab_size=97)),
                   tuple(f"encoder.layer.{i}" for i in range(3)),
                   kwargs=(("input_ids", tokens()), ("attention_mask", mask)))


def vit() -> Network:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**WIDTHS, num_hidden_layers=4, image_size=16, patch_size=4, num_labels=5)
    return Network(ViTForImageClassification(config), tuple(f"vit.layers.{i}" for i in range(4)),
                   (torch.randn(2, 3, 16, 16),))


def t5() -> Network:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=3, num_heads=4,
                      vocab_size=97, decoder_start_token_id=0)
    layers = [f"encoder.block.{i}" for i in range(2)] + [f"decoder.block.{i}" for i in range(3)]
    return Network(T5ForConditionalGeneration(config), tuple(layers),
                   kwargs=(("input_ids", tokens()), ("decoder_input_ids", tokens()[:, :4]),
                           ("use_cache", False)))


def llama() -> Network:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**WIDTHS, num_hidden_layers=4, num_key_value_heads=2, vocab_size=97,
                         max_position_embeddings=64)
    return Network(LlamaForCausalLM(config), tuple(f"model.layers.{i}" for i in range(4)),
                   kwargs=(("input_ids", tokens()), ("use_cache", False)))


NETWORKS: dict[str, Callable[[], Network]] = {f.__name__: f for f in (
    sequential, stages, children, skip_connections, bert, vit, t5, llama)}


def build(name: str) -> Network:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    network.module.eval()
    return network


@pytest.fixture
def make() -> Callable[[str], Network]:
    """Builds one of the networks by name."""
    return build


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> Network:
    """Every network in turn."""
    return build(request.param)


def main_output(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state", "out"):
        if name in output:
            found: Tensor = output[name]
            return found
    raise AssertionError(f"no main output in {list(output)}")


@pytest.fixture
def main() -> Callable[[Any], Tensor]:
    """The one tensor of a network's output that tests compare."""
    return main_output
