"""Bodies become messages, each bad one is refused with its one right status, and messages become bodies."""

from __future__ import annotations

import dataclasses
import io
import json
import struct
import time
import tracemalloc
import zlib
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from torchserve_dag.runtime.data import codec
from torchserve_dag.runtime.messages import (
    Box,
    DetectedObject,
    Failure,
    InputError,
    Label,
    Labels,
    Objects,
    Photo,
    Text,
)


def written(image: Image.Image, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def png_of_zeros(width: int, height: int, bits: int = 1, colour: int = 0, rows: bytes | None = None) -> bytes:
    """A PNG made by hand, so that it may say what Pillow would not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    if rows is None:
        rows = bytes((1 + (width * bits + 7) // 8) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def refused(kind: Any, body: bytes, content_type: str | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        codec.decode(kind, body, content_type)
    assert caught.value.message.endswith(".")
    return caught.value


def photo(body: bytes, content_type: str | None = None) -> Image.Image:
    image = codec.decode(Photo, body, content_type).image
    assert image.mode == "RGB"
    return image


JPEG = written(Image.radial_gradient("L").convert("RGB"), "JPEG")
SMALL = written(Image.new("RGB", (4, 3), "red"), "PNG")


# Photos that are refused.


@pytest.mark.parametrize("kind", [Photo, Text, Objects, bytes, Any])
def test_an_empty_body_is_refused(kind: Any) -> None:
    error = refused(kind, b"")

    assert error.status == 400
    assert "empty" in error.message


@pytest.mark.parametrize("body", [b"hello", b"\x00" * 100, b'{"text": "no photo"}', b"%PDF-1.4", b"<svg/>"])
def test_a_body_that_is_no_photo_is_refused(body: bytes) -> None:
    error = refused(Photo, body)

    assert error.status == 415
    assert "JPEG, PNG" in error.message


@pytest.mark.parametrize(
    "content_type", ["application/pdf", "text/plain", "application/json; charset=utf-8", "video/mp4"]
)
def test_a_photo_under_another_content_type_is_refused(content_type: str) -> None:
    error = refused(Photo, JPEG, content_type)

    assert error.status == 415
    assert content_type.partition(";")[0] in error.message


@pytest.mark.parametrize("content_type", [None, "", "image/jpeg", "IMAGE/PNG; q=1", "application/octet-stream"])
def test_a_photo_is_read_whichever_of_its_own_types_it_is_sent_as(content_type: str | None) -> None:
    assert photo(SMALL, content_type).size == (4, 3)


@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_a_truncated_jpeg_is_refused(part: float) -> None:
    error = refused(Photo, JPEG[: int(len(JPEG) * part)])

    assert error.status == 400
    assert "damaged" in error.message


@pytest.mark.parametrize("side", [20_000, 10_000, 8_400])
def test_a_bomb_is_refused_before_it_is_decoded(side: int) -> None:
    """280 MB to 1.6 GB of pixels in a few kB."""
    bomb = png_of_zeros(side, side)
    assert len(bomb) < 100_000
    tracemalloc.start()
    begin = time.thread_time()

    error = refused(Photo, bomb)

    assert error.status == 413
    assert "70,000,000" in error.message
    assert time.thread_time() - begin < 0.5
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_a_photo_that_only_its_header_makes_large_is_refused_by_its_header() -> None:
    assert refused(Photo, png_of_zeros(2**31 - 1, 2**31 - 1, rows=b"")).status == 413


# Photos that are read.


def test_a_photo_of_one_pixel_is_a_photo() -> None:
    assert photo(written(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).getpixel((0, 0)) == (1, 2, 3)


def test_an_animated_gif_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "green", "blue")]
    body = written(frames[0], "GIF", save_all=True, append_images=frames[1:])

    assert photo(body).getpixel((2, 2)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("cmyk", "rgb"),
    [((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 0), (255, 255, 255)), ((0, 0, 0, 255), (0, 0, 0))],
)
def test_a_cmyk_jpeg_has_its_colours(cmyk: tuple[int, ...], rgb: tuple[int, ...]) -> None:
    pixel = photo(written(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=95)).getpixel((8, 8))

    assert all(abs(have - want) < 6 for have, want in zip(pixel, rgb, strict=True))


@pytest.mark.parametrize(("value", "grey"), [(0, 0), (128, 0), (257, 1), (32768, 128), (65407, 255), (65535, 255)])
def test_sixteen_bits_of_grey_are_scaled_and_not_clipped(value: int, grey: int) -> None:
    image = Image.new("I;16", (3, 3), value)

    for body in (written(image, "PNG"), written(image, "TIFF")):
        assert photo(body).getpixel((1, 1)) == (grey, grey, grey)


def test_sixteen_bits_of_colour_are_scaled() -> None:
    rows = b"\x00" + struct.pack(">HHH", 65535, 32768, 0)

    pixel = photo(png_of_zeros(1, 1, bits=16, colour=2, rows=rows)).getpixel((0, 0))

    assert pixel == (255, 128, 0)


def test_a_tiff_of_floats_is_refused() -> None:
    """Nothing in such a file says which number is white."""
    error = refused(Photo, written(Image.new("F", (3, 3), 0.5), "TIFF"))

    assert error.status == 415


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_what_is_transparent_becomes_white(mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.putdata([0, 1])
        body = written(image, "PNG", transparency=1)
    elif mode in {"RGB", "L"}:
        image = Image.new("RGB", (2, 1), (255, 0, 0))
        image.putpixel((1, 0), (0, 0, 255))
        image = image.convert(mode)
        body = written(image, "PNG", transparency=image.getpixel((1, 0)))
    else:
        image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
        image.putpixel((1, 0), (0, 0, 255, 0))
        body = written(image.convert(mode), "PNG")

    left, right = (photo(body).getpixel((x, 0)) for x in (0, 1))

    assert right == (255, 255, 255)
    assert left == (76, 76, 76) if "L" in mode else (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_upright(orientation: int) -> None:
    upright = Image.new("RGB", (16, 24), "blue")
    upright.paste("red", (0, 0, 8, 8))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation

    image = photo(written(stored, "JPEG", quality=95, exif=exif))

    assert image.size == (16, 24)
    red, _, blue = image.getpixel((3, 3))
    assert red > 200 > blue


def test_a_photo_whose_exif_is_partly_wrong_is_still_turned_upright() -> None:
    """Its width is written as text there; Pillow's own turning raises struct.error."""
    entries = struct.pack(">HHHIHH", 2, 0x0112, 3, 1, 6, 0) + struct.pack(">HHI4s", 0x0100, 2, 4, b"abc\0")
    exif = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08" + entries + bytes(4)

    assert photo(written(Image.new("RGB", (16, 24)), "JPEG", exif=exif)).size == (24, 16)


@pytest.mark.parametrize("kind", ["WEBP", "BMP", "TIFF", "GIF"])
def test_every_format_that_is_promised_is_read(kind: str) -> None:
    assert photo(written(Image.new("RGB", (6, 7), "white"), kind)).size == (6, 7)


SEEDS = [
    JPEG,
    SMALL,
    written(Image.new("P", (9, 9)), "GIF"),
    written(Image.new("RGB", (9, 9)), "WEBP"),
    written(Image.new("L", (9, 9)), "TIFF"),
    written(Image.new("RGB", (9, 9)), "BMP"),
    written(Image.new("RGB", (16, 16)), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03"),
]


@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.floats(0, 0.999), st.binary(min_size=1, max_size=4)), max_size=4))
@settings(max_examples=150)
def test_any_bytes_are_a_photo_or_refused(seed: bytes, edits: list[tuple[float, bytes]]) -> None:
    body = bytearray(seed)
    for place, new in edits:
        at = int(place * len(body))
        body[at : at + len(new)] = new
    try:
        found: Any = codec.decode(Photo, bytes(body)).image.mode
    except InputError as error:
        found = error.status

    assert found in {"RGB", 400, 413, 415}


# Text and JSON.


@pytest.mark.parametrize("content_type", [None, "text/plain", "text/plain; charset=utf-8", "application/octet-stream"])
def test_text_is_read_as_it_is(content_type: str | None) -> None:
    assert codec.decode(Text, "grüß".encode(), content_type) == Text("grüß")


def test_text_may_come_as_json() -> None:
    assert codec.decode(Text, b'{"text": "a"}', "application/json; charset=utf-8") == Text("a")


def test_text_that_is_not_utf_8_is_refused() -> None:
    error = refused(Text, b"abc\xff")

    assert error.status == 400
    assert "byte 3" in error.message


@pytest.mark.parametrize(
    ("kind", "content_type"), [(Text, "image/jpeg"), (Objects, "text/plain"), (Objects, "image/png")]
)
def test_another_content_type_is_refused(kind: Any, content_type: str) -> None:
    assert refused(kind, b"{}", content_type).status == 415


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"{'a': 1}",
        b"\xff\xfe{}",
        b"\xed\xa0\x80",
        b"[" * 100_000,
        b'{"width": NaN, "height": 1}',
        b'{"width": ' + b"9" * 10_000 + b"}",
        b'"half of a pair: \\ud800"',
    ],
)
def test_broken_json_is_refused(body: bytes) -> None:
    error = refused(Objects, body, "application/json")

    assert error.status == 400
    assert "not valid JSON" in error.message or "not UTF-" in error.message
    assert refused(Any, body, "application/json").status == 400


def test_json_of_the_wrong_shape_is_refused_with_the_path() -> None:
    body = b'{"width": 1, "height": 2, "objects": [{"label": "a", "score": "high", "box": {"left": 0}}]}'

    error = refused(Objects, body)

    assert error.status == 422
    assert "objects[0].score: expected a number, not 'high'" in error.message
    assert 'objects[0].box: "top" is missing' in error.message


def test_a_number_too_large_is_the_wrong_shape() -> None:
    body = b'{"name": "a", "score": 1' + b"0" * 400 + b"}"

    assert refused(Label, body).status == 422


def test_json_where_anything_goes_is_decoded_only_where_it_is_declared() -> None:
    """So TorchServe does for a handler of its own."""
    assert codec.decode(Any, b'{"a": 1}', "application/json") == {"a": 1}
    assert codec.decode(Any, b'{"a": 1}') == b'{"a": 1}'
    assert codec.decode(bytes, b'{"a": 1}', "application/json") == b'{"a": 1}'


json_text = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
).map(lambda value: json.dumps(value).encode())


@given(st.sampled_from([Text, Objects, Labels, Any]), json_text | st.binary(min_size=1, max_size=20))
@example(Text, b'{"text": "\\udc80"}')
def test_any_body_is_a_message_or_refused(kind: Any, body: bytes) -> None:
    try:
        _, found = codec.encode(codec.decode(kind, body, "application/json"))
    except InputError as error:
        found = str(error.status)

    assert found in {"application/json", "400", "422"}


# Answers.


def test_a_photo_is_written_as_png_and_read_back() -> None:
    image = Image.effect_noise((20, 10), 50).convert("RGB")

    body, content_type = codec.encode(Photo(image))

    assert content_type == "image/png"
    assert photo(body, content_type).tobytes() == image.tobytes()


def test_a_photo_keeps_the_file_that_has_its_pixels() -> None:
    file = written(Image.new("RGB", (4, 3), (9, 8, 7)), "JPEG")
    photo = codec.decode(Photo, file)

    assert photo.file == file
    assert photo == Photo(photo.image)
    assert photo.crop(Box(0, 0, 2, 2)).file is None
    assert dataclasses.replace(photo, image=Image.new("RGB", (1, 1))).file is None


@pytest.mark.parametrize(
    "file",
    [
        written(Image.new("RGBA", (2, 2), (1, 2, 3, 100)), "PNG"),
        written(Image.new("L", (2, 2), 7), "PNG"),
        written(Image.new("I;16", (2, 2), 700), "PNG"),
        written(Image.new("RGB", (2, 2)), "PNG", transparency=(0, 0, 0)),
        written(
            Image.new("RGB", (4, 2)),
            "JPEG",
            exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0",
        ),
        written(Image.new("RGB", (2, 2)), "TIFF", save_all=True, append_images=[Image.new("RGB", (2, 2), "red")]),
    ],
    ids=["alpha", "grey", "16 bits", "a transparent colour", "turned", "two frames"],
)
def test_a_photo_that_is_not_what_its_file_shows_keeps_no_file(file: bytes) -> None:
    """A TorchServe handler opens the file itself, and would get other pixels."""
    assert codec.decode(Photo, file).file is None


def test_bytes_are_written_as_they_are() -> None:
    assert codec.encode(b"\x00\xff") == (b"\x00\xff", "application/octet-stream")


integers = st.integers(-(2**63), 2**63 - 1)
finite = st.floats(allow_nan=False, allow_infinity=False)
label = st.builds(Label, st.text(), finite)
found = st.builds(DetectedObject, st.text(), finite, st.builds(Box, finite, finite, finite, finite))


@given(
    st.one_of(
        st.builds(Text, st.text()),
        st.builds(Labels, st.lists(label, max_size=3)),
        st.builds(Objects, integers, integers, st.lists(found, max_size=3)),
    )
)
def test_a_message_is_read_back_as_it_was_written(message: Any) -> None:
    body, content_type = codec.encode(message)

    assert content_type == "application/json"
    assert codec.decode(type(message), body, content_type) == message


def test_an_answer_that_json_cannot_hold_is_refused_here_and_not_by_the_client() -> None:
    with pytest.raises(ValueError, match="score is nan, which JSON does not have"):
        codec.encode(Label("a", float("nan")))


# Failures.


@pytest.mark.parametrize("node", [None, "detect"])
def test_a_failure_is_written_as_torchserve_writes_its_own_and_found_again(node: str | None) -> None:
    failure = Failure(413, "Too large.", "InputError", node)

    body, content_type = codec.encode(failure)

    assert content_type == "application/json"
    assert codec.failure_in(body) == failure
    assert codec.failure_in(json.dumps(codec.failure_fields(failure, "id"), indent=2).encode()) == failure


def test_torchserves_own_failure_is_found() -> None:
    body = b'{\n  "code": 404,\n  "type": "ModelNotFoundException",\n  "message": "Model not found: x"\n}\n'

    assert codec.failure_in(body) == Failure(404, "Model not found: x", "ModelNotFoundException")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\x89PNG",
        b'{"code"',
        b'{"code": 1}',
        b'{"code": "x", "type": "a", "message": "b"}',
        b'{"code": true, "type": "a", "message": "b"}',
        b'{"code": 200, "type": "a", "message": "b"}',
        b'{"code": 400, "type": "a", "message": "b", "more": 1}',
        b'{"code": 400, "type": 3, "message": "b"}',
        b'[{"code": 400, "type": "a", "message": "b"}]',
        b'{"message": "b"}',
        b'{"code": ' + b"[" * 100_000,
        b'{"text": "{\\"code\\": 400}"}',
    ],
)
def test_nothing_else_is_taken_for_a_failure(body: bytes) -> None:
    assert codec.failure_in(body) is None


@given(st.binary(max_size=30) | json_text)
def test_any_bytes_may_be_looked_into(body: bytes) -> None:
    assert codec.failure_in(body) is None


@dataclass(frozen=True)
class Own:
    size: int


def test_a_kind_is_described_for_a_person() -> None:
    assert codec.describe(Photo).startswith("a photo (JPEG")
    assert codec.describe(Own) == "JSON with the keys size"
    assert codec.describe(list[Own]) == "JSON (list[Own])"


def test_a_number_that_no_answer_could_repeat_is_refused() -> None:
    with pytest.raises(InputError, match="too large a number"):
        codec.decode(dict[str, Any], b'{"a": 1e999}', "application/json")
