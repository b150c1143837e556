"""Photos of every mode, depth, transparency, orientation and format: read to the right pixels, or refused in a sentence.

What is expected is computed here from the numbers that the file says. PNG, TIFF, BMP and GIF files are written by hand,
so that they may say what Pillow would not write.
"""

from __future__ import annotations

import io
import itertools
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageCms

from tests.unit.conftest import Write
from torchserve_dag import Workflow
from torchserve_dag.runtime.data import photos
from torchserve_dag.runtime.data.source import CheckError
from torchserve_dag.runtime.messages import Failure, InputError, OverloadedError, Text

RGB = tuple[int, int, int]
ROOT = Path(__file__).parents[2]
WHITE, BLACK, RED, GREEN, BLUE = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)


def pixels(body: bytes) -> list[list[RGB]]:
    """The rows of a photo."""
    image = photos.decode(body).image
    assert image.mode == "RGB"
    assert image.info == {}
    assert dict(image.getexif()) == {}
    data = image.tobytes()
    flat: list[RGB] = [(data[i], data[i + 1], data[i + 2]) for i in range(0, len(data), 3)]
    return [flat[i : i + image.width] for i in range(0, len(flat), image.width)]


def refused(body: bytes) -> InputError:
    with pytest.raises(InputError) as caught:
        photos.decode(body)
    message = caught.value.message
    assert message.endswith(".")
    assert "\n" not in message
    return caught.value


def read_or_refused(body: bytes) -> list[list[RGB]] | InputError:
    try:
        return pixels(body)
    except InputError as error:
        return error


def differ(have: list[list[RGB]], want: list[list[RGB]]) -> int:
    """By how much the most different value differs."""
    assert [len(row) for row in have] == [len(row) for row in want]
    both = zip(itertools.chain(*itertools.chain(*have)), itertools.chain(*itertools.chain(*want)), strict=True)
    return max(abs(a - b) for a, b in both)


def grey(value: float) -> RGB:
    return (round(value), round(value), round(value))


def on_white(colour: Sequence[float], alpha: float) -> RGB:
    """`alpha`: 0 to 1."""
    red, green, blue = (round(value * alpha + 255 * (1 - alpha)) for value in colour)
    return red, green, blue


def packed(rows: list[list[int]], bits: int, order: str = ">") -> list[bytes]:
    """Each row's samples, one after another, from the highest bit on."""
    if bits > 12:
        return [struct.pack(f"{order}{len(row)}{'H' if bits == 16 else 'I'}", *row) for row in rows]
    texts = ["".join(f"{value:0{bits}b}" for value in row) for row in rows]
    return [int(text.ljust(-len(text) % 8 + len(text), "0"), 2).to_bytes((len(text) + 7) // 8, "big") for text in texts]


def saved(image: Image.Image, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


# PNG


def chunk(name: bytes, data: bytes, crc: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) if crc is None else crc)
    )


PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Of an interlaced PNG: the first column and row of each pass, and its steps."""


def png(
    samples: list[list[tuple[int, ...]]],
    bits: int,
    colour: int,
    *,
    interlaced: bool = False,
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    passes = PASSES if interlaced else ((0, 0, 1, 1),)
    data = b""
    for left, top, across, down in passes:
        rows = [list(itertools.chain(*row[left::across])) for row in samples[top::down]]
        data += b"".join(b"\0" + row for row in packed([row for row in rows if row], bits))
    header = struct.pack(">IIBBBBB", len(samples[0]), len(samples), bits, colour, 0, 0, interlaced)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + before
        + chunk(b"IDAT", zlib.compress(data))
        + after
        + chunk(b"IEND", b"")
    )


def spread(most: int, count: int = 12) -> list[int]:
    return [most * i // (count - 1) for i in range(count)]


def table(values: Sequence[Any], width: int = 4) -> list[list[Any]]:
    return [list(values[i : i + width]) for i in range(0, len(values), width)]


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_grey_png(bits: int, *, interlaced: bool) -> None:
    most = 2**bits - 1
    values = spread(most)
    body = png(table([(value,) for value in values]), bits, 0, interlaced=interlaced)

    assert pixels(body) == table([grey(value * 255 / most) for value in values])


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_grey_png_with_a_transparent_value(bits: int, *, interlaced: bool) -> None:
    """The value next to it, which 8 bits cannot tell from it, is not transparent."""
    most = 2**bits - 1
    clear = 0 if bits == 1 else most // 3
    values = [clear, most, 0, min(clear + 1, most), max(clear - 1, 0), clear]
    samples = table([(value,) for value in values], 3)
    body = png(samples, bits, 0, interlaced=interlaced, before=chunk(b"tRNS", struct.pack(">H", clear)))

    assert pixels(body) == table([WHITE if value == clear else grey(value * 255 / most) for value in values], 3)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_png_of_colours(bits: int, *, transparent: bool, interlaced: bool) -> None:
    most = 2**bits - 1
    clear = (most // 3, most // 2, most)
    values = [clear, (most, 0, 0), (0, most, 0), (clear[0] + 1, *clear[1:]), (*clear[:2], most - 1), clear]
    before = chunk(b"tRNS", struct.pack(">3H", *clear)) if transparent else b""
    want = [WHITE if transparent and v == clear else tuple(round(x * 255 / most) for x in v) for v in values]

    have = pixels(png(table(values, 3), bits, 2, interlaced=interlaced, before=before))

    assert differ(have, table(want, 3)) <= (bits == 16)  # of 16 bits Pillow keeps the upper 8
    if transparent:
        assert (have[0][0], have[1][2]) == (WHITE, WHITE)
        assert WHITE not in {have[1][0], have[1][1]}


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("transparent", [b"", b"\0", b"\xff\0", b"\x80\0"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_png_with_a_palette(bits: int, transparent: bytes, *, interlaced: bool) -> None:
    """`transparent`: the alpha of the first colours."""
    palette = [(10, 200, 30), (250, 20, 110), (1, 2, 3), (90, 80, 70)][: 2**bits]
    indices = [i % len(palette) for i in range(12)]
    before = chunk(b"PLTE", b"".join(map(bytes, palette))) + (chunk(b"tRNS", transparent) if transparent else b"")
    alpha = [value / 255 for value in transparent.ljust(4, b"\xff")]

    have = pixels(png(table([(i,) for i in indices]), bits, 3, interlaced=interlaced, before=before))

    assert differ(have, table([on_white(palette[i], alpha[i]) for i in indices])) <= 1


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("colour", [4, 6])
def test_a_png_with_an_alpha_channel(colour: int, bits: int, *, interlaced: bool) -> None:
    most = 2**bits - 1
    colours = [(most, 0, 0), (0, most // 2, most), (most // 5, most // 3, 7), (0, 0, 0)]
    alphas = [0, most, most // 2, most // 4]
    values = [(c[:1] if colour == 4 else c) + (a,) for a in alphas for c in colours]
    want = [
        on_white([v * 255 / most for v in (value[:1] * 3 if colour == 4 else value[:3])], value[-1] / most)
        for value in values
    ]

    assert differ(pixels(png(table(values), bits, colour, interlaced=interlaced)), table(want)) <= 1


SIX = [[RED, GREEN, BLUE], [WHITE, BLACK, (90, 120, 60)]]
"""Three pixels wide and two high, all different."""


def png_of_six(before: bytes = b"", after: bytes = b"") -> bytes:
    return png(SIX, 8, 2, before=before, after=after)  # type: ignore[arg-type]


MEGABYTES = zlib.compress(bytes(1_500_000))
METADATA = {
    "a profile of 1.5 MB": chunk(b"iCCP", b"icc\0\0" + MEGABYTES),
    "a profile that is none": chunk(b"iCCP", b"icc\0\0hello"),
    "a text of 1.5 MB": chunk(b"zTXt", b"prompt\0\0" + MEGABYTES),
    "an international text of 1.5 MB": chunk(b"iTXt", b"prompt\0\1\0\0\0" + MEGABYTES),
    "80 texts of 1 MB": chunk(b"zTXt", b"prompt\0\0" + zlib.compress(bytes(1_000_000))) * 80,
    "a text with a wrong checksum": chunk(b"tEXt", b"Comment\0hello", crc=1),
    "a text without its separator": chunk(b"zTXt", b"prompt"),
    "a gamma that is cut off": chunk(b"gAMA", b"\0"),
    "a chunk that nobody knows": chunk(b"prVt", b"x"),
    "EXIF with a wrong checksum": chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0", crc=1),
    "EXIF that is none": chunk(b"eXIf", b"hello, world"),
    "an animation": chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", struct.pack(">5IHHBB", 0, 3, 2, 0, 0, 1, 1, 0, 0)),
    "a wrong animation": chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", struct.pack(">5IHHBB", 7, 9, 9, 0, 0, 1, 1, 0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("where", ["before", "after"])
def test_the_metadata_of_a_png_is_skipped(name: str, where: str) -> None:
    body = png_of_six(**{where: METADATA[name]})

    assert pixels(body) == SIX
    assert photos.decode(body).file is None or Image.open(io.BytesIO(body)).load()  # a handler may open what it gets


def test_metadata_is_never_inflated() -> None:
    """A profile of 50 MB in 200 KB costs nothing."""
    bomb = chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(50_000_000), 1))
    before = time.thread_time()

    assert pixels(png_of_six(bomb)) == SIX
    assert time.thread_time() - before < 0.2


def test_a_png_without_its_last_chunk_is_read() -> None:
    assert pixels(png_of_six()[:-12]) == SIX


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (png_of_six(chunk(b"tRNS", bytes(6), crc=1)), "the checksum of its chunk tRNS is wrong"),
        (png_of_six().replace(b"IDATx", b"IDATy"), "the checksum of its chunk IDAT is wrong"),
        (png_of_six(chunk(b"CgBI", b"\x50\0\x20\x02")), "its chunk CgBI is not known, and needed"),
        (png_of_six(chunk(b"\xff\0\n!", b"") * 2)[:70], ""),
        (png_of_six()[:8] + png_of_six()[33:], "it does not begin with a header"),
        (png([[(0,)]], 8, 3), "its palette is missing"),
        (png([[(0,)]], 8, 5), ""),
    ],
)
def test_a_png_whose_pixels_are_not_known_is_refused(body: bytes, says: str) -> None:
    assert says in refused(body).message


# TIFF


def tiff(
    width: int, height: int, bits: Sequence[int], photometric: int, data: bytes, order: str = "<", **more: Sequence[int]
) -> bytes:
    """`more`: other tags, by `tNUMBER`; `next`: the data of the next page."""
    following = bytes(more.pop("next", b""))
    compression = more.get("t259", [1])[0]
    if compression == 8:
        data = zlib.compress(data)
    tags: dict[int, Sequence[int]] = {
        256: [width], 257: [height], 258: bits, 259: [compression], 262: [photometric],
        277: [len(bits)], 278: [height], 273: [0], 279: [len(data)],
    }  # fmt: skip
    tags |= {int(name[1:]): values for name, values in more.items()}
    tags = dict(sorted(tags.items()))
    end = 8 + 2 + 12 * len(tags) + 4
    outside = b""
    entries = b""
    for number, values in tags.items():
        letter, kind = ("I", 4) if number in {273, 279, 324, 325, 330} else ("H", 3)
        places = [value + end + 2000 for value in values] if number in {273, 324} else values
        written = struct.pack(f"{order}{len(values)}{letter}", *places)
        if len(written) > 4:
            outside, written = outside + written, struct.pack(f"{order}I", end + len(outside))
        entries += struct.pack(f"{order}HHI", number, kind, len(values)) + written.ljust(4, b"\0")
    after = end + 2000 + len(data) if following else 0
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    return start + entries + struct.pack(f"{order}I", after) + outside.ljust(2000, b"\0") + data + following


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_a_grey_tiff(bits: int, photometric: int, order: str, compression: int) -> None:
    """`photometric`: 0 where 0 is white, 1 where 0 is black."""
    most = 2**bits - 1
    values = spread(most, 15)
    data = b"".join(packed(table(values, 5), bits, order))
    body = tiff(5, 3, [bits], photometric, data, order, t259=[compression])
    want = table([grey((most - v if photometric == 0 else v) * 255 / most) for v in values], 5)

    if (bits == 12 and (photometric == 0 or order == ">")) or (bits == 16 and photometric == 0 and order == ">"):
        assert refused(body).status == 415  # Pillow has no reader for these
    else:
        assert pixels(body) == want


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("bits", "form"), [(8, 2), (16, 2), (32, 1), (32, 2), (32, 3), (16, 3), (64, 3)])
def test_a_tiff_without_a_defined_white_is_refused(bits: int, form: int, order: str) -> None:
    error = refused(tiff(2, 2, [bits], 1, bytes(4 * bits // 8), order, t339=[form]))

    assert error.status == 415


@pytest.mark.parametrize(("mode", "says"), [("I", "32-bit integers"), ("F", "floating-point numbers")])
def test_the_refusal_of_a_tiff_says_what_its_pixels_are(mode: str, says: str) -> None:
    error = refused(saved(Image.new(mode, (3, 3), 200), "TIFF"))

    assert error.status == 415
    assert says in error.message
    assert "send 8 or 16 bits" in error.message


COLOURS = [(250, 10, 30), (0, 90, 200), (255, 255, 255), (12, 200, 100), (0, 0, 0), (77, 66, 55)]


def premultiplied(value: int, alpha: int) -> int:
    return round(value * alpha / 255)


def colour_tiff(
    samples: list[tuple[int, ...]], photometric: int, bits: int = 8, order: str = "<", **tags: Any
) -> bytes:
    if tags.get("t284") == [2]:  # each band by itself
        size = len(samples) * bits // 8
        data = b"".join(packed([list(band) for band in zip(*samples, strict=True)], bits, order))
        tags |= {"t273": [i * size for i in range(len(samples[0]))], "t279": [size] * len(samples[0])}
        tags["t278"] = [2]
    else:
        data = b"".join(packed([list(itertools.chain(*samples))], bits, order))
    return tiff(3, 2, [bits] * len(samples[0]), photometric, data, order, **tags)


ALPHAS = [255, 128, 0, 51, 200, 255]
SEPARATIONS = [(0, 255, 255, 0), (255, 0, 0, 0), (0, 0, 0, 0), (10, 20, 30, 40), (0, 0, 0, 255), (200, 100, 50, 25)]


def from_cmyk(sample: Sequence[int]) -> RGB:
    *inks, black = sample
    cyan, magenta, yellow = (round((255 - ink) * (255 - black) / 255) for ink in inks)
    return cyan, magenta, yellow


def from_ycbcr(y: int, cb: int, cr: int) -> RGB:
    red, blue = y + 1.402 * (cr - 128), y + 1.772 * (cb - 128)
    green = y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128)
    clipped = [min(255, max(0, round(value))) for value in (red, green, blue)]
    return clipped[0], clipped[1], clipped[2]


def from_lab(lightness: float, a: float, b: float) -> RGB:
    """CIE L*a*b* under D50 to sRGB, by the Bradford-adapted matrix."""
    y = (lightness + 16) / 116
    x, z = y + a / 500, y - b / 200
    white = (0.9642, 1.0, 0.8249)
    cie = [
        w * (t**3 if t > 6 / 29 else 3 * (6 / 29) ** 2 * (t - 4 / 29)) for w, t in zip(white, (x, y, z), strict=True)
    ]
    matrix = (
        (3.1338561, -1.6168667, -0.4906146),
        (-0.9787684, 1.9161415, 0.0334540),
        (0.0719453, -0.2289914, 1.4052427),
    )
    linear = [min(1.0, max(0.0, sum(m * v for m, v in zip(row, cie, strict=True)))) for row in matrix]
    red, green, blue = (round(255 * (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055)) for v in linear)
    return red, green, blue


LABS = [(54, 81, 70), (30, 20, -60), (100, 0, 0), (0, 0, 0), (60, -40, 20), (50, 0, 0)]
LAB_SAMPLES = [(round(lightness * 2.55), a & 0xFF, b & 0xFF) for lightness, a, b in LABS]

RGBA = [(*c, a) for c, a in zip(COLOURS, ALPHAS, strict=True)]
PREMULTIPLIED = [(*(premultiplied(v, a) for v in c), a) for c, a in zip(COLOURS, ALPHAS, strict=True)]
BLENDED = [on_white(c, a / 255) for c, a in zip(COLOURS, ALPHAS, strict=True)]
LIGHT = [(c[0], a) for c, a in zip(COLOURS, ALPHAS, strict=True)]
YCBCR = [(81, 90, 240), (145, 54, 34), (41, 240, 110), (235, 128, 128), (0, 128, 128), (100, 130, 120)]
PALETTE = [(COLOURS * 43)[i][band] * 257 for band in range(3) for i in range(256)]
SMALL_PALETTE = [(COLOURS * 3)[i][band] * 257 for band in range(3) for i in range(16)]
TIFFS: dict[str, tuple[Callable[..., bytes], Sequence[Sequence[int]], int]] = {
    "RGB": (partial(colour_tiff, COLOURS, 2), COLOURS, 0),
    "RGB and a fourth band": (partial(colour_tiff, [(*c, 9) for c in COLOURS], 2, t338=[0]), COLOURS, 0),
    "RGB with alpha": (partial(colour_tiff, RGBA, 2, t338=[2]), BLENDED, 1),
    "RGB with alpha, premultiplied": (partial(colour_tiff, PREMULTIPLIED, 2, t338=[1]), BLENDED, 3),
    "RGB with alpha that is not declared": (partial(colour_tiff, RGBA, 2), BLENDED, 1),
    "CMYK": (partial(colour_tiff, SEPARATIONS, 5), [from_cmyk(s) for s in SEPARATIONS], 1),
    "Lab": (partial(colour_tiff, LAB_SAMPLES, 8), [from_lab(*lab) for lab in LABS], 6),
    "grey with alpha": (partial(colour_tiff, LIGHT, 1, t338=[2]), [on_white((g,) * 3, a / 255) for g, a in LIGHT], 1),
    "grey with alpha, premultiplied": (
        partial(colour_tiff, [(premultiplied(g, a), a) for g, a in LIGHT], 1, t338=[1]),
        [on_white((g,) * 3, a / 255) for g, a in LIGHT],
        3,
    ),
    "a palette": (partial(tiff, 3, 2, [8], 3, bytes(range(6)), t320=PALETTE), COLOURS, 0),
    "a palette of 4 bits": (partial(tiff, 3, 2, [4], 3, b"\x01\x20\x34\x50", t320=SMALL_PALETTE), COLOURS, 0),
    "a palette with alpha": (
        partial(tiff, 3, 2, [8, 8], 3, bytes(itertools.chain(*enumerate(ALPHAS))), t338=[2], t320=PALETTE),
        BLENDED,
        1,
    ),
}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("name", TIFFS)
def test_a_tiff_of_colours(name: str, compression: int, order: str) -> None:
    make, want, near = TIFFS[name]

    assert differ(pixels(make(order=order, t259=[compression])), table(want, 3)) <= near


def test_a_tiff_of_luma_and_chroma() -> None:
    assert differ(pixels(colour_tiff(YCBCR, 6, t530=[1, 1])), table([from_ycbcr(*s) for s in YCBCR], 3)) <= 2


def test_a_tiff_with_each_band_by_itself() -> None:
    assert pixels(colour_tiff(COLOURS, 2, t284=[2])) == table(COLOURS, 3)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("alpha", [False, True])
def test_a_tiff_of_16_bits_a_colour(compression: int, order: str, *, alpha: bool) -> None:
    samples = [tuple(value * 257 for value in sample) for sample in (RGBA if alpha else COLOURS)]
    body = colour_tiff(samples, 2, 16, order, t259=[compression], **({"t338": [2]} if alpha else {}))

    assert differ(pixels(body), table(BLENDED if alpha else COLOURS, 3)) <= 1


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_of_16_bits_an_ink(order: str) -> None:
    body = colour_tiff([tuple(value * 257 for value in sample) for sample in SEPARATIONS], 5, 16, order)

    assert differ(pixels(body), table([from_cmyk(sample) for sample in SEPARATIONS], 3)) <= 1


def test_a_tiff_in_tiles() -> None:
    tile = [[(x, y, 7) for x in range(16)] for y in range(16)]
    data = bytes(itertools.chain(*itertools.chain(*tile)))
    body = tiff(10, 9, [8, 8, 8], 2, data, t322=[16], t323=[16], t324=[0], t325=[len(data)])

    assert pixels(body.replace(struct.pack("<HHI", 273, 4, 1), struct.pack("<HHI", 65000, 4, 1))) == [
        row[:10] for row in tile[:9]
    ]


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("bits", [1, 8])
def test_a_tiff_with_its_bits_in_reverse(bits: int, compression: int) -> None:
    values = [1, 0, 1, 1] if bits == 1 else [1, 2, 200, 255]
    data = b"".join(packed([values], bits))
    turned = bytes(int(f"{byte:08b}"[::-1], 2) for byte in data)
    body = tiff(4, 1, [bits], 1, data if compression == 8 else turned, t266=[2], t259=[compression])
    if compression == 8:  # libtiff turns the bits of what is compressed, too
        at = body.index(zlib.compress(data))
        body = body[:at] + bytes(int(f"{byte:08b}"[::-1], 2) for byte in body[at:])

    assert pixels(body) == [[grey(value * 255 / (2**bits - 1)) for value in values]]


def test_of_a_tiff_the_first_page_is_read() -> None:
    pages = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]

    assert pixels(saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])) == [[RED, RED], [RED, RED]]


def test_a_tiff_that_begins_with_a_thumbnail_is_refused() -> None:
    """So do cameras' raw files: the thumbnail is not the photo."""
    raw = tiff(2, 2, [8, 8, 8], 2, bytes(12), t254=[1], t330=[8])

    assert "thumbnail" in refused(raw).message
    assert pixels(tiff(1, 1, [8], 1, b"\xff", t254=[1])) == [[WHITE]]


# BMP


MASKS = {"BGRA": (0xFF0000, 0xFF00, 0xFF, 0xFF000000), "RGBA": (0xFF, 0xFF00, 0xFF0000, 0xFF000000)}


def bmp(
    width: int,
    height: int,
    bits: int,
    data: bytes,
    *,
    palette: Sequence[RGB] = (),
    compression: int = 0,
    masks: Sequence[int] = (),
    old: bool = False,
) -> bytes:
    """`data`: rows of 4 n bytes, the lowest first unless the height is negative. `old`: with the header of OS/2."""
    colours = b"".join(bytes(colour[::-1]) + (b"" if old else b"\0") for colour in palette)
    if old:
        header = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        size = 108 if masks else 40
        header = struct.pack(
            "<IiiHHIIiiII", size, width, height, 1, bits, compression, len(data), 0, 0, len(palette), 0
        )
        if masks:
            header += struct.pack("<4I", *masks) + bytes(52)
    start = 14 + len(header) + len(colours)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + colours + data


def lines(rows: list[bytes]) -> bytes:
    return b"".join(row.ljust((len(row) + 3) // 4 * 4, b"\0") for row in reversed(rows))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_bmp_with_a_palette(bits: int, *, old: bool) -> None:
    palette = (COLOURS * 43)[: 2**bits]
    indices = [[i % len(palette) for i in range(y, y + 5)] for y in range(3)]

    body = bmp(5, 3, bits, lines(packed(indices, bits)), palette=palette, old=old)

    assert pixels(body) == [[palette[i] for i in row] for row in indices]


@pytest.mark.parametrize(
    "palette", [[BLACK, WHITE], [WHITE, BLACK], [grey(i) for i in range(256)], [grey(i) for i in range(16)]]
)
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_bmp_with_a_palette_of_greys_is_read_or_refused(bits: int, palette: list[RGB]) -> None:
    """Pillow reads 8 bits with the colours black and white as 1 bit."""
    if len(palette) > 2**bits:
        pytest.skip("more colours than there can be")
    indices = [[i % len(palette) for i in range(y, y + 9)] for y in range(2)]
    body = bmp(9, 2, bits, lines(packed(indices, bits)), palette=palette)
    have = read_or_refused(body)

    if isinstance(have, InputError):
        assert have.status == 415
        assert "a palette of greys" in have.message
        assert bits > 1
        assert palette[0] == BLACK
    else:
        assert have == [[palette[i] for i in row] for row in indices]


def fives(value: int) -> int:
    return round(value * 255 / 31)


@pytest.mark.parametrize("green_bits", [5, 6])
def test_a_bmp_of_16_bits(green_bits: int) -> None:
    values = [(31, 0, 0), (0, 2**green_bits - 1, 0), (0, 0, 31), (16, 2, 9)]
    row = struct.pack("<4H", *(r << 5 + green_bits | g << 5 | b for r, g, b in values))
    masks = (0x7C00, 0x3E0, 0x1F, 0) if green_bits == 5 else (0xF800, 0x7E0, 0x1F, 0)
    body = bmp(4, 1, 16, row, compression=3, masks=masks)
    want = [(fives(r), round(g * 255 / (2**green_bits - 1)), fives(b)) for r, g, b in values]

    assert differ(pixels(body), [want]) <= 1
    if green_bits == 5:
        assert differ(pixels(bmp(4, 1, 16, row)), [want]) <= 1


@pytest.mark.parametrize("downwards", [False, True])
def test_a_bmp_of_24_and_of_32_bits(*, downwards: bool) -> None:
    for extra in (b"", b"\0", b"\x80"):  # the fourth byte of 32 bits without masks says nothing
        rows = [b"".join(bytes(colour[::-1]) + extra for colour in row) for row in table(COLOURS, 3)]
        data = lines(rows[::-1] if downwards else rows)

        assert pixels(bmp(3, -2 if downwards else 2, 24 + 8 * len(extra), data)) == table(COLOURS, 3)


@pytest.mark.parametrize("order", MASKS)
@pytest.mark.parametrize("alphas", [ALPHAS, [0] * 6, [255] * 6, [0, 0, 0, 0, 0, 255]])
def test_a_bmp_with_alpha(order: str, alphas: list[int]) -> None:
    """With an alpha of 0 everywhere nobody meant one."""
    values = [(c if order == "RGBA" else c[::-1]) + (a,) for c, a in zip(COLOURS, alphas, strict=True)]
    data = lines([bytes(itertools.chain(*row)) for row in table(values, 3)])
    want = [on_white(c, a / 255 if any(alphas) else 1) for c, a in zip(COLOURS, alphas, strict=True)]

    assert differ(pixels(bmp(3, 2, 32, data, compression=3, masks=MASKS[order])), table(want, 3)) <= 1


def test_a_bmp_in_runs() -> None:
    """RLE8: two of the same, three as they are, padded; the end of the row; four of the same; the end."""
    data = bytes([2, 1, 0, 3, 0, 1, 2, 0, 0, 0, 5, 3, 0, 1])
    have = pixels(bmp(5, 2, 8, data, palette=COLOURS, compression=1))

    assert have == [[COLOURS[3]] * 5, [COLOURS[i] for i in (1, 1, 0, 1, 2)]]


def test_a_large_bmp_in_runs_is_refused() -> None:
    """Its 14 bytes would cost seconds."""
    error = refused(bmp(5_000_000, 2, 8, bytes([2, 1, 0, 0] * 3 + [0, 1]), palette=COLOURS, compression=1))

    assert error.status == 415
    assert "compressed, with more than 4,000,000 pixels" in error.message


@pytest.mark.parametrize(
    ("bits", "compression", "masks"), [(32, 3, (0x3FF00000, 0xFFC00, 0x3FF, 0)), (24, 4, ()), (24, 5, ()), (2, 0, ())]
)
def test_a_bmp_of_another_kind_is_refused(bits: int, compression: int, masks: Sequence[int]) -> None:
    error = refused(bmp(2, 2, bits, bytes(64), compression=compression, masks=masks))

    assert error.status == 415
    assert "a kind of BMP that is not read here: Unsupported BMP" in error.message


# GIF


def lzw(indices: Sequence[int]) -> bytes:
    """Codes of 9 bits: clear, each index by itself, end; in blocks."""
    assert len(indices) < 250
    number = sum(code << 9 * i for i, code in enumerate([256, *indices, 257]))
    data = number.to_bytes((9 * (len(indices) + 2) + 7) // 8, "little")
    blocks = [data[i : i + 255] for i in range(0, len(data), 255)]
    return b"\x08" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"


def frame(
    box: tuple[int, int, int, int],
    indices: Sequence[int],
    *,
    clear: int | None = None,
    own: Sequence[RGB] = (),
    interlaced: bool = False,
) -> bytes:
    """A frame of a GIF at (left, top, width, height)."""
    control = b"" if clear is None else b"!\xf9\x04" + struct.pack("<BHB", 1, 0, clear) + b"\0"
    flags = (0x80 | 7 if own else 0) | (0x40 if interlaced else 0)
    width = box[2]
    rows = [list(indices[i : i + width]) for i in range(0, len(indices), width)]
    if interlaced:
        rows = [row for first, step in ((0, 8), (4, 8), (2, 4), (1, 2)) for row in rows[first::step]]
    return control + b"," + struct.pack("<4HB", *box, flags) + table_of(own) + lzw(list(itertools.chain(*rows)))


def table_of(palette: Sequence[RGB]) -> bytes:
    return b"".join(map(bytes, palette)).ljust(768, b"\0") if palette else b""


def gif(width: int, height: int, *frames: bytes, palette: Sequence[RGB] = tuple(COLOURS), background: int = 0) -> bytes:
    flags = 0x80 | 7 if palette else 0
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", width, height, flags, background, 0)
        + table_of(palette)
        + b"".join(frames)
        + b";"
    )


ALL_SIX = (0, 0, 3, 2)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("clear", [None, 0, 4])
def test_a_gif(clear: int | None, *, own: bool) -> None:
    first = frame(ALL_SIX, range(6), clear=clear, own=COLOURS[::-1] if own else ())
    colours = COLOURS[::-1] if own else COLOURS

    assert pixels(gif(3, 2, first)) == table([WHITE if i == clear else colours[i] for i in range(6)], 3)


def test_a_gif_that_is_interlaced() -> None:
    indices = [i % 6 for i in range(2 * 13)]

    assert pixels(gif(2, 13, frame((0, 0, 2, 13), indices, interlaced=True))) == table([COLOURS[i] for i in indices], 2)


def test_of_a_gif_the_first_frame_is_read() -> None:
    body = gif(3, 2, frame(ALL_SIX, range(6)), frame(ALL_SIX, [0] * 6), frame((1, 0, 1, 1), [3], clear=2))

    assert pixels(body) == table(COLOURS, 3)


@pytest.mark.parametrize("clear", [None, 5])
@pytest.mark.parametrize("background", [0, 1])
def test_outside_a_gifs_first_frame_it_is_white(background: int, clear: int | None) -> None:
    """As browsers show it. Pillow takes the palette's first colour."""
    body = gif(4, 3, frame((1, 1, 2, 1), [4, 3], clear=clear), background=background)

    assert pixels(body) == [[WHITE] * 4, [WHITE, COLOURS[4], COLOURS[3], WHITE], [WHITE] * 4]


def test_a_gif_whose_frame_is_larger_than_its_page() -> None:
    assert pixels(gif(1, 1, frame(ALL_SIX, range(6)))) == table(COLOURS, 3)
    assert refused(gif(1, 1, frame((0, 0, 65_535, 65_535), [0]))).status == 413


def test_a_gif_of_greys() -> None:
    greys = [grey(i) for i in range(256)]

    assert pixels(gif(3, 1, frame((0, 0, 3, 1), [7, 80, 255], clear=80), palette=greys)) == [[greys[7], WHITE, WHITE]]


# JPEG


def blocks(colours: Sequence[Any], mode: str = "RGB", side: int = 16) -> Image.Image:
    """Squares of one colour each, side by side."""
    image = Image.new(mode, (side * len(colours), side))
    for i, colour in enumerate(colours):
        image.paste(colour, (side * i, 0, side * (i + 1), side))
    return image


def centres(body: bytes, count: int) -> list[RGB]:
    image = photos.decode(body).image
    side = image.height
    assert image.width == side * count
    return [image.getpixel((side * i + side // 2, side // 2)) for i in range(count)]


def near(have: Sequence[RGB], want: Sequence[RGB], most: int = 6) -> bool:
    return differ([list(have)], [list(want)]) <= most


JPEGS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "full colour resolution": {"subsampling": 0},
    "with restart markers": {"restart_marker_blocks": 2},
    "optimised": {"optimize": True},
    "not of this colour space": {"keep_rgb": True},
}


@pytest.mark.parametrize("how", JPEGS)
def test_a_jpeg(how: str) -> None:
    body = saved(blocks(COLOURS), "JPEG", quality=95, **JPEGS[how])

    assert near(centres(body, 6), COLOURS)


def test_a_grey_jpeg() -> None:
    assert near(centres(saved(blocks([0, 100, 255], "L"), "JPEG"), 3), [BLACK, grey(100), WHITE], 2)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_of_cyan_magenta_yellow_and_black(*, progressive: bool) -> None:
    """Adobe's programs write the values upside down, and so does everybody."""
    body = saved(blocks(SEPARATIONS, "CMYK"), "JPEG", quality=95, progressive=progressive)

    assert b"Adobe" in body
    assert near(centres(body, 6), [from_cmyk(sample) for sample in SEPARATIONS])


def test_of_a_jpeg_with_several_pictures_the_first_is_read() -> None:
    body = saved(blocks([RED]), "MPO", save_all=True, append_images=[blocks([BLUE])], quality=95)

    assert b"MPF" in body
    assert near(centres(body, 1), [RED])


SCENE = Image.effect_noise((64, 48), 50).convert("RGB")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("missing", [1, 2])
@pytest.mark.parametrize("how", JPEGS)
def test_a_jpeg_of_which_only_the_end_is_missing_is_read(how: str, missing: int, mode: str) -> None:
    body = saved(SCENE.convert(mode), "JPEG", **(JPEGS[how] if mode == "RGB" else {**JPEGS[how], "keep_rgb": False}))
    assert body.endswith(b"\xff\xd9")

    assert pixels(body[:-missing]) == pixels(body)
    assert photos.decode(body[:-missing]).file is None


@pytest.mark.parametrize("side", [48, 40])
@pytest.mark.parametrize("how", JPEGS)
def test_a_jpeg_that_was_cut_off_is_refused(how: str, side: int) -> None:
    """Also where it was cut off between two scans, or two intervals between restart markers."""
    body = saved(SCENE.crop((0, 0, 64, side)), "JPEG", **JPEGS[how])
    want = pixels(body)
    scan = body.index(b"\xff\xda")
    ends = {*range(scan + 20, len(body) - 2, 29), *range(len(body) - 60, len(body) - 2)}
    ends |= {i for i in range(scan + 20, len(body) - 4) if body[i] == 0xFF and body[i + 1] != 0}
    read = 0
    for end in sorted(ends):
        have = read_or_refused(body[:end])
        if isinstance(have, InputError):
            assert have.status == 400
            assert "damaged" in have.message
        else:
            assert have == want  # nothing that shows is missing
            read += 1

    assert read < 4


def test_a_jpeg_with_bytes_behind_its_end_is_read() -> None:
    body = saved(SCENE, "JPEG")

    assert pixels(body + b"\0" * 1000 + b"\xff\xda") == pixels(body)


def test_a_jpeg_of_ten_thousand_scans_is_refused() -> None:
    """Each is a pass over all pixels."""
    body = saved(SCENE, "JPEG", progressive=True)
    last = body.rindex(b"\xff\xda")
    error = refused(body[:last] + body[last:-2] * 10_000 + b"\xff\xd9")

    assert error.status == 415
    assert "more than 50 scans" in error.message


@pytest.mark.parametrize(("place", "value"), [(4, 12), (9, 2)])
def test_a_jpeg_of_12_bits_or_two_bands_is_refused(place: int, value: int) -> None:
    body = bytearray(saved(SCENE, "JPEG"))
    body[body.index(b"\xff\xc0") + place] = value

    assert refused(bytes(body)).status == 415


# WebP


def test_a_webp() -> None:
    assert pixels(saved(image_of(COLOURS), "WEBP", lossless=True)) == table(COLOURS, 3)
    assert near(centres(saved(blocks(COLOURS), "WEBP", quality=95), 6), COLOURS, 12)


def image_of(values: Sequence[Any], mode: str = "RGB") -> Image.Image:
    image = Image.new(mode, (3, 2))
    for i, value in enumerate(values):
        image.putpixel((i % 3, i // 3), value)
    return image


@pytest.mark.parametrize("lossless", [False, True])
def test_a_webp_with_alpha(*, lossless: bool) -> None:
    body = saved(blocks(RGBA, "RGBA"), "WEBP", lossless=lossless, quality=95, exact=True)

    assert near(centres(body, 6), BLENDED, 1 if lossless else 12)


def test_of_a_webp_the_first_frame_is_read() -> None:
    images = [image_of(COLOURS), image_of(COLOURS[::-1])]

    assert pixels(saved(images[0], "WEBP", lossless=True, save_all=True, append_images=images[1:])) == table(COLOURS, 3)


@pytest.mark.parametrize("kind", [b"VP8X\n\0\0\0\0\0\0\0\xff\x3f\0\xff\x3f\0", b"VP8L\x05\0\0\0\x2f\xff\xff\xff\x0f"])
def test_a_webp_that_is_too_large_is_refused_before_there_is_room_for_its_pixels(kind: bytes) -> None:
    """Pillow allocates 2 GB when it reads such a header."""
    body = b"RIFF" + struct.pack("<I", len(kind) + 4) + b"WEBP" + kind
    error = refused(body)

    assert error.status == 413
    assert "16,384 x 16,384 = 268,435,456 pixels" in error.message


# All formats


ORIENTED = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "MPO": {"quality": 95, "subsampling": 0},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "TIFF, compressed": {"compression": "tiff_adobe_deflate"},
}
TURNED = {
    1: ["ab", "cd", "ef"], 2: ["ba", "dc", "fe"], 3: ["fe", "dc", "ba"], 4: ["ef", "cd", "ab"],
    5: ["ace", "bdf"], 6: ["bdf", "ace"], 7: ["fdb", "eca"], 8: ["eca", "fdb"],
}  # fmt: skip
"""How an upright photo `ab cd ef` is stored, by the EXIF standard's words: for 6 its first row is the right side, and
its first column is the top."""


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("kind", ORIENTED)
@pytest.mark.parametrize("orientation", [*TURNED, 0, 9])
def test_a_photo_is_turned_upright(orientation: int, kind: str, mode: str) -> None:
    name = kind.partition(",")[0]
    if mode not in {"JPEG": "RGB L CMYK", "MPO": "RGB L CMYK", "PNG": "RGB L RGBA I;16", "WEBP": "RGB RGBA"}.get(
        name, mode
    ):
        pytest.skip(f"no {kind} is {mode}")
    if kind == "TIFF, compressed" and orientation not in TURNED:
        pytest.skip("libtiff does not write it")
    side, letters = 16, dict(zip("abcdef", [0, 50, 100, 150, 200, 250], strict=True))
    stored = TURNED.get(orientation, TURNED[1])
    image = Image.new("L", (side * len(stored[0]), side * len(stored)))
    for y, row in enumerate(stored):
        for x, letter in enumerate(row):
            image.paste(letters[letter], (side * x, side * y, side * (x + 1), side * (y + 1)))
    image = (
        image.convert("I").point(lambda value: value * 257).convert("I;16") if mode == "I;16" else image.convert(mode)
    )
    exif = Image.Exif()
    exif[0x0112] = orientation

    upright = photos.decode(saved(image, name, exif=exif, **ORIENTED[kind])).image

    assert upright.size == (2 * side, 3 * side)
    have = [upright.getpixel((side * x + 8, side * y + 8)) for y in range(3) for x in range(2)]
    assert near(have, [grey(letters[letter]) for letter in "abcdef"], 2)
    assert upright.info == {}


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\xff\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"]
)
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_exif_that_cannot_be_read_turns_nothing(kind: str, exif: bytes) -> None:
    assert pixels(saved(SCENE, kind, exif=exif)) == pixels(saved(SCENE, kind))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_colour_profile_changes_nothing(kind: str) -> None:
    """The pixels are those that Pillow, and so the models' training, reads."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    how = {"lossless": True} if kind == "WEBP" else {}

    assert pixels(saved(image_of(COLOURS), kind, icc_profile=profile, **how)) == pixels(
        saved(image_of(COLOURS), kind, **how)
    )


PLAIN = {
    "JPEG": saved(SCENE, "JPEG"),
    "JPEG, progressive": saved(SCENE, "JPEG", progressive=True),
    "PNG": saved(SCENE, "PNG"),
    "PNG, interlaced": png([[(x, y, x * y) for x in range(16)] for y in range(16)], 8, 2, interlaced=True),
    "GIF": gif(14, 14, frame((0, 0, 14, 14), [i % 6 for i in range(196)])),
    "BMP": bmp(16, 16, 24, bytes(range(256)) * 3),
    "BMP, in runs": bmp(5, 2, 8, bytes([2, 1, 0, 3, 0, 1, 2, 0, 0, 0, 5, 3, 0, 1]), palette=COLOURS, compression=1),
    "TIFF": tiff(16, 16, [8, 8, 8], 2, bytes(range(256)) * 3),
    "TIFF, compressed": saved(SCENE, "TIFF", compression="tiff_lzw"),
    "TIFF, deflated": saved(SCENE, "TIFF", compression="tiff_adobe_deflate"),
    "TIFF, JPEG": saved(SCENE, "TIFF", compression="jpeg"),
    "TIFF, PackBits": saved(SCENE, "TIFF", compression="packbits"),
    "WebP": saved(SCENE, "WEBP"),
    "WebP, lossless": saved(SCENE, "WEBP", lossless=True),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_a_photo_that_was_cut_off_is_refused(kind: str) -> None:
    """Or it is whole, because what is missing says nothing about its pixels."""
    body = PLAIN[kind]
    want = pixels(body)
    for end in {*range(1, len(body), max(1, len(body) // 40)), *range(max(1, len(body) - 12), len(body))}:
        have = read_or_refused(body[:end])
        assert have.status in {400, 415} if isinstance(have, InputError) else have == want


@pytest.mark.parametrize(
    "body",
    [
        b"\0\0\1\0\1\0\x10\x10\0\0\1\0 \0h\4\0\0\x16\0\0\0",  # ICO
        b"P6 1 1 255\n\1\2\3",
        b"\0\0\0\x0cjP  \r\n\x87\n",
        b"\0\0\0\x20ftypavif\0\0\0\0",
        b"\0\0\0\x18ftypheic\0\0\0\0",
        b"8BPS\0\1",
        b"%PDF-1.7",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\xff\x0a",  # JPEG XL
        b"RIFF\0\0\0\0WAVEfmt ",
    ],
)
def test_a_file_of_another_format_is_refused(body: bytes) -> None:
    error = refused(body)

    assert error.status == 415
    assert error.message == "The body is not a photo that is read here; send a photo (JPEG, PNG, WEBP, GIF, BMP, TIFF)."


# How many pixels


def test_the_photos_of_phones_with_50_megapixels_are_within_the_limit() -> None:
    assert 8160 * 6144 < 8192 * 6144 < photos.MAX_PIXELS


@pytest.mark.parametrize("kind", PLAIN)
def test_the_limit_is_a_setting(kind: str) -> None:
    image = photos.decode(PLAIN[kind]).image
    pixel_count = image.width * image.height

    assert photos.decode(PLAIN[kind], pixel_count).image.size == image.size
    with pytest.raises(InputError, match=f"= {pixel_count:,} pixels; the limit is {pixel_count - 1:,}") as caught:
        photos.decode(PLAIN[kind], pixel_count - 1)
    assert caught.value.status == 413


def test_a_workflow_says_its_limit(write: Write) -> None:
    path = write("""
        answer: {function: measure}
        """, """
        from torchserve_dag import Photo
        def measure(photo: Photo) -> Text:
            return Text(f"{photo.width} x {photo.height}")
    """, more="serve: {max_pixels: 3071}")  # fmt: skip
    smaller = saved(SCENE.crop((0, 0, 63, 48)), "PNG")
    with Workflow.load(path) as workflow:
        assert workflow([smaller, PLAIN["PNG"]]) == [
            Text("63 x 48"),
            Failure(413, "The photo is 64 x 48 = 3,072 pixels; the limit is 3,071."),
        ]


@pytest.mark.parametrize("wrong", [0, 178_956_971])
def test_a_limit_that_cannot_be_kept_is_refused(write: Write, wrong: int) -> None:
    with pytest.raises(CheckError, match=f"max_pixels is at {'most 178,956,970' if wrong else 'least 1'}"):
        Workflow.load(write("answer: {handler: upper}", more=f"serve: {{max_pixels: {wrong}}}"))


def test_photos_wait_while_others_are_decoded() -> None:
    room = photos._Room(100)
    entered: list[int] = []
    leave = threading.Event()

    def decode(pixel_count: int) -> None:
        with room.room(pixel_count):
            entered.append(pixel_count)
            leave.wait(30)

    threads = []
    for pixel_count, inside in ((60, [60]), (70, [60]), (10, [60])):  # 10 would fit, and must not pass 70 for ever
        threads.append(threading.Thread(target=decode, args=(pixel_count,)))
        threads[-1].start()
        limit = time.monotonic() + 30
        while (entered != inside or len(room._waiting) < len(threads) - 1) and time.monotonic() < limit:
            time.sleep(0.001)
        assert entered == inside
    leave.set()
    for thread in threads:
        thread.join(30)

    assert entered == [60, 70, 10]
    with room.room(1000):  # alone, a photo has room whatever its size
        pass


def test_a_photo_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "WAIT_S", 0.01)
    monkeypatch.setattr(photos, "_decoding", photos._Room(1))
    with photos._decoding.room(1), pytest.raises(OverloadedError) as caught:
        photos.decode(PLAIN["PNG"])
    assert caught.value.status == 503
    assert len(pixels(PLAIN["PNG"])) == 48


MEASURE = """
import io, re, sys, threading
from pathlib import Path
from PIL import Image
from torchserve_dag.runtime.data import photos

exif = Image.Exif()
exif[0x0112] = 6
buffer = io.BytesIO()
Image.new("RGB", (2000, 2000), (9, 90, 200)).save(buffer, "JPEG", exif=exif)
photos._decoding = photos._Room(int(sys.argv[1]))
begin = threading.Barrier(16)

def peak():  # not ru_maxrss, in which the memory of the process that forked this one is
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

sizes = []

def decode():
    begin.wait()
    sizes.append(photos.decode(buffer.getvalue()).image.size)

before = peak()
threads = [threading.Thread(target=decode) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert sizes == [(2000, 2000)] * 16
print(peak() - before)
"""


def test_sixteen_large_photos_at_once_take_the_memory_of_two() -> None:
    """In kB. Each has 4 megapixels: 16 MB, and as much again while it is turned."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, "8_000_000"], capture_output=True, text=True, check=True, timeout=120
    )

    assert 40_000 < int(done.stdout) < 150_000


MADE = """
import io, sys
from PIL import Image

exif = Image.Exif()
exif[0x0112] = 6
buffer = io.BytesIO()
if sys.argv[1] == "turned, with alpha":
    Image.new("LA", (3000, 3000), (90, 200)).save(buffer, "PNG", exif=exif, compress_level=1)
else:
    Image.new("RGB", (3000, 3000), (9, 90, 200)).save(buffer, "JPEG", exif=exif)
body = buffer.getvalue()[:-2] if sys.argv[1] == "without its end" else buffer.getvalue()
sys.stdout.buffer.write(body)
"""
PEAK = """
import re, sys
from pathlib import Path
from torchserve_dag.runtime.data import photos

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

body = sys.stdin.buffer.read()
before = kilobytes("VmRSS")
photos.decode(body)
print((kilobytes("VmHWM") - before) * 1024 / 3000**2)
"""


@pytest.mark.parametrize(("kind", "most"), [("turned", 9.5), ("without its end", 9.5), ("turned, with alpha", 13.5)])
def test_a_pixel_takes_at_most_so_many_bytes_while_it_is_decoded(kind: str, most: float) -> None:
    """8, 8 and 12, and what the decoder itself needs; a copy of the pixels more would be 4."""
    made = subprocess.run([sys.executable, "-c", MADE, kind], capture_output=True, check=True, timeout=120)
    done = subprocess.run([sys.executable, "-c", PEAK], input=made.stdout, capture_output=True, check=True, timeout=120)

    assert 3.5 < float(done.stdout) < most


NO_MEMORY = """
import re, resource
from pathlib import Path
from tests.unit.test_photos import png_of_zeros
from torchserve_dag.runtime.data import photos
from torchserve_dag.runtime.messages import OverloadedError

size = 1024 * int(re.search(r"VmSize:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_AS, (size + 40_000_000, size + 40_000_000))
try:
    photos.decode(png_of_zeros(7000, 7000))
except OverloadedError as error:
    print(error.status, error.message)
"""


def png_of_zeros(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_without_memory_the_client_is_not_blamed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_MEMORY], capture_output=True, text=True, check=True, timeout=120, cwd=ROOT
    )

    assert done.stdout == "503 There is no memory for the photo's pixels; try again in some seconds.\n"
