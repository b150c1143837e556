"""TorchServe's own workflow files run as they are, by TorchServe's rules."""

from __future__ import annotations

import argparse
import io
import json
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.unit.conftest import Mar
from torchserve_dag.runtime.compat.rows import Row
from torchserve_dag.runtime.data.parts import Body
from torchserve_dag.runtime.data.source import CheckError, Problem
from torchserve_dag.runtime.graph.graph import Attempts
from torchserve_dag.runtime.graph.torchserve.nodes import takes_rows
from torchserve_dag.runtime.graph.torchserve.spec import check_torchserve_file, is_torchserve_file
from torchserve_dag.runtime.messages import Failure
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.workflow import Workflow

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


def caught(path: Path) -> list[Problem]:
    with pytest.raises(CheckError) as error:
        check_torchserve_file(Project(path.parent.parent), path)
    return error.value.problems


def problems(path: Path) -> list[Problem]:
    found = caught(path)
    assert {p.file for p in found} == {str(path)}
    return found


JOINED = FUNCTIONS + "    def joined(data, context):\n        return data and [sorted(row) for row in data]\n"

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
    assert (graph.name, graph.output.needs, graph.answer) == ("flow", {"postprocessing"}, bytes)
    assert [node.code.batch for node in graph.nodes.values()] == [1, 4, 3, 1]
    assert {node.code.attempts for node in graph.nodes.values()} == {Attempts(timeout_s=5.0, retries=3)}
    assert [node.depth for node in graph.nodes.values()] == [1, 2, 3, 4]
    assert graph.serve.timeout_s == 4 * 5 * (1 + 3)  # when each node answers at its last try


def test_torchserves_defaults_hold(put: Put, mar: Mar) -> None:
    mar("m1", SHOW)
    path = put("models: {m1: {url: m1.mar}}\ndag: {pre_processing: [m1]}\n")

    graph = check_torchserve_file(Project(path.parent.parent), path)

    assert {node.code.attempts for node in graph.nodes.values()} == {Attempts(timeout_s=10.0, retries=1)}
    assert {node.code.batch for node in graph.nodes.values()} == {1}


def test_a_common_setting_holds_for_the_models_below_it_and_the_last_for_functions(put: Put, mar: Mar) -> None:
    mar("m1", SHOW)
    path = put(
        """
        models:
          m1: {url: m1.mar}
          batch-size: 7
          retry-attempts: 4
          m2: {url: m1.mar}
        dag:
          pre_processing: [m1]
          m1: [m2]
        """
    )

    nodes = check_torchserve_file(Project(path.parent.parent), path).nodes

    assert {name: (node.code.batch, node.code.attempts.retries) for name, node in nodes.items()} == {
        "pre_processing": (1, 4),
        "m1": (1, 1),
        "m2": (7, 4),
    }


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


def test_blank_children_are_none(put: Put) -> None:
    with Workflow.load(put("models: {}\ndag:\n  pre_processing: [upper, '', ' ', null]\n")) as workflow:
        assert workflow([b"x"]) == [b"X"]


@pytest.mark.parametrize("name", ["request", "parameters", "item", "answer"])
def test_a_node_may_have_a_name_that_means_something_in_our_own_files(put: Put, mar: Mar, name: str) -> None:
    mar("m1", SHOW)
    path = put(f"models: {{{name}: {{url: m1.mar}}}}\ndag:\n  upper: [{name}, joined]\n  {name}: [joined]\n", JOINED)
    with Workflow.load(path) as workflow:
        (answer,) = workflow([b"x"])

    assert json.loads(answer) == sorted([name, "upper"])


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
        MADE = {code}
        def make(data, context): return data and [MADE]
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
        answer = workflow.submit(Body(b'{"a": 1}', "application/json")).future.result()

    assert json.loads(answer) == ["bytearray", json.dumps({"a": 1}, indent=2)]


@pytest.mark.parametrize(("retries", "ends_well"), [(-1, False), (0, False), (1, False), (2, True)])
def test_a_node_that_fails_is_tried_again_as_often_as_is_set(put: Put, retries: int, *, ends_well: bool) -> None:
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
        assert answer == Failure(500, "flaky failed.", "HandlerError", "flaky")


def test_a_node_that_takes_too_long_is_tried_again(put: Put) -> None:
    """As in TorchServe: `timeout-ms` is the time of each try."""
    path = put(
        "models: {timeout-ms: 1000}\ndag:\n  slow: []\n",
        """
        import threading
        calls = []
        def slow(data, context):
            if data is None: return
            calls.append(1)
            if len(calls) == 1: threading.Event().wait(1.3)
            return [len(calls)]
    """,
    )
    with Workflow.load(path) as workflow:
        assert workflow([b"x"]) == [b"2"]


def test_one_batch_is_inside_a_handler_at_a_time(put: Put) -> None:
    """Such handlers keep state between their stages."""
    path = put(
        "models: {}\ndag:\n  alone: []\n",
        """
        import threading
        lock = threading.Lock()
        def alone(data, context):
            if data is None: return
            free = lock.acquire(blocking=False)
            threading.Event().wait(0.005)
            if free: lock.release()
            return ["alone" if free else "met"]
    """,
    )
    with Workflow.load(path) as workflow:
        assert set(workflow([b"x"] * 16)) == {b"alone"}


def test_each_function_has_a_copy_of_its_file(put: Put) -> None:
    """In TorchServe each has a process of its own."""
    path = put(
        "models: {}\ndag:\n  one: [two]\n",
        """
        calls = []
        def one(data, context): return data and [calls.append(1) or len(calls)]
        def two(data, context): return data and [calls.append(1) or len(calls)]
    """,
    )
    with Workflow.load(path) as workflow:
        assert workflow([b"x"]) == [b"1"]


SEEN = """
    def first(data, context):
        return data and [{"keys": sorted(row), "types": [type(row[k]).__name__ for k in sorted(row)]} for row in data]
    def second(data, context):
        return data and [[context.get_request_header(0, "X-One"), sorted(data[0])]]
"""


def test_the_first_node_gets_the_parts_of_a_form_by_their_names(put: Put) -> None:
    headers = {"a": {"content-type": "application/json"}, "b": {"content-type": "text/plain"}, "explain": "False"}
    row = Row.received({"a": bytearray(b"[1]"), "b": bytearray(b"t"), "data": bytearray(b"\xff")}, headers)
    with Workflow.load(put("models: {}\ndag:\n  first: []\n", SEEN)) as workflow:
        assert takes_rows(workflow.graph)
        (answer,) = workflow([row])

    assert json.loads(answer) == {"keys": ["a", "b", "data"], "types": ["list", "str", "bytearray"]}


def test_parameters_are_among_the_parts(put: Put) -> None:
    with Workflow.load(put("models: {}\ndag:\n  first: []\n", SEEN)) as workflow:
        (answer,) = workflow([b"x"], {"top": "5"})

    assert json.loads(answer) == {"keys": ["body", "top"], "types": ["bytearray", "bytearray"]}


def test_every_node_sees_the_clients_headers(put: Put) -> None:
    with Workflow.load(put("models: {}\ndag:\n  first: [second]\n", SEEN)) as workflow:
        (answer,) = workflow([Row({"body": b"x"}, {"X-One": "1"})])

    assert json.loads(answer) == ["1", ["body"]]


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
        ("models: {}\ndag:\n  pre_processing: [upper,\n   upper]\n", 4, "pre_processing: upper is written twice", "keep one"),
        ("models: {}\ndag:\n  pre_processing: [uper]\n", 3, '"uper" is neither in models nor a function of flow_handler.py', ""),
        ("models:\n  m1:\n    url: m1.mar\ndag:\n  m1: []\n", 3, "m1: there is no archive m1.mar", ""),
        ("models:\n  m1:\n    url: http://host/m1.mar\ndag:\n  m1: []\n", 3, "m1: http://host/m1.mar is an address", "put the archive into model_store/"),
        ("models:\n  m1:\n    batch-size: 3\ndag:\n  m1: []\n", 2, 'm1: "url" is missing', ""),
        ("models:\n  m1:\n    url: m1.mar\n    bach-size: 3\ndag:\n  upper: []\n", 4, 'm1: unknown key "bach-size"', 'did you mean "batch-size"?'),
        ("models:\n  m1:\n    url: m1.mar\n    batch-size: big\ndag:\n  upper: []\n", 4, "m1: expected a whole number, not 'big'", ""),
        ("models:\n  timeout-ms: 0\ndag:\n  upper: []\n", 2, "upper: timeout-ms is at least 1, or no call could be answered", ""),
        ("models:\n  batch-size: 1\n  retry-attempts: often\ndag:\n  upper: []\n", 3, "models: expected a whole number, not 'often'", ""),
        ("models:\n  batch-sise: 1\ndag:\n  upper: []\n", 2, 'models: unknown key "batch-sise"', 'did you mean "batch-size"?'),
        ("models: []\ndag:\n  upper: []\n", 1, "models: expected a mapping", "write models: {} where there are none"),
        ("models: {}\ndag: []\n", 2, "dag: expected a mapping", ""),
        ("models: {}\ndag: {}\n", 2, "dag: expected a mapping", ""),
        ("models: {}\ndag:\n  upper: pre_processing\n", 3, "dag: upper: expected a list of nodes", ""),
        ("models: {}\ndag:\n  upper: [1]\n", 3, "dag: upper: 1 is not text", "put it in quotes"),
        ("models: {}\ndag:\n  1: [upper]\n", 3, "dag: the key 1 is not text", "put it in quotes"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_its_line(put: Put, text: str, line: int, what: str, help_: str) -> None:
    (problem,) = problems(put(text))

    assert what in problem.what
    assert problem.line == line
    assert help_ in problem.help


def test_a_file_that_cannot_be_imported_is_named_by_its_line(put: Put) -> None:
    path = put("models: {}\ndag: {upper: []}\n", "x = 1\nimport nonesuch\ndef upper(data, context): ...\n")
    (problem,) = caught(path)
    assert (Path(problem.file).name, problem.line) == ("flow_handler.py", 2)
    assert problem.what == "importing it raised ModuleNotFoundError: No module named 'nonesuch'"
    assert ".war" in problem.help

    (problem,) = caught(put("models: {}\ndag: {upper: []}\n", "x = 1\ndef upper(data, context) ...\n"))
    assert (Path(problem.file).name, problem.line) == ("flow_handler.py", 2)
    assert problem.what.startswith("not valid Python: ")


def test_what_is_no_archive_is_refused(put: Put, project: Path) -> None:
    path = put("models: {m1: {url: m1.mar}}\ndag: {m1: []}\n")
    (project / "model_store").mkdir()
    (project / "model_store" / "m1.mar").write_bytes(b"junk")

    assert "is not an archive of torch-model-archiver's" in problems(path)[0].what


def test_an_archive_that_streams_is_refused_here(put: Put, mar: Mar) -> None:
    mar("m1", "def handle(data, context): send_intermediate_predict_response(['a'], {}, '', 200, context)")
    (problem,) = problems(put("models:\n  m1: {url: m1.mar}\ndag:\n  m1: []\n"))

    assert problem.what == "m1: m1.mar sends its answer in chunks, and this form knows no streams"
    assert problem.help.startswith("a workflow in our own form streams it")


# The workflow's Python file.


def test_functions_without_a_file_are_named(put: Put) -> None:
    (problem,) = problems(put("models: {}\ndag:\n  upper: []\n", functions=""))

    assert problem.what == (
        "dag: upper: not in models, and there is no flow_handler.py, nor another Python file here that defines them"
    )


@pytest.mark.parametrize("code", ["flow_handler", "flow", "nmt_workflow_handler_dualtranslation", "my-handler"])
def test_the_file_that_defines_all_functions_is_the_workflows_whatever_its_name(put: Put, code: str) -> None:
    (put("", "def upper(data, context): ...", name="other", code="has_only_one")).unlink()
    with Workflow.load(put("models: {}\ndag:\n  pre_processing: [upper]\n", code=code)) as workflow:
        assert workflow([b"a"]) == [b"A"]


def test_two_files_that_define_all_functions_are_told_apart_by_a_name(put: Put) -> None:
    text = "models: {}\ndag:\n  upper: []\n"
    put(text, code="b")
    (problem,) = problems(put(text, code="a"))

    assert problem.what == "dag: upper: not in models, and a.py and b.py all define them"
    assert problem.help == "give the one that is meant the name flow_handler.py"
    with Workflow.load(put(text)) as workflow:
        assert workflow([b"a"]) == [b"A"]


def test_the_only_class_of_the_file_stands_for_a_name_that_it_does_not_have(put: Put) -> None:
    """TorchServe loads a function as it loads a handler."""
    functions = """
        class Shout:
            def initialize(self, context): self.end = "!"
            def handle(self, data, context): return [bytes(row["body"]).decode() + self.end for row in data]
    """
    with Workflow.load(put("models: {}\ndag: {anything: []}\n", functions, code="flow")) as workflow:
        assert workflow([b"a"]) == [b"a!"]


def test_an_archive_may_lie_beside_the_workflow(put: Put, mar: Mar) -> None:
    archive = mar("m1", SHOW)
    path = put("models:\n  m1: {url: m1.mar}\ndag:\n  m1: []\n", "")
    archive.rename(path.parent / "m1.mar")

    with Workflow.load(path) as workflow:
        assert [json.loads(a) for a in workflow([b"a"])] == [{"node": "m1", "body": "a"}]


def test_an_archive_may_be_a_folder(put: Put, mar: Mar) -> None:
    archive = mar("m1", SHOW)
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(archive.with_name("folder"))

    with Workflow.load(put("models: {m1: {url: folder}}\ndag: {m1: []}\n", "")) as workflow:
        assert [json.loads(a) for a in workflow([b"a"])] == [{"node": "m1", "body": "a"}]
    assert archive.with_name("folder").is_dir()


# A finished `.war`.


@pytest.fixture
def war(project: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Makes `workflows/NAME.war` with TorchServe's own archiver."""
    from workflow_archiver.workflow_packaging import package_workflow
    from workflow_archiver.workflow_packaging_utils import WorkflowExportUtils

    def make(text: str, functions: str, *, name: str = "flow", **more: str) -> Path:
        sources = project / "sources"
        sources.mkdir(exist_ok=True)
        files = {"any spec.yaml": text, "any-handler.py": functions, **more}
        for file, content in files.items():
            (sources / file).write_text(textwrap.dedent(content))
        arguments = argparse.Namespace(
            workflow_name=name,
            spec_file=str(sources / "any spec.yaml"),
            handler=str(sources / "any-handler.py"),
            extra_files=",".join(str(sources / file) for file in more) or None,
            export_path=str(project / "workflows"),
            force=True,
        )
        monkeypatch.setattr("tempfile.tempdir", str(sources))
        package_workflow(arguments, WorkflowExportUtils.generate_manifest_json(arguments))
        monkeypatch.undo()
        return project / "workflows" / f"{name}.war"

    return make


def test_a_war_runs_as_it_is_with_its_extra_files(war: Put, mar: Mar) -> None:
    mar("m1", SHOW)
    functions = """
        import json, os
        def pre_processing(data, context):
            from words import WORD
            folder = context.system_properties["model_dir"]
            return data and [WORD + open(os.path.join(folder, "names.txt")).read()]
    """
    path = war(
        "models: {m1: {url: m1.mar}}\ndag: {pre_processing: [m1]}\n",
        functions,
        **{"words.py": "WORD = 'hello '", "names.txt": "world"},
    )
    assert is_torchserve_file(path)
    with Workflow.load(path) as workflow:
        assert (workflow.graph.name, workflow.graph.files) == ("flow", {path})
        assert [json.loads(a) for a in workflow([b"x"])] == [{"node": "m1", "body": "hello world"}]


def test_a_mistake_in_a_war_is_named_by_its_file_and_line(war: Put) -> None:
    (problem,) = caught(path := war("models: {}\ndag:\n  upper: [lower]\n", FUNCTIONS))
    assert (problem.file, problem.line) == (f"{path}/any spec.yaml", 3)
    assert "any-handler.py" in problem.what

    (problem,) = caught(path := war("models: {\n", FUNCTIONS))
    assert problem.file == f"{path}/any spec.yaml"

    (problem,) = caught(path := war("models: {}\ndag: {upper: []}\n", "\nimport nonesuch"))
    assert (problem.file, problem.line) == (f"{path}/any-handler.py", 2)


def test_a_war_that_is_none_is_refused(project: Path, war: Put) -> None:
    path = project / "workflows" / "flow.war"
    assert "there is no such file" in caught(path)[0].what

    path.write_bytes(b"junk")
    assert "it is not an archive of torch-workflow-archiver's: BadZipFile" in caught(path)[0].what

    with zipfile.ZipFile(path, "w") as empty:
        empty.writestr("x", "")
    assert "it holds no WAR-INF/MANIFEST.json" in caught(path)[0].what

    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("WAR-INF/MANIFEST.json", json.dumps({"workflow": {"specFile": "a.yaml", "handler": "a.py"}}))
    assert "it holds no a.yaml, which its manifest names" in caught(path)[0].what
