"""Answers in JSON: a schema becomes a grammar, and the grammar says which tokens may come next (xgrammar).

A small schema can ask for a huge automaton, so what schemas may ask for is bounded before one is compiled.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from layerwise.errors import BadData, BadOption, MissingExtra
from layerwise.io.tokenizer import Tokenizer, read_json
from layerwise.serve.request import Grammar

MOST_BYTES, MOST_DEPTH, MOST_COUNTED = 16_384, 32, 1024
"""Bounds of a schema: its size, its nesting, and the sum of the lengths and counts that it prescribes."""

COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
KEPT = 32


class JsonGrammar:
    """Follows one answer through a compiled schema."""

    def __init__(self, matcher: Any, mask_1W: Tensor, apply: Callable[[Tensor, Tensor], None]) -> None:
        self._matcher, self._mask_1W, self._apply = matcher, mask_1W, apply

    def mask(self, logits_V: Tensor) -> None:
        """Rule out what would break the schema."""
        if self._matcher.fill_next_token_bitmask(self._mask_1W):
            if not self._mask_1W.any():
                raise _nothing_fits()
            self._apply(logits_V, self._mask_1W[0].to(logits_V.device))

    def accept(self, token: int) -> bool:
        """Move on; True after the token that ends the text."""
        return not self._matcher.accept_token(token) or bool(self._matcher.is_terminated())


class Grammars:
    """Compiles schemas for one tokenizer and keeps the last ones. `vocabulary` is the model's, `stops` end a text."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, stops: tuple[int, ...]) -> None:
        self.tokenizer, self.vocabulary, self.stops = tokenizer, vocabulary, stops
        self._library: Any = None
        self._compiler: Any = None
        self._kept: OrderedDict[str, Any] = OrderedDict()

    def compile(self, schema: Mapping[str, Any]) -> Callable[[], Grammar]:
        """What makes a grammar for each answer. Not safe for threads.

        Raises BadOption for a schema that asks for too much, BadData for one that is wrong or that nothing fulfils,
        MissingExtra without xgrammar.
        """
        text = _bounded(schema)
        self._prepare()
        if text not in self._kept:
            try:
                self._kept[text] = self._compiler.compile_json_schema(text, any_whitespace=False)
            except Exception as error:  # the library has one class for all that may be wrong
                why = str(error).split(": ", 1)[-1].strip()
                raise BadData(f"a JSON schema that cannot be followed: {why}", expected="JSON Schema, draft 2020-12",
                              do="simplify it") from error
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(text)
        compiled = self._kept[text]
        self._try(compiled)
        return lambda: self._follow(compiled)

    def _follow(self, compiled: Any) -> JsonGrammar:
        matcher = self._library.GrammarMatcher(compiled, terminate_without_stop_token=not self.stops)
        mask_1W = self._library.allocate_token_bitmask(1, self.vocabulary)
        return JsonGrammar(matcher, mask_1W, self._library.apply_token_bitmask_inplace)

    def _try(self, compiled: Any) -> None:
        mask_1W = self._library.allocate_token_bitmask(1, self.vocabulary)
        needed = self._library.GrammarMatcher(compiled).fill_next_token_bitmask(mask_1W)
        if needed and not mask_1W.any():
            raise _nothing_fits()

    def _prepare(self) -> None:
        if self._compiler is not None:
            return
        try:
            import xgrammar
        except ImportError as error:
            raise MissingExtra("xgrammar", "serve", "an answer in JSON") from error
        words = [""] * self.vocabulary
        for word, token in self.tokenizer.words().items():
            if token < self.vocabulary:
                words[token] = word
        kind = getattr(xgrammar.VocabType, _spelling(self.tokenizer))
        info = xgrammar.TokenizerInfo(words, kind, vocab_size=self.vocabulary,
                                      stop_token_ids=list(self.stops) or None)
        self._library = xgrammar
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=64 << 20)


def _spelling(tokenizer: Tokenizer) -> str:
    """How the tokenizer's file spells bytes: as letters, as `<0x0A>`, or as they are."""
    decoder = json.dumps(read_json(tokenizer.folder / "tokenizer.json").get("decoder"))
    return "BYTE_LEVEL" if '"ByteLevel"' in decoder else "BYTE_FALLBACK" if '"ByteFallback"' in decoder else "RAW"


def _bounded(schema: Mapping[str, Any]) -> str:
    """The schema as text. Raises BadOption where it is too large, too deep, or counts too far."""
    try:
        text = json.dumps(schema)
    except RecursionError as error:
        raise _too_much("nested too deeply", f"{MOST_DEPTH} levels") from error
    if len(text) > MOST_BYTES:
        raise _too_much(f"of {len(text)} bytes", f"{MOST_BYTES} bytes")
    counted = _counted(schema, 0)
    if counted > MOST_COUNTED:
        raise _too_much(f"whose lengths and counts add up to {counted}", str(MOST_COUNTED))
    return text


def _counted(value: object, depth: int) -> int:
    if depth > MOST_DEPTH:
        raise _too_much("nested too deeply", f"{MOST_DEPTH} levels")
    if isinstance(value, list):
        return sum(_counted(item, depth + 1) for item in value)
    if not isinstance(value, dict):
        return 0
    total = 0
    for name, item in value.items():
        number = isinstance(item, int | float) and not isinstance(item, bool)
        if name in COUNTS and number:
            total += int(min(max(item, 0), 1e9))
        elif name == "pattern" and isinstance(item, str):
            total += _pattern(item)
        else:
            total += _counted(item, depth + 1)
    return total


def _pattern(text: str) -> int:
    """A bound for the states of a regular expression: repetitions multiply."""
    total = len(text)
    for numbers in re.findall(r"\{(\d*),?(\d*)\}", text):
        total *= max(1, *(int(number[:9]) for number in numbers if number))
        total = min(total, 10**9)
    return total


def _too_much(given: str, limit: str) -> BadOption:
    return BadOption(f"a JSON schema {given}", expected=f"at most {limit}", do="simplify it")


def _nothing_fits() -> BadData:
    return BadData("a JSON schema that nothing fulfils", expected="one that some finite value fulfils",
                   do="look for a part that refers to itself")
