"""Layer-table folders open in transformers: the same logits, generation, loss, and saving again."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.io.auto import register_when_imported
from layerwise.io.save import save
from layerwise.io.source import read
from layerwise.io.weights import build
from layerwise.nets.decoder import Decoder
from layerwise.nets.flow import Flow
from layerwise.spec import Attention, FeedForward, Format, LayerSpec, StackSpec, StateSpace

ROW = LayerSpec(Attention(4, 2, 8), FeedForward(48))
SPEC = StackSpec("llama", 32, 61, (
    replace(ROW, mixer=None),
    replace(ROW, mixer=replace(ROW.mixer, window=4), formats={"q": Format(8, 0, True), "up": Format(4, 32)}),
    replace(ROW, feed_forward=None),
    ROW,
), dtype="float32", embedding_format=Format(8, 16), extras={"eos_token_id": 2, "bos_token_id": 1})

STATES = replace(SPEC, rows=(
    LayerSpec(StateSpace(heads=4, head_dim=8, state=4), None, formats={"in_proj": Format(8, 0, True)}),
    ROW,
    LayerSpec(StateSpace(heads=4, head_dim=8, state=4, groups=2), FeedForward(48)),
))


@pytest.fixture(scope="module", params=[SPEC, STATES], ids=["attention", "states"])
def table(request: pytest.FixtureRequest) -> StackSpec:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def folder(table: StackSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    decoder = Decoder(table).requires_grad_(False)
    for name, tensor in decoder.state_dict().items():
        codes = "codes" in name
        tensor.copy_(torch.randint(1, 100, tensor.shape) if codes else torch.randn(tensor.shape) * 0.1)
    assets = tmp_path_factory.mktemp("assets")
    (assets / "generation_config.json").write_text('{"eos_token_id": 2}')
    return save(tmp_path_factory.mktemp("saved") / "m", table, decoder.state_dict().items(), assets=assets)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    register_when_imported()
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("order", [
    "import layerwise; from transformers.models.auto import modeling_auto",
    "from transformers import AutoModelForCausalLM; import layerwise",
])
def test_either_package_may_come_first(folder: Path, order: str) -> None:
    code = f"""
{order}
from transformers import AutoConfig, AutoModelForCausalLM
assert AutoConfig.from_pretrained({str(folder)!r}).vocab_size == 61
model, report = AutoModelForCausalLM.from_pretrained({str(folder)!r}, output_loading_info=True)
assert not any(report.values()), report
print(type(model).__name__)
"""
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True,
                          cwd=Path(__file__).parents[2], check=False)
    assert done.stdout.strip() == "LayerwiseForCausalLM", done.stderr


def test_importing_layerwise_does_not_import_transformers() -> None:
    code = "import layerwise, sys; assert 'transformers' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@torch.inference_mode()
def test_logits_are_the_decoders(model: Any, folder: Path) -> None:
    decoder = build(read(folder).weights)
    expected_BTV = decoder(tokens(), Flow(torch.arange(9).expand(2, -1)))
    torch.testing.assert_close(model(tokens()).logits, expected_BTV, rtol=0, atol=1e-6)


@torch.inference_mode()
def test_padding_leaves_a_row_as_it_is_alone(model: Any) -> None:
    mask_BT = torch.ones(2, 9, dtype=torch.long)
    mask_BT[1, :4] = 0
    padded_BTV = model(tokens(), attention_mask=mask_BT).logits
    torch.testing.assert_close(padded_BTV[1, 4:], model(tokens()[1:, 4:]).logits[0], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_generation_with_and_without_a_cache_agree(model: Any) -> None:
    mask_BT = torch.ones(2, 9, dtype=torch.long)
    mask_BT[1, :4] = 0
    settings = {"attention_mask": mask_BT, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(tokens(), use_cache=True, **settings)
    assert cached.shape[1] > 9
    assert cached.equal(model.generate(tokens(), use_cache=False, **settings))
    model.generate(tokens(), num_beams=3, **settings)


@torch.inference_mode()
def test_a_cache_continues_a_sequence(model: Any) -> None:
    whole_BTV = model(tokens()).logits
    first = model(tokens()[:, :5], use_cache=True)
    second = model(tokens()[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole_BTV, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_only_the_last_logits(model: Any) -> None:
    assert model(tokens(), logits_to_keep=2).logits.equal(model(tokens()).logits[:, -2:])


def test_the_loss_is_that_of_the_next_token_and_has_gradients(model: Any) -> None:
    labels_BT = tokens().clone()
    labels_BT[0, :3] = -100
    result = model(tokens(), labels=labels_BT)
    shares_BTV = result.logits[:, :-1].log_softmax(-1)
    kept_BT = labels_BT[:, 1:] != -100
    picked_BT = shares_BTV.gather(-1, labels_BT[:, 1:].clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(result.loss, -picked_BT[kept_BT].mean())
    result.loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()


@torch.inference_mode()
def test_saved_again_it_opens_on_both_sides(model: Any, table: StackSpec, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "again")
    assert read(tmp_path / "again").spec == table
    again = type(model).from_pretrained(tmp_path / "again")
    assert again(tokens()).logits.equal(model(tokens()).logits)
    assert again.generation_config.eos_token_id == 2


def test_a_dtype_may_be_asked_for(folder: Path, model: Any) -> None:
    small = type(model).from_pretrained(folder, dtype=torch.bfloat16)
    assert small(tokens()).logits.dtype == torch.bfloat16
