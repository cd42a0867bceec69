"""From messages to a prompt, and which tokens end the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from layerwise.errors import BadData
from layerwise.io.tokenizer import Tokenizer, read_json
from layerwise.stack.decoder import DecoderStack

NAMES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool", "function": "Tool"}
PLAIN_STOP = "\nUser:"


def tokenizer_of(stack: DecoderStack) -> Tokenizer:
    """The stack's tokenizer. Raises BadData where it has none."""
    if stack.tokenizer is None:
        raise BadData(f"text for {stack.name}, which has no tokenizer",
                      expected="token ids, or a model folder with tokenizer files", do="pass a list of token ids")
    return stack.tokenizer


def prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> tuple[str, bool, tuple[str, ...]]:
    """The text that ends where the model answers, whether to frame it by special tokens, and strings that end it.

    A model without a chat template gets lines such as `User: ...`. Raises BadData for messages that a template
    refuses.
    """
    if not tokenizer.has_chat_template:
        turns = [f"{NAMES[message['role']]}: {message['content']}" for message in messages]
        return "\n".join([*turns, "Assistant:"]), True, (PLAIN_STOP,)
    try:
        return tokenizer.chat(messages), False, ()
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise BadData(f"messages that the chat template cannot read: {error}",
                      expected="the roles and order this model was trained on",
                      do="alternate user and assistant, beginning with user") from error


def stop_ids(stack: DecoderStack) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's end of text, and those that the model's folder names besides."""
    found = set() if stack.tokenizer is None or stack.tokenizer.eos is None else {stack.tokenizer.eos}
    file = stack.folder / "generation_config.json" if stack.folder else None
    if file is not None and file.exists():
        named = read_json(file).get("eos_token_id")
        found |= {token for token in (named if isinstance(named, list) else [named]) if isinstance(token, int)}
    return tuple(sorted(token for token in found if token < stack.spec.vocabulary))
