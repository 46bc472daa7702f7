"""Labels of AI-generated images: read back, in the published places, and kept by lossless copies."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from common.outputs.label import (
    LABEL_CHUNK,
    AigcLabel,
    LabelOptions,
    add_mark,
    joined_arguments,
    keep_mark,
    kept_arguments,
    labelled,
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


def labelled_file(file_format: str = "PNG", mode: str = "implicit", side: int = 64) -> Image.Image:
    image, arguments = labelled(example(side), file_format, LabelOptions(mode, "x"), MANIFEST)
    return written(image, file_format, **arguments)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_a_changed_copy_keeps_producer_and_id_and_its_code_is_its_own(file_format):
    source, smaller = labelled_file(), example().resize((32, 32))
    copy = written(smaller, file_format, **kept_arguments(source, smaller, file_format, resized=32))
    (before, *_), (after, *_) = read_labels(source), read_labels(copy)
    assert after.label.ProduceID == before.label.ProduceID and after.label.ContentProducer == "x"
    assert after.label.ReservedCode1 == pixels_code(smaller) != before.label.ReservedCode1
    assert read_manifest(copy) == MANIFEST | {"resized": 32}
    assert kept_arguments(written(example(), "PNG"), smaller, "PNG") == {}


def test_a_copy_does_not_hide_that_its_source_was_changed():
    label = make_label(example(), "x", MANIFEST)
    source = written(example(63), "PNG", **save_arguments("PNG", label, MANIFEST))
    copy = written(example(63), "PNG", **kept_arguments(source, example(63), "PNG"))
    assert read_labels(copy)[0].label == label


def test_labels_by_option():
    assert labelled(example(), "PNG", LabelOptions(), MANIFEST) == (example(), {})
    implicit, both = labelled_file(), labelled_file(mode="both")
    assert read_manifest(implicit) == MANIFEST and implicit.tobytes() == example().tobytes()
    assert read_manifest(both) == MANIFEST | {"visible_mark": True}
    assert both.tobytes() == add_mark(example()).tobytes()
    assert read_labels(both)[0].label.ReservedCode1 == pixels_code(both)
    with pytest.raises(ValueError, match="20 x 20: take --label implicit"):
        labelled(example(20), "PNG", LabelOptions("both"), MANIFEST)


def test_the_visible_mark_is_kept_on_a_changed_image():
    white = Image.new("RGB", (128, 128), "white")
    kept = np.asarray(keep_mark(labelled_file(mode="both", side=128), white))
    marked = np.asarray(add_mark(example(128)))
    assert (kept[-12:, -12:] == marked[-12:, -12:]).all() and (kept[:100] == 255).all()
    assert keep_mark(labelled_file(side=128), white) is white


def test_a_grid_of_labelled_images_is_labelled(tmp_path):
    example().save(tmp_path / "plain.png")
    labelled_file().save(tmp_path / "bare.png")  # saved anew: Pillow drops the label
    assert joined_arguments([tmp_path / "plain.png", tmp_path / "bare.png"], example(), "PNG") == {}
    _, arguments = labelled(example(), "PNG", LabelOptions("implicit", "x"), MANIFEST)
    example().save(tmp_path / "a.png", **arguments)
    grid = example(100)
    found = written(
        grid, "PNG", **joined_arguments([tmp_path / "plain.png", tmp_path / "a.png"], grid, "PNG")
    )
    label = read_labels(found)[0].label
    assert label.ContentProducer == "x" and label.ReservedCode1 == pixels_code(grid)
    assert read_manifest(found) is None


def test_damaged_exif_is_no_error():
    data = io.BytesIO()
    example().save(
        data,
        "JPEG",
        exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x87\x69\0\x04\0\0\0\x01\xff\xff\xff\xff" * 3,
    )
    assert read_labels(Image.open(io.BytesIO(data.getvalue()))) == []


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
