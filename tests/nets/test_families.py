"""Every family computes what transformers computes, from the folder that transformers writes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.errors import BadModel
from layerwise.io.save import save
from layerwise.io.source import read
from layerwise.io.weights import build
from layerwise.nets.decoder import Decoder
from layerwise.nets.families import FAMILIES
from layerwise.nets.flow import Flow
from tests.nets.tiny import CASES, tiny, write

CLOSE = {"rtol": 0.0, "atol": 1e-4}


class Pair:
    """A model of transformers and the decoder read from its folder."""

    def __init__(self, case: str, folder: Path) -> None:
        self.theirs = tiny(case)
        self.folder = write(self.theirs, folder / case)
        cap = getattr(self.theirs.config, "attn_logit_softcapping", None)
        if cap is not None:  # their attention takes the cap, but their layers do not pass it on
            self.theirs.forward = partial(self.theirs.forward, softcap=cap)
        self.source = read(self.folder)
        self.ours: Decoder = build(self.source.weights)


@pytest.fixture(scope="module", params=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with torch.inference_mode():
        yield Pair(request.param, tmp_path_factory.mktemp("families"))


def tokens(batch: int = 2, length: int = 17) -> Tensor:
    return torch.randint(131, (batch, length), generator=torch.Generator().manual_seed(1))


def plain_flow(batch: int, length: int) -> Flow:
    return Flow(torch.arange(length).expand(batch, length))


def test_every_family_has_a_case() -> None:
    assert {kind for kind, _ in CASES.values()} == set(FAMILIES)


def test_prefill(pair: Pair) -> None:
    tokens_BT = tokens()
    found_BTV = pair.ours(tokens_BT, plain_flow(2, 17))
    torch.testing.assert_close(found_BTV, pair.theirs(tokens_BT).logits, **CLOSE)


@pytest.mark.parametrize("first", [1, 6])
def test_cached_decoding(pair: Pair, first: int) -> None:
    tokens_BT = tokens()
    expected_BTV = pair.theirs(tokens_BT).logits
    caches: dict[int, Any] = {}
    for start, stop in [(0, first), *((at, at + 1) for at in range(first, 17))]:
        flow = Flow(torch.arange(start, stop).expand(2, -1), caches=caches, past=start)
        found_BTV = pair.ours(tokens_BT[:, start:stop], flow)
        torch.testing.assert_close(found_BTV, expected_BTV[:, start:stop], **CLOSE)


def test_cached_decoding_in_pieces(pair: Pair) -> None:
    tokens_BT = tokens()
    caches: dict[int, Any] = {}
    found = [pair.ours(tokens_BT[:, start:stop],
                       Flow(torch.arange(start, stop).expand(2, -1), caches=caches, past=start))
             for start, stop in ((0, 7), (7, 11), (11, 17))]
    torch.testing.assert_close(torch.cat(found, 1), pair.theirs(tokens_BT).logits, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(pair: Pair, side: str) -> None:
    tokens_BT, valid_BT = tokens(3), torch.ones(3, 17, dtype=torch.bool)
    for row, missing in enumerate((0, 4, 9)):
        valid_BT[row, slice(0, missing) if side == "left" else slice(17 - missing, 17)] = False
    positions_BT = (valid_BT.long().cumsum(-1) - 1).clamp(min=0)
    found_BTV = pair.ours(tokens_BT, Flow(positions_BT, valid_BS=valid_BT))
    expected_BTV = pair.theirs(tokens_BT, attention_mask=valid_BT.long(), position_ids=positions_BT).logits
    torch.testing.assert_close(found_BTV[valid_BT], expected_BTV[valid_BT], **CLOSE)
    for row in range(3):  # padding leaves a row as it is alone
        alone_TV = pair.ours(tokens_BT[row][valid_BT[row]][None], plain_flow(1, int(valid_BT[row].sum())))[0]
        torch.testing.assert_close(found_BTV[row][valid_BT[row]], alone_TV, **CLOSE)


def test_padded_batch_decodes_with_a_cache(pair: Pair) -> None:
    tokens_BT, valid_BT = tokens(), torch.ones(2, 17, dtype=torch.bool)
    valid_BT[1, :5] = False
    positions_BT = (valid_BT.long().cumsum(-1) - 1).clamp(min=0)
    expected_BTV = pair.theirs(tokens_BT, attention_mask=valid_BT.long(), position_ids=positions_BT).logits
    caches: dict[int, Any] = {}
    for start, stop in [(0, 8), *((at, at + 1) for at in range(8, 17))]:
        flow = Flow(positions_BT[:, start:stop], valid_BT[:, :stop], caches, past=start)
        found_BTV = pair.ours(tokens_BT[:, start:stop], flow)
        kept_BT = valid_BT[:, start:stop]
        torch.testing.assert_close(found_BTV[kept_BT], expected_BTV[:, start:stop][kept_BT], **CLOSE)


def test_saved_again_it_opens_in_transformers(pair: Pair, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save(tmp_path / "again", pair.source.spec, pair.ours.state_dict().items())
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(again) is type(pair.theirs)
    softcap = getattr(pair.theirs.config, "attn_logit_softcapping", None)
    again.config._attn_implementation = "eager"
    found_BTV = again.eval()(tokens(), **({"softcap": softcap} if softcap else {})).logits
    torch.testing.assert_close(found_BTV, pair.theirs(tokens()).logits, **CLOSE)


def test_the_table_survives_its_configuration(pair: Pair) -> None:
    family = FAMILIES[pair.source.spec.family]()
    assert family.spec(family.config(pair.source.spec)).diff(pair.source.spec) == []


def test_sizes_are_those_of_the_model(pair: Pair) -> None:
    assert pair.source.spec.parameters() == sum(p.numel() for p in pair.theirs.parameters())
    assert pair.source.spec.bytes() == sum(t.nbytes for t in pair.ours.state_dict().values())


@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma3", "mamba2", "bamba"])
def test_bfloat16_is_as_close_as_rounding_allows(case: str, tmp_path: Path) -> None:
    theirs = tiny(case)
    ours = build(read(write(theirs, tmp_path / case), dtype="bfloat16").weights)
    with torch.inference_mode():
        flow = Flow(torch.arange(17).expand(2, -1), dtype=torch.bfloat16)
        exact = theirs(tokens()).logits
        rounded = theirs.to(torch.bfloat16)(tokens()).logits.float()
        found = ours(tokens(), flow).float()
    assert (found - exact).abs().mean() <= 1.5 * (rounded - exact).abs().mean()


@pytest.mark.parametrize("config", [
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    {"hidden_act": "tanh"},
    {"dtype": "float8_e4m3fn"},
])
def test_what_we_do_not_run_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    whole = tiny("llama").config.to_dict() | config
    with pytest.raises(BadModel):
        FAMILIES["llama"]().spec(whole)
