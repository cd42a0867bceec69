"""Every route gives the parts of a float64 loop; summaries are those known by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerwise.errors import BadModel
from layerwise.measure import ntk
from layerwise.nets.classifiers import ResNet, convnet, mlp


def agree(found: ntk.Parts, true: ntk.Parts) -> None:
    assert set(found) <= set(true)
    for name, part in found.items():
        assert torch.allclose(part.detach(), true[name].detach(), rtol=1e-9, atol=1e-12), name


def perceptron(activation: type[nn.Module] = nn.ReLU, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return mlp((6, 7, 5, 1), activation, bias=bias).double()


def test_a_linear_model_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    parts = ntk.explicit(nn.Sequential(nn.Linear(2, 1)), x)
    assert torch.equal(parts["0.weight"], x @ x.T) and torch.equal(parts["0.bias"], torch.ones(2, 2))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ELU, nn.Tanh])
@pytest.mark.parametrize("bias", [True, False])
def test_all_routes_agree_for_perceptrons(activation: type[nn.Module], bias: bool) -> None:
    net, x = perceptron(activation, bias), torch.randn(9, 6).double()
    true = ntk.looped(net, x)
    for found in (ntk.explicit(net, x), ntk.by_hooks(net, x), ntk.one_by_one(net, x), ntk.together(net, x, chunk=4)):
        assert set(found) == set(true)
        agree(found, true)


def test_routes_agree_for_convolutions_and_batch_norms() -> None:
    x = torch.randn(4, 1, 8, 8).double()
    for net in (convnet((2, 3), 4, 8).double(), ResNet(1, (2, 4), channels=1).double().eval()):
        true = ntk.looped(net, x, ntk.logit_sum)
        agree(ntk.one_by_one(net, x, ntk.logit_sum), true)
        agree(ntk.together(net, x, ntk.logit_sum), true)
        agree(ntk.by_hooks(net, x, ntk.logit_sum), true)


def test_fisher_blocks_have_the_spectrum_of_the_kernel() -> None:
    net, x = perceptron(), torch.randn(9, 6).double()
    kernel, blocks = ntk.looped(net, x), ntk.fisher(net, x, largest=35)
    assert set(blocks) == set(kernel) - {"1.weight"}  # 42 entries, more than asked for
    for name, block in blocks.items():
        one, other = (torch.linalg.eigvalsh(matrix.detach()).flip(0) for matrix in (block, kernel[name]))
        count = min(len(one), len(other))
        assert torch.allclose(one[:count], other[:count], atol=1e-10), name


def test_the_kernel_of_all_outputs_holds_that_of_each() -> None:
    torch.manual_seed(0)
    net, x = mlp((6, 7, 3)).double(), torch.randn(4, 6).double()
    every = ntk.total(ntk.all_logits(net, x, chunk=3))
    assert every.shape == (12, 12)
    assert torch.allclose(every[::3, ::3], ntk.total(ntk.together(net, x)))
    summed = every.view(4, 3, 4, 3).sum((1, 3))
    assert torch.allclose(summed, ntk.total(ntk.together(net, x, ntk.logit_sum)))


class Positions(nn.Module):
    """A linear layer that runs at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.inner(x).tanh().mean(1))
        return out


def test_hooks_sum_over_positions() -> None:
    torch.manual_seed(0)
    net, x = Positions().double(), torch.randn(5, 6, 3).double()
    agree(ntk.by_hooks(net, x), ntk.looped(net, x))
    assert len(ntk.by_hooks(net, x)) == 4


def test_the_total_is_the_gram_matrix_of_the_whole_jacobian() -> None:
    net, x = perceptron(), torch.randn(5, 6).double()
    rows = []
    for row in x:
        net.zero_grad()
        net(row[None]).sum().backward()
        rows.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    jacobian = torch.stack(rows)
    assert torch.allclose(ntk.total(ntk.explicit(net, x)), jacobian @ jacobian.T)


def test_other_models_are_refused_by_the_closed_form() -> None:
    with pytest.raises(BadModel, match="Conv2d"):
        ntk.explicit(convnet((2,), 3, 8, classes=1), torch.zeros(1, 1, 8, 8))
    with pytest.raises(BadModel, match="2 outputs"):
        ntk.explicit(mlp((3, 2)), torch.zeros(1, 3))


def test_summaries_by_hand() -> None:
    eye, y = torch.eye(2), torch.tensor([1.0, -1.0])
    assert ntk.conditioning(torch.diag(torch.tensor([1.0, 4.0]))) == 0.25
    assert ntk.alignment(torch.outer(y, y), y) == pytest.approx(1) and ntk.alignment(eye, y) == pytest.approx(0.5**0.5)
    assert ntk.drift(eye, 3 * eye) == pytest.approx(0, abs=1e-6)
    assert ntk.drift(torch.diag(torch.tensor([1.0, 0])), torch.diag(torch.tensor([0, 1.0]))) == 1
    assert ntk.trace_shares({"a": eye, "b": 3 * eye}) == {"a": 0.25, "b": 0.75}


def test_kernel_ridge_recalls_what_it_knows() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(20, 30).double(), torch.randn(20).double()
    assert torch.allclose(ntk.kernel_ridge(x @ x.T, y, x @ x.T, ridge=1e-10), y, atol=1e-6)
