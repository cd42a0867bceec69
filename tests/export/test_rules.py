"""Recipes and rules, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerwise.allocate.plan import Edit, Plan
from layerwise.errors import BadOption
from layerwise.export import EXPORTS
from layerwise.export.base import NOTHING, Allowed
from layerwise.export.mergekit import recipe, runs
from layerwise.export.source import Source
from layerwise.spec import StackSpec
from layerwise.testing.stacks import random_stack

SPEC = random_stack(4).spec


def source(*edits: Edit, spec: StackSpec = SPEC) -> Source:
    plan = Plan(spec.fingerprint(), len(spec.rows), edits)
    return Source(plan=plan, original=spec, origin="some/model", name="some-model")


def write(kind: str, given: Source, folder: Path, allowed: Allowed = NOTHING) -> str:
    written = EXPORTS[kind]().write(given, folder / "out", allowed)
    assert written.bytes == written.path.stat().st_size
    return written.path.read_text()


def ranked(ranks: dict[int, dict[str, int]]) -> Source:
    rows = {layer: dataclasses.replace(SPEC.rows[layer], ranks=of) for layer, of in ranks.items()}
    given = source()
    given.__dict__["spec"] = SPEC.with_rows(rows)
    return given


def test_runs_of_neighbours() -> None:
    assert runs((0, 1, 2, 5, 7, 8)) == [(0, 2), (5, 5), (7, 8)]
    assert runs(()) == []


def test_mergekit_slices_skip_what_is_dropped(tmp_path: Path) -> None:
    text = write("mergekit", source(Edit(1, "drop", {"part": "layer"})), tmp_path)
    found = yaml.safe_load(text)
    assert found["merge_method"] == "passthrough" and found["dtype"] == "float32"
    assert [slice["sources"][0]["layer_range"] for slice in found["slices"]] == [[0, 1], [2, 4]]
    assert recipe("a b", (0, 1), "bfloat16").count('model: "a b"') == 1


def test_mergekit_refuses_all_but_dropped_layers(tmp_path: Path) -> None:
    mixed = source(Edit(1, "drop", {"part": "layer"}), Edit(2, "quantize", {"bits": 4}))
    with pytest.raises(BadOption, match="quantize bits=4 for layer 2"):
        write("mergekit", mixed, tmp_path)
    assert "[2, 4]" in write("mergekit", mixed, tmp_path, Allowed(dense=True))
    with pytest.raises(BadOption, match="without its plan"):
        write("mergekit", Source(random_stack(2)), tmp_path)


def test_llamacpp_rules_count_the_layers_that_are_left(tmp_path: Path) -> None:
    plan = source(Edit(0, "quantize", {"bits": 4}), Edit(1, "drop", {"part": "layer"}),
                  Edit(2, "quantize", {"bits": 8, "matrices": ["q"]}), Edit("embedding", "quantize", {"bits": 6}))
    lines = write("llama.cpp-rules", plan, tmp_path).splitlines()
    assert r"--tensor-type ^blk\.0\.attn_q\.weight$=q4_1" in lines
    assert r"--tensor-type ^blk\.1\.attn_q\.weight$=q8_0" in lines
    assert r"--tensor-type ^blk\.1\.ffn_up\.weight$=f32" in lines
    assert "--token-embedding-type q8_0" in lines and "--prune-layers 1" in lines
    assert not any(r"blk\.3\." in line for line in lines)


def test_llamacpp_rules_take_k_types_for_long_rows(tmp_path: Path) -> None:
    spec = random_stack(1, hidden=256).spec
    text = write("llama.cpp-rules", source(Edit(0, "quantize", {"bits": 3}), spec=spec), tmp_path)
    assert r"attn_q\.weight$=q3_k" in text and r"ffn_down\.weight$=q3_k" in text


def test_llamacpp_rules_refuse_factors_and_lost_halves(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="factors of up in layer 1"):
        write("llama.cpp-rules", ranked({1: {"up": 8}}), tmp_path)
    with pytest.raises(BadOption, match="layer 2 without its attention half"):
        write("llama.cpp-rules", source(Edit(2, "drop", {"part": "attention"})), tmp_path)


def test_no_rule_says_that_rows_of_a_table_differ(tmp_path: Path) -> None:
    table = source(Edit("embedding", "quantize", {"bits": 3, "frequent": "8/row=", "frequent_rows": 9}))
    for kind, left in (("llama.cpp-rules", "--token-embedding-type f32"), ("torchao-rules", "IntxWeight")):
        with pytest.raises(BadOption, match="8 bits for 9 frequent tokens, 3 bits for all others"):
            write(kind, table, tmp_path)
        assert (left in write(kind, table, tmp_path, Allowed(dense=True))) == (kind == "llama.cpp-rules")


def test_torchao_rules_say_bits_groups_and_symmetry(tmp_path: Path) -> None:
    plan = source(Edit(0, "quantize", {"bits": 4, "matrices": ["q"]}), Edit(3, "quantize", {"bits": 8}))
    rules = json.loads(write("torchao-rules", plan, tmp_path))["_data"]["fqn_to_config"]
    assert len(rules) == 8
    assert rules["model.layers.3.mlp.down_proj"]["_type"] == "Int8WeightOnlyConfig"
    assert rules["model.layers.0.self_attn.q_proj"]["_data"] == {
        "weight_dtype": {"_type": "torch.dtype", "_data": "int4"},
        "granularity": {"_type": "PerGroup", "_version": 1, "_data": {"group_size": 32}},
        "mapping_type": {"_type": "MappingType", "_data": "ASYMMETRIC"}}


def test_torchao_rules_refuse_what_they_cannot_say(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="dropped layers"):
        write("torchao-rules", source(Edit(1, "drop", {"part": "layer"})), tmp_path)
    table = source(Edit("embedding", "quantize", {"bits": 8}))
    with pytest.raises(BadOption, match="the embedding in 8 bits"):
        write("torchao-rules", table, tmp_path)
    assert json.loads(write("torchao-rules", table, tmp_path, Allowed(dense=True)))["_data"] == {"fqn_to_config": {}}


def test_torchao_reads_and_applies_the_rules(tmp_path: Path) -> None:
    pytest.importorskip("torchao", exc_type=ImportError)
    import torch
    from torchao.core.config import config_from_dict
    from torchao.quantization import quantize_
    from transformers import LlamaConfig, LlamaForCausalLM

    plan = source(Edit(0, "quantize", {"bits": 3, "matrices": ["q"]}), Edit(3, "quantize", {"bits": 8}))
    config = config_from_dict(json.loads(write("torchao-rules", plan, tmp_path)))
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
                                         num_attention_heads=4, num_key_value_heads=2))
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    quantize_(model, config, filter_fn=None)
    after = model.model.layers[0].self_attn.q_proj.weight.dequantize()
    assert all(len(group.unique()) <= 8 for group in after.view(-1, 32)) and not torch.equal(after, before)
    assert type(model.model.layers[3].mlp.up_proj.weight) is not torch.nn.Parameter
    assert type(model.model.layers[1].mlp.up_proj.weight) is torch.nn.Parameter


def test_peft_ranks_and_alphas(tmp_path: Path) -> None:
    found = json.loads(write("peft-ranks", ranked({0: {"q": 8, "up": 8}, 2: {"q": 4}}), tmp_path))
    assert found["r"] == found["lora_alpha"] == 8
    assert found["target_modules"] == [
        "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.2.self_attn.q_proj"]
    assert found["rank_pattern"] == found["alpha_pattern"] == {r"^model\.layers\.2\.self_attn\.q_proj$": 4}
    with pytest.raises(BadOption, match="none of whose matrices has a rank"):
        write("peft-ranks", source(), tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_makes_adapters_of_these_ranks(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    arguments: dict[str, Any] = json.loads(write("peft-ranks", ranked({0: {"q": 8, "up": 8}, 2: {"q": 4}}), tmp_path))
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
                                         num_attention_heads=4, num_key_value_heads=2))
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **arguments))
    shapes = {name: tuple(tensor.shape) for name, tensor in adapted.named_parameters() if "lora_A" in name}
    assert len(shapes) == 3
    assert shapes["base_model.model.model.layers.2.self_attn.q_proj.lora_A.default.weight"] == (4, 64)
    assert shapes["base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"] == (8, 64)
