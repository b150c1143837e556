"""TorchServe's own handlers run in this process as they are."""

from __future__ import annotations

import inspect
import io
import json
import logging
import socket
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.unit.conftest import Mar
from torchserve_dag.runtime.compat.context import Context, RequestProcessor
from torchserve_dag.runtime.compat.runner import Row, TorchServeRunner, as_bytes
from torchserve_dag.runtime.messages import Failure, Label, Labels, Photo, Text

MODULE = """
    STATE = {}
    def handle(data, context):
        if data is None:
            STATE["loads"] = STATE.get("loads", 0) + 1
            return None
        return [{"loads": STATE["loads"], "size": len(row["body"])} for row in data]
"""


def runner(archive: Path, *, batch: int = 1, gives: Any = bytes) -> TorchServeRunner:
    return TorchServeRunner.of_archive(archive.stem, archive, None, batch, gives=gives)


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


def bodies(*texts: bytes) -> list[Row]:
    return [Row({"body": text}) for text in texts]


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


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("class A: ...\nclass B: ...", "m.mar: handler.py has neither a function handle nor exactly one class"),
        ("x = 1", "m.mar: handler.py has neither a function handle nor exactly one class"),
        ("import no_such_package", "m.mar: loading it raised ModuleNotFoundError: No module named 'no_such_package'"),
        ("def handle(data, context): return [len(data)]", "m.mar: loading it raised TypeError: "),
        ("async def handle(data, context): return data", "m.mar: handle is a coroutine"),
        (
            "class A:\n def initialize(self, context): raise RuntimeError('no weights')\n def handle(self, data, context): ...",
            "m.mar: no weights",
        ),
    ],
)
def test_a_handler_that_cannot_be_loaded_is_refused_with_the_reason(mar: Mar, code: str, why: str) -> None:
    before = set(sys.modules)
    with pytest.raises(RuntimeError) as caught:
        runner(mar("m", code))

    assert str(caught.value).startswith(why)
    assert not {name for name in set(sys.modules) - before if "folder" in name}


def test_an_archive_may_name_a_handler_of_torchserves(mar: Mar) -> None:
    """Its own handlers need libraries that may not be here; the base class needs none."""
    more = {"model.py": EAGER, "model.pt": weights(2.0)}
    archive = mar("m", MODULE, more=more, model_file="model.py", serialized_file="model.pt")
    run = runner(with_handler(archive, "base_handler"))

    assert isinstance(run([{"not": "a tensor"}])[0], Failure)
    assert type(run._handle.__self__).__name__ == "BaseHandler"  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"c\.mar: its handler is TorchServe's image_classifier, which cannot be"):
        runner(with_handler(archive, "image_classifier"))
    with pytest.raises(RuntimeError, match=r"c\.mar: it holds no nonesuch\.py, and TorchServe has no handler of that"):
        runner(with_handler(archive, "nonesuch.py"))


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


def test_a_handler_is_given_bytearrays_as_torchserve_gives_them(mar: Mar) -> None:
    run = runner(mar("m", "def handle(data, context): return data and [type(row['body']).__name__ for row in data]"))

    assert run([Row({"body": b"x"}), Row({"body": {"a": 1}})]) == [b"bytearray", b"dict"]


def test_a_handler_may_change_what_it_is_given(mar: Mar) -> None:
    """The row that is tried again is whole."""
    code = """
        seen = []
        def handle(data, context):
            if data is None: return
            seen.append(1)
            value = data[0].pop("body")
            value["a"].append(1)
            if len(seen) == 1: raise RuntimeError("once")
            return [value]
    """
    run, row = runner(mar("m", code)), Row({"body": {"a": []}})

    assert [type(run([row])[0]), json.loads(run([row])[0])] == [Failure, {"a": [1]}]
    assert row.values == {"body": {"a": []}}


# Messages, as a node of a workflow of ours gives and takes them.


@dataclass(frozen=True)
class Found:
    text: str
    size: int


SHOW_BODY = """
    def handle(data, context):
        if data is None: return None
        bodies = [row["body"] for row in data]
        return [{"text": type(one).__name__, "size": len(one)} for one in bodies]
"""


@pytest.mark.parametrize(
    ("message", "kind", "size"),
    [
        (b"abc", "bytearray", 3),
        (Text("gr\u00fc\u00df"), "bytearray", 6),
        ("text", "str", 4),
        (Found("a", 1), "dict", 2),
        (Labels([Label("a", 0.5)]), "dict", 1),
        ([Found("a", 1)], "list", 1),
        ({"a": 1}, "dict", 1),
    ],
)
def test_a_message_is_handed_over_as_torchserve_would_have_it(mar: Mar, message: Any, kind: str, size: int) -> None:
    assert runner(mar("m", SHOW_BODY), gives=Found)([message]) == [Found(kind, size)]


def test_a_photo_is_handed_over_as_the_bytes_of_a_file(mar: Mar) -> None:
    code = """
        import io
        from PIL import Image
        def handle(data, context):
            return data and [{"text": str(Image.open(io.BytesIO(r["body"])).getpixel((0, 0))), "size": 0} for r in data]
    """
    photo = Photo(Image.new("RGB", (4, 4), (10, 20, 30)))

    assert runner(mar("m", code), gives=Found)([photo]) == [Found("(10, 20, 30)", 0)]


@pytest.mark.parametrize(
    ("answer", "gives", "expected"),
    [
        ("{'a': 1}", Any, {"a": 1}),
        ("'no JSON'", Any, b"no JSON"),
        ("b''", Any, b""),
        ("b''", bytes, b""),
        ("'plain'", Text, Text("plain")),
        ("{'text': 'ours'}", Text, Text("ours")),
        ("{'tabby': 0.5}", dict[str, float], {"tabby": 0.5}),
        ("[{'name': 'a', 'score': 1}]", list[Label], [Label("a", 1.0)]),
        ("0.5", float, 0.5),
    ],
)
def test_an_answer_becomes_the_type_that_is_declared(mar: Mar, answer: str, gives: Any, expected: Any) -> None:
    run = runner(mar("m", f"def handle(data, context): return data and [{answer}]"), gives=gives)

    assert run([b"x"]) == [expected]


def test_an_answer_of_another_type_is_the_handlers_failure(mar: Mar) -> None:
    """And not its client's: a 4xx would say that the request has to be mended."""
    (failure,) = runner(mar("m", "def handle(data, context): return data and ['text']"), gives=Labels)([b"x"])

    assert (failure.status, failure.type, failure.node) == (500, "HandlerError", "m")
    assert failure.message.startswith("m did not answer with JSON with the keys labels.")


# What a handler asks of TorchServe.


def test_a_prediction_exception_says_its_status_and_message(mar: Mar) -> None:
    code = """
        from ts.utils.util import PredictionException
        def handle(data, context):
            if data is None: return
            if bytes(data[0]["body"]) == b"odd" or len(data) > 1: raise PredictionException("Too odd.", 422)
            if bytes(data[0]["body"]) == b"big": raise MemoryError
            return ["well"]
    """
    answers = runner(mar("m", code), batch=3)(bodies(b"even", b"odd", b"big"))

    assert answers[:2] == [b"well", Failure(422, "Too odd.", "HandlerError", "m")]
    assert answers[2].status == 507


def test_every_kind_of_metric_may_be_added(mar: Mar) -> None:
    code = """
        class Counts:
            def initialize(self, context):
                self.made = context.metrics.add_metric_to_cache("n", "count")
            def handle(self, data, context):
                context.metrics.add_counter("a", 1, 0)
                context.metrics.add_time("b", 2.5, None, "ms")
                context.metrics.add_size("c", 1)
                context.metrics.add_percent("d", 1)
                context.metrics.add_error("e", "f")
                context.metrics.add_metric("g", 1, "count")
                context.metrics.get_metric("a").add_or_update(1, [])
                self.made.add_or_update(len(data))
                return ["counted"]
    """
    assert runner(mar("m", code))(bodies(b"x")) == [b"counted"]


def test_a_handler_sees_its_own_rows_headers(mar: Mar) -> None:
    code = """
        def handle(data, context):
            return data and [
                [context.get_request_header(i, "X-One"), context.get_all_request_header(i).get("body"),
                 context.get_request_id(i) == context.request_ids[i]]
                for i in range(len(data))
            ]
    """
    rows = [Row({"body": b""}, {"X-One": "1"}), Row({"body": b""}, {"body": {"content-type": "a/b"}})]

    answers = runner(mar("m", code), batch=2)(rows)

    assert [json.loads(one) for one in answers] == [["1", None, True], [None, {"content-type": "a/b"}, True]]


def test_the_context_has_what_torchserves_has() -> None:
    from ts.context import Context as Theirs
    from ts.context import RequestProcessor as TheirProcessor

    theirs, ours = Theirs("m", "", {}, 1, None, "0.12.0", model_yaml_config={}), Context("m", Path(), None, 1)

    assert _public(theirs) - _public(ours) <= {
        "header_key_sequence_id",
        "header_key_sequence_start",
        "header_key_sequence_end",
    }
    assert _public(TheirProcessor({})) == _public(RequestProcessor({}))
    assert theirs.system_properties.keys() == ours.system_properties.keys()
    for name in _public(TheirProcessor({})):
        assert _parameters(TheirProcessor, name) == _parameters(RequestProcessor, name)
    for name in _public(theirs) & _public(Theirs):
        if callable(getattr(Theirs, name)):
            assert _parameters(Theirs, name) == _parameters(Context, name)


def _public(one: object) -> set[str]:
    return {name for name in dir(one) if not name.startswith("_")}


def _parameters(kind: type, name: str) -> list[str]:
    return list(inspect.signature(getattr(kind, name)).parameters)


@pytest.mark.parametrize("media", ["application/json", "application/json5", "text/plain", "text/csv", "image/png", ""])
@pytest.mark.parametrize("body", [b'{"a": [1]}', b'{"a": ', "gr\u00fc\u00df".encode(), b"\xff"])
def test_a_request_is_decoded_as_torchserves_worker_does(media: str, body: bytes) -> None:
    from ts.protocol.otf_message_handler import _retrieve_input_data

    sent = b"".join(len(part).to_bytes(4, "big") + part for part in (b"data", media.encode(), body))
    connection, worker = socket.socketpair()
    with connection, worker:
        connection.sendall(sent)
        theirs = _retrieve_input_data(worker)["value"]

    row = Row.received({"data": bytearray(body)}, {"data": {"content-type": media}, "explain": "False"})

    assert row.values == {"data": theirs}
    assert type(row.values["data"]) is type(theirs)
    assert "explain" not in row.headers


def test_an_answer_is_encoded_as_torchserve_does() -> None:
    from ts.context import Context, RequestProcessor
    from ts.protocol.otf_message_handler import create_predict_response

    context = Context("m", "", {}, 1, None, "")
    for answer in (b"\x00", bytearray(b"a"), "ü", {"a": 1}, [1, None], 3, True, torch.arange(3.0)):
        context.request_processor = [RequestProcessor({})]
        message = create_predict_response([answer], {0: "id"}, "ok", 200, context=context)

        assert bytes(message).removesuffix(b"\xff\xff\xff\xff").endswith(as_bytes(answer))
