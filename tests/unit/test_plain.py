"""Plain data becomes typed values, and everything that is wrong in it is named with its path."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.data.plain import Wrong, WrongDataError, build, flatten


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Leaf:
    name: str
    size: float = 1.0


@dataclass(frozen=True)
class Other:
    number: int


@dataclass(frozen=True)
class Tree:
    leaf: Leaf
    leaves: list[Leaf] = field(default_factory=list)
    named: dict[str, Leaf] = field(default_factory=dict)
    either: Leaf | Other | None = None
    mode: Literal["fast", "slow"] = "fast"
    colour: Colour = Colour.RED
    pair: tuple[int, str] = (0, "")
    numbers: tuple[int, ...] = ()
    anything: Any = None


@dataclass(frozen=True)
class Even:
    number: int

    def __post_init__(self) -> None:
        if self.number % 2:
            raise ValueError(f"{self.number} is odd")


def wrongs(kind: Any, data: Any) -> list[Wrong]:
    with pytest.raises(WrongDataError) as caught:
        build(kind, data)
    return caught.value.wrongs


def test_nested_data_becomes_nested_dataclasses() -> None:
    data = {"leaf": {"name": "a"}, "leaves": [{"name": "b", "size": 2}], "named": {"x": {"name": "c"}}}

    tree = build(Tree, data)

    assert tree == Tree(Leaf("a"), [Leaf("b", 2.0)], {"x": Leaf("c")})
    assert isinstance(tree.leaves[0].size, float)


def test_every_mistake_is_reported_with_its_path() -> None:
    data = {"leaf": {"size": "big"}, "leaves": [{"name": "a"}, {"nam": "b"}], "named": {"x": {"name": None}}}

    found = wrongs(Tree, data)

    assert [(plain.dotted(w.path), w.what) for w in found] == [
        ("leaf.size", "expected a number, not 'big'"),
        ("leaf", '"name" is missing'),
        ("leaves[1].nam", 'unknown key "nam"'),
        ("leaves[1]", '"name" is missing'),
        ("named.x.name", "expected text, not None"),
    ]


def test_a_misspelt_key_is_answered_with_the_right_one() -> None:
    (wrong,) = wrongs(Leaf, {"name": "a", "sise": 1.0})

    assert (wrong.what, wrong.help, wrong.at_key) == ('unknown key "sise"', 'did you mean "size"?', True)


def test_a_key_like_no_other_is_answered_with_all_of_them() -> None:
    (wrong,) = wrongs(Leaf, {"name": "a", "q": 1.0})

    assert wrong.help == "known: name, size"


def test_a_number_where_text_is_meant_is_told_to_be_quoted() -> None:
    (wrong,) = wrongs(Leaf, {"name": 1.0})

    assert wrong == Wrong(("name",), "1.0 is a number where text is meant", "put it in quotes")


def test_true_is_neither_a_number_nor_text() -> None:
    assert [w.what for w in wrongs(Leaf, {"name": True, "size": False})] == [
        "expected text, not True",
        "expected a number, not False",
    ]


def test_a_union_takes_the_option_that_fits() -> None:
    base = {"leaf": {"name": "a"}}

    assert build(Tree, {**base, "either": {"name": "b"}}).either == Leaf("b")
    assert build(Tree, {**base, "either": {"number": 1}}).either == Other(1)
    assert build(Tree, {**base, "either": None}).either is None


def test_data_that_fits_no_option_of_a_union_is_named() -> None:
    (wrong,) = wrongs(Tree, {"leaf": {"name": "a"}, "either": "neither"})

    assert (wrong.path, wrong.what) == (("either",), "expected Leaf | Other | nothing, not 'neither'")


def test_a_mistake_inside_the_only_option_is_named_there() -> None:
    (wrong,) = wrongs(Leaf | None, {"name": []})

    assert (wrong.path, wrong.what) == (("name",), "expected text, not list")


def test_a_choice_is_one_of_those_that_are_named() -> None:
    (wrong,) = wrongs(Tree, {"leaf": {"name": "a"}, "mode": "medium"})

    assert wrong.what == "expected 'fast' or 'slow', not 'medium'"


def test_an_enum_is_read_by_its_value() -> None:
    assert build(Colour, "blue") is Colour.BLUE
    assert [w.what for w in wrongs(Colour, "green")] == ["expected Colour ('red', 'blue'), not 'green'"]


def test_a_tuple_is_read_from_a_list() -> None:
    assert build(tuple[int, str], [1, "a"]) == (1, "a")
    assert build(tuple[int, ...], [1, 2, 3]) == (1, 2, 3)
    assert [w.what for w in wrongs(tuple[int, str], [1])] == ["expected 2 items, not 1"]
    assert [plain.dotted(w.path) for w in wrongs(tuple[int, ...], [1, "b"])] == ["[1]"]


def test_the_keys_of_a_mapping_are_checked_too() -> None:
    """YAML reads `on:` as the key True, and `1:` as a number."""
    (wrong,) = wrongs(dict[str, int], {True: 1})

    assert (wrong.path, wrong.what, wrong.at_key) == ((True,), "the key True is not text", True)
    assert wrong.help == "put it in quotes"


def test_a_dataclass_that_refuses_its_own_values_is_named() -> None:
    (wrong,) = wrongs(list[Even], [{"number": 2}, {"number": 3}])

    assert (wrong.path, wrong.what) == ((1,), "3 is odd")


def test_a_whole_number_too_large_for_a_float_is_refused() -> None:
    assert [w.path for w in wrongs(Leaf, {"name": "a", "size": 10**400})] == [("size",)]


def test_long_data_is_shortened_in_the_message() -> None:
    (wrong,) = wrongs(int, "x" * 1000)

    assert len(wrong.what) < 120


def test_types_are_named_as_a_person_writes_them() -> None:
    assert plain.name_of(list[Leaf | None]) == "list[Leaf | nothing]"
    assert plain.name_of(dict[str, Any]) == "dict[str, anything]"
    assert plain.name_of(tuple[int, ...]) == "tuple[int, ...]"
    assert plain.name_of(Literal["a", "b"]) == "'a' or 'b'"


names = st.text(max_size=5)
integers = st.integers(-(2**63), 2**63 - 1)
leaves = st.builds(Leaf, names, st.floats(allow_nan=False))
trees = st.builds(
    Tree,
    leaves,
    st.lists(leaves, max_size=3),
    st.dictionaries(names, leaves, max_size=3),
    st.one_of(st.none(), leaves, st.builds(Other, integers)),
    st.sampled_from(["fast", "slow"]),
    st.sampled_from(Colour),
    st.tuples(integers, names),
    st.lists(integers, max_size=3).map(tuple),
    st.one_of(st.none(), integers, names),
)


@given(trees)
def test_what_is_flattened_is_built_again(tree: Tree) -> None:
    assert build(Tree, flatten(tree)) == tree


scalars = st.none() | st.booleans() | st.integers() | st.floats() | names
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(names | st.integers() | st.booleans(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(anything | st.dictionaries(st.sampled_from([*plain.field_types(Tree)]), anything, max_size=6))
def test_any_data_is_built_or_refused_and_nothing_else(data: Any) -> None:
    try:
        found: Any = build(Tree, data)
    except WrongDataError as error:
        found = error.wrongs[0]

    assert isinstance(found, Tree | Wrong)
