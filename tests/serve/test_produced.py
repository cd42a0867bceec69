"""What a plan makes of a model (packed, narrowed, without parts) is served as plain decoding decodes it."""

from __future__ import annotations

from pathlib import Path

import layerwise as lw
from layerwise.allocate.plan import Edit, Plan
from layerwise.serve.drafts import Lookup
from layerwise.serve.engine import Engine, layered
from layerwise.serve.request import Params
from layerwise.stack.decoder import DecoderStack
from layerwise.testing.stacks import random_stack
from tests.serve.plain import greedy, prompts, serve

EDITS = (
    Edit(0, "quantize", {"bits": 4, "group": 32}), Edit(1, "quantize", {"bits": 8}), Edit(2, "drop", {"part": "layer"}),
    Edit(3, "drop", {"part": "attention"}), Edit(4, "drop", {"part": "feed_forward"}),
    Edit(5, "share-kv", {"source": 1}), Edit("embedding", "quantize", {"bits": 8}),
)  # fmt: skip


def test_edited_models_are_served_as_they_are(tmp_path: Path) -> None:
    stack = random_stack(6)
    edited = lw.apply(stack, Plan(stack.spec.fingerprint(), 6, EDITS))
    again = lw.open(edited.save(tmp_path / "model"))
    assert isinstance(again, DecoderStack) and len(again) == 5 and again.spec.tied
    asked = prompts(6)
    for options in ({}, {"step_tokens": 13, "drafter": Lookup(shortest=1)}, {"groups": layered(9), "block": 4}):
        found = serve(Engine(again, cache_tokens=512, **options), asked, Params(max_tokens=9))  # type: ignore[arg-type]
        assert [list(one.tokens) for one in found] == [greedy(again, prompt, 9) for prompt in asked]
