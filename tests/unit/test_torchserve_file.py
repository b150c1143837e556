"""TorchServe's own workflow files run as they are, by TorchServe's rules."""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.unit.conftest import Mar
from torchserve_dag.engine.torchserve_file import check_torchserve_file
from torchserve_dag.engine.workflow import Workflow
from torchserve_dag.messages import Failure
from torchserve_dag.project import Project
from torchserve_dag.source import CheckError, Problem

Put = Callable[..., Path]

# A handler that shows what it was given: the keys of its row, and the types and texts of their values.
SHOW = """
    import json
    class Show:
        def initialize(self, context):
            self.name = context.model_name
        def handle(self, data, context):
            return [
                {"node": self.name, **{key: bytes(value).decode() for key, value in row.items()}}
                for row in data
            ]
"""
FUNCTIONS = """
    import json
    def pre_processing(data, context):
        if data is None:
            return None
        return [row.get("data") or row.get("body") for row in data]

    def upper(data, context):
        return data and [bytes(row["body"]).decode().upper() for row in data]

    def aggregate_func(data, context):
        return data and [{name: json.loads(value) for name, value in sorted(row.items())} for row in data]

    def postprocessing(data, context):
        return data and [{"seen": json.loads(row["body"])} for row in data]
"""


@pytest.fixture
def put(project: Path) -> Put:
    """Writes `workflows/NAME.yaml` and its functions; gives the path."""

    def write(text: str, functions: str = FUNCTIONS, name: str = "flow", code: str = "flow_handler") -> Path:
        (project / "workflows" / f"{name}.yaml").write_text(textwrap.dedent(text))
        if functions:
            (project / "workflows" / f"{code}.py").write_text(textwrap.dedent(functions))
        return project / "workflows" / f"{name}.yaml"

    return write


def problems(path: Path) -> list[Problem]:
    with pytest.raises(CheckError) as caught:
        check_torchserve_file(Project(path.parent.parent), path)
    assert {p.file for p in caught.value.problems} == {str(path)}
    return caught.value.problems


# The two kinds of file that TorchServe's documentation and examples have.

SEQUENCE = """
    models:
        #global model params
        min-workers: 1
        max-workers: 4
        batch-size: 3
        max-batch-delay : 5000
        retry-attempts : 3
        timeout-ms : 5000
        m1:
           url : m1.mar #local or public URI
           min-workers: 1   #override the global params
           max-workers: 2
           batch-size: 4

        m2:
           url : m2.mar

    dag:
      pre_processing : [m1]
      m1 : [m2]
      m2 : [postprocessing]
"""

JOIN = """
    models:
        min-workers: 1
        max-workers: 1
        batch-size: 4
        max-batch-delay: 100
        retry-attempts: 5
        timeout-ms: 300000

        nmt-en-de:
          url: nmt-en-de.mar

        nmt-en-fr:
          url: nmt-en-fr.mar

    dag:
      pre_processing: [nmt-en-de, nmt-en-fr]
      nmt-en-de: [aggregate_func]
      nmt-en-fr: [aggregate_func]
"""


def test_the_sequence_of_the_documentation_is_read_with_its_settings(put: Put, mar: Mar) -> None:
    for name in ("m1", "m2"):
        mar(name, SHOW)
    path = put(SEQUENCE)

    graph = check_torchserve_file(Project(path.parent.parent), path)

    assert list(graph.nodes) == ["pre_processing", "m1", "m2", "postprocessing"]
    assert (graph.name, graph.output, graph.serve.timeout_s) == ("flow", "postprocessing", 20)
    assert {name: node.batch for name, node in graph.nodes.items()} == {
        "pre_processing": 1,
        "m1": 4,
        "m2": 3,
        "postprocessing": 1,
    }
    assert {node.rows.retries for node in graph.nodes.values() if node.rows} == {3}
    assert [node.depth for node in graph.nodes.values()] == [1, 2, 3, 4]


def test_a_node_with_one_parent_gets_its_answer_as_body(put: Put, mar: Mar) -> None:
    for name in ("m1", "m2"):
        mar(name, SHOW)
    with Workflow.load(put(SEQUENCE)) as workflow:
        (answer,) = workflow([b"hello"])

    first = json.dumps({"node": "m1", "body": "hello"}, indent=2)
    assert json.loads(answer) == {"seen": {"node": "m2", "body": first}}


def test_a_node_with_several_parents_gets_each_under_its_name(put: Put, mar: Mar) -> None:
    for name in ("nmt-en-de", "nmt-en-fr"):
        mar(name, SHOW)
    with Workflow.load(put(JOIN)) as workflow:
        (answer,) = workflow([b"hello"])

    assert json.loads(answer) == {name: {"node": name, "body": "hello"} for name in ("nmt-en-de", "nmt-en-fr")}


def test_a_parent_that_is_both_near_and_far_counts_once_for_each(put: Put) -> None:
    """As in TorchServe's example of dog breeds: the second model reads the start and the first model."""
    path = put(
        "models: {}\ndag:\n  pre_processing: [upper, show]\n  upper: [show]\n",
        FUNCTIONS + "    def show(data, context):\n        return data and [sorted(row) for row in data]\n",
    )
    with Workflow.load(path) as workflow:
        assert [json.loads(a) for a in workflow([b"x"])] == [["pre_processing", "upper"]]


def test_an_edge_that_is_written_twice_is_one_edge(put: Put) -> None:
    with Workflow.load(put("models: {}\ndag:\n  pre_processing: [upper, upper, '']\n")) as workflow:
        assert workflow([b"x"]) == [b"X"]


def test_several_leaves_give_one_json_object(put: Put) -> None:
    path = put(
        "models: {}\ndag:\n  pre_processing: [one-leaf, answer]\n",
        FUNCTIONS
        + """
    globals()["one-leaf"] = lambda data, context: data and [{"a": 1}]
    def answer(data, context): return data and [{"b": bytes(data[0]["body"]).decode()}]
    """,
    )
    with Workflow.load(path) as workflow:
        assert workflow([b"x"]) == [{"one-leaf": {"a": 1}, "answer": {"b": "x"}}]


def test_a_leaf_that_gives_no_json_object_fails_where_there_are_several(put: Put) -> None:
    path = put("models: {}\ndag:\n  pre_processing: [upper, postprocessing]\n")
    with Workflow.load(path) as workflow:
        (answer,) = workflow([b'"x"'])

    assert (answer.status, answer.node) == (500, "answer")
    assert "JSON object" in answer.message


@pytest.mark.parametrize(
    ("code", "read"),
    [
        ("b'\\x00\\xff'", lambda body: body == b"\x00\xff"),
        ("bytearray(b'ab')", lambda body: body == b"ab"),
        ("'gr\\u00fc\\u00df'", lambda body: body == "grüß".encode()),
        ("{'a': [1, 2.5, None]}", lambda body: json.loads(body) == {"a": [1, 2.5, None]}),
        ("3", lambda body: body == b"3"),
        (
            "__import__('torch').arange(3)",
            lambda body: torch.equal(torch.load(io.BytesIO(body)), torch.arange(3)),
        ),
    ],
)
def test_an_answer_is_put_on_the_edge_as_torchserve_encodes_it(
    put: Put, code: str, read: Callable[[bytes], bool]
) -> None:
    path = put(
        "models: {}\ndag:\n  make: [check]\n",
        f"""
        def make(data, context): return data and [{code}]
        def check(data, context):
            if not data: return None
            assert type(data[0]["body"]) is bytearray
            return [data[0]["body"]]
    """,
    )
    with Workflow.load(path) as workflow:
        (answer,) = workflow([b"x"])

    assert isinstance(answer, bytes)
    assert read(answer)


def test_only_the_first_node_gets_json_decoded(put: Put) -> None:
    path = put(
        "models: {}\ndag:\n  first: [second]\n",
        """
        def first(data, context): return data and [data[0]["body"]]
        def second(data, context): return data and [[type(data[0]["body"]).__name__, bytes(data[0]["body"]).decode()]]
    """,
    )
    with Workflow.load(path) as workflow:
        answer = workflow.submit(b'{"a": 1}', content_type="application/json").result()

    assert json.loads(answer) == ["bytearray", json.dumps({"a": 1}, indent=2)]


@pytest.mark.parametrize(("retries", "ends_well"), [(0, False), (1, False), (2, True)])
def test_a_row_that_fails_is_tried_again_as_often_as_is_set(put: Put, retries: int, *, ends_well: bool) -> None:
    path = put(
        f"models: {{retry-attempts: {retries}}}\ndag:\n  flaky: [pre_processing]\n",
        FUNCTIONS
        + """
    calls = []
    def flaky(data, context):
        if data is None: return
        calls.append(1)
        if len(calls) % 3: raise RuntimeError("not yet")
        return [len(calls)]
    """,
    )
    with Workflow.load(path) as workflow:
        (answer,) = workflow([b"x"])

    if ends_well:
        assert answer == b"3"
    else:
        assert answer == Failure(500, "flaky failed; the log says why.", "HandlerError", "flaky")


def test_one_row_that_fails_does_not_fail_its_batch(put: Put, mar: Mar) -> None:
    mar(
        "m1",
        """
        def handle(data, context):
            if data is None: return
            if any(bytes(row["body"]) == b"bad" for row in data): raise ValueError("bad row")
            return [bytes(row["body"]) for row in data]
    """,
    )
    path = put("models:\n  m1: {url: m1.mar, batch-size: 8, retry-attempts: 0}\ndag:\n  m1: []\n", "")
    with Workflow.load(path) as workflow:
        answers = workflow([b"a", b"bad", b"b", b"c"])

    assert [a for a in answers if isinstance(a, bytes)] == [b"a", b"b", b"c"]
    assert (answers[1].status, answers[1].node) == (500, "m1")


# Mistakes.


@pytest.mark.parametrize(
    ("text", "line", "what", "help_"),
    [
        ("models: {}\ndag:\n  a: [b]\n  b: [a]\n", 3, "dag: a cycle: ", ""),
        ("models: {}\ndag:\n  a: [a]\n", 3, "dag: a cycle: a -> a", ""),
        ("models: {}\ndag:\n  upper: [c]\n  pre_processing: [c]\n", 4, "2 nodes have no parent: upper, pre_processing", "put one node before them all"),
        ("models: {}\ndag:\n  pre_processing: [uper]\n", 3, '"uper" is neither in models nor a function of flow_handler.py', ""),
        ("models:\n  m1:\n    url: m1.mar\ndag:\n  m1: []\n", 3, "m1: there is no archive m1.mar", ""),
        ("models:\n  m1:\n    url: http://host/m1.mar\ndag:\n  m1: []\n", 3, "m1: http://host/m1.mar is an address", "put the archive into model_store/"),
        ("models:\n  m1:\n    batch-size: 3\ndag:\n  m1: []\n", 2, 'm1: "url" is missing', ""),
        ("models:\n  m1:\n    url: m1.mar\n    bach-size: 3\ndag:\n  m1: []\n", 4, 'm1: unknown key "bach-size"', 'did you mean "batch-size"?'),
        ("models:\n  m1:\n    url: m1.mar\n    batch-size: big\ndag:\n  m1: []\n", 4, "m1: expected a whole number, not 'big'", ""),
        ("models:\n  m1:\n    url: m1.mar\n    batch-size: 0\ndag:\n  m1: []\n", 2, "batch-size and timeout-ms are at least 1", ""),
        ("models:\n  batch-size: 1\n  retry-attempts: often\ndag:\n  upper: []\n", 3, "models: expected a whole number, not 'often'", ""),
        ("models:\n  batch-sise: 1\ndag:\n  upper: []\n", 2, 'models: unknown key "batch-sise"', 'did you mean "batch-size"?'),
        ("models: []\ndag:\n  upper: []\n", 1, "models: expected a mapping", ""),
        ("models: {}\ndag: []\n", 2, "dag: expected a mapping", ""),
        ("models: {}\ndag: {}\n", 2, "dag: expected a mapping", ""),
        ("models: {}\ndag:\n  upper: pre_processing\n", 3, "dag: upper: expected a list of nodes", ""),
        ("models: {}\ndag:\n  request: [upper]\n", 3, 'a node cannot be called "request"', "rename it"),
        ("models: {}\ndag:\n  upper: [parameters]\n", 3, 'a node cannot be called "parameters"', "rename it"),
        ("models: {}\ndag:\n  1: [upper]\n", 3, "dag: the key 1 is not text", "put it in quotes"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_its_line(put: Put, text: str, line: int, what: str, help_: str) -> None:
    (problem,) = problems(put(text))

    assert what in problem.what
    assert problem.line == line
    assert help_ in problem.help


def test_functions_without_their_file_are_named(put: Put) -> None:
    (problem,) = problems(put("models: {}\ndag:\n  upper: []\n", functions=""))

    assert problem.what == "dag: upper: not in models, and there is no flow_handler.py"


def test_functions_may_be_in_a_file_of_the_workflows_own_name(put: Put) -> None:
    with Workflow.load(put("dag:\n  upper: []\n", code="flow")) as workflow:
        assert workflow([b"a"]) == [b"A"]


def test_an_archive_may_lie_beside_the_workflow(put: Put, mar: Mar) -> None:
    archive = mar("m1", SHOW)
    path = put("models:\n  m1: {url: m1.mar}\ndag:\n  m1: []\n", "")
    archive.rename(path.parent / "m1.mar")

    with Workflow.load(path) as workflow:
        assert [json.loads(a) for a in workflow([b"a"])] == [{"node": "m1", "body": "a"}]
