"""The formats of photos: how each begins, and what each needs beyond what Pillow does.

Pillow's plugins are called directly, and not through `Image.open`, whose limit on pixels is the process's, and which
drops the reason why a file cannot be read.
"""

from __future__ import annotations

import dataclasses
import io
import re
import zlib
from collections.abc import Callable
from functools import partial, reduce
from http import HTTPStatus
from typing import Any

from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageChops,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from torchserve_dag.runtime.messages import InputError

Loaded = tuple[Image.Image, bool]
"""The upright pixels, 8 bits for each band, in any of Pillow's modes, with a `transparency` that fits them; and whether
whoever opens the file with Pillow gets this image, too."""


@dataclasses.dataclass(frozen=True, slots=True)
class Opened:
    """What a format's header says: width and height, and how the pixels are decoded."""

    size: tuple[int, int]
    load: Callable[[], Loaded]
    weight: int = 1
    """For how many pixels each one counts while they are decoded: 1 where it takes at most 12 bytes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Format:
    name: str
    begins: re.Pattern[bytes]
    open: Callable[[bytes], Opened]
    """Raises whatever Pillow raises for a header that it cannot read, or InputError."""


def format_of(body: bytes) -> Format | None:
    """The format that a file's first bytes are of, if it is read here."""
    return next((each for each in FORMATS if each.begins.match(body)), None)


_TURNS: dict[Any, Image.Transpose] = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image, *, same: bool = True) -> Loaded:
    # ImageOps.exif_transpose copies photos that are upright already, and fails if it cannot write the EXIF again.
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # noqa: BLE001 (EXIF that cannot be read says nothing; the pixels are there)
        turn = None
    return (image, same) if turn is None else (image.transpose(turn), False)


def _grey(image: Image.Image, black: int, white: int) -> Image.Image:
    """Grey values of more than 8 bits, scaled; Pillow's own conversion clips them at 255."""
    scale = 255 / (white - black)
    # `point` truncates, so half is added to round
    return image.convert("I").point(lambda value: value * scale + (0.5 - black * scale)).convert("L")


# JPEG


MAX_SCANS = 50
"""A progressive JPEG has some ten scans. Each is a pass over all pixels, and a small file can have thousands."""

_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])", re.DOTALL)
"""A marker within the data of a scan: FF 00 stands for the byte FF there, and FF D0 to FF D7 restart the decoder."""

_RESTART = re.compile(rb"\xff([\xd0-\xd7])")

_SOS, _EOI = 0xDA, 0xD9
_SOF = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})


def _open_jpeg(body: bytes) -> Opened:
    if body.count(b"\xff\xda") > MAX_SCANS:
        raise ValueError(f"it has more than {MAX_SCANS} scans")
    image = JpegImagePlugin.JpegImageFile(io.BytesIO(body))  # of several pictures (MPO) the first
    return Opened(image.size, partial(_load_jpeg, image, body))


def _load_jpeg(image: Image.Image, body: bytes) -> Loaded:
    try:
        image.load()
        return _upright(image)
    except OSError:
        restart = _next_restart(body)
        if restart is None:
            raise
        image.close()  # with its pixels: others take their place
    # libjpeg reads ahead, and needs something to read. Behind the last bit of a complete scan it may be anything, while
    # of a scan that was cut off it becomes pixels, for each filler others.
    expected = None
    for filler in _FILLERS:
        image = _with_end(body, filler + restart + filler)
        pixels = _fingerprint(image)
        if expected not in {None, pixels}:
            raise OSError("image file is truncated")
        expected = pixels
    return _upright(image, same=False)


_FILLERS = (b"\x55" * 1024, b"\xfe" * 1024, b"\xaa" * 1024, b"")
"""With fewer, one cut in a hundred within the last bytes is not noticed; with these, none of 5,000."""


def _with_end(body: bytes, filler: bytes) -> Image.Image:
    image = JpegImagePlugin.JpegImageFile(io.BytesIO(body.rstrip(b"\xff") + filler + b"\xff\xd9"))
    image.load()
    return image


def _fingerprint(image: Image.Image) -> int:
    value = 0
    for top in range(0, image.height, 256):
        value = zlib.crc32(image.crop((0, top, image.width, min(top + 256, image.height))).tobytes(), value)
    return value


def _next_restart(body: bytes) -> bytes | None:
    """Where only the file's end can be missing: the restart marker that would come next, if there were more data.

    None where the file has its end, or scans are missing: each says for which coefficients it is, and how precise.
    """
    at, progressive = 2, False
    missing: dict[int, set[int]] = {}  # by component: its coefficients that have not come with full precision
    while True:
        found = _MARKER.search(body, at)
        if found is None:
            if not missing or any(missing.values()):
                return None
            restarts = _RESTART.findall(body, at)
            return bytes([0xFF, 0xD0 + (restarts[-1][0] + 1) % 8 if restarts else 0xD0])
        marker, start = found[1][0], found.end()
        segment = body[start + 2 : start + int.from_bytes(body[start : start + 2], "big")]
        if marker == _EOI:
            return None
        if marker in _SOF:
            progressive = marker in _PROGRESSIVE
            missing = {segment[6 + 3 * i]: set(range(64)) for i in range(segment[5])}
        if marker == _SOS:
            count = segment[0]
            first, last, approximation = segment[1 + 2 * count : 4 + 2 * count]
            for component in segment[1 : 1 + 2 * count : 2]:
                if not progressive:
                    missing[component] = set()
                elif not approximation & 0x0F:
                    missing[component] -= set(range(first, last + 1))
        at = start + 2 + len(segment)


# PNG


_PNG_BEGINS = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_PNG_SIMPLE = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9, b"tIME": 0, b"bKGD": 0, b"sBIT": 0, b"tEXt": 0}
"""Chunks that Pillow accepts, where they are at least so long."""
_GREY, _PALETTE = 0, 3
_ANCILLARY = 0x20
"""Set in a chunk's first letter: a reader may leave it out."""


def _open_png(body: bytes) -> Opened:
    if body[12:16] != b"IHDR":
        raise ValueError("it does not begin with a header")
    bits, colour = body[24], body[25]
    pixels, same = _without_metadata(body)
    image = PngImagePlugin.PngImageFile(io.BytesIO(pixels))
    masked = bits == 16 and "transparency" in image.info  # noqa: PLR2004
    return Opened(image.size, partial(_load_png, image, pixels, bits, colour, same=same), weight=2 if masked else 1)


def _without_metadata(body: bytes) -> tuple[bytes, bool]:
    """The chunks that say what the pixels are, and EXIF; and whether Pillow accepts the others, too.

    Others are not read, so that they may be wrong, or large: a profile of 1 MB in 2 KB, which Pillow refuses. Raises
    ValueError where a chunk that is needed is not what was written.
    """
    view, at, same = memoryview(body), len(_PNG_BEGINS), True
    parts = [view[:at]]
    while len(body) - at >= 8:  # noqa: PLR2004 (length and name)
        name = body[at + 4 : at + 8]
        end = at + 12 + int.from_bytes(view[at : at + 4], "big")
        whole = end <= len(body) and zlib.crc32(view[at + 4 : end - 4]) == int.from_bytes(view[end - 4 : end], "big")
        if name in _PNG_PIXELS:
            if not whole and end <= len(body):
                raise ValueError(f"the checksum of its chunk {name.decode()} is wrong")
            parts.append(view[at:end])
        elif whole and name == b"eXIf":
            parts.append(view[at:end])
        elif not name[0] & _ANCILLARY:
            raise ValueError(f"its chunk {ascii(name)[2:-1]} is not known, and needed")
        else:
            same = same and whole and end - at - 12 >= _PNG_SIMPLE.get(name, end)
        at = end
        if name == b"IEND":
            break
    return b"".join(parts), same


def _load_png(image: Image.Image, body: bytes, bits: int, colour: int, *, same: bool) -> Loaded:
    transparent = image.info.pop("transparency", None)
    if colour == _PALETTE and image.palette is None:
        raise ValueError("its palette is missing")
    image.load()
    if bits == 16:  # noqa: PLR2004
        image = _from_16_bits(image, body, colour, transparent)
    elif transparent is not None:
        image.info["transparency"] = _in_8_bits(transparent, bits, colour)
    return _upright(image, same=same)


def _in_8_bits(transparent: Any, bits: int, colour: int) -> Any:
    """The transparent value as Pillow gives the pixels. The file says it in the file's own bits."""
    if colour == _PALETTE or bits == 1:
        return transparent
    most = 2**bits - 1
    if colour == _GREY:
        return (transparent & most) * 255 // most
    return tuple(value & most for value in transparent)


def _from_16_bits(image: Image.Image, body: bytes, colour: int, transparent: Any) -> Image.Image:
    """Of colours Pillow keeps the upper 8 bits, and the transparent value is one of 16."""
    exif: dict[Any, Any] = {"exif": image.info["exif"]} if "exif" in image.info else {}
    if colour == _GREY:
        scaled = _grey(image, 0, 0xFFFF)
        if transparent is not None:
            values = image.convert("I")
            above, below = (values.point(lambda v, s=sign: v * s - transparent * s).convert("L") for sign in (1, -1))
            scaled.putalpha(_opaque(above, below))
        scaled.info = exif
        return scaled
    if transparent is None:
        return image
    lower = PngImagePlugin.PngImageFile(io.BytesIO(body))
    lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]  # the same bytes, read the other way round
    lower.load()
    differences = [
        ImageChops.difference(half, Image.new("RGB", half.size, tuple(value >> shift & 0xFF for value in transparent)))
        for half, shift in ((image, 8), (lower, 0))
    ]
    image.putalpha(_opaque(*(band for difference in differences for band in difference.split())))
    return image


def _opaque(*differences: Image.Image) -> Image.Image:
    """Opaque where any of the bands is not 0."""
    return reduce(ImageChops.lighter, differences).point([0] + [255] * 255)


# TIFF


_SUBFILE, _BITS, _PHOTOMETRIC, _ORIENTATION, _SUB_IFDS, _SAMPLE_FORMAT = 254, 258, 262, 274, 330, 339
_REDUCED, _WHITE_IS_ZERO = 1, 0


def _open_tiff(body: bytes) -> Opened:
    image = TiffImagePlugin.TiffImageFile(io.BytesIO(body))  # the first page
    tags = image.tag_v2
    signed = 2 in tags.get(_SAMPLE_FORMAT, ())  # noqa: PLR2004
    if signed or image.mode in {"I", "F"}:
        integers = f"{'signed ' if signed else ''}{tags[_BITS][0]}-bit integers"
        what = "floating-point numbers" if image.mode == "F" else integers
        raise InputError(
            f"The photo's pixels are {what} without a defined white; send 8 or 16 bits.",
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        )
    if tags.get(_SUBFILE, 0) & _REDUCED and (_SUB_IFDS in tags or tags.next):
        raise ValueError("its first picture is a thumbnail of another, as in a camera's raw file")
    return Opened(image.size, partial(_load_tiff, image))


def _load_tiff(image: TiffImagePlugin.TiffImageFile) -> Loaded:
    tags = image.tag_v2
    white = 2 ** tags.get(_BITS, (1,))[0] - 1
    inverted = tags.get(_PHOTOMETRIC, _WHITE_IS_ZERO) == _WHITE_IS_ZERO
    same = tags.get(_ORIENTATION, 1) == 1 and not tags.next
    image.load()  # Pillow turns it upright
    if image.mode.startswith("I;16"):
        return (_grey(image, white, 0) if inverted else _grey(image, 0, white)), False
    return image, same


# BMP


_OS2_HEADER = 12
_RUNS = {1, 2}
MAX_PIXELS_IN_RUNS = 4_000_000
"""Pillow writes what a compressed BMP leaves out pixel by pixel, in Python: of a file of 100 bytes, for ten seconds."""


def _open_bmp(body: bytes) -> Opened:
    image = BmpImagePlugin.BmpImageFile(io.BytesIO(body))
    bits = int.from_bytes(body[24:26] if body[14] == _OS2_HEADER else body[28:30], "little")
    if (image.mode, bits) not in {("1", 1), ("L", 8)} and image.mode in {"1", "L"}:
        # Pillow takes the palette's two colours for pixels of 1 bit
        raise ValueError(f"{bits} bits a pixel with a palette of greys")
    if image.info["compression"] in _RUNS and image.width * image.height > MAX_PIXELS_IN_RUNS:
        raise ValueError(f"compressed, with more than {MAX_PIXELS_IN_RUNS:,} pixels")
    return Opened(image.size, partial(_load_bmp, image))


def _load_bmp(image: Image.Image) -> Loaded:
    image.load()
    # Many programs write a fourth byte of 0 and mean no transparency by it; a picture of nothing is nobody's photo.
    if image.mode == "RGBA" and image.getchannel("A").getbbox() is None:
        return image.convert("RGB"), False
    return image, True


# GIF


def _open_gif(body: bytes) -> Opened:
    image = GifImagePlugin.GifImageFile(io.BytesIO(body))
    return Opened(image.size, partial(_load_gif, image))


def _load_gif(image: Image.Image) -> Loaded:
    box = image.tile[0].extents  # type: ignore[attr-defined]
    image.load()
    if box == (0, 0, *image.size):
        return image, True
    page = Image.new("RGBA", image.size, (255, 255, 255, 0))  # outside the first frame there is nothing
    page.paste(image.crop(box).convert("RGBA"), box[:2])
    return page, False


# WebP


def _open_webp(body: bytes) -> Opened:
    # Pillow would allocate the pixels already when it reads the header.
    match body[12:16]:
        case b"VP8X":
            size = int.from_bytes(body[24:27], "little") + 1, int.from_bytes(body[27:30], "little") + 1
        case b"VP8L":
            both = int.from_bytes(body[21:25], "little")
            size = (both & 0x3FFF) + 1, (both >> 14 & 0x3FFF) + 1
        case _:
            size = int.from_bytes(body[26:28], "little") & 0x3FFF, int.from_bytes(body[28:30], "little") & 0x3FFF
    return Opened(size, partial(_load_webp, body), weight=2)  # the decoder holds the pixels twice more


def _load_webp(body: bytes) -> Loaded:
    image = WebPImagePlugin.WebPImageFile(io.BytesIO(body))
    image.load()
    pixels = image._new(image.im)  # noqa: SLF001 (without the decoder, which holds the pixels twice more)
    return _upright(pixels, same=image.n_frames == 1)


FORMATS = (
    Format("JPEG", re.compile(rb"\xff\xd8\xff"), _open_jpeg),
    Format("PNG", re.compile(re.escape(_PNG_BEGINS)), _open_png),
    Format("WEBP", re.compile(rb"RIFF.{4}WEBPVP8", re.DOTALL), _open_webp),
    Format("GIF", re.compile(rb"GIF8[79]a"), _open_gif),
    Format("BMP", re.compile(rb"BM"), _open_bmp),
    Format("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]"), _open_tiff),
)
