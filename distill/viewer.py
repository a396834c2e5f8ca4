"""Decode a picture file as a viewer shows it on white, so that training sees what people see.

Colors behind transparency, levels of more than 8 bits and numbers that only a color profile
explains look wrong when the stored values are taken as they are.
"""

import io
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin

from laptop.errors import BadInput

# Pillow decodes these itself; others, such as EPS, it hands to programs that run what is in them.
FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI",
    "SGI", "TGA", "TIFF", "WEBP",
)  # fmt: skip
BITS, PHOTOMETRIC, FORMAT = 258, 262, 339  # tags of TIFF; photometric is 0 where 0 is white
SIGNED = 2  # a FORMAT
SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of color profiles, by Pillow's mode
SAME = 4  # of 255: a profile that moves no color by more is sRGB, as some program wrote it


class BadPicture(BadInput):
    """A file that shows no picture; the message says why, in a few words."""


def view(content: bytes) -> Image.Image:
    """The picture in a file as a viewer shows it on white: RGB, upright, the first frame.

    A color profile is honored, since viewers do: photos of today's phones (Display P3) are pale
    without it. One that is damaged or for colors of another kind is ignored, as viewers do. Raises
    `BadPicture`, also for numbers whose white is unknown, such as floats beyond 1.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as file:
            white, is_negative = _levels(file)
            image = ImageOps.exif_transpose(file)
        opacity = _opacity(image)
        colors = _srgb(_grey(image, white, is_negative=is_negative) if white else image)
    except BadPicture:
        raise
    except Exception as e:  # noqa: BLE001 (decoders raise nearly anything on damaged files)
        raise BadPicture(type(e).__name__) from None
    if opacity is None:
        return colors
    shown = Image.new("RGB", colors.size, "white")
    shown.paste(colors, mask=opacity)
    return shown


@cache
def _formats() -> tuple[str, ...]:
    """The formats of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _levels(file: Image.Image) -> tuple[float, bool]:
    """The white level of grey of more than 8 bits (0 for others), and whether 0 is white."""
    tags = file.tag_v2 if isinstance(file, TiffImagePlugin.TiffImageFile) else {}
    is_negative = tags.get(PHOTOMETRIC) == 0
    if file.mode == "F":
        return 1.0, is_negative
    if not file.mode.startswith("I"):
        return 0.0, False
    bits = tags.get(BITS, (16,))[0]
    if bits > 16 or tags.get(FORMAT, (1,))[0] == SIGNED:
        raise BadPicture(f"levels of {bits} bits or with a sign, whose white is unknown")
    return float(2**bits - 1), is_negative


def _grey(image: Image.Image, white: float, *, is_negative: bool) -> Image.Image:
    """Scale levels of 0 to `white` to 8 bits."""
    levels = np.asarray(image, np.float64)
    if not (levels.min() >= 0 and levels.max() <= white):  # NaN is neither
        raise BadPicture(
            f"levels of {levels.min():g} to {levels.max():g}; needed are 0 to {white:g}"
        )
    fractions = 1 - levels / white if is_negative else levels / white
    grey = Image.fromarray(np.rint(255 * fractions).astype(np.uint8))
    grey.info = image.info
    return grey


def _opacity(image: Image.Image) -> Image.Image | None:
    """The opacity of each pixel, 0 to 255; None for a picture without transparency."""
    key = image.info.get("transparency")
    if image.mode.startswith("I"):  # Pillow does not convert these
        return None if key is None else Image.fromarray(np.uint8(255) * (np.asarray(image) != key))
    if isinstance(key, tuple) and max(key) > 255:  # of levels of 16 bits, which Pillow cut to 8
        raise BadPicture("a transparent color of 16 bits")
    return _straight(image).getchannel("A") if image.has_transparency_data else None


def _straight(image: Image.Image) -> Image.Image:
    """Convert a picture that has transparency to RGBA."""
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _srgb(image: Image.Image) -> Image.Image:
    """Convert a picture's colors to sRGB, without transparency."""
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image)
    is_seen_through = image.has_transparency_data  # Pillow warns of the direct way
    rgb = (_straight(image) if is_seen_through else image).convert("RGB")
    profile = image.info.get("icc_profile")
    transform = _transform(profile) if profile else None
    if transform is None:
        return rgb
    is_fit = {
        "RGB": image.mode != "CMYK",
        "L": image.getbands()[0] in ("1", "L"),
        "CMYK": image.mode == "CMYK",
    }
    if not is_fit[transform.input_mode]:
        return rgb
    return transform.apply(image if image.mode == "CMYK" else rgb.convert(transform.input_mode))


@lru_cache(maxsize=16)
def _transform(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    """The transform from a profile's colors to sRGB; None for sRGB itself and unfit profiles."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = SPACES[source.profile.xcolor_space.strip()]
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (KeyError, OSError, ImageCms.PyCMSError):
        return None
    if mode == "CMYK":
        return transform
    cube = (
        np.stack(np.meshgrid(*[np.arange(0, 256, 15)] * 3), -1).astype(np.uint8).reshape(-1, 1, 3)
    )
    colors = Image.fromarray(cube).convert(mode)
    moved = np.asarray(transform.apply(colors), int) - np.asarray(colors.convert("RGB"), int)
    return transform if np.abs(moved).max() > SAME else None
