"""Every mistake in a workflow is found before it runs, and named: file, line, what, and what to write instead."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.unit.conftest import Write
from torchserve_dag.runtime.data.source import CheckError, Problem
from torchserve_dag.runtime.graph.graph import Graph
from torchserve_dag.runtime.graph.read import workflow_graph as check
from torchserve_dag.runtime.messages import Skipped, Text
from torchserve_dag.runtime.project.folders import Project

FUNCTIONS = """
    def twice(text: Text) -> Text: return Text(text.text * 2)
    def size(text: Text) -> int: return len(text.text)
    def both(text: Text, count: int = 0) -> Text: return text
    def three(one: Text, two: Text, count: int) -> Text: return one
    def join(texts: list[Text]) -> Text: return texts[0]
    def join_some(texts: list[Text | Skipped]) -> Text: return Text("")
    def split(text: Text) -> list[Text]: return [text]
    def bare(text: Text) -> list: return [text]
    def maybe(text: Text) -> Text | None: return None
    def label(name: str | None) -> Text: return Text(name or "")
    def nothing() -> Text: return Text("")
    def untyped(text, more: int): return text
    def unresolved(text: Txt) -> Text: return text
    def many(*texts: Text) -> Text: return texts[0]
    async def later(text: Text) -> Text: return text
    def flag(text: Text) -> bool: return True
    @dataclass
    class Lost: field: Txt
    def lost(text: Text) -> list[Lost]: return []
    def _hidden(text: Text) -> Text: return text
    not_a_function = 3
"""
FIRST = 5
"""The line of the first node in what `write` writes."""


def checked(path: Path) -> Graph:
    return check(Project(path.parent.parent), path)


def problems(path: Path) -> list[Problem]:
    with pytest.raises(CheckError) as caught:
        checked(path)
    return caught.value.problems


def only(path: Path) -> Problem:
    (problem,) = problems(path)
    return problem


def test_a_workflow_without_a_mistake_becomes_a_graph(write: Write) -> None:
    path = write(
        """
        upper: {handler: upper, batch: 4}
        size: {function: size}
        answer: {function: both, inputs: {text: upper, count: size}}
    """,
        FUNCTIONS.replace("Txt", "Text"),
    )
    graph = checked(path)

    assert list(graph.nodes)[-1] == "answer"
    assert (graph.name, graph.version, graph.path, graph.output.needs) == ("flow", "1.0", path, {"answer"})
    assert (graph.request, graph.answer) == (Text, Text)
    assert {name: node.depth for name, node in graph.nodes.items()} == {"upper": 1, "size": 1, "answer": 2}
    assert graph.nodes["answer"].needs == {"upper", "size"}
    assert (graph.nodes["upper"].code.batch, graph.nodes["size"].code.batch) == (4, 1)


STAGES = """from __future__ import annotations
import dataclasses, json
from torchserve_dag import Handler
@dataclasses.dataclass
class B:
    {}
class A(Handler[str, str, str, str]):
    def preprocess(self, item: str) -> str: return item
    def postprocess(self, output: str, item: str) -> {}: return output
"""
ONE_OF = "it has exactly one of handler, function, workflow, served, torchserve"


@pytest.mark.parametrize(
    ("nodes", "line", "what", "help_"),
    [
        ("answer: {handler: uper}", 5, 'answer: there is no handler "uper"', 'did you mean "upper"?'),
        ('answer: {handler: ""}', 5, 'answer: there is no handler ""', "known: upper, words"),
        ("answer: {handler: upper/2.0}", 5, 'answer: there is no handler "upper/2.0"', 'did you mean "upper"?'),
        ("answer: {function: twise}", 5, 'flow.py has no function "twise"', 'did you mean "twice"?'),
        ("answer: {function: not_a_function}", 5, 'has no function "not_a_function"', "known: "),
        ("answer: {function: untyped}", 5, "untyped does not say the type of text, return", "annotate it"),
        ("answer: {function: unresolved}", 5, "name 'Txt' is not defined", ""),
        ("answer: {function: later}", 5, "later is a coroutine", "write def, without async"),
        ("answer: {function: many}", 5, "many's parameter texts cannot be given by its name", ""),
        ("answer: {function: nothing}", 5, "nothing takes nothing", "give it a parameter"),
        ("answer: {handler: upper, input: uper}", 5, 'there is no node "uper"', "known: answer"),
        ("answer: {handler: upper, input: requst}", 5, 'there is no node "requst"', 'did you mean "request"?'),
        ("answer: {handler: upper, batsh: 3}", 5, 'nodes.answer: unknown key "batsh"', 'did you mean "batch"?'),
        ("answer: {handler: upper, on: 3}", 5, 'nodes.answer: unknown key "True"', "known: "),
        ("answer: {handler: upper, function: twice}", 5, ONE_OF, ""),
        ("answer: {input: request}", 5, ONE_OF, ""),
        ("answer: {function: twice, input: request, inputs: {text: request}}", 5, "input or inputs, not both", ""),
        ("answer: {handler: upper, inputs: {item: request}}", 5, "upper takes one input", ""),
        ("answer: {function: twice, batch: 2}", 5, "batch and device are for models", ""),
        ("answer: {handler: upper, batch: 0}", 5, "batch is at least 1", ""),
        ("answer: {handler: upper, device: gpu}", 5, '"gpu" is not a device; write auto, cpu or cuda:N', ""),
        ("answer: {function: lost}", 5, "the annotations of lost: the fields of Lost: name 'Txt' is not defined", ""),
        ("answer: {torchserve: {archive: ../other.mar}}", 5, "../other.mar is not below the project's root", "copy it"),
        ("answer: {handler: upper, batch: many}", 5, "expected a whole number, not 'many'", ""),
        ("answer: {function: both, inputs: {txt: request}}", 5, 'both has no parameter "txt"', 'did you mean "text"?'),
        ("answer: {function: three, inputs: {one: request, two: request}}", 5, 'the parameter "count" of three gets nothing', ""),
        ("answer: {function: three}", 5, "three takes one, two, count", "say what each gets, under inputs"),
        ("answer: {handler: upper, input: item}", 5, '"item" reads item, and there is no item here', "a node with each has one"),
        ("answer: {handler: upper, each: item.words}", 5, "there is no item here", "a node with each has one"),
        ("answer: {handler: upper, when: request.txt == 1}", 5, 'Text (the type of "request") has no "txt"', 'did you mean "text"?'),
        ("answer: {handler: upper, when: request.__class__ == 1}", 5, 'has no "__class__"', ""),
        ("answer: {handler: upper, when: request.text}", 5, '"request.text" is str, where true or false is meant', ""),
        ("answer: {handler: upper, when: request.text and}", 5, "is not an expression", "write paths"),
        ("answer: {handler: upper, when: open('x')}", 5, "the only function here is len", "do more in a function node"),
        ("answer: {handler: upper, input: answer}", 5, "these nodes wait for each other: answer -> answer", ""),
    ],
)  # fmt: skip
def test_a_mistake_in_one_node(write: Write, nodes: str, line: int, what: str, help_: str) -> None:
    path = write(nodes, FUNCTIONS)

    found = [p for p in problems(path) if what in p.what]

    assert [(p.file, p.line) for p in found] == [(str(path), line)]
    assert help_ in found[0].help


@pytest.mark.parametrize(
    ("nodes", "line", "what", "help_"),
    [
        (
            "size: {function: size}\nanswer: {handler: upper, input: size}",
            6,
            'answer: takes Text, and "size" is int',
            "",
        ),
        (
            "split: {handler: words}\nanswer: {handler: upper, each: split}",
            6,
            'answer: "split" is Words, where a list is meant',
            "",
        ),
        (
            "bare: {function: bare}\nanswer: {handler: upper, each: bare}",
            6,
            'answer: "bare" is list, where a list is meant',
            "say what is in it, like list[str]",
        ),
        (
            "split: {handler: words}\nanswer: {handler: upper, each: split.words}",
            6,
            'takes Text, and "item" is Word',
            "",
        ),
        (
            "maybe: {function: maybe}\nanswer: {handler: upper, input: maybe}",
            6,
            'takes Text, and "maybe" is Text | nothing',
            "",
        ),
        (
            ('split: {function: split}\nsome: {handler: upper, each: split, when: item.text != ""}\n'
            "answer: {function: join, input: some}"),
            7,
            'takes list[Text], and "some" is list[Text | Skipped]',
            "its items may be skipped: take list[... | Skipped]",
        ),
        ("split: {function: split}\nanswer: {handler: upper, input: split}", 6, 'takes Text, and "split" is list[Text]', ""),
        (
            ("one: {handler: upper, input: two}\ntwo: {handler: upper, input: three}\nthree: {handler: upper, input: one}\n"
            "answer: {function: both, inputs: {text: three}}"),
            5,
            "these nodes wait for each other: ",
            "",
        ),
        ("alone: {handler: upper}\nanswer: {handler: upper}", 5, 'alone: nothing reads it on the way to the output, "answer"', "read it, or remove it"),
        (
            "name: {function: label, input: parameters.name}\nanswer: {handler: upper, input: name}",
            4,
            "no node reads the request",
            "begin with input: request",
        ),
        (
            "one: {function: twice}\nname: {function: label, input: request}\nanswer: {function: three, inputs: {one: one, two: name, count: len(one.text)}}",
            6,
            "name: takes the request as str | nothing, and one as Text",
            "",
        ),
    ],
)  # fmt: skip
def test_a_mistake_between_nodes(write: Write, nodes: str, line: int, what: str, help_: str) -> None:
    path = write(nodes, FUNCTIONS.replace("Txt", "Text"))

    problem = only(path)

    assert what in problem.what
    assert (problem.file, problem.line) == (str(path), line)
    assert problem.help == help_


def test_a_list_that_may_be_skipped_as_a_whole_may_still_be_taken(write: Write) -> None:
    """What takes it is then skipped too, as any node whose input is."""
    path = write(
        """
        split: {handler: words, when: request.text != ""}
        word: {function: size_of, each: split.words}
        answer: {function: total, input: word}
    """,
        """
        def size_of(word: object) -> int: return word.size
        def total(sizes: list[int]) -> int: return sum(sizes)
    """,
    )
    graph = checked(path)

    assert graph.nodes["word"].result == list[int] | Skipped
    assert graph.answer == int | Skipped


def test_an_item_of_unknown_type_is_not_said_to_be_skipped(write: Write) -> None:
    path = write(
        """
        loose: {function: loose}
        size: {function: size_of, each: loose}
        answer: {function: total, input: size}
    """,
        """
        from typing import Any
        def loose(text: Text) -> list[Any]: return [text]
        def size_of(word: object) -> int: return 1
        def total(sizes: list[int]) -> int: return sum(sizes)
    """,
    )

    assert checked(path).nodes["size"].result == list[int]


def test_a_node_that_reads_only_parameters_waits_for_the_request(write: Write) -> None:
    path = write(
        """
        name: {function: label, input: parameters.name}
        upper: {handler: upper}
        answer: {function: three, inputs: {one: name, two: upper, count: len(name.text)}}
    """,
        FUNCTIONS.replace("Txt", "Text"),
    )

    assert checked(path).nodes["name"].needs == {"request"}


@pytest.mark.parametrize(
    ("changed", "to", "line", "what"),
    [
        ('version: "1.0"', 'version: "v1"', 2, '"v1" is not a version; write numbers with dots, like "1.0"'),
        ('version: "1.0"', "version: 1.0", 2, "version: 1.0 is a number where text is meant"),
        ('version: "1.0"\n', "", 1, '"version" is missing'),
        ("name: flow", "name: Flow", 1, '"Flow" is not a name; write lower-case letters'),
        ("does: A test.", 'does: " "', 3, '"does" is empty; say what the workflow is for'),
        ("output: answer", "output: anser", 6, 'output: there is no node "anser"'),
        ("  answer:", "  request:", 5, 'a node cannot be called "request"'),
        ("  answer:", "  item:", 5, 'a node cannot be called "item"'),
        ("  answer:", "  parameters:", 5, 'a node cannot be called "parameters"'),
        ("  answer:", "  len:", 5, 'a node cannot be called "len"'),
        ("  answer:", "  class:", 5, 'a node cannot be called "class"'),
        ("  answer:", "  two-words:", 5, 'a node cannot be called "two-words"'),
        ("  answer:", "  on:", 5, "nodes: the key True is not text"),
        ("  answer:", "  1:", 5, "nodes: the key 1 is not text"),
        ("  answer: {handler: upper}", "", 4, "nodes: expected a mapping, not None"),
        ("  answer: {handler: upper}", "  {}", 4, "there are no nodes"),
        ("output: answer", "output: answer\nserve: {timeout: 3}", 7, 'serve: unknown key "timeout"'),
        ("output: answer", "output: answer\nserve: {timeout_s: 0}", 7, "timeout_s is at least 1"),
    ],
)  # fmt: skip
def test_a_mistake_about_the_whole(write: Write, changed: str, to: str, line: int, what: str) -> None:
    path = write("answer: {handler: upper}")
    text = path.read_text()
    assert changed in text
    path.write_text(text.replace(changed, to))

    found = [p for p in problems(path) if what in p.what]

    assert [(p.file, p.line) for p in found] == [(str(path), line)]


def test_problems_of_several_nodes_are_reported_together(write: Write) -> None:
    path = write(
        """
        one: {handler: uper}
        two: {function: twise}
        three: {function: both, inputs: {txt: one}}
        answer: {function: untyped}
    """,
        FUNCTIONS,
    )

    found = problems(path)

    assert {(p.line, p.what.partition(":")[0]) for p in found} == {(5, "one"), (6, "two"), (7, "three"), (8, "answer")}


def test_expressions_of_several_nodes_are_reported_together(write: Write) -> None:
    path = write("one: {handler: upper, input: nobody}\nanswer: {handler: upper, when: nowhere and, input: on.e}")

    assert [p.line for p in problems(path)] == [5, 6, 6]


def test_functions_with_a_syntax_error_are_named_by_their_own_line(write: Write) -> None:
    path = write("answer: {function: broken}\ntwo: {function: broken}")
    code = path.with_suffix(".py")
    code.write_text("x = 1\n\ndef broken(:\n    pass\n")

    problem = only(path)

    assert (problem.file, problem.line) == (str(code), 3)
    assert problem.what.startswith("not valid Python: ")


def test_functions_that_raise_when_they_are_imported_are_named_by_their_own_line(write: Write) -> None:
    path = write("answer: {function: twice}", "\n\nimport no_such_package\n")
    code = path.with_suffix(".py")

    problem = only(path)

    assert (problem.file, problem.line) == (
        str(code),
        1 + code.read_text()[: code.read_text().index("import no_such")].count("\n"),
    )
    assert "no_such_package" in problem.what


def test_a_relative_path_gives_the_same_line(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("answer: {function: twice}", "\n\nraise KeyError('x')\n")
    monkeypatch.chdir(path.parent.parent)

    with pytest.raises(CheckError) as caught:
        check(Project(Path()), Path("workflows/flow.yaml"))

    assert (
        caught.value.problems[0].line
        == path.with_suffix(".py").read_text().splitlines().index("raise KeyError('x')") + 1
    )


def test_a_missing_file_of_functions_is_named(write: Write) -> None:
    path = write("answer: {function: twice}")
    path.with_suffix(".py").unlink()

    problem = only(path)

    assert "there is no" in problem.what
    assert problem.help == "write the function twice there"


def handler_problem(project: Path, code: str | None = None, card: str | None = None) -> Problem:
    (project / "workflows" / "one.yaml").write_text(
        'name: one\nversion: "1.0"\ndoes: A test.\nnodes:\n  answer: {handler: upper}\noutput: answer\n'
    )
    if code is not None:
        (project / "handlers" / "upper.py").write_text(textwrap.dedent(code))
    if card is not None:
        file = project / "handlers" / "upper.yaml"
        file.write_text(file.read_text() + card)
    return only(project / "workflows" / "one.yaml")


@pytest.mark.parametrize(
    ("code", "line", "what"),
    [
        ("def (:\n", 1, "not valid Python"),
        ("x = 1\nimport no_such_package\n", 2, 'there is no module "no_such_package"'),
        ("x = 1\n", 1, "0 subclasses of Handler or ContinuousHandler, where one is meant"),
        (
            "from torchserve_dag import Handler\nclass A(Handler): pass\nclass B(Handler): pass\n",
            1,
            "2 subclasses of Handler or ContinuousHandler, where one is meant",
        ),
        ("from torchserve_dag import Handler\nclass A(Handler): pass\n", 1, "A.preprocess does not say"),
        (STAGES.format("pass", "json.Nope"), 1, "the annotations of A: module 'json' has no attribute 'Nope'"),
        (STAGES.format("x: Txt", "B"), 1, "the fields of B: name 'Txt' is not defined"),
    ],
)
def test_a_handler_that_is_not_fit_to_serve_is_named(project: Path, code: str, line: int, what: str) -> None:
    problem = handler_problem(project, code)

    assert (problem.file, problem.line) == (str(project / "handlers" / "upper.py"), line)
    assert what in problem.what


def test_an_unknown_setting_of_a_handler_is_named_in_its_own_file(project: Path) -> None:
    problem = handler_problem(project, card="settings:\n  threshold: 0.5\n")

    assert problem.file == str(project / "handlers" / "upper.yaml")
    assert problem.line == len((project / "handlers" / "upper.yaml").read_text().splitlines())
    assert problem.what == 'settings: unknown key "threshold"'


def test_a_syntax_error_in_what_a_handler_imports_is_named_where_it_is(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = project / "other_with_an_error.py"
    other.write_text("x = 1\ny = = 2\n")
    monkeypatch.syspath_prepend(str(project))

    problem = handler_problem(project, "import other_with_an_error\n")

    assert (problem.file, problem.line) == (str(other), 2)
