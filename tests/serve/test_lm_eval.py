"""lm-eval on the engine, beside our own scorer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.data.metrics import token_losses
from layerwise.data.tasks import ChoiceItem, MultipleChoice, accuracy, encode, scorer
from layerwise.errors import BadOption
from layerwise.generate.sample import generate
from layerwise.stack.decoder import DecoderStack

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra 'eval'")

ITEMS = tuple(ChoiceItem(f"Question {number}: which?", (" this", " that", " neither one"), number % 3)
              for number in range(12))


@pytest.fixture(scope="module")
def lm(talker: DecoderStack) -> Any:
    from layerwise.serve.lm_eval import EngineLM

    return EngineLM(talker, cache_tokens=2048)


def request(kind: str, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_scores_are_those_of_a_plain_pass(lm: Any, talker: DecoderStack) -> None:
    pairs = [(item.prompt, option) for item in ITEMS for option in item.options]
    found = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    assert lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs]) == found
    plain = scorer(talker)([pair for item in ITEMS for pair in encode(item, talker.tokenizer)])
    assert [score for score, _ in found] == pytest.approx(plain, abs=1e-4)
    with torch.inference_mode():
        for (prompt, option), (_, greedy) in zip(pairs, found, strict=True):
            ids = torch.tensor([talker.tokenizer.encode(prompt + option)])
            likeliest = talker(ids)[0].argmax(-1)[len(talker.tokenizer.encode(prompt)) - 1 : -1]
            assert greedy == bool((likeliest == ids[0, -len(likeliest) :]).all())


def test_the_likeliest_continuation_is_told_apart(lm: Any, talker: DecoderStack) -> None:
    ids = list(generate(talker, "abc", max_tokens=1, stop=()))
    options = [chr(97 + letter) for letter in range(26)]
    found = lm._loglikelihood_tokens([(None, talker.tokenizer.encode("abc"), [token])
                                      for token in (*ids, *(talker.tokenizer.encode(one)[0] for one in options))])
    assert found[0][1] and found[0][0] == max(score for score, _ in found)


def test_long_texts_are_scored_in_windows(lm: Any, talker: DecoderStack) -> None:
    text = "abcdefghij" * 70
    [found] = lm.loglikelihood_rolling([request("loglikelihood_rolling", text)])
    ids = [lm.prefix_token_id, *talker.tokenizer.encode(text)]
    size, expected = lm.max_length - 1, 0.0
    with torch.inference_mode():
        for end in [*range(size + 1, len(ids), size), len(ids)]:
            fresh = size if end < len(ids) else (len(ids) - 1) % size or size
            tokens_BT = torch.tensor([ids[max(0, end - size - 1) : end]])
            expected -= float(token_losses(talker(tokens_BT), tokens_BT)[0, -fresh:].sum())
    assert found == pytest.approx(expected, abs=1e-2)


def test_answers_end_at_stop_strings(lm: Any, talker: DecoderStack) -> None:
    [whole] = lm.generate_until([request("generate_until", "abc", {"until": [], "max_gen_toks": 20})])
    stop = whole[4:6]
    [cut] = lm.generate_until([request("generate_until", "abc", {"until": [stop], "max_gen_toks": 20})])
    assert whole.startswith(cut) and stop not in cut
    assert lm.generate_until([request("generate_until", "x" * 999, {"until": "q", "max_gen_toks": 3})])
    with pytest.raises(BadOption, match="num_beams"):
        lm.generate_until([request("generate_until", "abc", {"num_beams": 4})])


def test_a_task_in_memory_has_the_accuracy_of_our_own_scorer(
    lm: Any, talker: DecoderStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "items.json"
    file.write_text("\n".join(json.dumps({"q": item.prompt, "o": list(item.options), "a": item.answer})
                              for item in ITEMS))
    task = {"task": "tiny-choices", "dataset_path": "json", "dataset_name": None, "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test", "doc_to_text": "{{q}}",
            "doc_to_choice": "{{o}}", "doc_to_target": "{{a}}", "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    found = lm_eval.simple_evaluate(
        model=lm, tasks=[task], bootstrap_iters=0, task_manager=TaskManager(include_defaults=False),
        random_seed=None, numpy_random_seed=None, torch_random_seed=None)
    ours = accuracy(scorer(talker), MultipleChoice("tiny", ITEMS, "memory"), talker.tokenizer)
    assert found["results"]["tiny-choices"]["acc,none"] == ours.value


def test_the_model_class_is_registered_by_name() -> None:
    from lm_eval.api.registry import get_model

    from layerwise.serve.lm_eval import EngineLM

    assert get_model("layerwise") is EngineLM
