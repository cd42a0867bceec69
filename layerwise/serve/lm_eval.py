"""A model class for lm-eval on the engine: importing this module makes `simple_evaluate(model="layerwise")` work.

    import lm_eval
    import layerwise.serve.lm_eval
    lm_eval.simple_evaluate(model="layerwise", model_args={"pretrained": "smollm2"}, tasks=["piqa"])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from layerwise.errors import BadData, BadModel, BadOption, MissingExtra
from layerwise.serve.conversation import stop_ids, tokenizer_of
from layerwise.serve.engine import Engine
from layerwise.serve.request import Params
from layerwise.stack.base import Stack
from layerwise.stack.decoder import DecoderStack
from layerwise.stack.open import open

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise MissingExtra("lm-eval", "eval", "a model class for lm-eval") from error

AT_A_TIME = 512
"""Requests that are scored together; the log-probabilities of their tokens are in memory at once."""


@register_model("layerwise")
class EngineLM(TemplateLM):  # type: ignore[misc]
    """`pretrained` is a stack, or what `open` takes; `max_gen_toks` bounds answers that no task bounds.

    `running`, `step_tokens` and `cache_tokens` are the engine's. lm-eval passes `batch_size`, `max_batch_size` and
    `device` to every model: the engine packs by itself, and `device` is where the stack is opened.
    """

    def __init__(self, pretrained: str | Stack, *, max_gen_toks: int = 256, running: int = 64, step_tokens: int = 512,
                 cache_tokens: int | None = None, batch_size: object = None, max_batch_size: object = None,
                 device: str | None = None) -> None:
        super().__init__()
        stack = pretrained if isinstance(pretrained, Stack) else open(pretrained, device=device)
        self.engine = Engine(stack, running=running, step_tokens=step_tokens, cache_tokens=cache_tokens)
        assert isinstance(stack, DecoderStack)
        self.stack, self.max_gen_toks = stack, max_gen_toks
        self.tokens = tokenizer_of(stack)
        self.stops = stop_ids(stack)
        self.tokenizer = None

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text. Raises BadModel where there is none."""
        if not self.stops:
            raise BadModel(f"{self.stack.name}, whose tokenizer names no end of text",
                           expected="a tokenizer with an eos_token", do="name one in tokenizer_config.json")
        return self.stops[0] if self.tokens.eos is None else self.tokens.eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        return self.eot_token_id if self.tokens.bos is None else self.tokens.bos

    @property
    def max_length(self) -> int:
        """Tokens that a text may have; of longer ones the end is scored."""
        return self.engine.longest

    @property
    def tokenizer_name(self) -> str:
        """Distinguishes cached requests."""
        return str(self.tokens.folder).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids, framed as the tokenizer frames texts unless told otherwise."""
        return self.tokens.encode(string, special=add_special_tokens is not False)

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt for a conversation."""
        return self.tokens.chat(chat_history, reply=add_generation_prompt)

    # scoring -------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
                              disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        found = list(self._scores([(context, continuation) for _, context, continuation in requests]))
        for (names, _, _), score in zip(requests, found, strict=True):
            if names is not None:
                self.cache_hook.add_partial("loglikelihood", names, score)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token after as much before it as fits."""
        found = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1, context_len=1)
            found.append(sum(score for score, _ in self._scores([make_disjoint_window(pair) for pair in windows])))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        """Log-likelihood (nats) of each continuation after its context, and whether it is the likeliest."""
        params = Params(max_tokens=0, prompt_logprobs=True, logprobs=1)
        for start in range(0, len(pairs), AT_A_TIME):
            part = pairs[start : start + AT_A_TIME]
            texts = [(context + continuation)[-self.max_length :] for context, continuation in part]
            for (_, continuation), done in zip(part, self.engine.generate(texts, params), strict=True):
                if len(continuation) > len(done.prompt_logprobs):
                    raise BadData(f"a continuation of {len(continuation)} tokens",
                                  expected=f"fewer than {self.max_length} tokens", do="shorten the text")
                scored = done.prompt_logprobs[len(done.prompt_logprobs) - len(continuation) :]
                greedy = all(entry.top[0][0] == entry.token for entry in scored)
                yield sum(entry.logprob for entry in scored), greedy

    # writing -------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, up to one of its stop strings."""
        prompts, params = [], []
        for context, given in (request.args for request in requests):
            own = self._params(given)
            room = max(1, self.max_length - own.max_tokens + 1)
            prompts.append(self.tok_encode(context)[-room:])
            params.append(own)
        texts = [done.text for done in self.engine.generate(prompts, params)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _params(self, given: Mapping[str, Any]) -> Params:
        until = given.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        sampled = given.get("do_sample", float(given.get("temperature") or 0) > 0)
        known = {"until", "do_sample", "temperature", "top_p", "top_k", "min_p", "max_gen_toks", "seed"}
        if set(given) - known:
            raise BadOption(f"generation options {sorted(set(given) - known)}", expected=", ".join(sorted(known)),
                            do="leave the others out of generation_kwargs")
        return Params(
            max_tokens=int(given.get("max_gen_toks", self.max_gen_toks)),
            temperature=float(given.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(given.get("top_p", 1.0)), top_k=int(given.get("top_k", 0)),
            min_p=float(given.get("min_p", 0.0)), seed=int(given.get("seed", 0)),
            stop=tuple(stop for stop in stops if stop), stop_ids=self.stops)
