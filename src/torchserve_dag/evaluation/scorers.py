"""Scorers: how good an answer is, 0 to 1, beside what was expected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torchserve_dag.evaluation.answers import at
from torchserve_dag.runtime.data import strict_json

IDENTIFIERS = ("id", "document", "label", "name")
"""By which of its fields an element of a list is known: the first that it has."""


class ScoreError(Exception):
    """Why an answer cannot be scored: a sentence without its full stop."""


class Scorer(Protocol):
    """Scores an answer, as `answers.readable` gives it."""

    def check(self, expected: Any) -> str | None:
        """What is wrong with what a line of the data expects; None if nothing is."""

    def score(self, answer: Any, expected: Any) -> float:
        """0 to 1. Raises ScoreError."""


class Exact:
    """Whether the answer is what was expected: the text, but for white space around it; else the same JSON.

    Of a list of texts, any one.
    """

    def check(self, expected: Any) -> str | None:  # noqa: ARG002
        return None

    def score(self, answer: Any, expected: Any) -> float:
        if isinstance(answer, str):
            return float(answer.strip() in [text.strip() for text in texts_in(expected)])
        return float(same_json(answer, expected))


class Contains:
    """Whether the text has what was expected in it; of a list of texts, any one."""

    def check(self, expected: Any) -> str | None:
        return no_texts(expected)

    def score(self, answer: Any, expected: Any) -> float:
        return float(any(text in text_of(answer) for text in texts_in(expected)))


class Json:
    """Whether the answer is the same JSON as what was expected; a text is read as JSON, and is wrong if it is none."""

    def check(self, expected: Any) -> str | None:  # noqa: ARG002
        return None

    def score(self, answer: Any, expected: Any) -> float:
        if isinstance(answer, str):
            try:
                answer = strict_json.parse(answer)
            except ValueError:
                return 0.0
        return float(same_json(answer, expected))


@dataclass(frozen=True, slots=True)
class Recall:
    """How much of what was expected is among the first elements of the answer, a list; each element counts once.

    1 where nothing was expected: nothing is missed.
    """

    first: int

    def check(self, expected: Any) -> str | None:
        if isinstance(expected, list) and all(_key(one) is not None for one in expected):
            return None
        return "recall: what is expected is no list of ids, documents or labels"

    def score(self, answer: Any, expected: Any) -> float:
        if not isinstance(answer, list):
            raise ScoreError(f"the answer is no list: name a field of it that is one, as in recall@{self.first}:FIELD")
        wanted = Counter(map(_key, expected))
        got = Counter(map(_key, answer[: self.first]))
        return (wanted & got).total() / wanted.total() if wanted else 1.0


@dataclass(frozen=True, slots=True)
class OfField:
    """Another scorer for one field of the answer; and of what is expected, where that has the field too."""

    scorer: Scorer
    field: str

    def check(self, expected: Any) -> str | None:
        try:
            return self.scorer.check(self._expected(expected))
        except ScoreError as error:
            return str(error)

    def score(self, answer: Any, expected: Any) -> float:
        try:
            found = at(answer, self.field)
        except LookupError as error:
            raise ScoreError(f'the answer has no "{error.args[0]}"; {self.field} is to be scored') from None
        return self.scorer.score(found, self._expected(expected))

    def _expected(self, expected: Any) -> Any:
        if not isinstance(expected, Mapping) or self.field.partition(".")[0] not in expected:
            return expected
        try:
            return at(expected, self.field)
        except LookupError as error:
            raise ScoreError(f'what is expected has no "{error.args[0]}"; {self.field} is to be scored') from None


def text_of(answer: Any) -> str:
    """The text that an answer is. Raises ScoreError."""
    if not isinstance(answer, str):
        raise ScoreError("the answer is no text: name a field of it that is one, as in contains:FIELD")
    return answer


def same_json(one: Any, other: Any) -> bool:
    """Whether two are the same data: 1 is 1.0, and not true; the order of keys does not matter."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_json(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other)


def texts_in(expected: Any) -> list[str]:
    return [text for text in (expected if isinstance(expected, list) else [expected]) if isinstance(text, str)]


def no_texts(expected: Any) -> str | None:
    all_of = expected if isinstance(expected, list) else [expected]
    if all_of and all(isinstance(text, str) and text.strip() for text in all_of):
        return None
    return "what is expected is neither a text nor a list of texts, or one is blank"


def _key(element: Any) -> str | int | float | None:
    """What an element of a list is known by; None if by nothing."""
    if isinstance(element, Mapping):
        element = next((element[name] for name in IDENTIFIERS if name in element), None)
    return element if isinstance(element, str | int | float) else None
