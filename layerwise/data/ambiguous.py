"""Words of two senses in sentences that settle which is meant: the answer is known because the sentence was made so.

Each sense has words that name its kind; a model answers with the sense whose kind words are likelier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerwise.data.prompts import is_single_token, single_token
from layerwise.data.text import Tokenizer


@dataclass(frozen=True)
class Sense:
    """Words for the kind of thing, and places or doings that imply it."""

    kinds: tuple[str, ...]
    cues: tuple[str, ...]

    def tokens(self, tokenizer: Tokenizer) -> list[int]:
        """The kind words that are one token."""
        return [single_token(tokenizer, f" {kind}") for kind in self.kinds if is_single_token(tokenizer, f" {kind}")]


@dataclass(frozen=True)
class Ambiguous:
    """One word and its two senses."""

    word: str
    senses: tuple[Sense, Sense]


@dataclass(frozen=True)
class Item:
    """A question about a word in a context: `before` is the part in front of `template`, {} stands for the word.

    `told` is the same question after a sentence that says which sense is meant.
    """

    group: str
    before: str
    template: str
    told: str
    right: Sense
    wrong: Sense

    @property
    def text(self) -> str:
        return self.before + self.template.replace("{}", self.group)


def items(words: Sequence[Ambiguous], before: str = "I am {cue} and I see a {word}. ",
          template: str = "The {} is a kind of", told: str = "This {word} is a kind of {kind}. ") -> list[Item]:
    """One item for every word, sense and cue; both senses of a word have equally many."""
    found = []
    for entry in words:
        for sense, other in (entry.senses, entry.senses[::-1]):
            for cue in sense.cues:
                context = before.format(cue=cue, word=entry.word)
                found.append(Item(entry.word, context, template,
                                  told.format(word=entry.word, kind=sense.kinds[0]), sense, other))
    return found


def _sense(kinds: str, cues: str) -> Sense:
    return Sense(tuple(kinds.split()), tuple(cue.strip() for cue in cues.split(",")))


MUSIC = "at a concert, in a music shop, with a jazz band, in an orchestra, at a rock show"
WILD = "in the forest, in a zoo, on a farm, in the wild, with a biologist"
SEA = "on a fishing boat, by the river, at an aquarium, by the sea, at a lake"
GAME = "at a baseball game, in a sports hall, with the team, in the stadium, at practice"
TOOLS = "in a workshop, on a building site, with a builder, in a garage, with an engineer"
OFFICE = "in an office, at my computer, with a programmer, in a computer shop, at a desk"
KITCHEN = "in the kitchen, at a restaurant, at dinner, with a cook, at a market"
CLOTHES = "in a clothes shop, with a tailor, at a wedding, at a fashion show, in my wardrobe"
STREET = "in the city, with a banker, in a big street, in a business district, with a lawyer"
SKY = "at an observatory, with an astronomer, in a spaceship, at NASA, looking at the night sky"

WORDS: tuple[Ambiguous, ...] = (
    Ambiguous("bass", (_sense("fish animal", SEA), _sense("instrument musical guitar music", MUSIC))),
    Ambiguous("bat", (_sense("animal mammal bird", WILD), _sense("stick club equipment baseball", GAME))),
    Ambiguous("crane", (_sense("bird animal", WILD), _sense("machine equipment vehicle", TOOLS))),
    Ambiguous("mouse", (_sense("animal rodent mammal", WILD), _sense("device computer input", OFFICE))),
    Ambiguous("bank", (_sense("river land shore", SEA), _sense("financial business company money", STREET))),
    Ambiguous("organ", (_sense("body tissue", "at a hospital, with a surgeon, in a clinic, with a doctor, in an "
                        "anatomy class"), _sense("instrument musical music", MUSIC))),
    Ambiguous("date", (_sense("fruit food", KITCHEN), _sense("day time calendar", OFFICE))),
    Ambiguous("horn", (_sense("instrument musical music", MUSIC), _sense("bone animal", WILD))),
    Ambiguous("drill", (_sense("tool machine", TOOLS), _sense("exercise training practice", GAME))),
    Ambiguous("tie", (_sense("clothing cloth garment", CLOTHES), _sense("game score result draw", GAME))),
    Ambiguous("jam", (_sense("food fruit", KITCHEN), _sense("music song", MUSIC))),
    Ambiguous("chip", (_sense("food snack", KITCHEN), _sense("computer device circuit", OFFICE))),
    Ambiguous("star", (_sense("celestial planet object", SKY), _sense("person actor singer", MUSIC))),
    Ambiguous("seal", (_sense("animal mammal", SEA), _sense("stamp mark document", OFFICE))),
    Ambiguous("match", (_sense("game competition sport", GAME), _sense("fire stick light", KITCHEN))),
    Ambiguous("ring", (_sense("jewelry gold", CLOTHES), _sense("sound noise", OFFICE))),
)
