"""Bodies as clients send them: what the model gets, or the status, for each content type, body and message.

Whatever a client sends is answered, or refused with a status of 4xx: none of it counts against a version.
"""

from __future__ import annotations

import gzip
import io
import json
import sys
import types
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.unit.front_end import REST, WAIT_S, request_of_parts
from torchserve_dag.clients.bodies import body_of
from torchserve_dag.runtime.compat.rows import wire_request
from torchserve_dag.runtime.compat.wire import WireRequest, read_requests
from torchserve_dag.runtime.data import content_encoding, media, photos
from torchserve_dag.runtime.data.codec import reads
from torchserve_dag.runtime.data.parts import Body, Parts, message_in, read
from torchserve_dag.runtime.messages import OverloadedError, Photo, Text
from torchserve_dag.runtime.worker.protocol import Part, Service, ServiceRequest, ServiceResponse
from torchserve_dag.runtime.worker.row import row_of
from torchserve_dag.runtime.worker.service import load
from torchserve_dag.runtime.worker.torchserve.rows import read_request

FORM = media.FORM
FUNCTIONS = """
from __future__ import annotations
from dataclasses import dataclass, field
from typing import Any, Literal
from torchserve_dag import Photo, Text

@dataclass(frozen=True)
class Point:
    x: int
    y: float = 0.0

@dataclass(frozen=True)
class Captioned:
    photo: Photo
    caption: str
    count: int = 1
    tags: list[str] = field(default_factory=list)
    at: Point | None = None
    style: Literal["plain", "bold"] = "plain"
    mask: Photo | None = None

@dataclass(frozen=True)
class Mail:
    subject: str
    body: str

def text(message: Text) -> str: return message.text
def photo(message: Photo) -> str: return f"{message.width}x{message.height}"
def point(message: Point) -> str: return f"{message.x!r}, {message.y!r}"
def mail(message: Mail) -> str: return f"{message.subject}: {message.body}"
def raw(message: bytes) -> str: return message.hex()
def anything(message: Any) -> str: return repr(message)
def captioned(message: Captioned) -> str:
    mask = f", {message.mask.width} wide" if message.mask else ""
    return (f"{message.photo.width}x{message.photo.height} {message.caption!r} {message.count} {message.tags} "
            f"{message.at} {message.style}{mask}")
"""
KINDS = ("text", "photo", "point", "mail", "raw", "anything", "captioned")


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Service]]:
    """A service for each kind of message: it answers with what it got, as text."""
    root = tmp_path_factory.mktemp("bodies")
    (root / "workflows").mkdir()
    (root / "handlers").mkdir()
    (root / "workflows" / "kinds.py").write_text(FUNCTIONS)
    made = {}
    for kind in KINDS:
        (root / "workflows" / f"{kind}.yaml").write_text(
            f'name: {kind}\nversion: "1.0"\ndoes: A test.\ncode: kinds.py\nnodes:\n  answer: {{function: {kind}}}\n'
            "output: {got: answer, user: parameters.user}\n"
        )
        (root / "build.json").write_text(json.dumps({"file": f"workflows/{kind}.yaml"}))
        made[kind] = load(root, None)
    yield made
    for service in made.values():
        service.close()


def answer(service: Service, request: ServiceRequest) -> tuple[int, Any]:
    """The status, and what the model got with the parameter `user`, or the message of the refusal."""
    response: ServiceResponse = service.submit(request).result(WAIT_S)
    said = json.loads(response.body)
    return response.status, said["got"] if response.status == 200 else said["message"]


def png(width: int = 4, height: int = 3) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
UTF_16 = b"\xff\xfe" + "grün".encode("utf-16-le")
DEEP = b"[" * 101 + b"]" * 101

BODIES: list[tuple[str, str | None, bytes, int, str]] = [
    # A message, the content type, the body: the status, and what the model got, or words of the refusal.
    # What says nothing: the message decides.
    *(
        row
        for nothing in (None, "", "application/octet-stream", "binary/octet-stream", FORM, f"{FORM.upper()}; charset=UTF-8")
        for row in (
            ("text", nothing, b"I like a=b&c=%41+d", 200, "I like a=b&c=%41+d"),
            ("text", nothing, b"x=%", 200, "x=%"),
            ("photo", nothing, PNG, 200, "4x3"),
            ("photo", nothing, b"x=%", 415, "not a photo"),
            ("point", nothing, b'{"x": 1, "y": 2}', 200, "1, 2.0"),
            ("point", nothing, b"x=1&y=2", 400, "not valid JSON"),
            ("raw", nothing, b"a=b", 200, "613d62"),
            ("anything", nothing, b"a=b", 200, "b'a=b'"),
            ("text", nothing, b"", 400, "empty"),
        )
    ),
    # `curl -d` declares JSON as a form; with other types a text may look like JSON.
    ("text", FORM, b'{"text": "I like a=b"}', 200, "I like a=b"),
    ("text", FORM, b'{"text": "a", "more": 1}', 200, '{"text": "a", "more": 1}'),
    ("text", FORM, b'{"text": ', 200, '{"text": '),
    ("text", None, b'{"text": "a"}', 200, '{"text": "a"}'),
    ("text", "text/plain", b'{"text": "a"}', 200, '{"text": "a"}'),
    # JSON by its several names.
    *(
        ("text", json_type, b'{"text": "a"}', 200, "a")
        for json_type in ("application/json", "text/json", "application/problem+json", "Application/LD+JSON; q=1")
    ),
    ("point", "text/json; charset=utf-8", b'{"x": 1}', 200, "1, 0.0"),
    ("anything", "application/vnd.api+json", b'{"x": 1}', 200, "{'x': 1}"),
    ("point", "text/plain", b'{"x": 1}', 415, "text/plain"),
    ("point", "application/json5", b'{"x": 1}', 415, "application/json5"),
    ("photo", "application/json", PNG, 415, "application/json"),
    ("text", "image/png", b"a", 415, "image/png"),
    ("text", "multipart/form-data", b"a", 415, "multipart/form-data"),
    # The characters of a text.
    ("text", "text/plain; charset=ISO-8859-1", b"gr\xfcn", 200, "grün"),
    ("text", 'text/plain; charset="latin-1"', b"gr\xfcn", 200, "grün"),
    ("text", "text/plain;CHARSET=windows-1252", b"\x80", 200, "\u20ac"),
    ("text", "text/plain; charset=utf-16", UTF_16, 200, "grün"),
    ("text", "text/plain; charset=utf-16le", UTF_16, 200, "grün"),
    ("text", "text/plain; charset=shift_jis", "\u65e5".encode("shift_jis"), 200, "\u65e5"),
    ("text", "text/plain", UTF_16, 200, "grün"),
    ("text", None, "grün".encode("utf-16-be").join([b"\xfe\xff", b""]), 200, "grün"),
    ("text", None, b"\xef\xbb\xbfgr\xc3\xbcn", 200, "grün"),
    ("text", "text/plain; charset=utf-8", b"\xef\xbb\xbf", 200, ""),
    ("text", "application/json; charset=utf-16", '{"text": "grün"}'.encode("utf-16"), 200, "grün"),
    ("text", "application/json", b'\xef\xbb\xbf{"text": "a"}', 200, "a"),
    ("text", "text/plain", b"gr\xfcn", 400, "not UTF-8 (byte 2)"),
    ("text", "text/plain; charset=utf-16", b"\xff\xfea", 400, "not utf-16"),
    ("text", "text/plain; charset=ascii", b"\xfc", 400, "not ascii"),
    ("text", "application/json; charset=ascii", b'{"text": "\xfc"}', 400, "not ascii"),
    *(
        ("text", f"text/plain; charset={name}", b"a", 415, f"charset {name}")
        for name in ("klingon", "iso-8859-12", "idna", "unicode_escape", "rot13", "hex", "utf-7", "x" * 40)
    ),
    # JSON that a parser could guess at.
    ("point", "application/json", b'{"x": 1, "x": 2}', 400, '"x" is written twice'),
    ("anything", "application/json", b'[{"a": {"b": 1, "b": 1}}]', 400, '"b" is written twice'),
    ("point", "application/json", b'{"x": 1, "y": NaN}', 400, "NaN is not JSON"),
    ("point", "application/json", b'{"x": 1, "y": -Infinity}', 400, "-Infinity is not JSON"),
    ("point", "application/json", b'{"x": 1, "y": 1e999}', 400, "too large a number"),
    ("point", "application/json", b'{"x": ' + b"9" * 5000 + b"}", 400, "not valid JSON"),
    ("point", "application/json", b'{"x": 18446744073709551616}', 422, "64 bits"),
    ("point", "application/json", b'{"x": -9223372036854775808}', 200, "-9223372036854775808, 0.0"),
    ("point", "application/json", b'{"x": 1, "z": 2}', 422, 'unknown key "z"'),
    ("anything", "application/json", DEEP[1:-1], 200, "[" * 100 + "]" * 100),
    ("anything", "application/json", DEEP, 400, "nested more than 100 deep"),
    ("anything", "application/json", b'{"a":' * 101 + b"1" + b"}" * 101, 400, "nested more than 100 deep"),
    ("anything", "application/json", b"[" * 100_000, 400, "nested more than 100 deep"),
    ("anything", "application/json", b'"' + b"[{" * 1000 + b'"', 200, repr("[{" * 1000)),
    ("anything", "application/json", b'"\\ud800"', 400, "not valid JSON"),
    # A message that JSON cannot hold is sent in parts.
    ("captioned", "application/json", b'{"photo": "a", "caption": "b"}', 422, "send a form with the parts photo, caption"),
    ("captioned", "image/png", PNG, 415, "send a form with the parts photo, caption"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "content_type", "body", "status", "got"), BODIES)
def test_a_body_is_read_as_its_content_type_says_or_as_the_message_needs(
    services: dict[str, Service], kind: str, content_type: str | None, body: bytes, status: int, got: str
) -> None:
    found, said = answer(services[kind], ServiceRequest("id-1", body, content_type))

    assert (found, said if found == 200 else "") == (status, got if status == 200 else "")
    assert got in said


def packed(data: bytes, wbits: int) -> bytes:
    packer = zlib.compressobj(wbits=wbits)
    return packer.compress(data) + packer.flush()


BOMB = gzip.compress(bytes(content_encoding.MAX_BYTES + 1), mtime=0)
ENCODED: list[tuple[str, bytes, int, str]] = [
    ("gzip", gzip.compress(b"hello", mtime=0), 200, "hello"),
    ("X-GZIP", gzip.compress(b"hello", mtime=0), 200, "hello"),
    ("identity, gzip", gzip.compress(b"hello", mtime=0), 200, "hello"),
    ("deflate", packed(b"hello", 15), 200, "hello"),
    ("deflate", packed(b"hello", -15), 200, "hello"),
    ("identity", b"hello", 200, "hello"),
    ("", b"hello", 200, "hello"),
    ("gzip", gzip.compress(b"", mtime=0), 400, "empty"),
    ("gzip", b"", 400, "empty"),
    ("gzip", b"hello", 400, "not gzip"),
    ("deflate", b"hello", 400, "not deflate"),
    ("gzip", gzip.compress(b"hello", mtime=0)[:-4], 400, "cut"),
    ("gzip", gzip.compress(b"hello", mtime=0) * 2, 400, "more follows"),
    ("br", b"hello", 415, "content encoding br"),
    ("gzip, gzip", b"hello", 415, "gzip, gzip"),
    ("gzip", BOMB, 413, "67,108,864"),
]


@pytest.mark.parametrize(("encoding", "body", "status", "got"), ENCODED)
def test_a_compressed_body_is_decompressed_within_a_bound(
    services: dict[str, Service], encoding: str, body: bytes, status: int, got: str
) -> None:
    found, said = answer(services["text"], ServiceRequest("id-1", body, "text/plain", encoding))

    assert found == status
    assert got in said


def test_a_bomb_of_many_members_costs_nothing() -> None:
    """Each member would cost a copy of the rest of the body."""
    request = ServiceRequest("id-1", gzip.compress(b"", mtime=0) * 300_000, "text/plain", "gzip")

    assert len(request.body) > 5_000_000
    with pytest.raises(content_encoding.InputError, match="more follows"):
        content_encoding.decompressed(request.body, "gzip")


P = Part
CAPTION = P("caption", b"a cat")
PHOTO = P("photo", PNG, "image/png")
PARTS: list[tuple[str, list[Part], int, str]] = [
    # A lone part is the body, whatever its name; a lone file part, too, beside fields that are no files.
    ("text", [P("body", b"a")], 200, "a"),
    ("text", [P("data", b"a")], 200, "a"),
    ("text", [P("mine", b"a")], 200, "a"),
    ("text", [P("text", b"a"), P("user", b"me")], 200, "a"),
    ("photo", [P("file", PNG, "image/png"), P("user", b"me")], 200, "4x3"),
    ("photo", [P("image", PNG), P("user", b"me")], 200, "4x3"),
    ("photo", [P("user", b"me"), P("data", PNG)], 200, "4x3"),
    ("text", [P("body", b'{"text": "a"}', "application/json"), P("user", b"me")], 200, "a"),
    ("point", [P("file", b'{"x": 1}', "application/json"), P("user", b"me")], 200, "1, 0.0"),
    ("text", [P("body", b"gr\xfcn", "text/plain; charset=latin1")], 200, "grün"),
    ("text", [], 400, "empty"),
    ("text", [P("a", b"1"), P("b", b"2")], 400, "Which of a, b is the message?"),
    ("photo", [P("a", PNG, "image/png"), P("b", PNG, "image/png")], 400, "Which of a, b is the message?"),
    # The fields of a message.
    ("captioned", [PHOTO, CAPTION], 200, "4x3 'a cat' 1 [] None plain"),
    ("captioned", [CAPTION, P("photo", PNG)], 200, "4x3 'a cat' 1 [] None plain"),
    ("captioned", [PHOTO, P("caption", b"")], 200, "4x3 '' 1 [] None plain"),
    ("captioned", [PHOTO, P("caption", b"3")], 200, "4x3 '3' 1 [] None plain"),
    ("captioned", [PHOTO, P("caption", b'"a"', "application/json")], 200, "4x3 'a' 1 [] None plain"),
    ("captioned", [PHOTO, P("caption", b"gr\xfcn", "text/plain; charset=latin1")], 200, "4x3 'grün' 1 [] None plain"),
    (
        "captioned",
        [PHOTO, CAPTION, P("count", b"3"), P("tags", b'["a"]'), P("at", b'{"x": 1}'), P("style", b"bold"), P("mask", PNG)],
        200, "4x3 'a cat' 3 ['a'] Point(x=1, y=0.0) bold, 4 wide",
    ),
    ("captioned", [PHOTO, CAPTION, P("parameters.user", b"me")], 200, "4x3 'a cat' 1 [] None plain"),
    ("point", [P("x", b"1"), P("y", b"2.5")], 200, "1, 2.5"),
    ("point", [P("x", b"1")], 200, "1, 0.0"),
    ("mail", [P("subject", b"a"), P("body", b"b")], 200, "a: b"),
    ("mail", [P("body", b'{"subject": "a", "body": "b"}')], 200, "a: b"),
    ("captioned", [PHOTO, P("captoin", b"a")], 400, "no captoin: its parts are photo, caption, count"),
    ("captioned", [PHOTO], 422, '"caption" is missing'),
    ("captioned", [PHOTO, CAPTION, P("count", b"many")], 422, "count: expected a whole number, not 'many'"),
    ("captioned", [PHOTO, CAPTION, P("count", b"1.5")], 422, "count: expected a whole number, not 1.5"),
    ("captioned", [PHOTO, CAPTION, P("style", b"odd")], 422, "style: expected 'plain' or 'bold'"),
    ("captioned", [PHOTO, CAPTION, P("tags", b'["a"')], 400, "The part tags: it is not valid JSON"),
    ("captioned", [PHOTO, CAPTION, P("at", b'{"x": 1, "x": 2}')], 400, "written twice"),
    ("captioned", [P("photo", b"no"), CAPTION], 415, "The part photo: The body is not a photo"),
    ("captioned", [P("photo", PNG, "text/plain"), CAPTION], 415, "The part photo: The content type text/plain"),
    ("captioned", [PHOTO, P("caption", b"\xff")], 400, "The part caption: The text is not UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "parts", "status", "got"), PARTS)
def test_the_parts_of_a_form_are_the_fields_of_a_message_or_a_body_and_its_parameters(
    services: dict[str, Service], kind: str, parts: list[Part], status: int, got: str
) -> None:
    found, said = answer(services[kind], ServiceRequest("id-1", content_type="multipart/form-data", parts=parts))

    assert (found, said if found == 200 else "") == (status, got if status == 200 else "")
    assert got in said


def test_a_part_that_cannot_be_decoded_now_is_too_much_load_and_no_mistake(
    known: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photos, "WAIT_S", 0.01)
    monkeypatch.setattr(photos, "_decoding", photos._Room(1))
    with photos._decoding.room(1), pytest.raises(OverloadedError) as caught:
        read(known["Captioned"], Parts({"photo": Body(PNG), "caption": Body(b"a")}))

    assert caught.value.message.startswith("The part photo: Too many large photos")


def test_what_is_no_part_of_the_message_is_a_parameter(services: dict[str, Service]) -> None:
    for kind, parts in (
        ("photo", [P("file", PNG, "image/png"), P("user", b"me")]),
        ("photo", [P("body", PNG), P("parameters.user", b"me")]),
        ("captioned", [PHOTO, CAPTION, P("parameters.user", b"me")]),
    ):
        response = services[kind].submit(ServiceRequest("id-1", parts=parts)).result(WAIT_S)
        assert json.loads(response.body)["user"] == "me"


# What TorchServe makes of a request, and a worker of that. Over gRPC it hands on neither headers nor content types.


def over_torchserve(service: Service, headers: dict[str, str], *parts: tuple[str, str, bytes]) -> tuple[int, Any]:
    """The answer to a request as TorchServe writes it to a worker's socket: with parts that may share a name."""
    return answer(service, over_wire(headers, *parts))


def over_wire(headers: dict[str, str], *parts: tuple[str, str, bytes]) -> ServiceRequest:
    ((wire,), _) = read_requests(bytearray(request_of_parts("id-1", parts, headers)))
    return read_request(wire)


def http(content_type: str, **more: str) -> dict[str, str]:
    return {**REST, "Content-Type": content_type, **more}


def test_two_parts_of_one_name_are_refused(services: dict[str, Service]) -> None:
    twice = [("photo", "image/png", PNG), ("caption", "", b"a"), ("caption", "", b"b")]

    assert over_torchserve(services["captioned"], http("multipart/form-data; boundary=x"), *twice) == (
        400,
        "The form has several parts called caption: send one.",
    )
    assert (
        over_torchserve(services["text"], http("multipart/form-data; boundary=x"), *[("body", "", b"a")] * 2)[0] == 400
    )


@pytest.mark.parametrize("headers", [http("multipart/form-data; boundary=x"), {}])
def test_a_message_in_parts_comes_over_rest_and_grpc_alike(
    services: dict[str, Service], headers: dict[str, str]
) -> None:
    parts = [("photo", "image/png" if headers else "", PNG), ("caption", "", b"a cat"), ("x-priority", "", b"bulk")]

    assert over_torchserve(services["captioned"], headers, *parts) == (200, "4x3 'a cat' 1 [] None plain")


@pytest.mark.parametrize(
    ("kind", "fields", "send"),
    [
        ("text", [('{"text": "I like a', "", b'b"}')], "text/plain"),
        ("text", [("hello", "", b"")], "text/plain"),
        ("text", [("body", "", b"hello")], "text/plain"),
        ("photo", [("\ufffd", "", b"\xff")], "image/jpeg"),
        ("point", [("x", "", b"1")], "application/json"),
        ("raw", [("a", "", b"1"), ("b", "", b"2")], "application/octet-stream"),
        ("captioned", [("caption", "", b"1")], "multipart/form-data"),
    ],
)
def test_a_body_that_torchserve_took_apart_is_refused_with_the_header_to_send(
    services: dict[str, Service], kind: str, fields: list[tuple[str, str, bytes]], send: str
) -> None:
    """TorchServe parses what claims to be a form, and the body as it was sent is lost."""
    status, said = over_torchserve(services[kind], http(f"{FORM}; charset=UTF-8"), *fields)

    assert status == 415
    assert f"send Content-Type: {send}, or call the front door" in said


def test_a_form_that_the_front_door_hands_on_as_it_was_sent_is_a_body(services: dict[str, Service]) -> None:
    sent = http(f"{media.FORM_AS_SENT}; charset=latin-1")

    assert over_torchserve(services["text"], sent, ("body", media.FORM_AS_SENT, b"gr\xfcn=b")) == (200, "grün=b")
    assert over_torchserve(services["text"], sent, ("body", media.FORM_AS_SENT, b'{"text": "a=b"}')) == (200, "a=b")


@pytest.mark.parametrize(
    ("body", "row"),
    [
        (b"data=a%20b&x=&y=%c3%bc", {"data": b"a b", "x": b"", "y": "ü".encode()}),
        (b"data=a+b", {"data": b"a b"}),
        (PNG, {"body": PNG}),
        (b'{"text": "I like a=b"}', {"body": b'{"text": "I like a=b"}'}),
        (b"hello", {"body": b"hello"}),
        (b"a=" * 100_000, {"body": b"a=" * 100_000}),
    ],
)
def test_a_torchserve_handler_gets_a_forms_fields_as_from_torchserve_and_anything_else_as_the_body(
    body: bytes, row: dict[str, bytes]
) -> None:
    sent = over_wire(http(media.FORM_AS_SENT), ("body", media.FORM_AS_SENT, body))

    assert row_of(sent).values == row


def test_the_charset_and_the_encoding_are_in_torchserves_headers(services: dict[str, Service]) -> None:
    body = ("body", "text/plain", gzip.compress(b"gr\xfcn", mtime=0))
    sent = http("text/plain; charset=latin-1", **{"Content-Encoding": "gzip"})

    assert over_torchserve(services["text"], sent, body) == (200, "grün")


@given(
    kind=st.sampled_from(KINDS),
    content_type=st.sampled_from(
        [
            None,
            FORM,
            "application/json",
            "text/plain; charset=utf-16",
            "text/plain",
            "image/png",
            "*/*",
            "a;charset=\x00",
        ]
    ),
    encoding=st.sampled_from([None, "gzip", "deflate", "br"]),
    body=st.binary(max_size=50) | st.text(alphabet='{}[]",:1etruxy \\', max_size=30).map(str.encode),
)
def test_whatever_is_sent_is_answered_or_is_the_clients_mistake(
    services: dict[str, Service], kind: str, content_type: str | None, encoding: str | None, body: bytes
) -> None:
    status, _ = answer(services[kind], ServiceRequest("id-1", body, content_type, encoding))

    assert status == 200 or 400 <= status < 500


@given(
    kind=st.sampled_from(KINDS),
    parts=st.dictionaries(
        st.sampled_from(["body", "data", "photo", "caption", "x", "at", "tags", "count", "parameters.user", "odd"]),
        st.tuples(
            st.binary(max_size=20) | st.just(PNG), st.sampled_from([None, "image/png", "application/json", "text/x"])
        ),
        max_size=4,
    ),
)
def test_whatever_parts_are_sent_are_answered_or_are_the_clients_mistake(
    services: dict[str, Service], kind: str, parts: dict[str, tuple[bytes, str | None]]
) -> None:
    form = [P(name, content, content_type) for name, (content, content_type) in parts.items()]
    status, _ = answer(services[kind], ServiceRequest("id-1", parts=form))

    assert status == 200 or 400 <= status < 500


# Which messages can be sent, and what the clients make of them.


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The messages of FUNCTIONS, by name."""
    module = types.ModuleType("kinds")
    monkeypatch.setitem(sys.modules, "kinds", module)
    exec(FUNCTIONS, module.__dict__)  # noqa: S102
    return vars(module)


def test_a_message_that_no_client_could_send_is_known(known: dict[str, Any]) -> None:
    sendable = [Photo, Text, bytes, Any, str, list[str], known["Point"], known["Captioned"]]

    assert all(map(reads, sendable))
    assert not any(map(reads, [list[Photo], dict[str, Photo], Photo | Text, list[bytes], tuple[Photo, str]]))


def test_an_unedited_handler_gets_such_a_message_as_a_form(known: dict[str, Any]) -> None:
    row = wire_request("id-1", known["Captioned"](Photo(Image.new("RGB", (4, 3))), "grün", 2))

    assert row.row.keys() == {"photo", "caption", "count", "tags", "style"}
    assert (row.row["caption"], row.row["count"], row.row["photo"][:2]) == ("grün".encode(), b"2", b"BM")
    assert (row.headers["caption"], row.headers["count"]) == (
        {"content-type": "text/plain"},
        {"content-type": "application/json"},
    )


def test_a_client_sends_in_parts_what_json_cannot_hold(tmp_path: Path, known: dict[str, Any]) -> None:
    message = known["Captioned"](Photo(Image.new("RGB", (4, 3))), "grün", 2, ["a"], known["Point"](1))
    sent = body_of(message)
    (tmp_path / "cat.png").write_bytes(PNG)
    of_mapping = body_of({"photo": tmp_path / "cat.png", "caption": b"a", "count": 3})

    assert isinstance(sent, Parts)
    assert isinstance(of_mapping, Parts)
    assert sent.fields["caption"] == Body("grün".encode(), "text/plain; charset=utf-8")
    assert sent.fields.keys() == {"photo", "caption", "count", "tags", "at", "style"}, (
        "a field that is None is left out"
    )
    assert of_mapping.fields["photo"] == Body(PNG, "image/png")
    for declared in (sent, Parts({name: Body(part.content) for name, part in sent.fields.items()})):  # REST, gRPC
        message_again, parameters = message_in(known["Captioned"], declared.fields)
        built = read(known["Captioned"], message_again)
        assert (built.caption, built.count, built.tags, built.at, parameters) == (
            "grün",
            2,
            ["a"],
            known["Point"](1),
            {},
        )
    assert body_of({"caption": "a", "count": 3}) == Body(b'{"caption": "a", "count": 3}', "application/json")


@pytest.mark.parametrize("entry", [b"application/json", None])
def test_json_over_grpc_is_json_where_the_map_says_so(entry: bytes | None) -> None:
    """A text that looks like JSON is a text, unless the client names the type: gRPC has no header for it."""
    row = {"body": b'{"text": "a"}'} | ({"content-type": entry} if entry else {})
    request = read_request(WireRequest("id-1", row, {}))

    message, _ = message_in(Text, {"body": Body(request.body, request.content_type)})
    assert request.parts is None
    assert read(Text, message) == Text("a" if entry else '{"text": "a"}')
