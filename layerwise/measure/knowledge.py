"""Where facts of several kinds are written: the answer's chance that is lost without one feed-forward half.

    lost = mean over facts of log p(answer) - log p'(answer)

p' is the chance where the feed-forward half of one layer writes nothing at the subject's tokens. Of each kind the facts
are taken whose answers the model finds likeliest, so that there is something to lose. Facts and wordings come with the
package. That facts are written there, at the subject, is the finding of causal tracing (arXiv 2202.05262); one half at
a time misses what several layers write together. Cost: layers / 2 passes over `most` short prompts a kind.

Shapes: B facts, T tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from layerwise.data.facts import RELATIONS, Relation, facts
from layerwise.data.prompts import Located, locate, single_token
from layerwise.data.text import Tokenizer
from layerwise.measure.edit_scores import Prompts
from layerwise.measure.scores import Column
from layerwise.stack.changes import at
from layerwise.stack.decoder import DecoderStack

MOST = 12
ABOUT = "how much of an answer's log chance is lost when the feed-forward half writes nothing at the subject"


@torch.inference_mode()
def knowledge(stack: DecoderStack, tokenizer: Tokenizer, relations: Sequence[Relation] = RELATIONS,
              most: int = MOST) -> tuple[Mapping[str, float], list[Column]]:
    """By kind the mean chance of the answers, and the columns `knowledge:KIND`, nats; nan without feed-forward half.

    Kinds of which no answer is one token are left out.
    """
    chances: dict[str, float] = {}
    columns = []
    for relation in relations:
        found = facts(tokenizer, [relation])
        if found:
            prompts = [locate(tokenizer, relation.template, fact.subject) for fact in found]
            answers = [single_token(tokenizer, fact.answer) for fact in found]
            order = Prompts(stack, [p.tokens for p in prompts], answers).chances().argsort(descending=True)[:most]
            known = [prompts[index] for index in order.tolist()]
            chance, lost_L = lost(stack, known, [answers[index] for index in order.tolist()])
            chances[relation.name] = chance
            columns.append(Column(f"knowledge:{relation.name}", tuple(lost_L), "nats", None, ABOUT))
    return chances, columns


@torch.inference_mode()
def lost(stack: DecoderStack, prompts: Sequence[Located], answers: Sequence[int]) -> tuple[float, list[float]]:
    """The mean chance of the answers, and what is lost of its logarithm at every layer."""
    asked = Prompts(stack, [prompt.tokens for prompt in prompts], answers)
    subject_BT = places(prompts)
    clean_B = asked.chances()
    found = []
    for layer, row in enumerate(stack.spec.rows):
        if row.feed_forward is None:
            found.append(float("nan"))
            continue
        asked.advance(layer)
        with stack.edit(layer, "feed_forward", at(subject_BT, torch.zeros_like)):
            changed_B = asked.chances()
        found.append(fmean((clean_B.log() - changed_B.clamp(min=1e-30).log()).tolist()))
    return float(clean_B.mean()), found


def places(prompts: Sequence[Located]) -> Tensor:
    """Where the subject is, bool [B, T], rows filled up on the right."""
    first_B, last_B = (torch.tensor([getattr(prompt, end) for prompt in prompts])[:, None] for end in ("first", "last"))
    place_T = torch.arange(max(len(prompt.tokens) for prompt in prompts))
    return (place_T >= first_B) & (place_T <= last_B)
