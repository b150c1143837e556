"""What `evaluate` does: data through real archives, scored; what is kept, when it is stale, what `--require` refuses."""

from __future__ import annotations

import json
import random
import shutil
import textwrap
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.unit.conftest import IMPORTS, Write
from torchserve_dag import Chat, Text, Workflow
from torchserve_dag.archives.build import build
from torchserve_dag.commands import app
from torchserve_dag.evaluation import requirement, results, version
from torchserve_dag.evaluation.answers import readable
from torchserve_dag.evaluation.data_set import MAX_LINE, DataSet
from torchserve_dag.evaluation.inputs import message_of
from torchserve_dag.evaluation.scorers import ScoreError
from torchserve_dag.evaluation.specs import ScoreSpec, read_specs
from torchserve_dag.releases import intervals
from torchserve_dag.runtime.data.parts import Body, Parts
from torchserve_dag.runtime.data.source import CheckError
from torchserve_dag.runtime.messages import Prompt, TextChunk
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.server.errors import ServerError

FLOW = """
name: flow
version: "{}"
does: A test.
nodes:
  answer: {{function: {}}}
output: answer
"""

FUNCTIONS = """
import hashlib
from collections.abc import Iterator
from torchserve_dag import TextChunk

@dataclass(frozen=True)
class Found:
    words: list[str]
    size: int

def right(text: Text) -> Text:
    if text.text == "bad": raise InputError("That text is bad.", 422)
    return Text(text.text.upper())

def wrong(text: Text) -> Text:
    return Text(text.text)

def find(text: Text) -> Found:
    words = text.text.split()
    return Found(words, len(words))

def spell(text: Text) -> Iterator[TextChunk]:
    for letter in text.text: yield TextChunk(letter)
"""

Lines = list[dict[str, Any]]
UPPER = [
    {"id": word, "input": word, "expected": word.upper()} for word in ("one", "two", "three", "four", "five", "six")
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with four archives, built once, for they carry the whole runtime."""
    project = tmp_path_factory.mktemp("built")
    (project / "workflows").mkdir()
    (project / "workflows" / "flow.py").write_text(IMPORTS + textwrap.dedent(FUNCTIONS))
    for number, function in {"1.0": "right", "2.0": "wrong", "3.0": "find", "4.0": "spell"}.items():
        (project / "workflows" / f"flow-{number}.yaml").write_text(
            FLOW.format(number, function).replace("output", "code: flow.py\noutput")
        )
    report = build(Project(project), ["flow"])
    assert not report.problems, report.problems
    return project


@pytest.fixture
def flow(built: Path, tmp_path: Path) -> Path:
    """A project with archives of `flow`: 1.0 is right, 2.0 is wrong, 3.0 finds words, 4.0 streams."""
    shutil.copytree(built, tmp_path / "project", symlinks=True)
    return tmp_path / "project"


def write_data(project: Path, lines: Lines, name: str = "data.jsonl") -> Path:
    path = project / name
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def run(project: Path, *words: str, code: int = 0) -> Any:
    """What the command prints as JSON, or its error."""
    done = CliRunner().invoke(app, ["evaluate", *words, "--json", "--project", str(project)])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout) if done.stdout else done.stderr


def scorer(spec: str, root: Path = Path()):
    return ScoreSpec.read(spec).load(root, ExitStack())


class TestScorers:
    @pytest.mark.parametrize(
        ("spec", "answer", "expected", "score"),
        [
            ("exact", " Paris\n", "Paris", 1),
            ("exact", "paris", "Paris", 0),
            ("exact", "Paris", ["Rome", "Paris"], 1),
            ("exact", "3", 3, 0),
            ("exact", {"a": 1}, {"a": 1.0}, 1),
            ("contains", "It is Paris.", "Paris", 1),
            ("contains", "It is Rome.", ["Paris", "Rome"], 1),
            ("contains", "It is Oslo.", ["Paris", "Rome"], 0),
            ("contains:text.inner", {"text": {"inner": "Paris"}}, "Paris", 1),
            ("json", '{"b": [1, 2], "a": null}', {"a": None, "b": [1, 2]}, 1),
            ("json", '{"a": 1, "b": 2}', {"a": 1}, 0),
            ("json", {"a": True}, {"a": 1}, 0),
            ("json", "no JSON", {"a": 1}, 0),
            ("json", '{"a": 1, "a": 2}', {"a": 2}, 0),  # twice the same key
            ("json:a", {"a": [1], "b": 2}, [1], 1),
            ("recall@2", ["x", "y", "z"], ["x", "z"], 0.5),
            ("recall@3", ["x", "y", "z"], ["x", "z"], 1),
            ("recall@3", ["x", "x"], ["x", "y"], 0.5),  # once found, once counted
            ("recall@3", [{"id": 7, "score": 1.0}, {"id": 8}], [8, 9], 0.5),
            ("recall@3", [{"document": "a.md"}], ["a.md"], 1),
            ("recall@3", ["x"], [], 1),
            ("recall@9:objects.label", {"objects": [{"label": "cup"}]}, ["cup", "cup"], 0.5),
            ("recall@9:objects.label", {"objects": []}, {"objects": [{"label": "cup"}], "else": 1}, 0),
        ],
    )
    def test_an_answer_has_its_score(self, spec: str, answer: Any, expected: Any, score: float) -> None:
        found = scorer(spec)

        assert found.check(expected) is None
        assert found.score(answer, expected) == score

    @pytest.mark.parametrize(
        ("spec", "answer", "sentence"),
        [
            ("contains", ["Paris"], "no text: name a field"),
            ("recall@3", "Paris", "no list: name a field"),
            ("exact:text", {"label": "Paris"}, 'the answer has no "text"'),
            ("exact:a.b", {"a": "Paris"}, 'the answer has no "b"'),
        ],
    )
    def test_an_answer_that_cannot_be_scored_is_no_zero_without_a_word(
        self, spec: str, answer: Any, sentence: str
    ) -> None:
        with pytest.raises(ScoreError, match=sentence):
            scorer(spec).score(answer, ["Paris"])

    @pytest.mark.parametrize(
        ("spec", "sentence"),
        [
            ("exakt", 'did you mean "exact"'),
            ("recall", "recall@5 is of the first 5"),
            ("recall@0", "is no scorer"),
            ("exact@5", "only recall has an @"),
            ("scores.txt:function", "is no scorer"),
        ],
    )
    def test_what_is_no_scorer_is_refused(self, spec: str, sentence: str) -> None:
        with pytest.raises(ValueError, match=sentence):
            ScoreSpec.read(spec)

    def test_two_scores_of_one_name_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="two scores are called exact"):
            read_specs(["exact", "exact"], tmp_path)

    def test_similarity_needs_the_handler_of_embeddings(self, tmp_path: Path) -> None:
        with pytest.raises(CheckError, match="torchserve-dag add handler text_embedding"):
            scorer("similarity", tmp_path)


class TestFunctions:
    CODE = """
        from __future__ import annotations
        from typing import Any
        from workflows.flow import Found

        def share(answer: Found, expected: list[str]) -> float:
            return sum(word in answer.words for word in expected) / len(expected)

        def same(answer: str, expected: Any) -> bool: return answer == expected
        def large(answer: str, expected: str) -> float: return 2.0
        def breaks(answer: str, expected: str) -> float: return 1 / 0
        def untyped(answer, expected: str) -> float: return 1.0
        def text(answer: str, expected: str) -> str: return ""
        def alone(answer: str) -> float: return 1.0
        """

    @pytest.fixture
    def load(self, flow: Path) -> Callable[[str], Any]:
        (flow / "evaluations").mkdir()
        for file in ("scores.py", "evaluations/scores.py"):  # at the root, and in a folder
            (flow / file).write_text(textwrap.dedent(self.CODE))
        return lambda name, file="scores.py": scorer(f"{file}:{name}", flow)

    @pytest.mark.parametrize("file", ["scores.py", "evaluations/scores.py"])
    def test_it_gets_the_types_that_it_declares(self, load: Callable[..., Any], file: str) -> None:
        """The answer is one of the project's own classes, made of the answer's data."""
        assert load("share", file).score({"words": ["a", "b"], "size": 2}, ["b", "c"]) == 0.5
        assert load("same", file).score("x", "x") == 1.0

    @pytest.mark.parametrize(
        ("name", "sentence"),
        [
            ("untyped", r"scores.py:\d+: untyped: the type of answer is not declared"),
            ("text", "it gives str, and a score is float or bool"),
            ("alone", "it takes 1 values, where two are given"),
            ("shared", 'there is no function "shared"\n  help: did you mean "share"'),
        ],
    )
    def test_a_function_that_cannot_score_is_named_by_its_line(
        self, load: Callable[..., Any], name: str, sentence: str
    ) -> None:
        with pytest.raises(CheckError, match=sentence):
            load(name)

    @pytest.mark.parametrize(
        ("name", "sentence"), [("large", "large gave 2.0"), ("breaks", "breaks raised ZeroDivisionError")]
    )
    def test_what_it_gives_is_a_score(self, load: Callable[..., Any], name: str, sentence: str) -> None:
        with pytest.raises(ScoreError, match=sentence):
            load(name).score("x", "x")

    def test_what_does_not_fit_its_types_is_said(self, load: Callable[..., Any]) -> None:
        assert "share expects list[str]" in load("share").check(3)
        with pytest.raises(ScoreError, match=r'the answer is no Found: "size" is missing'):
            load("share").score({"words": []}, ["a"])

    def test_it_is_in_the_project(self, flow: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        elsewhere = tmp_path_factory.mktemp("elsewhere") / "scores.py"
        with pytest.raises(ValueError, match="is not in the project"):
            read_specs([f"{elsewhere}:share"], flow)


class TestData:
    def test_each_wrong_line_is_named_by_its_number(self, tmp_path: Path) -> None:
        lines = {
            '{"input": "a", "expected": "a"}': None,
            "": None,
            "{": "the line is not JSON",
            "[]": "the line is no object",
            '{"input": "a"}': '"expected" is missing',
            '{"inputs": "a", "expected": 1}': 'unknown key "inputs"\n  help: did you mean "input"?',
            '{"input": {"file": "none.jpg"}, "expected": 1}': f"there is no file {tmp_path}/none.jpg",
            '{"input": {"photo": {"file": "no.jpg"}}, "expected": 1}': f"there is no file {tmp_path}/no.jpg",
            '{"input": 1, "expected": 1, "id": [1]}': "the id [1] is neither",
            '{"input": 1, "input": 2, "expected": 1}': "the line is not JSON",
            '{"input": 1, "expected": ""}': "what is expected is neither a text",
        }
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(lines))
        with pytest.raises(CheckError) as caught:
            DataSet.read(path, (scorer("contains").check,))
        problems = [str(problem) for problem in caught.value.problems]

        wrong = [f"{path}:{number}: {what}" for number, what in enumerate(lines.values(), 1) if what]
        assert [problem[: len(start)] for problem, start in zip(problems, wrong, strict=True)] == wrong

    def test_lines_that_are_no_text_or_too_long_or_missing_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl"
        for content, sentence in (
            (b'{"input": "\xff", "expected": 1}', "1: the line is not UTF-8"),
            (b" " * MAX_LINE + b"{}", "1: the line has more than"),
            (b"\n\n", "1: it has no item"),
        ):
            path.write_bytes(content)
            with pytest.raises(CheckError, match=sentence):
                DataSet.read(path)

    def test_the_hash_is_of_the_lines_and_of_the_files_that_they_name(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("one")
        path = write_data(tmp_path, [{"input": {"file": "a.txt"}, "expected": "ONE"}])
        before = DataSet.read(path)

        assert [(item.line, item.id, item.input) for item in before] == [(1, "1", tmp_path / "a.txt")]
        assert DataSet.read(path).hash == before.hash
        (tmp_path / "a.txt").write_text("two")
        assert DataSet.read(path).hash != before.hash

    @pytest.mark.parametrize(
        ("kind", "value", "message"),
        [
            (Text, "a", Body(b"a", "text/plain; charset=utf-8")),
            (Text, {"text": "a"}, Body(b'{"text": "a"}', "application/json")),
            (Chat, "a", Chat.of("a")),
            (Chat | Prompt, "a", Chat.of("a")),
            (Prompt, "a", Prompt(prompt="a")),
            (str, "a", Body(b'"a"', "application/json")),
            (list[int], [1], Body(b"[1]", "application/json")),
        ],
    )
    def test_an_input_is_sent_as_a_client_sends_it(self, kind: Any, value: Any, message: Any) -> None:
        assert message_of(kind, value) == message

    def test_a_file_is_sent_as_it_is_and_one_among_fields_in_parts(self, tmp_path: Path) -> None:
        photo = tmp_path / "a.png"
        photo.write_bytes(b"\x89PNG\r\n\x1a\n")
        path = write_data(tmp_path, [{"input": {"photo": {"file": "a.png"}, "question": "what?"}, "expected": 1}])
        (item,) = DataSet.read(path)

        assert message_of(Text, photo) == Body(photo.read_bytes(), "image/png")
        assert message_of(dict, item.input) == Parts(
            {"photo": Body(photo.read_bytes(), "image/png"), "question": Body(b"what?", "text/plain; charset=utf-8")}
        )


class TestRun:
    def test_items_are_scored_and_those_that_fail_score_nothing_and_are_listed(self, flow: Path) -> None:
        lines = [*UPPER[:3], {"input": "bad", "expected": "BAD"}]
        data = write_data(flow, lines)
        (done,) = run(flow, "flow/1.0", "--data", str(data), "--score", "exact", "--score", "contains")["evaluations"]

        assert (done["items"], done["errors"]) == (4, 1)
        assert done["scores"]["exact"]["mean"] == done["scores"]["contains"]["mean"] == 0.75
        assert done["failed"] == [{"id": "4", "line": 4, "why": "422 That text is bad. (at the node answer)"}]
        assert json.loads((flow / "evaluations" / "flow-1.0.json").read_text()) == done
        low, high = (done["scores"]["exact"][bound] for bound in ("low", "high"))
        assert (round(low, 3), round(high, 3)) == (0.301, 0.954)  # Wilson's interval of 3 of 4

    def test_chunks_of_a_stream_are_one_text(self, flow: Path) -> None:
        data = write_data(flow, [{"input": "streamed", "expected": "streamed"}])

        (done,) = run(flow, "flow/4.0", "--data", str(data), "--score", "exact")["evaluations"]
        assert done["scores"]["exact"]["mean"] == 1

    @pytest.mark.parametrize(
        ("answer", "streams", "found"),
        [
            ([TextChunk("a"), TextChunk("no", index=1), TextChunk("b", finish_reason="stop")], True, "ab"),
            ([Text("a"), Text("b")], True, "ab"),
            (["a", "b"], True, "ab"),
            ([1, 2], True, [1, 2]),
            (["a", "b"], False, ["a", "b"]),
            (Text("a"), False, "a"),
            (b"a", False, b"a"),
        ],
    )
    def test_an_answer_is_read_as_text_or_data(self, answer: Any, *, streams: bool, found: Any) -> None:
        assert readable(answer, streams=streams) == found

    def test_a_field_of_the_answer_is_scored(self, flow: Path) -> None:
        data = write_data(flow, [{"input": "one two three", "expected": {"words": ["two", "nine"], "size": 3}}])
        words = ("--data", str(data), "--score", "recall@2:words", "--score", "json:size", "--score", "exact")

        (done,) = run(flow, "flow/3.0", *words)["evaluations"]
        assert {name: score["mean"] for name, score in done["scores"].items()} == {
            "recall@2:words": 0.5, "json:size": 1, "exact": 0,
        }  # fmt: skip

    def test_what_is_evaluated_is_the_archive_and_not_the_files_beside_it(self, flow: Path) -> None:
        path = flow / "workflows" / "flow.py"
        path.write_text(path.read_text().replace("text.text.upper()", "'edited'"))
        words = ["flow/1.0", "--data", str(write_data(flow, UPPER)), "--score", "exact", "--project", str(flow)]
        done = CliRunner().invoke(app, ["evaluate", *words])

        assert done.exit_code == 0, done.output
        assert "workflows/flow.py: not as in flow-1.0.mar, which is evaluated" in done.stderr
        assert "1.000" in done.stdout
        assert [path.name for path in (flow / ".torchserve-dag").iterdir()] == []  # nothing unpacked is left

    def test_items_wait_for_each_other_longer_than_a_client_would(self, flow: Path) -> None:
        """A busy machine is no fault of a version: its workflow's limit, 30 s, counts from when an item is submitted."""
        archive = version.find_version(version.model_store(flow), "flow/1.0")
        with version.loaded(flow, archive) as workflow:
            assert workflow.graph.serve.timeout_s == version.ITEM_S

    def test_without_a_version_the_highest_is_evaluated(self, flow: Path) -> None:
        assert version.find_version(version.model_store(flow), "flow").version == "4.0"

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (("flo", "--score", "exact"), 'flo is not in {store} (did you mean "flow"?): torchserve-dag build flo.'),
            (("flow/9.0", "--score", "exact"), "flow/9.0 is not in {store} (only 1.0, 2.0, 3.0, 4.0)"),
            (("flow/1.0", "--score", "exact", "--require", "exact"), '"exact" is not a requirement: write'),
            (("flow/1.0", "--score", "exact", "--require", "exact > 5ms"), '"exact > 5ms" is not a requirement'),
            (("flow/1.0", "--score", "exakt"), '"exakt" is no scorer; did you mean "exact"?'),
        ],
    )
    def test_what_cannot_be_evaluated_is_refused_in_one_sentence(
        self, flow: Path, words: tuple[str, ...], sentence: str
    ) -> None:
        said = run(flow, *words, "--data", str(write_data(flow, UPPER)), code=1)

        assert sentence.format(store=flow / "model_store") in said
        assert said.count("\n") == 1

    def test_an_archive_of_torchserves_own_is_refused(self, project: Path, mar: Callable[..., Path]) -> None:
        mar("foreign", "def handle(data, context): return data")
        data = write_data(project, UPPER)

        assert "was not built by torchserve-dag" in run(
            project, "foreign", "--data", str(data), "--score", "exact", code=1
        )


class TestTwoVersions:
    def test_a_worse_version_is_called_so_and_ends_with_1(self, flow: Path) -> None:
        data = write_data(flow, UPPER)
        words = ("--data", str(data), "--score", "exact")
        found = run(flow, "flow/2.0", "--against", "flow/1.0", *words, code=1)

        (row,) = found["differences"]
        assert (row["first"], row["second"], row["difference"], row["needed"]) == (1, 0, -1, 0)
        assert -1 <= row["low"] < row["high"] < 0
        assert [one["version"] for one in found["evaluations"]] == ["1.0", "2.0"]
        assert {path.name for path in (flow / "evaluations").iterdir()} == {"flow-1.0.json", "flow-2.0.json"}
        better = CliRunner().invoke(
            app, ["evaluate", "flow/1.0", "--against", "flow/2.0", *words, "--project", str(flow)]
        )
        assert better.exit_code == 0
        assert "1.0 is better" in better.stdout

    def test_one_item_settles_nothing(self, flow: Path) -> None:
        data = write_data(flow, UPPER[:1])
        (row,) = run(flow, "flow/2.0", "--against", "flow/1.0", "--data", str(data), "--score", "exact")["differences"]

        assert row["difference"] == -1
        assert row["low"] <= 0 <= row["high"]
        assert row["needed"]


class TestRequire:
    @pytest.fixture
    def check(self, flow: Path) -> Callable[..., None]:
        """Evaluates 1.0 by a function and by recall, and gives what `rollout --require` asks."""
        (flow / "scores.py").write_text("def same(answer: str, expected: str) -> bool: return answer == expected\n")
        (flow / "a.txt").write_text("seven")
        data = write_data(flow, [*UPPER, {"input": {"file": "a.txt"}, "expected": "SEVEN"}])
        run(flow, "flow/1.0", "--data", str(data), "--score", "exact", "--score", f"{flow}/scores.py:same")

        def check(*texts: str, number: str = "1.0") -> None:
            archive = version.find_version(version.model_store(flow), f"flow/{number}")
            requirement.check_released(flow, archive, [requirement.read(text) for text in texts])

        return check

    def test_a_version_that_shows_it_is_released(self, check: Callable[..., None]) -> None:
        check("exact >= 1", "exact > .99", "exact>=100%", "errors <= 0", "same >= .8")

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("exact > 1", r"flow/1.0 has exact 1 of 7 items \(95% interval 0.646 to 1\), and exact > 1 is required"),
            ("errors > 1%", "has errors 0.0% of 7 items, and errors > 1% is required"),
            ("recall >= .8", "The evaluation of flow/1.0 has no score recall, and recall >= 0.8 is required; known: "),
            ("exakt >= .8", 'did you mean "exact"'),
        ],
    )
    def test_one_that_does_not_is_refused(self, check: Callable[..., None], text: str, sentence: str) -> None:
        with pytest.raises(ServerError, match=sentence):
            check("exact >= .5", text)

    def test_one_that_was_not_evaluated_is_refused_with_what_to_run(self, check: Callable[..., None]) -> None:
        sentence = r"flow/2.0 was not evaluated.*: torchserve-dag evaluate flow/2.0 --data FILE --score SCORE\."
        with pytest.raises(ServerError, match=sentence):
            check("exact >= .8", number="2.0")

    def test_a_result_of_another_archive_is_stale(self, check: Callable[..., None], flow: Path) -> None:
        path = flow / "workflows" / "flow.py"
        path.write_text(path.read_text() + "# edited\n")
        assert not build(Project(flow), ["flow/1.0"], force=True).problems
        again = "Run torchserve-dag evaluate flow/1.0 --data data.jsonl --score exact --score scores.py:same"
        with pytest.raises(
            ServerError, match=rf"it is of another archive \(\w+, and flow-1.0.mar is \w+\)\. {again}\."
        ):
            check("exact >= .8")

    @pytest.mark.parametrize(
        ("file", "sentence"),
        [
            ("data.jsonl", "data.jsonl has changed since, or a file that it names"),
            ("a.txt", "data.jsonl has changed since, or a file that it names"),
            ("scores.py", "what computes the score same has changed since"),
        ],
    )
    @pytest.mark.parametrize("gone", [False, True])
    def test_a_result_of_other_data_or_scores_is_stale(
        self, check: Callable[..., None], flow: Path, file: str, sentence: str, *, gone: bool
    ) -> None:
        path = flow / file
        before = path.read_text()
        path.write_text(before.replace("two", "2").replace("seven", "7").replace("==", "is"))
        if gone:
            path.unlink()
            sentence = {"data.jsonl": "cannot be read", "a.txt": "has mistakes now"}.get(file, sentence)
        with pytest.raises(ServerError, match=f"{sentence}.*Run torchserve-dag evaluate"):
            check("exact >= .8")
        path.write_text(before)

        check("exact >= .8")

    def test_a_kept_file_that_is_none_is_named(self, check: Callable[..., None], flow: Path) -> None:
        results.path_of(flow, "flow", "1.0").write_text("{}")
        with pytest.raises(CheckError, match=r"flow-1.0.json:1: it is no evaluation"):
            check("exact >= .8")

    def test_evaluate_itself_may_require(self, flow: Path) -> None:
        words = ("--data", str(write_data(flow, UPPER)), "--score", "exact", "--require", "exact >= .5")
        assert run(flow, "flow/1.0", *words)["unmet"] == []

        (why,) = run(flow, "flow/2.0", *words, code=1)["unmet"]
        assert why.startswith("flow/2.0 has exact 0 of 6 items")

    def test_rollout_refuses_what_is_no_requirement(self, flow: Path) -> None:
        words = ["rollout", "flow", "2.0", "--require", "exact is good", "--project", str(flow)]
        done = CliRunner().invoke(app, words)

        assert done.exit_code == 1
        assert '"exact is good" is not a requirement: write "recall >= .8"' in done.stderr


class TestMap:
    def test_a_long_list_is_never_in_memory_as_a_whole(self, write: Write) -> None:
        path = write("answer: {function: same}", "def same(text: Text) -> Text: return text")
        taken = 0

        def items():
            nonlocal taken
            for number in range(500):
                taken += 1
                yield Text(str(number))

        with Workflow.load(path) as workflow:
            most = 0
            for done, answer in enumerate(workflow.map(items()), 1):
                assert answer.text == str(done - 1)
                most = max(most, taken - done)

        assert taken == 500
        assert 0 < most <= 64

    def test_whoever_leaves_the_loop_cancels_the_rest(self, write: Write, tmp_path: Path) -> None:
        gate = tmp_path / "gate"
        functions = f"""
            def same(text: Text) -> Text:
                if text.text != "first": wait_at({str(gate)!r})
                return text
            """
        with Workflow.load(write("answer: {function: same}", functions)) as workflow:
            answers = workflow.map(Text(text) for text in ("first", *["waits"] * 100))
            assert next(answers).text == "first"
            assert len(workflow.engine._admission) > 0
            answers.close()

            assert len(workflow.engine._admission) == 0
            gate.touch()


class TestIntervals:
    def test_a_paired_difference_is_as_published(self) -> None:
        """By Newcombe (1998b), method 10, of 36 pairs with both, 12 and 2 with one, and none with neither."""
        first = [1.0] * 36 + [1.0] * 12 + [0.0] * 2
        second = [1.0] * 36 + [0.0] * 12 + [1.0] * 2
        low, high = intervals.paired_difference(second, first)

        assert (round(low, 4), round(high, 4)) == (0.0569, 0.3404)

    @pytest.mark.parametrize("agree", [0.0, 0.6])
    def test_a_paired_difference_covers_the_true_one(self, agree: float) -> None:
        """In 95 of 100 data sets, about, of 30 items: 0.8 of them right in one version, 0.6 in the other."""
        dice, covered = random.Random(11), 0
        for _ in range(400):
            pairs = []
            for _ in range(30):
                luck = dice.random()
                other = luck if dice.random() < agree else dice.random()
                pairs.append((float(luck < 0.6), float(other < 0.8)))
            low, high = intervals.paired_difference([a for a, _ in pairs], [b for _, b in pairs])
            covered += low <= 0.2 <= high

        assert 0.92 < covered / 400 < 0.99

    def test_the_mean_of_one_is_unknown(self) -> None:
        assert intervals.mean([0.3]) == intervals.EVERYTHING
