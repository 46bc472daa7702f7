"""Labels of AI-generated images: read back, in the published places, and kept by lossless copies."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from common.label import (
    LABEL_CHUNK,
    AigcLabel,
    LabelOptions,
    add_mark,
    kept_arguments,
    make_label,
    pixels_code,
    read_labels,
    read_manifest,
    save_arguments,
)

MANIFEST = {"model": "abc", "seed": 3, "text": '红色"T恤" <b>&'}


def example(side: int = 64) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8))


def written(image: Image.Image, file_format: str, **arguments) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **arguments)
    return Image.open(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize(
    ("file_format", "places"), [("PNG", ["XMP", "PNG text"]), ("JPEG", ["XMP"]), ("WEBP", ["XMP"])]
)
def test_labels_and_manifest_come_back_from_every_format(file_format, places):
    label = make_label(example(), "店铺甲", MANIFEST)
    image = written(example(), file_format, **save_arguments(file_format, label, MANIFEST))
    found = read_labels(image)
    assert [f.place for f in found] == places
    assert all(f.label == label for f in found)
    assert read_manifest(image) == MANIFEST
    assert label.ReservedCode1 == pixels_code(example())


def test_the_label_has_the_seven_fields_of_the_standard_in_order():
    text = make_label(example(), "x", MANIFEST).to_json()
    assert list(json.loads(text)) == [
        "Label",
        "ContentProducer",
        "ProduceID",
        "ReservedCode1",
        "ContentPropagator",
        "PropagateID",
        "ReservedCode2",
    ]
    assert json.loads(text)["Label"] == "1"


def test_the_packet_escapes_quotes_and_names_the_namespace():
    label = AigcLabel(ContentProducer="x")
    packet = written(example(), "JPEG", **save_arguments("JPEG", label)).info["xmp"].decode("utf-8")
    assert 'xmlns:TC260="http://www.tc260.org.cn/ns/AIGC/1.0/"' in packet
    assert "<TC260:AIGC>{&quot;Label&quot;:&quot;1&quot;," in packet


@pytest.mark.parametrize(
    "packet",
    [
        '<x xmlns:a="http://www.tc260.org.cn/ns/AIGC/1.0"><a:AIGC>{"Label":"2"}</a:AIGC></x>',
        '<x xmlns:q="http://www.tc260.org.cn/ns/AIGC/1.0/" q:AIGC="{&quot;Label&quot;:&quot;2&quot;}"/>',
    ],
)
def test_labels_of_other_writers_are_read(packet):
    image = written(example(), "WEBP", xmp=packet.encode())
    assert [f.label.Label for f in read_labels(image)] == ["2"]


def test_a_label_in_exif_is_read():
    exif = Image.Exif()
    text = json.dumps({"AIGC": {"Label": "1", "ContentProducer": "y"}})
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\x00\x00\x00" + text.encode()
    found = read_labels(written(example(), "JPEG", exif=exif))
    assert [(f.place, f.label.ContentProducer) for f in found] == [("EXIF", "y")]


@pytest.mark.parametrize("packet", [b"junk", b"<a>", b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', b"<a/>"])
def test_foreign_metadata_is_no_label_and_no_error(packet):
    assert read_labels(written(example(), "WEBP", xmp=packet)) == []


def test_a_text_chunk_that_is_no_label_is_not_one():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(LABEL_CHUNK, "[1, 2]")
    assert read_labels(written(example(), "PNG", pnginfo=info)) == []


def test_a_copy_keeps_label_and_manifest(tmp_path):
    label = make_label(example(), "x", MANIFEST)
    example().save(tmp_path / "a.png", **save_arguments("PNG", label, MANIFEST))
    copy = written(example().resize((32, 32)), "JPEG", **kept_arguments(tmp_path / "a.png", "JPEG"))
    assert [f.label for f in read_labels(copy)] == [label]
    assert read_manifest(copy) == MANIFEST
    example().save(tmp_path / "plain.png")
    assert kept_arguments(tmp_path / "plain.png", "PNG") == {}


def test_the_visible_mark_is_high_enough_and_leaves_the_rest_alone():
    for side in (64, 128, 512):
        image = Image.new("RGB", (side, side), (90, 160, 90))
        marked = np.asarray(add_mark(image))
        changed = (marked != np.asarray(image)).any(2)
        rows, columns = np.nonzero(changed.any(1))[0], np.nonzero(changed.any(0))[0]
        assert rows[-1] == side - 1 and columns[-1] == side - 1
        white = np.nonzero((marked > 200).all(2).any(1))[0]
        assert white[-1] - white[0] + 1 >= 0.05 * side
        assert not changed[: side // 2].any()


def test_a_format_without_metadata_is_refused():
    with pytest.raises(ValueError, match="PNG, JPEG or WebP"):
        save_arguments("BMP", AigcLabel())
    with pytest.raises(ValueError, match="label-producer"):
        LabelOptions(label_producer=" ")
