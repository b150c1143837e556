"""Expressions: what they may say, what they mean, and that nothing else ever runs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from torchserve_dag.runtime.graph.expression import Expression, ExpressionError, compile_expression, names_in
from torchserve_dag.runtime.messages import Box, DetectedObject, Label, Labels, Objects, Skipped, Text

SCOPE: dict[str, Any] = {
    "request": Text,
    "parameters": dict[str, str],
    "item": DetectedObject,
    "detect": Objects,
    "labels": Labels,
    "maybe": Objects | Skipped,
    "flag": bool,
    "any": Any,
}
ITEM = DetectedObject("cat", 0.5, Box(1, 2, 3, 4))
VALUES: dict[str, Any] = {
    "request": Text("hello"),
    "parameters": {"by": "me"},
    "item": ITEM,
    "detect": Objects(10, 20, [ITEM, ITEM]),
    "labels": Labels([Label("tabby", 0.9)]),
    "maybe": Skipped("maybe"),
    "flag": True,
    "any": 1,
}


def value(text: str) -> Any:
    return compile_expression(text, SCOPE).evaluate(VALUES)


def error(text: str) -> ExpressionError:
    with pytest.raises(ExpressionError) as caught:
        compile_expression(text, SCOPE)
    return caught.value


@pytest.mark.parametrize(
    ("text", "kind", "result"),
    [
        ("request", Text, VALUES["request"]),
        ("detect.objects", list[DetectedObject], [ITEM, ITEM]),
        ("item.box.left", float, 1),
        ("labels.best.name", str, "tabby"),
        ("parameters.by", str | None, "me"),
        ("parameters.nobody", str | None, None),
        ("parameters.items", str | None, None),
        ("parameters", dict[str, str], {"by": "me"}),
        ("len(detect.objects)", int, 2),
        ("len(request.text)", int, 5),
        ("item.score >= 0.3", bool, True),
        ("item.score < -1", bool, False),
        ("detect.width != detect.height", bool, True),
        ('item.label == "cat"', bool, True),
        ('"b" > item.label', bool, False),
        ('parameters.by == "me"', bool, True),
        ("not flag", bool, False),
        ("flag and item.score > 0.9", bool, False),
        ("flag or item.score > 0.9", bool, True),
        ("not (item.score > 1 or len(detect.objects) == 0)", bool, True),
        ("  item.score\t> 0 ", bool, True),
        ("'a text'", str, "a text"),
        ("0.5", float, 0.5),
        ("True", bool, True),
    ],
)
def test_what_an_expression_means_and_its_type(text: str, kind: Any, result: Any) -> None:
    expression = compile_expression(text, SCOPE)

    assert expression.type == kind
    assert expression.evaluate(VALUES) == result


def test_an_expression_names_what_it_reads() -> None:
    assert names_in("len(detect.objects) > 0 and item.score > 1") == {"detect", "item"}
    assert compile_expression("flag", SCOPE).names == {"flag"}


@pytest.mark.parametrize(
    ("text", "what", "help_"),
    [
        ("detekt.objects", 'nothing here is called "detekt"', 'did you mean "detect"?'),
        ("item.scor > 1", 'DetectedObject (the type of "item") has no "scor"', 'did you mean "score"?'),
        ("item.box.score", 'Box (the type of "item.box") has no "score"', "known: bottom, left, right, top"),
        ("request.text.upper", 'str (the type of "request.text") has no "upper"', ""),
        ('item.score > "high"', "compares float with str", ""),
        ("item < item", "compares DetectedObject with DetectedObject", ""),
        ("parameters.by > 3", "compares str | nothing with int", ""),
        ("flag == 'yes'", "compares bool with str", ""),
        ("0 < item.score < 1", "write one comparison", "join two with and"),
        ("item.label in detect.objects", "write one comparison", "join two with and"),
        ("flag is True", "write one comparison", "join two with and"),
        ("item.score and flag", '"item.score" is float, where true or false is meant', ""),
        ("not request", '"request" is Text, where true or false is meant', ""),
        ("-item.label", "minus needs a number, not str", ""),
        ("len(item)", "DetectedObject has no length", ""),
        ("len(item.score)", "float has no length", ""),
        ("item.score >", "is not an expression", "write paths"),
        ("", "is not an expression", "write paths"),
        ("None", '"None" is not part of an expression', "write paths"),
    ],
)
def test_a_mistake_is_named_and_mended(text: str, what: str, help_: str) -> None:
    found = error(text)

    assert what in found.what
    assert help_ in found.help


@pytest.mark.parametrize(
    "text",
    [
        "open('/etc/passwd')",
        "__import__('os')",
        "item.__class__",
        "item.__class__.__mro__",
        "request.text.__len__",
        "parameters.__class__.x",
        "detect.objects[0]",
        "request.text[0]",
        "lambda: 1",
        "(lambda x: x)(1)",
        "[x for x in detect.objects]",
        "{x for x in detect.objects}",
        "len(x for x in detect.objects)",
        "(item := 1)",
        "f'{item}'",
        "f'{item!r:>{detect.width}}'",
        "item if flag else detect",
        "[1, 2]",
        "(1, 2)",
        "{'a': 1}",
        "*item",
        "await item",
        "1 + 1",
        "2 ** 99999999",
        "'a' * 99999999999",
        "1 << 999999999",
        "~1",
        "+1",
        "b'bytes'",
        "1j",
        "...",
        "len",
        "len()",
        "len(item, item)",
        "len(obj=detect.objects)",
        "len(*detect.objects)",
        "item.box.crop()",
        "print(1)",
        "import os",
        "x = 1",
        "flag; flag",
        "flag\nflag",
        "eval('1')",
        "\x00",
        "item.score\\",
        "(" * 50 + "flag" + ")" * 49,
    ],
)
def test_nothing_but_the_language_is_taken(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        error(text)


def test_a_parameter_with_a_dunder_name_is_only_a_name() -> None:
    assert value("parameters.__class__") is None


@pytest.mark.parametrize(
    "text",
    [
        "not " * 5_000 + "flag",
        "-" * 5_000 + "1",
        "(" * 5_000 + "flag" + ")" * 5_000,
        "item" + ".box" * 5_000,
        "len(" * 5_000 + "item" + ")" * 5_000,
        "flag == " * 5_000 + "flag",
        "~" * 400 + "1",
        "1 + " * 5_000 + "1",
        "0x" + "f" * 10_000 + " + 1",
        "9" * 10_000,
    ],
)
def test_what_is_nested_too_deeply_or_too_long_is_refused(text: str) -> None:
    found = error(text)

    assert len(found.what) < 500
    with pytest.raises(ExpressionError):
        names_in(text)


def test_and_and_or_stop_at_the_first_part_that_decides() -> None:
    """`flag and len(any) > 1` must not look at what flag guards."""
    scope = {"flag": bool, "guarded": list[int]}
    both = compile_expression("flag and len(guarded) > 0", scope)
    either = compile_expression("flag or len(guarded) > 0", scope)

    assert both.evaluate({"flag": False}) is False
    assert either.evaluate({"flag": True}) is True
    with pytest.raises(KeyError):
        both.evaluate({"flag": True})


def test_a_path_through_what_was_skipped_is_skipped() -> None:
    expression = compile_expression("maybe.objects", SCOPE)

    assert expression.type == list[DetectedObject] | Skipped
    assert expression.evaluate(VALUES) == Skipped("maybe")
    assert expression.evaluate({"maybe": VALUES["detect"]}) == [ITEM, ITEM]


def test_what_may_be_skipped_is_not_compared() -> None:
    assert "int | Skipped" in error("maybe.width > 3").what


@dataclass(frozen=True)
class Plain:
    size: int

    @property
    def untyped(self):
        return self.size

    def method(self) -> int:
        return self.size


def test_methods_are_not_attributes_and_untyped_properties_are_anything() -> None:
    assert compile_expression("own.untyped", {"own": Plain}).type is Any
    with pytest.raises(ExpressionError, match='has no "method"'):
        compile_expression("own.method", {"own": Plain})


words = st.sampled_from(
    [
        *SCOPE,
        *[
            ".objects",
            ".score",
            ".box",
            ".text",
            ".__class__",
            "len",
            "(",
            ")",
            "[",
            "]",
            "{",
            "}",
            "and",
            "or",
            "not",
            "if",
            "else",
            "<",
            ">=",
            "==",
            "!=",
            "=",
            ":=",
            "-",
            "+",
            "*",
            "**",
            ",",
            ":",
        ],
        *[
            "lambda",
            "f'{",
            "}'",
            "'",
            '"',
            "#",
            "\\",
            "0",
            "1.5",
            "0x1",
            "1_0",
            "True",
            "None",
            "...",
            "@",
            "~",
            "await",
            "yield",
            "for",
            "in",
            "is",
            "é",
        ],
        "\n",
        "\x00",
        "\ud800",
    ]
)


@given(st.text(max_size=30) | st.lists(words, max_size=12).map(" ".join) | st.lists(words, max_size=12).map("".join))
@example("'\\N{x}'")
@example("1if flag else 2")
def test_any_text_is_an_expression_or_refused(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            found: Any = compile_expression(text, SCOPE)
            found.evaluate({**VALUES, "any": 1, "maybe": VALUES["detect"]})
        except ExpressionError as error:
            found = error

    assert found.names <= SCOPE.keys() if isinstance(found, Expression) else found.what
