"""A tokenizer read from `tokenizer.json`, without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import BadData, BadFile, BadModel

if TYPE_CHECKING:
    import tokenizers

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
         "generation_config.json", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")
"""What belongs to a tokenizer in a Hugging Face folder, and travels with a saved model."""


class Tokenizer:
    """Text to token ids and back. Nothing is read until first use.

    `limit` is the model's vocabulary: BadModel is raised where the tokenizer's own vocabulary is larger.
    """

    def __init__(self, folder: str | Path, limit: int | None = None) -> None:
        self._folder, self.limit = Path(folder), limit

    @property
    def folder(self) -> Path:
        """Where the tokenizer's files lie."""
        return self._folder

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`; with `special`, framed by the tokens that the tokenizer adds by itself.

        Names of special tokens inside the text (`<|im_end|>`) become those tokens.
        """
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        if self.limit is not None and ids and max(ids) >= self.limit:
            raise self._misfit(f"the token {max(ids)}")
        return ids

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """Text of token ids; without `special`, special tokens are left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=not special)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are, added ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def words(self) -> dict[str, int]:
        """Every token as the tokenizer's file spells it, with its id; added ones included."""
        found: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return found

    @cached_property
    def bos(self) -> int | None:
        """The token that begins a text, if any."""
        return self._special("bos_token")

    @cached_property
    def eos(self) -> int | None:
        """The token that ends a text, if any."""
        return self._special("eos_token")

    @property
    def has_chat_template(self) -> bool:
        """Whether the model was trained for conversation."""
        return self._template() is not None

    def chat(self, messages: Sequence[Mapping[str, str]], *, reply: bool = True) -> str:
        """The prompt for a conversation of {"role", "content"}; with `reply` it ends where the model answers.

        Raises BadModel where the model has no chat template, BadData where the template refuses the messages.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        template = self._template()
        if template is None:
            raise BadModel(f"{self.folder} has no chat template", expected="a model trained for conversation",
                           do="give plain text instead of messages")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols"])

        def refuse(message: str) -> None:
            raise TemplateError(message)

        names = {"raise_exception": refuse, "bos_token": self._text("bos_token") or "",
                 "eos_token": self._text("eos_token") or ""}
        try:
            return environment.from_string(template).render(
                messages=list(messages), add_generation_prompt=reply, **names)
        except TemplateError as error:
            raise BadData(f"messages that the chat template refuses: {error}",
                          expected="the roles and order this model was trained on",
                          do="alternate user and assistant, beginning with user") from error

    @cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        from tokenizers import Tokenizer as Fast

        file = self.folder / "tokenizer.json"
        if not file.exists():
            raise BadFile(f"{self.folder} has no tokenizer.json",
                          expected="a tokenizer in the fast format",
                          do="load it with transformers and save it again with save_pretrained")
        try:
            tokenizer = Fast.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise BadFile(f"{file} cannot be read: {error}", expected="the tokenizers format",
                          do="fetch the folder again") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        size = tokenizer.get_vocab_size(with_added_tokens=False)
        if self.limit is not None and size > self.limit:
            raise self._misfit(f"{size:,} tokens")
        return tokenizer

    def _misfit(self, what: str) -> BadModel:
        return BadModel(f"the tokenizer in {self.folder} does not fit the model: it has {what}",
                        expected=f"ids below the model's vocabulary of {self.limit:,}",
                        do="put the tokenizer files that came with the model into its folder")

    @cached_property
    def _config(self) -> dict[str, Any]:
        file = self.folder / "tokenizer_config.json"
        return read_json(file) if file.exists() else {}

    def _text(self, name: str) -> str | None:
        token = self._config.get(name)
        return token.get("content") if isinstance(token, dict) else token

    def _special(self, name: str) -> int | None:
        text = self._text(name)
        return None if text is None else self._tokenizer.token_to_id(text)

    def _template(self) -> str | None:
        file = self.folder / "chat_template.jinja"
        if file.exists():
            return file.read_text(encoding="utf-8")
        template = self._config.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return template


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises BadFile where it is absent, damaged, or not an object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadFile(f"{file} cannot be read: {error}", expected="a JSON file",
                      do="fetch the folder again") from error
    if not isinstance(value, dict):
        raise BadFile(f"{file} holds a {type(value).__name__}", expected="a JSON object",
                      do="fetch the folder again")
    return value
