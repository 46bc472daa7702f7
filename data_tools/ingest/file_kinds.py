"""What a file is that cannot be read, by its first bytes, and what to do about it: one sentence for people."""

import re

_MAGIC = (
    (b"PK\x03\x04", "a zip archive (or .xlsx, .docx): unpack it, save a workbook as CSV UTF-8"),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word file: save it as CSV UTF-8"),
    (b"\x1f\x8b", "gzip: unpack it (gunzip, or tar -xzf where it is a .tar.gz)"),
    (b"BZh", "bzip2: unpack it"),
    (b"\xfd7zXZ", "xz: unpack it"),
    (b"7z\xbc\xaf", "a 7-Zip archive: unpack it"),
    (b"Rar!", "a RAR archive: unpack it"),
    (b"\x28\xb5\x2f\xfd", "zstd: unpack it"),
    (b"%PDF", "a PDF: export its pages as images"),
    (b"8BPS", "a Photoshop file: export it as JPEG or PNG"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000: convert it to JPEG or PNG"),
    (b"\xff\x0a", "JPEG XL: convert it to JPEG or PNG"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL: convert it to JPEG or PNG"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file: git lfs pull"),
    (b"PAR1", "parquet"),
    (b"\x89HDF", "HDF5: export its images as files"),
    (b"SQLite format 3", "an SQLite database: export its table as CSV UTF-8"),
)
_HTML = re.compile(rb"\s*<(!doctype|html|head|body)", re.IGNORECASE)
UTF16 = (b"\xff\xfe", b"\xfe\xff")


def what_is(data: bytes) -> str:
    """Of the first bytes of a file (512 are enough): what it is and what to do, else what it begins with."""
    if not data:
        return "an empty file"
    for magic, text in _MAGIC:
        if data.startswith(magic):
            return text
    if data[257:262] == b"ustar":
        return "a tar archive"
    if data.startswith(UTF16):
        return "UTF-16 text: save it as UTF-8"
    if _HTML.match(data):
        return "an HTML page, as servers send in place of an image: download it again"
    if data.lstrip()[:5] in (b"<?xml", b"<svg ") and b"<svg" in data:
        return "an SVG: render it to PNG"
    if data[4:8] == b"ftyp":
        return "a video"
    if data[:4] == b"RIFF":
        return "a sound or a video"
    return f"the first bytes are {data[:8]!r}"
