"""Whether a sentence counts what was found, each thing once and rightly, and nothing else.

It errs on the safe side: a sentence that it cannot read is refused. It knows English and the detector's classes: a
thing by another word, and without a number, it does not see.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

LONGEST = 300
"""In characters."""
MOST_ADJECTIVES = 2
"""Words between a number and what it counts: `two small white cups`."""


def _listed(names: str) -> list[str]:
    return [" ".join(name.split()) for name in names.split(",")]


CLASSES = _listed("""
    person, bicycle, car, motorbike, aeroplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove,
    skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple,
    sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, sofa, pottedplant, bed, diningtable,
    toilet, tvmonitor, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink,
    refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush
""")
"""What the detector knows, by its own names."""
CALLED = {
    "motorbike": ("motorbike", "motorcycle"),
    "aeroplane": ("aeroplane", "airplane"),
    "sofa": ("sofa", "couch"),
    "pottedplant": ("potted plant", "pottedplant"),
    "diningtable": ("dining table", "diningtable", "table"),
    "tvmonitor": ("TV monitor", "tvmonitor"),
    "cell phone": ("cell phone", "mobile phone"),
}
"""The words for a class, the best first, where its name is not the only one."""
PLURALS = {"person": "people", "sheep": "sheep", "skis": "skis", "scissors": "scissors", "knife": "knives"}
PLURALS |= {"mouse": "mice"}
_HISSES = ("s", "x", "ch", "sh")

UNITS = _listed("""
    zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen, fifteen,
    sixteen, seventeen, eighteen, nineteen
""")
TENS = _listed("twenty, thirty, forty, fifty, sixty, seventy, eighty, ninety")
NUMBERS = {word: i for i, word in enumerate(UNITS)} | {word: 10 * i for i, word in enumerate(TENS, 2)}
ARTICLES = frozenset({"a", "an"})
SCENE = frozenset({"photo", "photograph", "picture", "image", "scene"})
"""Of these there is one, whatever was found."""
UNCERTAIN = frozenset(
    _listed("""
    about, almost, another, approximately, around, both, bunch, cannot, could, couple, double, dozen, dozens,
    each, either, else, except, extra, few, fewer, first, group, half, hundred, hundreds, if, least, less, many,
    maybe, might, missing, more, most, multiple, nearly, neither, never, no, none, nor, not, numerous, once, or,
    other, others, over, pair, pairs, perhaps, possibly, row, second, set, several, single, some, t, than,
    third, thousand, thousands, triple, twice, under, various, without
    """)
)
"""Words that count without a number, or change what a number says; `t` is that of `isn't`."""
BETWEEN = frozenset(
    _listed("""
    and, are, as, at, be, behind, beside, between, but, by, can, for, from, has, have, her, his, in, inside,
    into, is, it, its, near, next, of, on, onto, that, the, their, there, these, this, those, to, was, were,
    which, while, who, with
    """)
)
"""Words that end what a number counts."""
_WORD = re.compile(r"[^\W_]+|[,;:()\u2013\u2014]")
_ODD_NUMBER = re.compile(r"[^\s\d(]\d|\d[^\s\d),.:;!?]")
"""Like 1,000, 2nd, x3 or -4."""


@dataclass(frozen=True, slots=True)
class Mention:
    """A class in a sentence, by its name or in its plural."""

    label: str
    singular: bool
    plural: bool
    words: int


def counts_rightly(sentence: str, counts: Mapping[str, int]) -> bool:
    """Whether the sentence names each class of `counts` once, with its number right before it, and no other.

    Numbers are digits or words, `a` is one, and one has the singular. Up to two adjectives may stand between.
    """
    if len(sentence) > LONGEST or not re.fullmatch(r"[^.!?\n]+[.!?]", sentence) or _ODD_NUMBER.search(sentence):
        return False
    if any(one.isnumeric() and not one.isascii() for one in sentence):
        return False
    words = [word.lower() for word in _WORD.findall(sentence)]
    if UNCERTAIN.intersection(words):
        return False
    said = list(_said(words))
    return None not in said and sorted(said, key=str) == sorted(counts.items(), key=str)


def _said(words: list[str]) -> Iterator[tuple[str, int] | None]:
    """What is counted, as a class and a number; None for what is not readable."""
    at = 0
    while at < len(words):
        number, after = _number(words, at)
        if number is None:
            if _mention(words, at):
                yield None
            at += 1
            continue
        if words[at] in ARTICLES and after < len(words) and words[after] in SCENE:
            at = after + 1
            continue
        mention, end = _counted(words, after)
        if mention:
            fits = mention.singular if number == 1 else mention.plural
            yield (mention.label, number) if fits else None
            at = end
        else:
            yield None
            at = after


def _number(words: list[str], at: int) -> tuple[int | None, int]:
    """The number at a place, and the place after it."""
    word = words[at]
    if word.isascii() and word.isdecimal():
        return int(word), at + 1
    if word in ARTICLES:
        return 1, at + 1
    number = NUMBERS.get(word)
    unit = NUMBERS.get(words[at + 1], 0) if at + 1 < len(words) else 0
    if number and number >= 20 and 0 < unit < 10:  # noqa: PLR2004 (twenty-two)
        return number + unit, at + 2
    return number, at + 1


def _counted(words: list[str], at: int) -> tuple[Mention | None, int]:
    """The class that a number before `at` counts, and the place after it."""
    for place in range(at, min(at + MOST_ADJECTIVES + 1, len(words))):
        if mention := _mention(words, place):
            return mention, place + mention.words
        word = words[place]
        if not word.isalnum() or word in BETWEEN or word.endswith("ing") or _number(words, place)[0] is not None:
            break
    return None, at


def _mention(words: list[str], at: int) -> Mention | None:
    """The class at a place, by the longest of its names: a hot dog is no dog."""
    found = [_FORMS[form] for form in (tuple(words[at : at + n]) for n in (3, 2, 1)) if form in _FORMS]
    return found[0] if found else None


def names_of(label: str) -> tuple[str, ...]:
    """What a class is called, the best name first."""
    return CALLED.get(label, (label,))


def plural(name: str) -> str:
    """The plural of a class's name."""
    if name in PLURALS:
        return PLURALS[name]
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}es" if name.endswith(_HISSES) else f"{name}s"


def _forms() -> dict[tuple[str, ...], Mention]:
    forms: dict[tuple[str, ...], Mention] = {}
    for label in CLASSES:
        for name in names_of(label):
            several = plural(name)
            for form in (name, several, *(["persons"] if label == "person" else [])):
                words = tuple(form.lower().split())
                forms[words] = Mention(label, form == name, form in {several, "persons"}, len(words))
    return forms


_FORMS = _forms()
