"""TorchServe's own handlers run in this process as they are."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from tests.unit.conftest import Mar
from torchserve_dag.messages import Failure
from torchserve_dag.rows import RowsRunner, as_bytes

MODULE = """
    STATE = {}
    def handle(data, context):
        if data is None:
            STATE["loads"] = STATE.get("loads", 0) + 1
            return None
        return [{"loads": STATE["loads"], "size": len(row["body"])} for row in data]
"""


def runner(archive: Path, *, batch: int = 1, retries: int = 0) -> RowsRunner:
    return RowsRunner.of_archive(archive.stem, archive, None, batch, retries)


def with_handler(archive: Path, handler: str) -> Path:
    """The archive with another handler in its manifest."""
    other = archive.with_name("c.mar")
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(other, "w") as new:
        for entry in old.namelist():
            content = old.read(entry)
            if entry == "MAR-INF/MANIFEST.json":
                manifest = json.loads(content)
                manifest["model"]["handler"] = handler
                content = json.dumps(manifest).encode()
            new.writestr(entry, content)
    return other


def bodies(*texts: bytes) -> list[dict[str, bytes]]:
    return [{"body": text} for text in texts]


def test_a_module_with_handle_is_called_once_with_nothing_and_then_with_rows(mar: Mar) -> None:
    run = runner(mar("m", MODULE))

    assert [json.loads(a) for a in run(bodies(b"ab", b"c"))] == [{"loads": 1, "size": 2}, {"loads": 1, "size": 1}]


def test_a_handler_may_name_its_function(mar: Mar) -> None:
    code = "def serve(data, context): return data and ['served'] * len(data)\ndef handle(data, context): return data and ['no']"

    assert runner(with_handler(mar("m", code), "handler.py:serve"))(bodies(b"x")) == [b"served"]


def test_the_one_class_of_a_module_is_the_handler(mar: Mar) -> None:
    code = """
        from collections import OrderedDict
        class Handler:
            def initialize(self, context):
                self.folder = context.system_properties["model_dir"]
                self.batch = context.system_properties["batch_size"]
                self.name = context.manifest["model"]["modelName"]
                self.settings = context.model_yaml_config
            def handle(self, data, context):
                with open(self.folder + "/names.txt") as file:
                    return [[self.name, self.batch, self.settings, file.read()]]
    """
    archive = mar(
        "m", code, more={"names.txt": "a b", "settings.yaml": "handler: {top: 3}\n"}, config_file="settings.yaml"
    )

    (answer,) = runner(archive, batch=4)(bodies(b"x"))

    assert json.loads(answer) == ["m", 4, {"handler": {"top": 3}}, "a b"]


def test_a_module_with_two_classes_is_refused(mar: Mar) -> None:
    with pytest.raises(RuntimeError, match=r"m\.mar: handler\.py has 2 classes, where one is meant"):
        runner(mar("m", "class A: ...\nclass B: ..."))


def test_an_archive_that_relies_on_a_handler_of_torchserve_is_refused(mar: Mar) -> None:
    with pytest.raises(RuntimeError, match=r"c\.mar: it holds no image_classifier\.py"):
        runner(with_handler(mar("m", MODULE), "image_classifier"))


BASE_HANDLER = """
    import torch
    from ts.torch_handler.base_handler import BaseHandler

    class Double(BaseHandler):
        def preprocess(self, data):
            return torch.stack([torch.tensor(float(bytes(row["body"]))) for row in data])
"""
EAGER = """
    import torch
    class Times(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.by = torch.nn.Parameter(torch.tensor(1.0))
        def forward(self, x):
            return x * self.by
"""


def weights(by: float) -> bytes:
    buffer = io.BytesIO()
    torch.save({"by": torch.tensor(by)}, buffer)
    return buffer.getvalue()


def test_a_base_handler_with_an_eager_model_runs(mar: Mar) -> None:
    """Its own code loads the model, asks the context for headers, and adds a metric to each call."""
    more = {"model.py": EAGER, "model.pt": weights(2.0)}
    run = runner(mar("m", BASE_HANDLER, more=more, model_file="model.py", serialized_file="model.pt"), batch=4)

    assert run(bodies(b"1.5", b"2")) == [b"3.0", b"4.0"]


def test_a_base_handler_with_a_torchscript_model_runs(mar: Mar) -> None:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Softplus(), torch.zeros(2)), buffer)
    run = runner(mar("m", BASE_HANDLER, more={"model.pt": buffer.getvalue()}, serialized_file="model.pt"))

    (answer,) = run(bodies(b"0"))

    assert json.loads(answer) == pytest.approx(0.6931, abs=1e-4)


def test_two_archives_whose_files_have_the_same_names_do_not_meet(mar: Mar) -> None:
    """In TorchServe each has a process of its own; `import model` must give each its own `model.py`."""
    before = set(sys.modules)
    double, negative = (
        runner(
            mar(
                name,
                BASE_HANDLER,
                more={"model.py": code, "model.pt": weights(2.0)},
                model_file="model.py",
                serialized_file="model.pt",
            )
        )
        for name, code in (("double", EAGER), ("negative", EAGER.replace("* self.by", "* -self.by")))
    )

    assert (double(bodies(b"3")), negative(bodies(b"3"))) == ([b"6.0"], [b"-6.0"])
    assert "model" not in set(sys.modules) - before


def test_an_archives_files_go_when_its_runner_goes(mar: Mar) -> None:
    run = runner(mar("m", MODULE))
    folder = Path(run.context.system_properties["model_dir"])
    assert folder.is_dir()

    del run

    assert not folder.exists()


def test_a_status_that_a_handler_sets_is_the_answer_of_that_row(mar: Mar) -> None:
    code = """
        def handle(data, context):
            if data is None: return
            for i, row in enumerate(data):
                if bytes(row["body"]) == b"odd":
                    context.set_response_status(code=418, phrase="teapot", idx=i)
            return ["short and stout"] * len(data)
    """
    run = runner(mar("m", code))

    assert run(bodies(b"even", b"odd")) == [b"short and stout", Failure(418, "short and stout", "HandlerError", "m")]
    assert run(bodies(b"even", b"even")) == [b"short and stout"] * 2


def test_rows_that_fail_together_are_tried_alone(mar: Mar, caplog: pytest.LogCaptureFixture) -> None:
    code = """
        def handle(data, context):
            if data is None: return
            if any(bytes(row["body"]) == b"bad" for row in data): raise KeyError("secret")
            return [bytes(row["body"]) for row in data]
    """
    with caplog.at_level(logging.ERROR):
        answers = runner(mar("m", code), batch=3)(bodies(b"a", b"bad", b"c"))

    assert answers == [b"a", Failure(500, "m failed; the log says why.", "HandlerError", "m"), b"c"]
    assert "secret" in caplog.text


def test_an_answer_that_cannot_be_written_is_a_failure_of_its_row_alone(mar: Mar) -> None:
    code = """
        def handle(data, context):
            return data and [object() if bytes(row["body"]) == b"bad" else "well" for row in data]
    """
    answers = runner(mar("m", code), batch=3)(bodies(b"a", b"bad", b"c"))

    assert [a if isinstance(a, bytes) else a.status for a in answers] == [b"well", 500, b"well"]


def test_a_handler_that_answers_only_the_first_row_is_asked_row_by_row(mar: Mar) -> None:
    """Many a handler reads `data[0]` and answers with a list of one."""
    code = "def handle(data, context): return data and [bytes(data[0]['body'])]"

    assert runner(mar("m", code), batch=3)(bodies(b"a", b"b", b"c")) == [b"a", b"b", b"c"]


@pytest.mark.parametrize("answer", ["'text'", "None", "{}", "[]", "[1, 2]"])
def test_an_answer_that_is_no_list_as_long_as_the_batch_is_a_failure(mar: Mar, answer: str) -> None:
    run = runner(mar("m", f"def handle(data, context): return None if data is None else {answer}"))

    assert run(bodies(b"x")) == [
        Failure(500, "m must answer with a list as long as its batch, 1.", "HandlerError", "m")
    ]


def test_one_batch_is_inside_at_a_time(mar: Mar) -> None:
    """Such handlers keep state between their stages."""
    code = """
        import threading
        lock = threading.Lock()
        def handle(data, context):
            if data is None: return
            free = lock.acquire(blocking=False)
            threading.Event().wait(0.005)
            if free: lock.release()
            return ["alone" if free else "met"]
    """
    run = runner(mar("m", code))
    answers: list[object] = []
    threads = [threading.Thread(target=lambda: answers.extend(run(bodies(b"x")))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert answers == [b"alone"] * 8


def test_a_handler_is_given_bytearrays_as_torchserve_gives_them(mar: Mar) -> None:
    run = runner(mar("m", "def handle(data, context): return data and [type(row['body']).__name__ for row in data]"))

    assert run([{"body": b"x"}, {"body": {"a": 1}}]) == [b"bytearray", b"dict"]


def test_an_answer_is_encoded_as_torchserve_does() -> None:
    from ts.context import Context, RequestProcessor
    from ts.protocol.otf_message_handler import create_predict_response

    context = Context("m", "", {}, 1, None, "")
    for answer in (b"\x00", bytearray(b"a"), "ü", {"a": 1}, [1, None], 3, True, torch.arange(3.0)):
        context.request_processor = [RequestProcessor({})]
        message = create_predict_response([answer], {0: "id"}, "ok", 200, context=context)

        assert bytes(message).removesuffix(b"\xff\xff\xff\xff").endswith(as_bytes(answer))
