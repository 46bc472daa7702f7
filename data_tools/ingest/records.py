"""What every reader yields: a record that was read, or a problem that says which row was lost and why.

A reader yields exactly one of the two for each row it meets, so rows read = rows kept + rows dropped, always.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common.files import split_lines

# Reason codes and what to do about each: the codes stand in dropped.jsonl and in reports, so they do not change.
HINTS: dict[str, str] = {
    "aspect_ratio": "the image is too long or too wide; raise --max-aspect to keep it",
    "bad_base64": "the image field is not base64; was the file cut or edited by a spreadsheet?",
    "bad_column_count": "the row has another number of columns; look for tabs or commas inside a caption",
    "bad_csv": "quotes do not balance; write captions that hold commas or quotes inside double quotes",
    "bad_encoding": "the row is not valid UTF-8; if the file is GB18030 pass --encoding gb18030",
    "bad_json": "the line is not one JSON object; each line of JSONL holds one",
    "bad_key": "the id cannot name a file; ids need visible characters",
    "bad_value": "a field has another type than expected; captions are text or lists of text",
    "decoder_crashed": "the decoder process died on this image; it is left out, look at the file",
    "duplicate_key": "an earlier row has the same id; ids name files, so each must be unique",
    "empty_image": "the image field is empty",
    "image_too_large": "the file of the image is larger than --max-image-bytes",
    "image_too_small": "the shorter side is under --min-side pixels",
    "missing_file": "no such file; paths are relative to the list or to --image-root",
    "missing_id": "the id field is empty",
    "no_caption": "no caption; --caption-column names its column, --captions optional keeps images without text",
    "no_pair": "the drawing and the photo are joined by their file names, and one of the two is missing",
    "no_image": "no image was found for this text; rows with a url need python -m data_tools.download first",
    "needs_pillow_heif": "a HEIC photo, as phones make them: pip install pillow-heif, or convert it to JPEG",
    "not_an_image": "the bytes are no image of a known kind (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, HEIC)",
    "not_in_list": "an image that the list does not name; --format folder reads the images and their .txt instead",
    "not_read": "the file is none of the format that was recognised",
    "hidden_file": "names that begin with a dot are never read; rename it if it belongs to the data",
    "not_in_split_file": "the key is not in --split-file; make it anew from the present source",
    "path_outside_root": "the path leaves the folder of the list; set --image-root to the folder of the images",
    "row_too_large": "the row is longer than --max-row-bytes",
    "too_many_pixels": "the image has more than --max-pixels pixels, as decompression bombs have",
    "truncated_file": "the file ends early; copy or download it again",
    "truncated_image": "the image ends early; download it again",
    "undecodable": "the image is damaged; download it again",
    "unknown_header": "no column is an image or a url: name it with --image-column, captions with --caption-column",
    "unreadable_file": "the file or a part of it cannot be read; copy or download it again",
    "unsafe_name": "the name leaves the archive or is no plain file; such members are never read",
    "unsupported_mode": "the pixel format has no defined range (floating point, 32-bit); convert it first",
}

LEFT_OUT = (
    "not_in_list",
    "not_read",
    "hidden_file",
)  # of whole files of a folder, which are no rows of the source

MAX_KEY_BYTES = 180  # a tar member and most file systems hold 255 bytes with the suffix
_UNSAFE = re.compile(r"[./\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Record:
    """One image with its captions, as it came."""

    key: str
    """Unique name of the sample; passes `validate_key`."""
    image: bytes
    """The encoded file as it came; empty when the source names only a url or has no image."""
    suffix: str
    """jpg, png, webp, gif, bmp, tiff, avif by content; empty when unknown."""
    captions: tuple[str, ...]
    """In the order of the source, each on one line."""
    meta: dict[str, Any] = field(default_factory=dict)
    """JSON-ready: source, licence, label, attributes, url ... and `id` where the key had to be encoded."""
    where: str = ""
    """`file.tsv:12`, for complaints."""
    extra: Mapping[str, bytes] = field(default_factory=dict)
    """Further members of the sample by suffix, such as `drawing.png`."""


@dataclass(frozen=True)
class Problem:
    """A row that was lost, and why."""

    where: str
    """`file.tsv:12`."""
    key: str
    """Empty when the row has none."""
    reason: str
    """A stable code, one of HINTS or of the step that dropped it."""
    detail: str
    """One sentence for people, with what to do."""

    def to_json(self) -> dict[str, str]:
        """The row of dropped.jsonl."""
        return {"where": self.where, "key": self.key, "reason": self.reason, "detail": self.detail}


def problem(where: str, key: str, reason: str, what: str = "") -> Problem:
    """A Problem whose detail is `what` followed by the hint of the reason; an unlisted reason is our bug."""
    hint = HINTS[reason]
    detail = f"{what}; {hint}" if what else hint
    return Problem(encodable(where), encodable(key[:300]), reason, encodable(detail))


def encodable(text: str) -> str:
    """The text with half surrogates, which UTF-8 cannot hold, replaced by question marks."""
    return text.encode(errors="replace").decode()


def validate_key(key: str) -> str:
    """Return `key` if it can name the members of a tar, else raise ValueError.

    Dots are refused because WebDataset ends the key at the first one; slashes and backslashes because they are paths.
    """
    if not key or not key.strip():
        raise ValueError("an empty key: every sample needs an id")
    if found := _UNSAFE.search(key):
        raise ValueError(
            f"key {key!r} holds {found.group()!r}: encode it with data_tools.ingest.records.encode_key"
        )
    if len(key.encode()) > MAX_KEY_BYTES:
        raise ValueError(f"key {key[:40]!r}... is longer than {MAX_KEY_BYTES} bytes")
    return key


def encode_key(identifier: str) -> str:
    """A valid key for any identifier: unsafe characters become %XX, long ones end in a hash.

    A key stays as it is, so shards of shards keep their keys; two ids agree only if one is spelt with %XX itself.
    Raises ValueError for an identifier without visible characters.
    """
    encoded = _UNSAFE.sub(lambda m: f"%{ord(m.group()):02X}", identifier.strip())
    raw = encoded.encode()
    if len(raw) > MAX_KEY_BYTES:
        digest = hashlib.blake2b(raw, digest_size=12).hexdigest()
        encoded = raw[: MAX_KEY_BYTES - 25].decode(errors="ignore") + "-" + digest
    return validate_key(encoded)


def one_line(caption: str) -> str:
    """The caption as it came, except that line breaks become spaces: `.txt` holds one caption a line.

    U+2028, NEL, VT, FF and a lone CR are no line breaks: they stay.
    """
    return " ".join(part for part in (line.strip() for line in split_lines(caption)) if part)
