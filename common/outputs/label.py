"""Labels of AI-generated images as Chinese rules ask for (GB 45438-2025, in force since 2025-09-01), and our manifest.

An implicit label is JSON with seven fields in the file's metadata: as XMP (`TC260:AIGC`) in PNG, JPEG and WebP, and in
PNG also as a text chunk `AIGC`. A visible one is the text "AI generated" in Chinese in a corner, at least 5 % of the
shorter side high. The manifest beside it is our own record of how the image was made, under a name of our own.
"""

import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

LabelMode = Literal["off", "implicit", "both"]
NAMESPACE = "http://www.tc260.org.cn/ns/AIGC/1.0/"
MANIFEST_NAMESPACE = "urn:product-painter:manifest:1.0/"
XMP_CHUNK, LABEL_CHUNK, MANIFEST_CHUNK = "XML:com.adobe.xmp", "AIGC", "product-painter"
MAX_METADATA_BYTES = 1 << 20  # of foreign XMP that is parsed
MARK = Path(__file__).with_name("ai_generated_mark.png")  # rendered from Noto Sans CJK Bold (SIL OFL 1.1)
MARK_SHARE, MARK_MIN_HEIGHT = (
    0.06,
    12,
)  # of the shorter side; pixels, below which the characters cannot be read
MARK_OPACITY = 0.55  # of the dark box behind it
MARKED = "visible_mark"  # key of the manifest of an image that has the mark
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
DAMAGED = (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error)  # of Pillow for damaged EXIF


@dataclass(frozen=True)
class LabelOptions:
    """Labels of AI-generated images."""

    label: LabelMode = "off"
    """implicit writes metadata, both adds the visible mark in the lower right corner."""
    label_producer: str = "product-painter"
    """ContentProducer: the code or name of whoever offers the images."""

    def __post_init__(self) -> None:
        if not self.label_producer.strip():
            raise ValueError("--label-producer must name whoever offers the images; it is empty")


@dataclass(frozen=True)
class AigcLabel:
    """The implicit label's fields, in the standard's order and spelling."""

    Label: str = "1"
    """1: AI-generated; 2: possibly; 3: suspected."""
    ContentProducer: str = ""
    ProduceID: str = ""
    """Unique number of the content."""
    ReservedCode1: str = ""
    """The producer's own protection; ours is `pixels_code` of the image."""
    ContentPropagator: str = ""
    PropagateID: str = ""
    ReservedCode2: str = ""

    def to_json(self) -> str:
        """In the standard's order of fields, without white space."""
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "AigcLabel":
        """Raises ValueError when `text` is not a label: no JSON mapping, or without the field Label."""
        values = json.loads(text)
        if not isinstance(values, dict) or "Label" not in values:
            raise ValueError("no AIGC label: the field Label is missing")
        return cls(**{f.name: str(values[f.name]) for f in fields(cls) if values.get(f.name) is not None})


@dataclass(frozen=True)
class FoundLabel:
    """A label read from a file."""

    place: Literal["XMP", "PNG text", "EXIF"]
    label: AigcLabel


def pixels_code(image: Image.Image) -> str:
    """Hash of the size and RGB values, which shows whether a lossless file was changed afterwards."""
    rgb = image.convert("RGB")
    digest = hashlib.sha256(f"{rgb.width}x{rgb.height}".encode() + rgb.tobytes())
    return f"sha256:{digest.hexdigest()}"


def make_label(image: Image.Image, producer: str, manifest: dict[str, Any]) -> AigcLabel:
    """The label of an image of ours; ProduceID is a hash of what the image was made from, so it repeats with it."""
    made_from = json.dumps(manifest, sort_keys=True, ensure_ascii=False).encode()
    return AigcLabel(
        ContentProducer=producer,
        ProduceID=hashlib.sha256(made_from).hexdigest()[:32],
        ReservedCode1=pixels_code(image),
    )


def add_mark(image: Image.Image) -> Image.Image:
    """A copy with the visible mark in the lower right corner: white characters on a half-transparent dark box.

    Raises ValueError for an image that is too small for it.
    """
    with Image.open(MARK) as file:
        mask = file.convert("L")
    height = max(round(MARK_SHARE * min(image.size)), MARK_MIN_HEIGHT)
    width = round(mask.width * height / mask.height)
    if width > image.width or height > image.height:
        raise ValueError(
            f"the visible label needs {width} x {height} pixels, the image is {image.width} x {image.height}: "
            "take --label implicit"
        )
    mask = mask.resize((width, height), Image.Resampling.LANCZOS)
    pad = _mark_pad(height)
    marked, box = image.convert("RGB"), _mark_box(image.size, width, height)
    dark = Image.new("RGB", (box[2] - box[0], box[3] - box[1]))
    marked.paste(Image.blend(marked.crop(box), dark, MARK_OPACITY), box)
    marked.paste((255, 255, 255), (marked.width - width - pad, marked.height - height - pad), mask)
    return marked


def _mark_pad(height: int) -> int:
    return max(1, height // 5)


def _mark_box(size: tuple[int, int], width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the box behind a mark of that many pixels."""
    pad = _mark_pad(height)
    return max(0, size[0] - width - 2 * pad), max(0, size[1] - height - 2 * pad), *size


def keep_mark(source: Image.Image, image: Image.Image) -> Image.Image:
    """`image`, changed from the opened file `source` of one size, with the visible mark that the source has by its
    manifest: no command takes it away."""
    if not (read_manifest(source) or {}).get(MARKED):
        return image
    with Image.open(MARK) as file:
        height = max(round(MARK_SHARE * min(image.size)), MARK_MIN_HEIGHT)
        box = _mark_box(image.size, round(file.width * height / file.height), height)
    kept = image.copy()
    kept.paste(source.convert("RGB").crop(box), box)
    return kept


def labelled(
    image: Image.Image, file_format: str, options: LabelOptions, manifest: dict[str, Any]
) -> tuple[Image.Image, dict[str, Any]]:
    """What to save of an image of ours: with the visible mark where `options` ask for it, and the keyword arguments of
    `Image.save`. Raises ValueError where the image is too small for the mark or the format holds no label."""
    if options.label == "off":
        return image, {}
    if options.label == "both":
        image, manifest = add_mark(image), manifest | {MARKED: True}
    return image, save_arguments(file_format, make_label(image, options.label_producer, manifest), manifest)


def save_arguments(
    file_format: str, label: AigcLabel, manifest: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Keyword arguments of `Image.save` that write the label into a PNG, JPEG or WebP file.

    Raises ValueError for a format that holds none.
    """
    record = None if manifest is None else json.dumps(manifest, sort_keys=True, ensure_ascii=False)
    packet = _xmp_packet(label, record)
    if file_format.upper() == "PNG":
        info = PngInfo()
        info.add_itxt(XMP_CHUNK, packet)
        info.add_text(LABEL_CHUNK, label.to_json())
        if record is not None:
            info.add_text(MANIFEST_CHUNK, record)
        return {"pnginfo": info}
    if file_format.upper() in ("JPEG", "WEBP"):
        return {"xmp": packet.encode("utf-8")}
    raise ValueError(f"a file of the format {file_format} holds no label: choose PNG, JPEG or WebP")


def _xmp_packet(label: AigcLabel, record: str | None) -> str:
    quoted = {'"': "&quot;"}
    ours = ""
    if record is not None:
        ours = f'<pp:Manifest xmlns:pp="{MANIFEST_NAMESPACE}">{escape(record, quoted)}</pp:Manifest>'
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" xmlns:TC260="{NAMESPACE}">'
        f"<TC260:AIGC>{escape(label.to_json(), quoted)}</TC260:AIGC>{ours}"
        '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )


def open_labelled(path: Path) -> Image.Image:
    """An opened image file. Raises FileNotFoundError, or ValueError when it is no image."""
    if not path.is_file():
        raise FileNotFoundError(f"no image file {path}")
    try:
        return Image.open(path)
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no image that can be read") from error


def read_labels(image: Image.Image) -> list[FoundLabel]:
    """Every implicit label of an opened file: XMP, a PNG text chunk, EXIF UserComment."""
    found = [FoundLabel("XMP", label) for label in _labels_in(_xmp_values(image, NAMESPACE, "AIGC"))]
    chunk = image.info.get(LABEL_CHUNK)
    found += [
        FoundLabel("PNG text", label) for label in _labels_in([chunk] if isinstance(chunk, str) else [])
    ]
    found += [FoundLabel("EXIF", label) for label in _labels_in(_in_comment(_user_comment(image)))]
    return found


def _user_comment(image: Image.Image) -> Any:
    try:
        return image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT)
    except DAMAGED:  # of a foreign file whose pixels may be sound
        return None


def read_manifest(image: Image.Image) -> dict[str, Any] | None:
    """Our record of how the image was made; None where the file has none."""
    chunk = image.info.get(MANIFEST_CHUNK)
    texts = [chunk] if isinstance(chunk, str) else _xmp_values(image, MANIFEST_NAMESPACE, "Manifest")
    for text in texts:
        try:
            value = json.loads(text)
        except ValueError:
            continue
        if isinstance(value, dict):
            return value
    return None


def kept_arguments(
    source: Image.Image, image: Image.Image, file_format: str, **changes: Any
) -> dict[str, Any]:
    """Keyword arguments of `Image.save` that hand the label and manifest of the opened file `source` on to `image`,
    which was made of it; empty where the source has none.

    changes: what is added to the manifest. The producer's code goes along with the pixels where it was right; one that
    was wrong stays, so that an earlier change still shows.
    """
    found, manifest = read_labels(source), read_manifest(source)
    if not found:
        return {}
    label = found[0].label
    if label.ReservedCode1 == pixels_code(source):
        label = replace(label, ReservedCode1=pixels_code(image))
    return save_arguments(file_format, label, None if manifest is None else manifest | changes)


def joined_arguments(sources: Iterable[Path], image: Image.Image, file_format: str) -> dict[str, Any]:
    """Keyword arguments of `Image.save` that label an image put together of files: by the producer of the first of
    them that is labelled, with an id made of theirs; empty where none is labelled."""
    labels = []
    for path in sources:
        with open_labelled(path) as source:
            labels += [found.label for found in read_labels(source)[:1]]
    if not labels:
        return {}
    return save_arguments(
        file_format, make_label(image, labels[0].ContentProducer, {"of": [x.ProduceID for x in labels]})
    )


def _labels_in(texts: list[str]) -> list[AigcLabel]:
    labels = []
    for text in texts:
        try:
            labels.append(AigcLabel.from_json(text))
        except ValueError:  # a foreign file's metadata may hold anything under this name
            continue
    return labels


def _xmp_values(image: Image.Image, namespace: str, name: str) -> list[str]:
    """Texts of the elements and attributes `name` in `namespace`, whatever their prefix and last slash."""
    packet = image.info.get("xmp") or image.info.get(XMP_CHUNK) or b""
    packet = packet.encode("utf-8") if isinstance(packet, str) else packet
    if len(packet) > MAX_METADATA_BYTES or b"<!DOCTYPE" in packet:
        return []
    try:
        root = ElementTree.fromstring(packet.strip(b"\x00 \r\n\t"))
    except ElementTree.ParseError:
        return []
    wanted = {f"{{{namespace}}}{name}", f"{{{namespace.rstrip('/')}}}{name}"}
    values = []
    for element in root.iter():
        values += [element.text] if element.tag in wanted and element.text else []
        values += [value for key, value in element.attrib.items() if key in wanted]
    return values


def _in_comment(comment: Any) -> list[str]:
    """The label inside EXIF's UserComment, which holds it under the key AIGC."""
    if isinstance(comment, bytes):
        encoding = "utf-16" if comment.startswith(b"UNICODE\x00") else "utf-8"
        comment = comment[8:].decode(encoding, errors="replace") if len(comment) > 8 else ""
    if not isinstance(comment, str):
        return []
    try:
        value = json.loads(comment.strip("\x00 "))
    except ValueError:
        return []
    value = value.get("AIGC") if isinstance(value, dict) else None
    return [value if isinstance(value, str) else json.dumps(value)] if value else []
