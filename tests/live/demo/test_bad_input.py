"""Every kind of bad input has one right answer, the same over REST and gRPC, and its neighbours never notice."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import pytest
from PIL import Image, ImageOps

from tests.live.conftest import ROOT, Serving
from torchserve_dag.clients import (
    Client,
    GrpcClient,
    ModelNotFound,
    RequestRefused,
    RestClient,
    ServingError,
    TooLarge,
    Unauthorized,
)
from torchserve_dag.runtime.messages import Labels

WORKFLOW = "detect_classify"
COFFEE = ROOT / "photos" / "coffee.jpg"


@dataclass(frozen=True)
class Bad:
    """A body that cannot be served: its status, and words that name the problem."""

    body: Callable[[], bytes]
    status: int
    says: str


def picture(mode: str = "RGB", format: str = "PNG", **save: object) -> bytes:  # noqa: A002 (Pillow's word)
    buffer = io.BytesIO()
    Image.open(COFFEE).convert(mode).save(buffer, format, **save)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of 20,000 x 20,000 pixels in 50 KB: 1.2 GB once decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = b"\0" * (20_000 // 8 + 1)
    packed = b"".join(packer.compress(row) for _ in range(20_000)) + packer.flush()
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def animated_gif() -> bytes:
    buffer = io.BytesIO()
    first = Image.open(COFFEE).convert("P")
    first.save(buffer, "GIF", save_all=True, append_images=[Image.new("P", first.size)] * 3)
    return buffer.getvalue()


def sixteen_bits() -> bytes:
    buffer = io.BytesIO()
    grey = Image.open(COFFEE).convert("L").convert("I").point(lambda value: value * 257)
    grey.convert("I;16").save(buffer, "PNG")
    return buffer.getvalue()


def lying_down() -> bytes:
    """The coffee turned by 90 degrees, with an EXIF tag that says how to turn it back."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.open(COFFEE).transpose(Image.Transpose.ROTATE_90).save(buffer, "JPEG", exif=exif, quality=95)
    return buffer.getvalue()


BAD = {
    "an empty body": Bad(lambda: b"", 400, "empty"),
    "a text file": Bad(lambda: b"These are words.\n" * 50, 415, "not a photo"),
    "a truncated JPEG": Bad(lambda: COFFEE.read_bytes()[:5000], 400, "damaged"),
    "a bomb of 20,000 x 20,000 pixels": Bad(bomb, 413, "pixels"),
    "broken JSON": Bad(lambda: b'{"photo": ', 415, "not a photo"),
}
UNUSUAL = {
    "an animated GIF": (animated_gif, lambda: picture("P")),
    "a CMYK JPEG": (lambda: picture("CMYK", "JPEG", quality=95), COFFEE.read_bytes),
    "16 bits a pixel": (sixteen_bits, lambda: picture("L")),
    "an EXIF rotation": (lying_down, COFFEE.read_bytes),
    "a transparent PNG": (lambda: picture("RGBA"), COFFEE.read_bytes),
}
"""A photo, and the plain one that has to give the same answer."""


@pytest.fixture(params=["rest", "grpc"])
def serving_client(request: pytest.FixtureRequest, rest: RestClient, grpc: GrpcClient) -> Client:
    return rest if request.param == "rest" else grpc


@pytest.mark.parametrize("name", BAD)
def test_a_body_that_cannot_be_served_is_refused_in_one_sentence(serving_client: Client, name: str) -> None:
    bad = BAD[name]
    with pytest.raises(RequestRefused) as refused:
        serving_client.predict(WORKFLOW, bad.body(), "1.0")

    assert refused.value.status == bad.status
    assert bad.says in refused.value.message
    assert refused.value.message.count("\n") == 0
    assert refused.value.request_id


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_photo_is_understood_as_the_plain_one_is(serving_client: Client, name: str) -> None:
    unusual, plain = (serving_client.predict("image_classifier", make(), answer=Labels).best for make in UNUSUAL[name])

    assert unusual.name == plain.name
    assert unusual.score == pytest.approx(plain.score, abs=0.05)


def test_a_photo_of_one_pixel_is_a_photo(serving_client: Client) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")

    assert serving_client.predict(WORKFLOW, buffer.getvalue(), "1.0")["objects"] == []


def test_a_body_of_50_megabytes_never_reaches_a_worker(serving_client: Client) -> None:
    with pytest.raises(TooLarge) as refused:
        serving_client.predict(WORKFLOW, b"\xff" * 50_000_000, "1.0")

    assert refused.value.status == 413


def test_an_unknown_model_and_an_unknown_version_are_not_found(serving_client: Client) -> None:
    for name, version in (("nothing", None), (WORKFLOW, "9.9")):
        with pytest.raises(ModelNotFound) as refused:
            serving_client.predict(name, COFFEE.read_bytes(), version)
        assert refused.value.status == 404


def test_a_wrong_token_is_refused(serving: Serving) -> None:
    where = serving.addresses
    for wrong in (
        RestClient(where.inference, where.management, token="wrong"),  # noqa: S106
        GrpcClient(where.grpc_inference, where.grpc_management, token="wrong"),  # noqa: S106
    ):
        with wrong, pytest.raises(Unauthorized) as refused:
            wrong.predict(WORKFLOW, COFFEE.read_bytes())
        assert refused.value.status == 401


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [("application/pdf", b"%PDF-1.7", 415), ("application/json", b'{"a": ', 415), ("text/plain", b"words", 415)],
)
def test_another_content_type_is_refused_by_its_name(
    serving: Serving, content_type: str, body: bytes, status: int
) -> None:
    """Over REST only: TorchServe's gRPC has no field for it."""
    token = serving.state.key_file.read_text("utf-8")
    headers = {
        "Content-Type": content_type,
        "Authorization": f"Bearer {httpx.Response(200, text=token).json()['inference']['key']}",
    }
    answer = httpx.post(
        f"{serving.addresses.inference}/predictions/{WORKFLOW}/1.0", content=body, headers=headers, timeout=30
    )

    assert answer.status_code == answer.json()["code"] == status
    assert content_type in answer.json()["message"]


def test_the_neighbours_of_bad_requests_never_notice(serving_client: Client, photo: Callable[[str], bytes]) -> None:
    """Every bad input, many times over, mixed with good requests: the good ones are answered as if alone."""
    right = {name: serving_client.predict(WORKFLOW, photo(name), "1.0") for name in ("coffee.jpg", "many.jpg")}
    bodies = {name: bad.body() for name, bad in BAD.items()}
    jobs = [("bad", name) for name in bodies] * 6 + [("good", name) for name in right] * 12
    random.Random(0).shuffle(jobs)

    def send(job: tuple[str, str]) -> object:
        kind, name = job
        try:
            return serving_client.predict(WORKFLOW, bodies[name] if kind == "bad" else photo(name), "1.0", timeout=60)
        except ServingError as error:
            return error.status

    with ThreadPoolExecutor(16) as threads:
        answers = list(zip(jobs, threads.map(send, jobs), strict=True))

    for (kind, name), answer in answers:
        if kind == "bad":
            assert answer == BAD[name].status
        else:
            assert answer["summary"] == right[name]["summary"]  # type: ignore[index]


def test_the_exif_rotation_is_the_one_that_pillow_undoes() -> None:
    """The fixture is what it says: it lies on its side until its tag is heeded."""
    image = Image.open(io.BytesIO(lying_down()))

    assert image.size == Image.open(COFFEE).size[::-1]
    assert ImageOps.exif_transpose(image).size == Image.open(COFFEE).size
