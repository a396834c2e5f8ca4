"""Pictures as a viewer shows them on white: each kind of file against the same picture in plain."""

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageCms

from laptop.distill.viewer import BadPicture, view

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLORS = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=-1)  # (16, 16, 3)
RGB, GREY = Image.fromarray(COLORS), Image.fromarray(RAMP)
PALE = (96 + COLORS // 4).astype(np.uint8)  # all of them within what LAB of 8 bits keeps
HALF = Image.fromarray(np.uint8([[0, 255] * 8] * 16))  # opacity: every second column
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LAB = ImageCms.createProfile("LAB")
RED_IS_GREEN = SRGB.replace(b"rXYZ", b"----").replace(b"gXYZ", b"rXYZ").replace(b"----", b"gXYZ")
LEVELS = np.uint16(RAMP) * 257


def stored(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_opacity(image: Image.Image, opacity: Image.Image = HALF) -> Image.Image:
    image = image.copy()
    image.putalpha(opacity)
    return image


def palette(*transparency: int) -> bytes:
    """Columns of red and blue, whose entries have this opacity."""
    image = Image.fromarray(np.uint8([[0, 1] * 8] * 16), "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    return stored(image, "PNG", transparency=bytes(transparency) if transparency else 1)


def tiff(image: Image.Image, tags: dict[int, int]) -> bytes:
    """A TIFF with other values of tags than Pillow writes."""
    content = bytearray(stored(image, "TIFF"))
    first = int.from_bytes(content[4:8], "little")
    for at in range(first + 2, first + 2 + 12 * content[first], 12):
        if (tag := int.from_bytes(content[at : at + 2], "little")) in tags:
            content[at + 8 : at + 10] = tags[tag].to_bytes(2, "little")
    return bytes(content)


WHITE_STRIPES = np.where(np.asarray(HALF)[..., None] > 0, COLORS, 255)
GREY_STRIPES = np.where(np.asarray(HALF) > 0, RAMP, 255)
RED_AND_WHITE = np.uint8([[[255, 0, 0], [255, 255, 255]] * 8] * 16)

KINDS: dict[str, tuple[Callable[[], bytes], np.ndarray]] = {
    "RGB": (lambda: stored(RGB, "PNG"), COLORS),
    "grey": (lambda: stored(GREY, "PNG"), RAMP),
    "one bit": (lambda: stored(HALF.convert("1"), "PNG"), np.asarray(HALF)),
    "RGBA": (lambda: stored(with_opacity(RGB), "PNG"), WHITE_STRIPES),
    "RGBA webp": (lambda: stored(with_opacity(RGB), "WEBP", lossless=True), WHITE_STRIPES),
    "premultiplied TIFF": (
        lambda: tiff(
            Image.fromarray(np.dstack([COLORS * (np.asarray(HALF)[..., None] > 0), HALF])), {338: 1}
        ),
        WHITE_STRIPES,
    ),
    "half opaque": (
        lambda: stored(with_opacity(RGB, Image.new("L", (16, 16), 128)), "PNG"),
        np.rint(COLORS * (128 / 255) + 127),
    ),
    "grey with alpha": (lambda: stored(with_opacity(GREY), "PNG"), GREY_STRIPES),
    "grey with alpha, TIFF": (lambda: stored(with_opacity(GREY), "TIFF"), GREY_STRIPES),
    "palette with a transparent entry": (lambda: palette(), RED_AND_WHITE),
    "palette with opacities": (lambda: palette(255, 0), RED_AND_WHITE),
    "GIF": (
        lambda: stored(
            Image.open(io.BytesIO(palette())), "GIF", save_all=True, append_images=[HALF], loop=0
        ),
        RED_AND_WHITE,
    ),
    "a transparent color": (
        lambda: stored(
            Image.fromarray(np.uint8([[[255, 0, 0], [0, 0, 255]] * 8] * 16)), "PNG",
            transparency=(0, 0, 255),
        ),
        RED_AND_WHITE,
    ),
    "a transparent grey": (
        lambda: stored(HALF, "PNG", transparency=0), np.full((16, 16), 255),
    ),
    "a transparent grey of 16 bits": (
        lambda: stored(Image.fromarray(LEVELS), "PNG", transparency=0),
        np.where(RAMP == 0, 255, RAMP),
    ),
    "a transparent bit": (
        lambda: stored(HALF.convert("1"), "PNG", transparency=0), np.full((16, 16), 255),
    ),
    "16 bits PNG": (lambda: stored(Image.fromarray(LEVELS), "PNG"), RAMP),
    "16 bits TIFF": (lambda: stored(Image.fromarray(LEVELS), "TIFF"), RAMP),
    "16 bits TIFF, big endian": (
        lambda: stored(Image.fromarray(LEVELS.astype(">u2")), "TIFF"), RAMP,
    ),
    "16 bits TIFF, white is 0": (lambda: tiff(Image.fromarray(LEVELS), {262: 0}), 255 - RAMP),
    "16 bits PGM": (lambda: b"P5 16 16 65535\n" + LEVELS.astype(">u2").tobytes(), RAMP),
    "16 bits JPEG 2000": (lambda: stored(Image.fromarray(LEVELS), "JPEG2000"), RAMP),
    "float TIFF": (lambda: stored(Image.fromarray(np.float32(RAMP / 255)), "TIFF"), RAMP),
    "CMYK TIFF": (
        lambda: stored(RGB.convert("CMYK"), "TIFF"), np.asarray(RGB.convert("CMYK").convert("RGB")),
    ),
    "YCbCr TIFF": (lambda: stored(RGB.convert("YCbCr"), "TIFF"), COLORS),
    "LAB TIFF": (
        lambda: stored(
            ImageCms.buildTransform(ImageCms.createProfile("sRGB"), LAB, "RGB", "LAB").apply(
                Image.fromarray(PALE)
            ),
            "TIFF",
        ),
        PALE,
    ),
    "upside down": (lambda: stored(RGB, "PNG", exif=turned(3)), COLORS[::-1, ::-1]),
    "on its side, of 16 bits": (
        lambda: stored(Image.fromarray(LEVELS), "PNG", exif=turned(6)), np.rot90(RAMP, -1),
    ),
    "sRGB profile": (lambda: stored(RGB, "PNG", icc_profile=SRGB), COLORS),
    "color profile": (
        lambda: stored(RGB, "PNG", icc_profile=RED_IS_GREEN), COLORS[..., [1, 0, 2]],
    ),
    "color profile and alpha": (
        lambda: stored(with_opacity(RGB), "PNG", icc_profile=RED_IS_GREEN),
        WHITE_STRIPES[..., [1, 0, 2]],
    ),
    "color profile of a palette": (
        lambda: stored(Image.open(io.BytesIO(palette())), "PNG", icc_profile=RED_IS_GREEN),
        RED_AND_WHITE[..., [1, 0, 2]],
    ),
    "color profile of greys": (lambda: stored(GREY, "PNG", icc_profile=RED_IS_GREEN), RAMP),
    "damaged profile": (lambda: stored(RGB, "PNG", icc_profile=b"x" * 200), COLORS),
}  # fmt: skip


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_picture_is_what_a_viewer_shows_on_white(kind: str) -> None:
    make, wanted = KINDS[kind]
    content = make()
    image = view(content)
    assert image.mode == "RGB"
    wanted = wanted if wanted.ndim == 3 else np.stack([wanted] * 3, -1)
    far = np.abs(np.asarray(image, int) - wanted.astype(int)).max()
    assert far <= (4 if kind in ("YCbCr TIFF", "LAB TIFF") or "profile" in kind else 1), far


@pytest.mark.parametrize("kind", ["RGB", "grey", "sRGB profile", "one bit"])
def test_plain_pictures_are_what_pillow_makes_of_them(kind: str) -> None:
    """To the byte, so that caches of them stay what they are."""
    content = KINDS[kind][0]()
    with Image.open(io.BytesIO(content)) as image:
        assert view(content).tobytes() == image.convert("RGB").tobytes()


def png(width: int, height: int) -> bytes:
    """A PNG whose header promises this size, and of which few pixels are in it."""
    content = bytearray(stored(RGB, "PNG"))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "UnidentifiedImageError"),
        (b"hello", "UnidentifiedImageError"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "UnidentifiedImageError"),
        (stored(RGB, "PNG")[:50], "OSError"),
        (png(60000, 60000), "DecompressionBombError"),
        (stored(Image.fromarray(np.float32(RAMP)), "TIFF"), "levels of 0 to 255; needed are 0 to"),
        (stored(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "levels of nan"),
        (
            stored(Image.fromarray(np.int32(RAMP)), "TIFF"),
            "levels of 32 bits or with a sign, whose",
        ),
        (stored(RGB, "PNG", transparency=(256, 0, 0)), "a transparent color of 16 bits"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_what_shows_no_picture_is_named(content: bytes, reason: str) -> None:
    with pytest.raises(BadPicture, match=reason):
        view(content)


def test_no_damage_to_a_file_is_more_than_a_bad_picture() -> None:
    """Bytes of small files of every kind are changed at random; decoders raise what they like."""
    rng = np.random.default_rng(0)
    for make, _ in KINDS.values():
        content = make()
        for _ in range(4):
            damaged = np.frombuffer(content, np.uint8).copy()
            damaged[rng.integers(0, len(content), 4)] = rng.integers(0, 256, 4)
            with warnings.catch_warnings(), contextlib.suppress(BadPicture):
                warnings.simplefilter("ignore")
                view(damaged.tobytes())
