"""Workflows of TorchServe's are accepted or refused as TorchServe 0.12.0 does; tests/torchserve_specs.py says where not."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import torchserve_specs as specs
from torchserve_dag.runtime.data.source import CheckError
from torchserve_dag.runtime.graph.torchserve.spec import check_torchserve_file
from torchserve_dag.runtime.messages import Failure
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.workflow import Workflow

Write = Callable[[str], Path]


@pytest.fixture(scope="session")
def torchserve_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("torchserve")
    specs.write_store(root / "model_store")
    (root / "workflows").mkdir()
    (root / "workflows" / "flow_handler.py").write_text(textwrap.dedent(specs.FUNCTIONS))
    return root


@pytest.fixture
def write(torchserve_project: Path) -> Write:
    """Writes a specification; gives its path."""

    def write_spec(text: str) -> Path:
        path = torchserve_project / "workflows" / "flow.yaml"
        path.write_text(specs.with_store(text, torchserve_project / "model_store"))
        return path

    return write_spec


def by_name(texts: dict[str, str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("text", texts.values(), ids=texts.keys())


@by_name({**specs.OWN, **specs.ANSWERED})
def test_what_torchserve_answers_is_answered(write: Write, text: str) -> None:
    with Workflow.load(write(text)) as workflow:
        answers = workflow([b"a body"] * 3)

    assert not [one for one in answers if isinstance(one, Failure)]
    assert answers[0] == answers[1] == answers[2]


@by_name({**specs.REFUSED, **specs.REFUSED_BY_WORKERS, **specs.NEVER_ANSWERED, **specs.STRICTER})
def test_what_torchserve_refuses_is_refused_by_its_line(write: Write, text: str) -> None:
    path = write(text)
    with pytest.raises(CheckError) as caught:
        check_torchserve_file(Project(path.parent.parent), path)

    for problem in caught.value.problems:
        assert problem.file == str(path)
        assert 1 <= problem.line <= text.count("\n") + 1
        assert problem.what


def test_a_leaf_that_gives_no_json_object_fails_where_there_are_several(write: Write) -> None:
    """TorchServe registers it, and then fails each call with 500."""
    with Workflow.load(write("models: {}\ndag: {a: [b, text]}\n")) as workflow:
        (answer,) = workflow([b"x"])

    assert answer.status == 500
    assert answer.message.startswith("text must give a JSON object")


def test_a_leaf_alone_may_give_anything(write: Write) -> None:
    with Workflow.load(write("models: {}\ndag: {a: [text]}\n")) as workflow:
        assert workflow([b"x"]) == [b"no JSON"]


def test_the_keys_of_a_row_are_those_of_torchserves_examples(write: Write) -> None:
    with Workflow.load(write(specs.OWN["dog breeds"])) as workflow:
        (answer,) = workflow([b"x"])

    assert json.loads(answer)["model"] == ["cat_dog_classification", "pre_processing"]
