"""The image formats that are read: one list for the decoder, for class folders, for shards and for packing.

A format is read if a decoder of Pillow serves it as strictly as the rest: damaged bytes are an error, no program is
started, memory is bounded by height and width. Of GIF and TIFF files with several pictures the first counts.
"""

from __future__ import annotations

# Pillow's name of a format -> suffixes of its files, those that a sample of a shard prefers first.
SUFFIXES_OF: dict[str, tuple[str, ...]] = {
    "JPEG": ("jpg", "jpeg"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "BMP": ("bmp",),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
    "GIF": ("gif",),
    "TIFF": ("tif", "tiff"),
    "AVIF": ("avif",),
}
_RARE = ("jpe", "jfif", "dib")

FORMATS = tuple(SUFFIXES_OF)

# Extensions of images in shards, without the dot, in the order of preference where a sample has several.
IMAGE_PARTS = (*(suffix for suffixes in SUFFIXES_OF.values() for suffix in suffixes), *_RARE)

# Suffixes of image files, with the dot, in lower case.
IMAGE_SUFFIXES = frozenset(f".{part}" for part in IMAGE_PARTS)

# What else begins a file that may be taken for an image, for messages.
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"<!doctype", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<?xml", "XML or SVG"),
    (b"<svg", "SVG"),
    (b"{", "JSON"),
    (b"%pdf", "PDF"),
    (b"%!ps", "PostScript"),
    (b"pk\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip"),
    (b"8bps", "Photoshop"),
    (b"\x00\x00\x01\x00", "a Windows icon"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cjxl ", "JPEG XL"),
    (b"\x00\x00\x00\x0cjp  ", "JPEG 2000"),
    (b"version https://git-lfs", "a pointer of Git LFS"),
)


def looks_like(data: bytes) -> str:
    """Return in words what bytes that are no image of ours seem to be; "" where nothing says it."""
    if not data:
        return "empty"
    if not data[:64].strip(b"\0"):
        return "zeros"
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1"):
        return "HEIC"
    head = data[:64].lstrip(b" \t\r\n\xef\xbb\xbf").lower()
    return next((what for start, what in _OTHERS if head.startswith(start)), "")


def suffixes_read() -> str:
    """Return the suffixes that are read, for messages."""
    return ", ".join(f".{part}" for part in IMAGE_PARTS)
