"""The Open Inference Protocol of the direct host: messages as tensors, over REST and gRPC."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.unit.test_dev import WITHIN_S, Dev, until
from torchserve_dag.archives.build import build
from torchserve_dag.archives.mar import read_json
from torchserve_dag.dev.loader import DevLoader
from torchserve_dag.direct.entrance import Entrance
from torchserve_dag.direct.open_inference import calls, grpc, rest
from torchserve_dag.direct.open_inference.calls import LARGE, OpenInference
from torchserve_dag.direct.open_inference.protos import open_inference_grpc_pb2 as pb
from torchserve_dag.direct.open_inference.requests import MAX_REQUESTS, Caller
from torchserve_dag.direct.open_inference.tensors import InferenceError, Tensor, from_raw, to_raw
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.worker.protocol import Service, ServiceRequest, ServiceResponse

FUNCTIONS = """
import enum
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from torchserve_dag import Box, InputError, Label, Labels, Photo, Text

@dataclass(frozen=True)
class Captioned:
    photo: Photo
    caption: str
    note: Text
    sizes: list[int]
    about: dict[str, Any]
    mask: Photo | None = None

@dataclass(frozen=True)
class Row:
    matrix: list[list[float]]
    count: int
    fast: bool
    words: list[str]
    style: Literal["plain", "bold"]
    note: Text
    about: dict[str, Any]
    scale: float = 1.0

@dataclass(frozen=True)
class Seen:
    matrix: list[list[float]]
    count: int
    fast: bool
    words: list[str]
    note: Text
    best: Label | None

def text(message: Text, parameters: dict[str, str]) -> Text:
    if message.text == "bad":
        raise InputError("That text is bad.", 422)
    if message.text == "broken":
        raise RuntimeError("broken")
    return Text(message.text.upper() + parameters.get("mark", ""))

def photo(message: Photo) -> Photo: return Photo(message.image.rotate(90, expand=True))
def size(message: Photo) -> list[int]: return [message.width, message.height]
def raw(message: bytes) -> bytes: return message[::-1]
def total(message: list[float]) -> float: return sum(message)
def words(message: Text) -> list[str]: return message.text.split()
def scored(message: Text) -> Labels: return Labels([Label(word, 1.0) for word in message.text.split()])
def anything(message: Any) -> Any: return message
def boxed(message: Box) -> int: return int(message.right - message.left)
def large(message: int) -> int: return 2 ** message
def seen(message: Row) -> Seen:
    best = Label(message.style, message.scale) if message.count else None
    return Seen(message.matrix, message.count, message.fast, message.words, message.note, best)
def captioned(message: Captioned) -> str:
    mask = message.mask.width if message.mask else None
    return f"{message.photo.width} {message.caption!r} {message.note.text!r} {message.sizes} {message.about} {mask}"
def spoken(message: Text) -> Iterator[Text]:
    for word in message.text.split():
        yield Text(word + ".")
def counted(message: int) -> Iterator[int]:
    yield from range(message)
def gated(message: Text) -> Text:
    if message.text == "bad":
        raise InputError("That text is bad.")
    gate = Path(message.text)
    gate.with_suffix(".begun").touch()
    end = time.monotonic() + 60
    while not gate.exists() and time.monotonic() < end:
        time.sleep(0.01)
    return message
def after(message: Text) -> Text:
    Path(message.text).with_suffix(".after").touch()
    return message
"""
OUTPUTS = {"twice": "{first: text, length: words}"}
NODES = {
    "twice": "  text: {function: text, inputs: {message: request, parameters: parameters}}\n"
    "  words: {function: words, inputs: {message: request}}",
    "text": "  text: {function: text, inputs: {message: request, parameters: parameters}}",
    "gated": "  gated: {function: gated, inputs: {message: request}}\n  after: {function: after, inputs: {message: gated}}",
}
ALONE = (
    "photo",
    "size",
    "raw",
    "total",
    "words",
    "scored",
    "anything",
    "boxed",
    "large",
    "seen",
    "captioned",
    "spoken",
)
NAMES = (*ALONE, "counted", *NODES)


def write_project(root: Path, *names: str) -> Path:
    (root / "workflows").mkdir()
    (root / "workflows" / "functions.py").write_text(FUNCTIONS)
    (root / "config.properties").write_text("max_request_size=2000000\n")
    for name in names:
        nodes = NODES.get(name, f"  {name}: {{function: {name}, inputs: {{message: request}}}}")
        output = OUTPUTS.get(name) or nodes.rsplit("\n", 1)[-1].strip().partition(":")[0]
        (root / "workflows" / f"{name}.yaml").write_text(
            f'name: {name}\nversion: "1.0"\ndoes: A test.\ncode: functions.py\nnodes:\n{nodes}\noutput: {output}\n'
            "serve: {timeout_s: 90}\n"
        )
    return root


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Service]]:
    state = DevLoader(Project(write_project(tmp_path_factory.mktemp("open"), *NAMES))).load()
    assert state.problems == []
    yield {name: service for (name, _), service in state.services.items()}
    for service in state.services.values():
        service.close()


def png(width: int = 4, height: int = 3) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


class Server:
    """The protocol in front of services, without a network."""

    def __init__(self, services: dict[str, Service]) -> None:
        self.services = services

    def _here(self) -> OpenInference:
        entrances = {name: Entrance(service) for name, service in self.services.items()}
        return OpenInference(
            lambda name, version: entrances.get(name) if version in {None, "1.0"} else None, lambda: ""
        )

    def rest(
        self, path: str, fields: Any = None, binary: bytes = b"", method: str = "", **headers: str
    ) -> ServiceResponse:
        body = b"" if fields is None else json.dumps(fields).encode()
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if binary:
            sent = {"inference-header-content-length": str(len(body)), **sent}
        method = method or ("GET" if fields is None else "POST")
        caller = Caller("id", sent, sent)

        async def ask() -> ServiceResponse:
            answer = rest.answer(self._here(), method, path, body + binary, caller)
            return await asyncio.wait_for(answer, WITHIN_S)

        return asyncio.run(ask())

    def infer(self, model: str, *inputs: dict[str, Any], **more: Any) -> ServiceResponse:
        return self.rest(f"/v2/models/{model}/infer", {"inputs": list(inputs), **more})

    def outputs(self, model: str, *inputs: dict[str, Any], **more: Any) -> dict[str, dict[str, Any]]:
        response = self.infer(model, *inputs, **more)
        assert response.status == 200, response.body
        return {output.pop("name"): output for output in json.loads(response.body)["outputs"]}

    def output(self, model: str, *inputs: dict[str, Any], **more: Any) -> dict[str, Any]:
        """The output of an answer that is one value."""
        return self.outputs(model, *inputs, **more)["output"]

    def refusal(self, model: str, *inputs: dict[str, Any], **more: Any) -> tuple[int, str]:
        response = self.infer(model, *inputs, **more)
        return response.status, json.loads(response.body)["error"]

    def grpc(self, call: str, message: Any) -> bytes:
        async def ask() -> bytes:
            answer = grpc.answer(self._here(), call, message.SerializeToString(), Caller("id"))
            return await asyncio.wait_for(answer, WITHIN_S)

        return asyncio.run(ask())


@pytest.fixture(scope="module")
def server(services: dict[str, Service]) -> Server:
    return Server(services)


def tensor(datatype: str, shape: list[int], data: list[Any], name: str = "input", **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": data, **more}


def texts(*data: str, name: str = "input") -> dict[str, Any]:
    return tensor("BYTES", [len(data)], list(data), name)


def coded(*data: bytes, name: str = "input") -> dict[str, Any]:
    values = [base64.b64encode(each).decode() for each in data]
    return tensor("BYTES", [len(data)], values, name, parameters={"content_type": "base64"})


def described(server: Server, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    found = json.loads(server.rest(f"/v2/models/{name}").body)
    assert (found["name"], found["versions"], found["platform"]) == (name, ["1.0"], "torchserve-dag_mar")
    return tuple(
        {one["name"]: (one["datatype"], one["shape"]) for one in found[side]} for side in ("inputs", "outputs")
    )  # type: ignore[return-value]


class TestMetadata:
    def test_of_the_server(self, server: Server) -> None:
        found = json.loads(server.rest("/v2").body)

        assert (found["name"], found["extensions"]) == ("torchserve-dag", ["binary_tensor_data"])
        assert json.loads(server.rest("/v2/health/live").body) == {"live": True}
        assert json.loads(server.rest("/v2/health/ready").body) == {"ready": True}
        assert json.loads(server.rest("/v2/models/text/ready").body) == {"name": "text", "ready": True}
        assert json.loads(server.rest("/v2/models/text/versions/1.0/ready").body) == {"name": "text", "ready": True}

    def test_one_value_is_called_input_or_output(self, server: Server) -> None:
        text, numbers = ("BYTES", [-1]), ("FP64", [-1, -1])

        assert described(server, "text") == ({"input": text}, {"output": text})
        assert described(server, "photo") == ({"input": text}, {"output": text})
        assert described(server, "total") == ({"input": numbers}, {"output": ("FP64", [-1])})
        assert described(server, "size")[1] == {"output": ("INT64", [-1, -1])}
        assert described(server, "spoken")[1] == {"output": text}

    def test_fields_have_tensors_of_their_own(self, server: Server) -> None:
        takes, answers = described(server, "seen")
        one = {"matrix": ("FP64", [-1, -1, -1]), "count": ("INT64", [-1]), "fast": ("BOOL", [-1])}
        words = {"words": ("BYTES", [-1, -1]), "note": ("BYTES", [-1])}

        assert takes == {**one, **words, "style": ("BYTES", [-1]), "about": ("BYTES", [-1]), "scale": ("FP64", [-1])}
        assert answers == {**one, **words, "best": ("BYTES", [-1])}
        assert described(server, "twice")[1] == {"first": ("BYTES", [-1]), "length": ("BYTES", [-1, -1])}
        assert list(described(server, "scored")[1]) == ["labels"]

    def test_the_archive_says_it(self, tmp_path: Path, services: dict[str, Service]) -> None:
        """A host knows no Python type of an archive."""
        project = write_project(tmp_path, "captioned")
        (built,) = build(Project(project), ["captioned"]).built
        said = read_json(built.path, "build.json")

        assert said["takes"] == {
            "fields": {
                "photo": "photo",
                "caption": "str",
                "note": "text",
                "sizes": "list[int]",
                "about": "json",
                "mask": "photo",
            },
            "optional": ["mask"],
        }
        assert said["answers"] == {"value": "str"}
        assert {key: services["captioned"].describe()[key] for key in ("takes", "answers")} == {
            key: said[key] for key in ("takes", "answers")
        }

    def test_an_archive_of_before_is_told_so(self, services: dict[str, Service]) -> None:
        class Before:
            name, version = "text", "1.0"

            def describe(self) -> dict[str, Any]:
                return {"name": "text", "protocol": 2}

        response = Server({"text": Before()}).rest("/v2/models/text")  # type: ignore[dict-item]

        assert response.status == 501
        assert "build it again" in json.loads(response.body)["error"]

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "/v2/models/none", 404),
            ("GET", "/v2/models/none/ready", 404),
            ("GET", "/v2/models/text/versions/2.0", 404),
            ("POST", "/v2/models/none/infer", 404),
            ("GET", "/v2/models/text/infer", 405),
            ("POST", "/v2/models/text", 405),
            ("POST", "/v2/health/live", 405),
            ("DELETE", "/v2", 405),
            ("GET", "/v2/models", 404),
            ("GET", "/v2/repository/index", 404),
            ("GET", "/v2/models/text/versions", 404),
        ],
    )
    def test_what_is_not_there(self, server: Server, method: str, path: str, status: int) -> None:
        response = server.rest(path, {"inputs": []} if path.endswith("infer") else None, method=method)

        assert response.status == status
        assert json.loads(response.body)["error"]


class TestMessages:
    def test_a_text_each(self, server: Server) -> None:
        assert server.output("text", texts("a", "ü", "c")) == {
            "datatype": "BYTES",
            "shape": [3],
            "data": ["A", "Ü", "C"],
        }

    def test_the_call_repeats_its_id_and_names_the_model(self, server: Server) -> None:
        found = json.loads(server.infer("text", texts("a"), id="42").body)

        assert (found["id"], found["model_name"], found["model_version"]) == ("42", "text", "1.0")
        assert "id" not in json.loads(server.infer("text", texts("a")).body)

    def test_the_calls_parameters_are_the_requests(self, server: Server) -> None:
        found = server.output("text", texts("a", "b"), parameters={"mark": "!", "other": True})

        assert found["data"] == ["A!", "B!"]

    def test_photos(self, server: Server) -> None:
        found = server.output("photo", coded(png(4, 3), png(2, 5)))
        sizes = [Image.open(io.BytesIO(base64.b64decode(each))).size for each in found["data"]]

        assert sizes == [(3, 4), (5, 2)]
        assert found["parameters"] == {"content_type": "base64"}
        assert server.output("size", coded(png(4, 3), png(2, 5))) == {
            "datatype": "INT64",
            "shape": [2, 2],
            "data": [4, 3, 2, 5],
        }

    def test_bytes(self, server: Server) -> None:
        found = server.output("raw", coded(b"\x00\xff"))

        assert base64.b64decode(found["data"][0]) == b"\xff\x00"

    @pytest.mark.parametrize("datatype", ["FP32", "FP64", "INT8", "UINT64"])
    @pytest.mark.parametrize("data", [[1, 2, 3, 4], [[1, 2], [3, 4]]])
    def test_numbers_of_any_type_flat_or_nested(self, server: Server, datatype: str, data: list[Any]) -> None:
        assert server.output("total", tensor(datatype, [2, 2], data)) == {
            "datatype": "FP64",
            "shape": [2],
            "data": [3.0, 7.0],
        }

    def test_lists_may_be_empty(self, server: Server) -> None:
        assert server.output("total", tensor("FP32", [2, 0], []))["data"] == [0.0, 0.0]

    def test_a_message_of_fields(self, server: Server) -> None:
        inputs = [
            tensor("FP32", [2, 2, 1], [0.5, 1, 2, 3], "matrix"),
            tensor("INT32", [2], [7, 0], "count"),
            tensor("BOOL", [2], [True, False], "fast"),
            tensor("BYTES", [2, 2], ["a", "b", "c", "d"], "words"),
            texts("bold", "plain", name="style"),
            texts("one", "two", name="note"),
            texts('{"k": [1]}', "{}", name="about"),
        ]
        found = server.outputs("seen", *inputs)

        assert found["matrix"] == {"datatype": "FP64", "shape": [2, 2, 1], "data": [0.5, 1.0, 2.0, 3.0]}
        assert found["count"] == {"datatype": "INT64", "shape": [2], "data": [7, 0]}
        assert found["fast"] == {"datatype": "BOOL", "shape": [2], "data": [True, False]}
        assert found["words"] == {"datatype": "BYTES", "shape": [2, 2], "data": ["a", "b", "c", "d"]}
        assert found["note"]["data"] == ["one", "two"]
        assert [json.loads(each) for each in found["best"]["data"]] == [{"name": "bold", "score": 1.0}, None]
        assert found["best"]["parameters"] == {"content_type": "application/json"}

    def test_a_message_with_a_photo_and_fields_beside_it(self, server: Server) -> None:
        inputs = [
            coded(png(4), png(5), name="photo"),
            texts("[1]", "", name="caption"),
            texts("n", "m", name="note"),
            tensor("INT64", [2, 1], [1, 2], "sizes"),
            texts('{"a": "b"}', "{}", name="about"),
        ]

        assert server.output("captioned", *inputs)["data"] == [
            "4 '[1]' 'n' [1] {'a': 'b'} None",
            "5 '' 'm' [2] {} None",
        ]
        with_mask = server.output("captioned", *inputs, coded(png(8), png(9), name="mask"))["data"]
        assert [each[-1] for each in with_mask] == ["8", "9"]

    def test_messages_in_messages_and_untyped_ones_are_json(self, server: Server) -> None:
        labels = server.outputs("scored", texts("a b", "c"))["labels"]
        back = server.output("anything", texts('{"a": [1, null]}', "5"))

        assert [len(json.loads(each)) for each in labels["data"]] == [2, 1]
        assert back["parameters"] == {"content_type": "application/json"}
        assert [json.loads(each) for each in back["data"]] == [{"a": [1, None]}, 5]

    def test_lists_of_several_lengths_are_json(self, server: Server) -> None:
        assert server.output("words", texts("a b", "c d")) == {
            "datatype": "BYTES",
            "shape": [2, 2],
            "data": list("abcd"),
        }
        assert server.output("words", texts("a b", "c")) == {
            "datatype": "BYTES",
            "shape": [2],
            "data": ['["a", "b"]', '["c"]'],
            "parameters": {"content_type": "application/json"},
        }

    def test_a_number_beyond_64_bits_is_json(self, server: Server) -> None:
        assert server.output("large", tensor("INT64", [2], [62, 3]))["data"] == [2**62, 8]
        assert server.output("large", tensor("INT64", [2], [64, 3]))["data"] == [str(2**64), "8"]

    def test_a_stream_is_one_answer(self, server: Server) -> None:
        assert server.output("spoken", texts("a b", "c"))["data"] == ["a.b.", "c."]
        assert server.output("counted", tensor("INT64", [1], [3]))["data"] == ["0\n1\n2\n"]

    def test_the_outputs_that_were_asked_for(self, server: Server) -> None:
        found = server.outputs("twice", texts("a b"), outputs=[{"name": "length"}])

        assert found == {"length": {"datatype": "BYTES", "shape": [1, 2], "data": ["a", "b"]}}
        assert list(server.outputs("twice", texts("a b"))) == ["first", "length"]

    def test_null_is_as_nothing(self, server: Server) -> None:
        inputs = texts("a") | {"parameters": None}

        assert server.output("text", inputs, id=None, parameters=None, outputs=None)["data"] == ["A"]

    def test_as_many_as_a_call_may_have(self, server: Server) -> None:
        found = server.output("text", texts(*(f"n{i}" for i in range(MAX_REQUESTS))))

        assert found["data"] == [f"N{i}" for i in range(MAX_REQUESTS)]

    def test_a_large_call_is_converted_beside_the_event_loop(self, server: Server) -> None:
        assert server.output("total", tensor("FP32", [1, LARGE], [1] * LARGE))["data"] == [LARGE]
        assert server.output("text", texts("a" * LARGE, "b"))["data"] == ["A" * LARGE, "B"]


BOX = [tensor("FP32", [1], [1], name) for name in ("left", "top", "right", "bottom")]


class TestRefusals:
    @pytest.mark.parametrize(
        ("model", "inputs", "what"),
        [
            ("text", [], 'The input "input" is missing'),
            ("text", [texts("a", name="text")], 'no input "text": the inputs are input'),
            ("text", [texts("a"), texts("a")], "came twice"),
            ("boxed", BOX[:2], 'The input "right", "bottom" is missing'),
            (
                "boxed",
                [*BOX[:3], tensor("FP32", [2], [1, 2], "bottom")],
                "same for all inputs; it is left 1, top 1, right 1, bottom 2",
            ),
            ("text", [tensor("INT64", [1], [1])], "is BYTES, not INT64"),
            ("total", [texts("a")], "is FP16 or BF16 or FP32"),
            ("large", [tensor("FP32", [1], [1])], "is INT8 or INT16"),
            (
                "total",
                [tensor("FP32", [3], [1, 2, 3])],
                "has the shape [3], and 2 dimensions are needed: the requests, then",
            ),
            (
                "text",
                [tensor("BYTES", [1, 1], ["a"])],
                "has the shape [1, 1], and 1 dimension is needed: the requests.",
            ),
            ("seen", [tensor("FP32", [1, 2, 0], [], "matrix")], "is missing"),
            ("text", [tensor("BYTES", [2], ["a"])], r"says 2 elements, and 1 came"),
            ("text", [tensor("BYTES", [], [])], "not the size of each of its dimensions"),
            ("text", [tensor("BYTES", [-1], ["a"])], "not the size of each of its dimensions"),
            ("text", [tensor("BYTES", [1.5], ["a"])], "a list of whole numbers"),
            ("text", [tensor("BYTES", [True], ["a"])], "a list of whole numbers"),
            ("text", [tensor("BYTES", [2**70], ["a"])], "not the size of each of its dimensions"),
            ("text", [tensor("BYTES", [0], [])], "has 0 requests"),
            ("text", [texts(*["a"] * (MAX_REQUESTS + 1))], "has 1,001 requests"),
            ("text", [tensor("STRING", [1], ["a"])], 'is "STRING", which is none'),
            ("text", [tensor("BYTES", [1], [5])], "whose elements are texts in JSON"),
            ("text", [tensor("BYTES", [1], ["\ud800"])], "half a surrogate pair"),
            ("photo", [tensor("BYTES", [1], ["?"], parameters={"content_type": "base64"})], "not base64"),
            ("total", [tensor("FP32", [2, 2], [[1, 2], [3]])], "lists of another shape"),
            ("total", [tensor("FP32", [2, 2], [[1], [2], [3], [4]])], "lists of another shape"),
            ("total", [tensor("FP32", [1, 2], [1, "2"])], "its element 1 is '2'"),
            ("total", [tensor("FP32", [1, 1], [math.nan])], "a number that is not finite"),
            ("total", [tensor("FP32", [1, 1], [True])], "its element 0 is True"),
            ("large", [tensor("INT8", [1], [128])], "is INT8, and its element 0 is 128"),
            ("large", [tensor("UINT8", [1], [-1])], "its element 0 is -1"),
            ("large", [tensor("INT8", [1], [1.0])], "its element 0 is 1.0"),
            ("text", [{"name": "input", "datatype": "BYTES", "shape": [1]}], "an input has no data, which is a list"),
            ("text", [{"datatype": "BYTES", "shape": [1], "data": ["a"]}], "an input has no name, which is text"),
            ("text", ["a"], "an input is no JSON object"),
        ],
    )
    def test_tensors_that_do_not_fit(self, server: Server, model: str, inputs: list[Any], what: str) -> None:
        status, message = server.refusal(model, *inputs)

        assert status == 400
        assert what in message
        assert len(message) < 400

    @pytest.mark.parametrize(
        ("about", "what"),
        [
            (texts('{"a": 1}, "count": 5', name="about"), 'The input "about" is not JSON'),
            (texts("{", name="about"), 'The input "about" is not JSON'),
            (texts("[" * 100_000, name="about"), 'The input "about" is not JSON'),
            (texts("[]", name="about"), "about: expected a mapping"),
        ],
    )
    def test_json_that_is_none_does_not_enter_the_message(self, server: Server, about: Any, what: str) -> None:
        inputs = [
            tensor("FP32", [1, 1, 1], [1], "matrix"),
            tensor("INT64", [1], [1], "count"),
            tensor("BOOL", [1], [True], "fast"),
            tensor("BYTES", [1, 0], [], "words"),
            texts("bold", name="style"),
            texts("a", name="note"),
        ]

        assert what in server.refusal("seen", *inputs, about)[1]
        assert "empty list" not in server.refusal("seen", *inputs, about)[1]

    def test_lists_that_hold_nothing_but_lists_that_hold_nothing(self, server: Server) -> None:
        """A shape may say so many of them that their lists alone would fill the memory."""
        inputs = [texts("a", name=name) for name in ("style", "note", "about")]
        more = [
            tensor("INT64", [1], [1], "count"),
            tensor("BOOL", [1], [True], "fast"),
            tensor("BYTES", [1, 0], [], "words"),
        ]
        matrix = tensor("FP32", [1, 2**40, 0], [], "matrix")

        assert "its lists hold nothing" in server.refusal("seen", *inputs, *more, matrix)[1]

    def test_one_that_fails_is_named(self, server: Server) -> None:
        assert server.refusal("text", texts("a", "b", "bad", "d")) == (
            422,
            "Element 2 of 4, counted from 0: That text is bad.",
        )
        assert server.refusal("text", texts("bad")) == (422, "That text is bad.")
        status, message = server.refusal("size", coded(png(), b"no photo"))
        assert (status, message.startswith("Element 1 of 2, counted from 0: The body is not a photo")) == (415, True)
        assert (
            server.refusal("text", tensor("BYTES", [2], ["a", "/w=="], parameters={"content_type": "base64"}))[0] == 400
        )

    def test_answers_are_together_no_larger_than_a_limit(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(calls, "MAX_ANSWER", 100)

        assert server.refusal("text", texts("a" * 40, "b" * 40)) == (
            413,
            "The answers are together larger than 100 bytes: send fewer requests in a call.",
        )

    def test_a_fault_of_the_models_names_the_request_in_the_log(self, server: Server) -> None:
        status, message = server.refusal("text", texts("a", "broken"))

        assert status == 500
        assert "torchserve-dag logs --request id-1 says why" in message

    @pytest.mark.parametrize(
        ("more", "what"),
        [
            ({"outputs": [{"name": "none"}]}, 'There is no output "none": the outputs are output.'),
            (
                {"outputs": [{"name": "output", "parameters": {"classification": 3}}]},
                '"classification", which is not known',
            ),
            ({"outputs": ["output"]}, "an output is no JSON object"),
            ({"id": 5}, "has no id, which is text"),
            ({"parameters": []}, "has no parameters, which is a JSON object"),
        ],
    )
    def test_requests_that_are_not_right(self, server: Server, more: dict[str, Any], what: str) -> None:
        status, message = server.refusal("text", texts("a"), **more)

        assert status == 400
        assert what in message

    @pytest.mark.parametrize(
        ("body", "headers", "status", "what"),
        [
            (b"", {}, 400, "not valid JSON"),
            (b"[]", {}, 400, "the request is no JSON object"),
            (b"{", {}, 400, "not valid JSON"),
            (b"[" * 100_000, {}, 400, "not valid JSON"),
            (b"{}", {}, 400, "has no inputs"),
            (b"{}", {"inference-header-content-length": "3"}, 400, "is the length of the JSON"),
            (b"{}", {"inference-header-content-length": "-1"}, 400, "is the length of the JSON"),
            (b"{}", {"inference-header-content-length": "0" * 20 + "2"}, 400, "is the length of the JSON"),
            (b'{"inputs": []}abc', {"inference-header-content-length": "14"}, 400, "3 bytes follow the JSON"),
            (b"{}", {"content-encoding": "gzip"}, 415, "cannot be compressed"),
            (json.dumps({"inputs": [texts("a")]}).encode(), {"x-outputs": "a"}, 400, "name the outputs in the request"),
            (json.dumps({"inputs": [texts("a")]}).encode(), {"x-cancel": "a"}, 400, "send it to /predictions/NAME"),
            (json.dumps({"inputs": [texts("a")]}).encode(), {"x-timeout-ms": "soon"}, 400, "a number of milliseconds"),
        ],
    )
    def test_bodies_and_headers_that_are_not_right(
        self, server: Server, body: bytes, headers: dict[str, str], status: int, what: str
    ) -> None:
        async def ask() -> ServiceResponse:
            return await rest.answer(
                server._here(), "POST", "/v2/models/text/infer", body, Caller("id", headers, headers)
            )

        response = asyncio.run(ask())
        assert response.status == status
        assert what in json.loads(response.body)["error"]


def raw_bytes(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(each)) + each for each in elements)


class TestBinaryTensors:
    def binary(self, datatype: str, shape: list[int], size: Any) -> dict[str, Any]:
        return {"name": "input", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}

    def test_in_and_out(self, server: Server) -> None:
        raw = raw_bytes(png(4, 3), png(2, 5))
        fields = {"inputs": [self.binary("BYTES", [2], len(raw))], "parameters": {"binary_data_output": True}}
        response = server.rest("/v2/models/size/infer", fields, raw)
        end = int(response.headers["Inference-Header-Content-Length"])
        (output,) = json.loads(response.body[:end])["outputs"]

        assert response.content_type == "application/octet-stream"
        assert output == {
            "name": "output",
            "datatype": "INT64",
            "shape": [2, 2],
            "parameters": {"binary_data_size": 32},
        }
        assert np.frombuffer(response.body[end:], "<i8").tolist() == [4, 3, 2, 5]

    def test_some_inputs_in_json_and_some_outputs(self, server: Server) -> None:
        raw = np.array([1, 2, 3, 4], "<f4").tobytes()
        inputs = [{**self.binary("FP32", [1, 2, 2], 16), "name": "matrix"}]
        inputs += [tensor("INT64", [1], [5], "count"), tensor("BOOL", [1], [True], "fast"), texts("bold", name="style")]
        inputs += [tensor("BYTES", [1, 1], ["w"], "words"), texts("n", name="note"), texts("{}", name="about")]
        outputs = [{"name": "count"}, {"name": "words", "parameters": {"binary_data": True}}]
        response = server.rest("/v2/models/seen/infer", {"inputs": inputs, "outputs": outputs}, raw)
        end = int(response.headers["Inference-Header-Content-Length"])
        count, words = json.loads(response.body[:end])["outputs"]

        assert count["data"] == [5]
        assert (words["shape"], response.body[end:]) == ([1, 1], raw_bytes(b"w"))

    @pytest.mark.parametrize(
        ("datatype", "shape", "size", "raw", "what"),
        [
            ("FP32", [1, 2], 8, b"1234567", "more than the body has left"),
            ("FP32", [1, 2], "8", b"12345678", "more than the body has left"),
            ("FP32", [1, 2], 7, b"1234567", "2 elements of 4 bytes each, and 7 bytes came"),
            ("FP32", [1, 2], 8, b"123456789", "1 bytes follow the JSON"),
            ("BYTES", [1, 1], 3, b"\x01\x00\x00", "end within an element"),
            ("BYTES", [1, 1], 5, b"\x02\x00\x00\x00a", "end within an element"),
            ("BYTES", [1, 1], 9, raw_bytes(b"a", b""), "says 1 elements, and 2 came"),
        ],
    )
    def test_what_does_not_fit(
        self, server: Server, datatype: str, shape: list[int], size: Any, raw: bytes, what: str
    ) -> None:
        response = server.rest("/v2/models/total/infer", {"inputs": [self.binary(datatype, shape, size)]}, raw)

        assert response.status == 400
        assert what in json.loads(response.body)["error"]

    @pytest.mark.parametrize(
        ("datatype", "raw"),
        [
            ("BOOL", b"\x01\x00"),
            ("INT8", b"\x01\xff"),
            ("UINT16", b"\x01\x00\xff\xff"),
            ("INT64", np.array([1, -(2**63)], "<i8").tobytes()),
            ("FP16", np.array([1, -0.5], "<f2").tobytes()),
            ("FP64", np.array([1, 1e300], "<f8").tobytes()),
            ("BYTES", raw_bytes(b"", b"\xff\x00")),
        ],
    )
    def test_every_datatype_comes_back(self, datatype: str, raw: bytes) -> None:
        assert to_raw(from_raw("a", datatype, [2], raw)) == raw

    def test_bf16_is_the_upper_half_of_a_float(self) -> None:
        raw = np.array([1.5, -2], "<f4").view("<u4") >> 16

        assert from_raw("a", "BF16", [2], raw.astype("<u2").tobytes()) == Tensor("a", "BF16", [2], [1.5, -2.0])


class TestGrpc:
    """Messages without frames."""

    def call(self, model: str = "text", **more: Any) -> Any:
        return pb.ModelInferRequest(model_name=model, **more)

    def input(self, datatype: str, shape: list[int], name: str = "input", **contents: Any) -> Any:
        kind = pb.ModelInferRequest.InferInputTensor
        return kind(name=name, datatype=datatype, shape=shape, contents=contents or None)

    def test_the_server_and_the_models(self, server: Server) -> None:
        live = pb.ServerLiveResponse.FromString(server.grpc("ServerLive", pb.ServerLiveRequest()))
        ready = pb.ServerReadyResponse.FromString(server.grpc("ServerReady", pb.ServerReadyRequest()))
        about = pb.ServerMetadataResponse.FromString(server.grpc("ServerMetadata", pb.ServerMetadataRequest()))
        one = server.grpc("ModelReady", pb.ModelReadyRequest(name="text", version="1.0"))
        seen = pb.ModelMetadataResponse.FromString(server.grpc("ModelMetadata", pb.ModelMetadataRequest(name="seen")))

        assert live.live
        assert ready.ready
        assert about.name == "torchserve-dag"
        assert pb.ModelReadyResponse.FromString(one).ready
        assert (seen.name, list(seen.versions)) == ("seen", ["1.0"])
        assert {each.name: (each.datatype, list(each.shape)) for each in seen.outputs}["matrix"] == ("FP64", [-1] * 3)

    @pytest.mark.parametrize(
        ("datatype", "contents"),
        [
            ("FP32", {"fp32_contents": [0.5, 1.0]}),
            ("FP64", {"fp64_contents": [0.5, 1.0]}),
            ("INT8", {"int_contents": [0, 1]}),
            ("INT64", {"int64_contents": [0, 1]}),
            ("UINT16", {"uint_contents": [0, 1]}),
            ("UINT64", {"uint64_contents": [0, 1]}),
        ],
    )
    def test_contents_by_their_type(self, server: Server, datatype: str, contents: Any) -> None:
        call = self.call("total", inputs=[self.input(datatype, [1, 2], **contents)], id="42")
        found = pb.ModelInferResponse.FromString(server.grpc("ModelInfer", call))

        assert (found.model_name, found.model_version, found.id) == ("total", "1.0", "42")
        assert list(found.outputs[0].contents.fp64_contents) == [1.5 if datatype.startswith("FP") else 1.0]
        assert not found.raw_output_contents

    def test_raw_is_answered_raw(self, server: Server) -> None:
        call = self.call(inputs=[self.input("BYTES", [2])], raw_input_contents=[raw_bytes(b"a", b"b")])
        call.parameters["mark"].string_param = "!"
        found = pb.ModelInferResponse.FromString(server.grpc("ModelInfer", call))

        assert list(found.raw_output_contents) == [raw_bytes(b"A!", b"B!")]
        assert not found.outputs[0].HasField("contents")

    def test_outputs_that_are_json_say_so(self, server: Server) -> None:
        call = self.call("scored", inputs=[self.input("BYTES", [1], bytes_contents=[b"a b"])])
        (output,) = pb.ModelInferResponse.FromString(server.grpc("ModelInfer", call)).outputs

        assert output.parameters["content_type"].string_param == "application/json"
        assert len(json.loads(output.contents.bytes_contents[0])) == 2

    @pytest.mark.parametrize(
        ("call", "message", "status", "what"),
        [
            ("ModelInfer", {"model_name": "none"}, 404, "Model not found: none"),
            ("ModelInfer", {"model_name": "text", "model_version": "2"}, 404, "Model not found: version 2 of text"),
            ("ModelInfer", {"model_name": "text"}, 400, 'The input "input" is missing'),
            (
                "ModelInfer",
                {"model_name": "total", "inputs": [{"name": "input", "datatype": "FP16", "shape": [1, 1]}]},
                400,
                "sent in raw_input_contents",
            ),
            (
                "ModelInfer",
                {"model_name": "total", "inputs": [{"name": "input", "datatype": "half", "shape": [1, 1]}]},
                400,
                'is "half", which is none',
            ),
            ("ModelInfer", {"model_name": "text", "raw_input_contents": [b""]}, 400, "one for each input"),
            (
                "ModelInfer",
                {
                    "model_name": "text",
                    "inputs": [
                        {"name": "input", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [b"bad"]}}
                    ],
                },
                422,
                "That text is bad.",
            ),
            (
                "ModelInfer",
                {
                    "model_name": "text",
                    "outputs": [{"name": "output", "parameters": {"classification": {"int64_param": 1}}}],
                },
                400,
                '"classification", which is not known here',
            ),
            ("ModelStreamInfer", {}, 501, 'has no call "ModelStreamInfer"'),
        ],
    )
    def test_failures_have_a_status_and_a_sentence(
        self, server: Server, call: str, message: dict[str, Any], status: int, what: str
    ) -> None:
        with pytest.raises(InferenceError, match=what) as caught:
            server.grpc(call, pb.ModelInferRequest(**message))

        assert caught.value.status == status

    def test_a_message_that_is_none(self, server: Server) -> None:
        async def ask() -> bytes:
            return await grpc.answer(server._here(), "ModelInfer", b"\xff", Caller("id"))

        with pytest.raises(InferenceError, match="is no ModelInferRequest"):
            asyncio.run(ask())


class TestRequests:
    """What a call's requests have of the call, and what becomes of them."""

    def test_they_enter_together_and_have_their_call_s_options(self, services: dict[str, Service]) -> None:
        recording = Recording(services["text"])
        headers = {"x-priority": "bulk", "x-other": "1"}
        server = Server({"text": recording})  # type: ignore[dict-item]
        server.rest("/v2/models/text/infer", {"inputs": [texts("a", "b", "c")]}, **headers)

        assert [request.id for request in recording.requests] == ["id-0", "id-1", "id-2"]
        assert recording.blocks == 1
        assert all(request.options == request.headers == headers for request in recording.requests)

    def test_the_first_failure_cancels_the_others(self, server: Server, tmp_path: Path) -> None:
        gates = [tmp_path / f"{i}.gate" for i in range(2)]
        status, message = server.refusal("gated", texts("bad", *map(str, gates)))
        for gate in gates:
            gate.touch()
        assert server.output("text", texts("a"))["data"] == ["A"]

        assert (status, message) == (400, "Element 0 of 3, counted from 0: That text is bad.")
        assert list(tmp_path.glob("*.after")) == []

    def test_a_call_that_is_cancelled_cancels_them(self, server: Server, tmp_path: Path) -> None:
        gates = [tmp_path / f"{i}.gate" for i in range(3)]
        body = json.dumps({"inputs": [texts(*map(str, gates))]}).encode()

        async def ask_and_leave() -> None:
            answer = rest.answer(server._here(), "POST", "/v2/models/gated/infer", body, Caller("id"))
            asking = asyncio.ensure_future(answer)
            await asyncio.to_thread(until, gates[0].with_suffix(".begun").exists)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

        asyncio.run(ask_and_leave())
        for gate in gates:
            gate.touch()

        assert server.output("gated", texts(str(gates[0])))["data"] == [str(gates[0])]
        assert [path.name for path in tmp_path.glob("*.after")] == ["0.after"]


class Recording:
    """A service that notes what it is asked, in front of a real one."""

    def __init__(self, service: Service) -> None:
        self.service, self.blocks = service, 0
        self.requests: list[ServiceRequest] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.service, name)

    def together(self) -> Any:
        self.blocks += 1
        return self.service.together()

    def submit(self, request: ServiceRequest, on_chunk: Any = None) -> Any:
        self.requests.append(request)
        return self.service.submit(request, on_chunk)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dev]:
    running = Dev(write_project(tmp_path_factory.mktemp("served"), "text", "size", "gated"))
    yield running
    running.end()


class TestOverTheNetwork:
    def test_rest(self, dev: Dev) -> None:
        with dev.http() as http:
            assert http.get("/v2").json()["name"] == "torchserve-dag"
            assert http.get("/v2/health/ready").json() == {"ready": True}
            assert http.get("/v2/models/text/versions/1.0").json()["inputs"][0]["name"] == "input"
            found = http.post(
                "/v2/models/text/infer", json={"inputs": [texts("a", "b")]}, headers={"x-request-id": "mine"}
            )

            assert found.json()["outputs"][0]["data"] == ["A", "B"]
            assert found.headers["x-request-id"] == "mine"

    def test_a_photo_as_a_binary_tensor(self, dev: Dev) -> None:
        raw = raw_bytes(png(4, 3))
        about = {"name": "input", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(raw)}}
        head = json.dumps({"inputs": [about]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head))}
        response = httpx.post(
            f"{dev.address}/v2/models/size/infer", content=head + raw, headers=headers, trust_env=False
        )

        assert response.json()["outputs"][0]["data"] == [4, 3]

    def test_failures_have_the_standards_form(self, dev: Dev) -> None:
        with dev.http() as http:
            large = http.post("/v2/models/text/infer", content=b"a" * 2_000_001)
            none = http.get("/v2/models/none")

            assert (large.status_code, none.status_code) == (413, 404)
            assert "larger than 2,000,000 bytes" in large.json()["error"]
            assert none.json() == {"error": "Model not found: none"}
            assert http.get("/v2models").status_code == 404

    def test_a_client_that_leaves_ends_its_requests(self, dev: Dev, tmp_path: Path) -> None:
        gates = [tmp_path / f"{i}.gate" for i in range(3)]
        with dev.http() as http, pytest.raises(httpx.ReadTimeout):
            http.post("/v2/models/gated/infer", json={"inputs": [texts(*map(str, gates))]}, timeout=2)
        dev.wait_for(gates[0].with_suffix(".begun").exists)
        for gate in gates:
            gate.touch()
        with dev.http() as http:
            assert http.post("/v2/models/text/infer", json={"inputs": [texts("a")]}).status_code == 200

        assert list(tmp_path.glob("*.after")) == []
