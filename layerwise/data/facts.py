"""Simple facts as prompts that a small language model can complete, with other wordings of the same question.

They come with the package, so that tracing and editing need no download. Answers are the usual English names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerwise.data.prompts import is_single_token
from layerwise.data.text import Tokenizer


@dataclass(frozen=True)
class Relation:
    """One kind of fact: how it is asked, in other words too, and the answers by subject."""

    name: str
    template: str
    paraphrases: tuple[str, ...]
    answers: Mapping[str, str]


@dataclass(frozen=True)
class Fact:
    """A subject and its `answer`, which has a leading space."""

    relation: Relation
    subject: str
    answer: str

    @property
    def prompt(self) -> str:
        return self.relation.template.replace("{}", self.subject)


def _pairs(text: str) -> dict[str, str]:
    """`a:b, c:d` as a mapping."""
    return dict(entry.strip().split(":") for entry in text.replace("\n", " ").split(","))


RELATIONS: tuple[Relation, ...] = (
    Relation(
        "capital",
        "The capital of {} is",
        ("The capital city of {} is", "Question: What is the capital of {}? Answer:"),
        _pairs("""France:Paris, Germany:Berlin, Italy:Rome, Spain:Madrid, Portugal:Lisbon, England:London,
        Ireland:Dublin, Austria:Vienna, Greece:Athens, Russia:Moscow, Poland:Warsaw, Hungary:Budapest, Sweden:Stockholm,
        Norway:Oslo, Finland:Helsinki, Denmark:Copenhagen, Belgium:Brussels, Turkey:Ankara, Egypt:Cairo, Iran:Tehran,
        Iraq:Baghdad, Syria:Damascus, Lebanon:Beirut, Japan:Tokyo, China:Beijing, Cuba:Havana, Kenya:Nairobi,
        Thailand:Bangkok, Ukraine:Kiev, Scotland:Edinburgh, Canada:Ottawa, Peru:Lima, Switzerland:Bern,
        Afghanistan:Kabul, Taiwan:Taipei, Texas:Austin, Massachusetts:Boston, Georgia:Atlanta, Colorado:Denver,
        Arizona:Phoenix, Ohio:Columbus, Hawaii:Honolulu"""),
    ),
    Relation(
        "language",
        "The official language of {} is",
        ("The main language spoken in {} is", "The language that people speak in {} is"),
        _pairs("""France:French, Germany:German, Italy:Italian, Spain:Spanish, Portugal:Portuguese, England:English,
        Greece:Greek, Russia:Russian, Poland:Polish, Hungary:Hungarian, Sweden:Swedish, Norway:Norwegian,
        Finland:Finnish, Denmark:Danish, Turkey:Turkish, Egypt:Arabic, Iran:Persian, Israel:Hebrew, Japan:Japanese,
        China:Chinese, Mexico:Spanish, Brazil:Portuguese, Austria:German, Australia:English, Thailand:Thai,
        Vietnam:Vietnamese, Ukraine:Ukrainian, Netherlands:Dutch, Argentina:Spanish, Korea:Korean"""),
    ),
    Relation(
        "continent",
        "{} is a country located on the continent of",
        ("The country of {} is found on the continent of", "The country {} belongs to the continent of"),
        _pairs("""France:Europe, Germany:Europe, Italy:Europe, Spain:Europe, Poland:Europe, Egypt:Africa,
        Kenya:Africa, Nigeria:Africa, Ghana:Africa, Ethiopia:Africa, Morocco:Africa, China:Asia, India:Asia,
        Japan:Asia, Thailand:Asia, Vietnam:Asia, Pakistan:Asia, Nepal:Asia"""),
    ),
    Relation(
        "symbol",
        "The chemical symbol for the element {} is",
        ("The symbol of the chemical element {} is", "In the periodic table, the symbol for {} is"),
        _pairs("""hydrogen:H, carbon:C, nitrogen:N, oxygen:O, sulfur:S, phosphorus:P, potassium:K, sodium:Na,
        calcium:Ca, iron:Fe, copper:Cu, zinc:Zn, silver:Ag, gold:Au, lead:Pb, tin:Sn, helium:He, neon:Ne,
        magnesium:Mg, aluminum:Al, silicon:Si, iodine:I, uranium:U, mercury:Hg, lithium:Li"""),
    ),
    Relation(
        "opposite",
        "The opposite of {} is",
        ("The antonym of {} is", "The word that means the opposite of {} is"),
        _pairs("""hot:cold, big:small, high:low, fast:slow, good:bad, light:dark, hard:soft, happy:sad, rich:poor,
        early:late, strong:weak, old:young, up:down, left:right, open:closed, black:white, love:hate, war:peace,
        true:false, day:night, positive:negative, male:female, internal:external, maximum:minimum, north:south,
        east:west, above:below, before:after, wet:dry, win:lose"""),
    ),
)


def facts(tokenizer: Tokenizer, relations: Sequence[Relation] = RELATIONS) -> list[Fact]:
    """Every fact whose answer is one token for this tokenizer, relation by relation."""
    return [
        Fact(relation, subject, f" {answer}")
        for relation in relations
        for subject, answer in relation.answers.items()
        if is_single_token(tokenizer, f" {answer}")
    ]
