"""Submissions: exact form, ids in order, and a validator that finds each mistake."""

import base64
import io
import json
import zipfile

import numpy as np
import pytest
from make_sources import CAPTIONS, some_image
from PIL import Image

from common.outputs.label import LabelOptions, labelled, read_labels, read_manifest
from data_tools.images.decode import decode, sniff
from data_tools.readers.detect import open_source
from data_tools.submit import main, read_ids, validate

IDS = ["ff02", "0a", "24808", "裙"]


@pytest.fixture
def work(tmp_path):
    """A folder of images by id and two lists of ids."""
    (tmp_path / "out").mkdir()
    for i, name in enumerate(IDS):
        (tmp_path / "out" / f"{name}.png").write_bytes(some_image(i, (32, 32), "png"))
    (tmp_path / "T2I_test.tsv").write_text("".join(f"{name}\n" for name in IDS), "utf-8")
    texts = "".join(f"{name}\t{CAPTIONS[i]}\n" for i, name in enumerate(IDS))
    (tmp_path / "T2I_test.text.tsv").write_text(texts, "utf-8")
    return tmp_path


def submit(work, *flags, ids="T2I_test.tsv"):
    return main([str(work / "out"), str(work / ids), *flags])


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    assert error.value.code == 2
    return capsys.readouterr().err


def test_t2i_form_to_the_byte(work):
    target = submit(work)
    assert target == work / "out" / "T2I_test.tsv"
    expected = [
        f"{n}\t{base64.b64encode(some_image(i, (32, 32), 'png')).decode()}\n" for i, n in enumerate(IDS)
    ]
    assert target.read_bytes() == "".join(expected).encode()
    assert validate(target, IDS) == []


def test_other_images_become_png_of_one_size(work):
    (work / "out" / "0a.png").unlink()
    (work / "out" / "0a.jpg").write_bytes(some_image(5, (64, 48)))
    target = submit(work, "--size", "24", "--to", str(work / "x" / "result.tsv"))
    for line in target.read_text("utf-8").splitlines():
        data = base64.b64decode(line.split("\t")[1], validate=True)
        assert sniff(data) == "png" and decode(data).size == (24, 24)


def test_images_of_other_places(work):
    for name in IDS:
        (work / "out" / f"{name}.png").unlink()
    for i, place in enumerate(["ff02/rank00.png", "0a/0000.png", "0002.png", "other.png"]):
        path = work / "out" / place
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(some_image(i, (32, 32), "png"))
    lines = [{"text": "x"}, {"text": "x"}, {"key": "24808"}, {"key": "裙", "file": "other.png"}]
    (work / "out" / "images.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lines = submit(work).read_text("utf-8").splitlines()
    assert [base64.b64decode(line.split("\t")[1]) for line in lines] == [
        some_image(i, (32, 32), "png") for i in range(4)
    ]


def test_the_best_image_of_a_key_by_the_ranking(work):
    (work / "out" / "0a.png").unlink()
    for i in range(3):
        (work / "out" / f"{i:04d}.png").write_bytes(some_image(i, (32, 32), "png"))
    lines = [{"key": "0a", "text": "x", "file": f"{i:04d}.png"} for i in range(3)]
    (work / "out" / "images.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ranking = [{"rank": rank, "file": f"{i:04d}.png", "score": -rank} for rank, i in enumerate((2, 0, 1))]
    for texts, best in (([], 0), ([{"text": "x", "pictures": ranking}], 2)):
        (work / "out" / "ranking.json").write_text(json.dumps({"ranker": "r", "texts": texts}))
        line = submit(work).read_text("utf-8").splitlines()[IDS.index("0a")]
        assert base64.b64decode(line.split("\t")[1]) == some_image(best, (32, 32), "png")
    (work / "out" / "ranking.json").write_text("[]")
    with pytest.raises(SystemExit):
        submit(work)


def test_easynlp_form_is_read_back(work):
    target = submit(work, "--form", "easynlp", "--to", str(work / "result.tsv"), ids="T2I_test.text.tsv")
    records = list(open_source(target))
    assert [(r.key, r.captions) for r in records] == [(name, (CAPTIONS[i],)) for i, name in enumerate(IDS)]
    assert (np.asarray(decode(records[1].image)) == np.asarray(decode(some_image(1, (32, 32), "png")))).all()


def test_zip_of_ids_with_gaps(work):
    flags = ["--form", "zip", "--folder", "Realistic Drawing"]
    target = submit(work, *flags, "--to", str(work / "a.zip"))
    with zipfile.ZipFile(target) as archive:
        assert archive.namelist() == [f"Realistic Drawing/{name}.jpg" for name in IDS]
        assert sniff(archive.read(archive.namelist()[2])) == "jpg"
    assert submit(work, *flags, "--to", str(work / "b.zip")).read_bytes() == target.read_bytes()
    assert validate(target, IDS, "zip") == []
    assert validate(target, [*IDS[:3], "24807"], "zip") == [
        "'24807' is missing",
        "'裙' is none of the given ids",
    ]


def test_what_is_missing_or_damaged_is_named_and_nothing_is_written(work, capsys):
    (work / "out" / "0a.png").unlink()
    message = refused(capsys, work / "out", work / "T2I_test.tsv")
    assert "1 of 4 ids have no image" in message and "0a" in message
    (work / "out" / "0a.png").write_bytes(some_image(1, (32, 32), "png")[:50])
    assert "0a.png cannot be submitted" in refused(capsys, work / "out", work / "T2I_test.tsv")
    (work / "out" / "0a.png").write_bytes(some_image(1, (32, 31), "png"))
    assert "pass --size" in refused(capsys, work / "out", work / "T2I_test.tsv")
    assert not (work / "out" / "T2I_test.tsv").exists() and not list((work / "out").glob(".*"))


def test_the_list_of_ids_is_never_overwritten(work, capsys):
    (work / "out" / "T2I_test.tsv").write_text((work / "T2I_test.tsv").read_text("utf-8"), "utf-8")
    assert "--to" in refused(capsys, work / "out", work / "out" / "T2I_test.tsv")


@pytest.mark.parametrize(
    ("text", "message"),
    [("a\nb\na\n", "3: the id 'a' comes twice"), ("\n", "no ids"), ("a\n\tx\n", "2: the id is empty")],
)
def test_bad_lists_name_the_line(text, message, tmp_path):
    (tmp_path / "ids.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_ids(tmp_path / "ids.tsv")


def test_ids_never_leave_the_folder(work, capsys):
    (work / "ids.tsv").write_text("../secret\n")
    assert "cannot name a file" in refused(capsys, work / "out", work / "ids.tsv")
    assert "inside the zip" in " ".join(
        refused(capsys, work / "out", work / "T2I_test.tsv", "--form", "zip", "--folder", "../x").split()
    )


def mutate(lines, change):
    fields = lines[1].rstrip(b"\n").split(b"\t")
    rgba = base64.b64encode(some_image(1, (32, 32), "png", "RGBA"))
    small = base64.b64encode(some_image(1, (8, 8), "png"))
    safe = base64.urlsafe_b64encode(b"\xff\xfe\xfd" * 9)
    return {
        "a byte order mark": [b"\xef\xbb\xbf" + lines[0], *lines[1:]],
        "a header line is not allowed": [b"img_id\timage\n", *lines],
        "1 columns instead of 2": [lines[0], fields[0] + b"\n", *lines[2:]],
        "3 columns instead of 2": [lines[0], b"\t".join([fields[0], b"text", fields[1]]) + b"\n", *lines[2:]],
        "in the given order it is '0a'": [lines[0], lines[2], lines[1], lines[3]],
        "comes twice": [*lines, lines[1]],
        "1 of 4 ids are missing, first '0a'": [lines[0], *lines[2:]],
        "no standard base64": [lines[0], fields[0] + b"\t" + safe + b"\n", *lines[2:]],
        "neither PNG nor JPEG": [lines[0], fields[0] + b"\tAAAA\n", *lines[2:]],
        "the image is bad": [lines[0], fields[0] + b"\t" + fields[1][:80] + b"\n", *lines[2:]],
        "not RGB": [lines[0], fields[0] + b"\t" + rgba + b"\n", *lines[2:]],
        "the image is (8, 8)": [lines[0], fields[0] + b"\t" + small + b"\n", *lines[2:]],
        "no line break": [*lines[:3], lines[3].rstrip(b"\n")],
    }[change]


@pytest.mark.parametrize(
    "change",
    [
        "a byte order mark",
        "a header line is not allowed",
        "1 columns instead of 2",
        "3 columns instead of 2",
        "in the given order it is '0a'",
        "comes twice",
        "1 of 4 ids are missing, first '0a'",
        "no standard base64",
        "neither PNG nor JPEG",
        "the image is bad",
        "not RGB",
        "the image is (8, 8)",
        "no line break",
    ],
)
def test_the_validator_finds_each_mistake(change, work, capsys):
    good = submit(work)
    bad = work / "bad.tsv"
    bad.write_bytes(b"".join(mutate(good.read_bytes().splitlines(keepends=True), change)))
    assert any(change in complaint for complaint in validate(bad, IDS))
    assert "is not valid" in refused(capsys, bad, work / "T2I_test.tsv")


def test_a_finished_file_is_only_validated(work):
    good = submit(work)
    before = good.stat().st_mtime_ns
    assert main([str(good), str(work / "T2I_test.tsv")]) == good and good.stat().st_mtime_ns == before


@pytest.mark.parametrize(("form", "side"), [("t2i", 0), ("t2i", 24), ("zip", 0)])
def test_labels_are_kept(work, form, side):
    for i, name in enumerate(IDS):
        image = decode(some_image(i, (32, 32), "png"))
        _, arguments = labelled(image, "PNG", LabelOptions("implicit", "shop"), {"seed": i})
        image.save(work / "out" / f"{name}.png", **arguments)
    target = submit(work, "--form", form, "--size", str(side), "--to", str(work / "result"))
    if form == "zip":
        with zipfile.ZipFile(target) as archive:
            files = [archive.read(name) for name in archive.namelist()]
    else:
        files = [base64.b64decode(line.split("\t")[1]) for line in target.read_text("utf-8").splitlines()]
    assert len(files) == len(IDS)
    for i, data in enumerate(files):
        with Image.open(io.BytesIO(data)) as image:
            assert read_labels(image)[0].label.ContentProducer == "shop"
            assert read_manifest(image)["seed"] == i
