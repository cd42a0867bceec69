"""Tokenizers without transformers: the same ids, the same chat prompts, and clear errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Fast
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from layerwise.errors import BadData, BadFile, BadModel
from layerwise.io.tokenizer import Tokenizer

WORDS = ["<s>", "</s>", "the", "cat", "sat"]
TEMPLATE = ("{{ bos_token }}{% for message in messages %}{% if message['role'] == 'tool' %}"
            "{{ raise_exception('no tools') }}{% endif %}{{ message['role'] }}: {{ message['content'] }}\n"
            "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fast = Fast(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<s>"))
    fast.pre_tokenizer = WhitespaceSplit()
    fast.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    fast.enable_truncation(2)
    fast.enable_padding(length=9)
    fast.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "chat_template": TEMPLATE,
              "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_text_to_ids_and_back(folder: Path) -> None:
    tokenizer = Tokenizer(folder, limit=5)
    assert tokenizer.encode("the cat sat the cat") == [2, 3, 4, 2, 3]  # neither cut nor padded
    assert tokenizer.encode("the cat", special=True) == [0, 2, 3]
    assert tokenizer.decode([0, 2, 3]) == "<s> the cat"
    assert tokenizer.decode([0, 2, 3], special=False) == "the cat"
    assert (tokenizer.vocabulary, tokenizer.bos, tokenizer.eos) == (5, 0, 1)
    assert tokenizer.folder == folder


def test_chat_prompts_are_those_of_transformers(folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    for reply in (True, False):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=reply, tokenize=False)
        assert Tokenizer(folder).chat(messages, reply=reply) == expected


def test_a_template_may_lie_in_its_own_file(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    assert Tokenizer(folder).chat([{"role": "user", "content": "hi"}]) == "hi!"


def test_messages_that_the_template_refuses(folder: Path) -> None:
    with pytest.raises(BadData, match="no tools"):
        Tokenizer(folder).chat([{"role": "tool", "content": "x"}])


def test_a_template_cannot_reach_python(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(BadData):
        Tokenizer(folder).chat([{"role": "user", "content": "hi"}])


def test_no_template(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer(folder)
    assert not tokenizer.has_chat_template
    assert tokenizer.bos is None
    with pytest.raises(BadModel, match="no chat template"):
        tokenizer.chat([{"role": "user", "content": "hi"}])


def test_a_vocabulary_larger_than_the_models(folder: Path) -> None:
    with pytest.raises(BadModel, match="does not fit the model: it has 5 tokens"):
        Tokenizer(folder, limit=4).encode("the")


def test_an_added_token_beyond_the_models_vocabulary(folder: Path) -> None:
    fast = Fast.from_file(str(folder / "tokenizer.json"))
    fast.add_special_tokens([AddedToken("<image>")])
    fast.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer(folder, limit=5)
    assert tokenizer.encode("the cat") == [2, 3]
    with pytest.raises(BadModel, match="the token 5"):
        tokenizer.encode("the <image>")


@pytest.mark.parametrize("damage", [b"", b"{", b'{"version": "1.0"}', b"\xff\xfe"])
def test_a_damaged_tokenizer_is_named(folder: Path, damage: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(damage)
    with pytest.raises(BadFile, match=r"tokenizer\.json cannot be read"):
        Tokenizer(folder).encode("the")


def test_an_absent_tokenizer_says_how_to_write_one(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BadFile, match=r"no tokenizer\.json"):
        Tokenizer(folder).encode("the")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_configuration_is_named(folder: Path, text: str) -> None:
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(BadFile, match=r"tokenizer_config\.json"):
        _ = Tokenizer(folder).bos
