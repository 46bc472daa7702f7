"""No file of a source is lost, overlooked or misread in silence: each case that happened, and random trees of files."""

import base64
import csv
import io
import json
import os
import random
from pathlib import Path

import pytest
from make_sources import some_image
from PIL import Image, ImageCms

from data_tools.images.color_profiles import profile_state
from data_tools.images.decode import decode
from data_tools.ingest.records import Problem, Record
from data_tools.inspect import main as inspect_main
from data_tools.readers.base import ReaderOptions
from data_tools.readers.column_names import CAPTIONS, KEYS, PATHS, find_column
from data_tools.readers.detect import open_source
from data_tools.readers.formats.table import split_row
from data_tools.readers.formats.texts import read_texts
from data_tools.shard import ShardConfig, shard
from data_tools.submit import read_ids


def read(path: Path, **options) -> tuple[list[Record], list[Problem]]:
    items = list(open_source(path, ReaderOptions(**options)))
    return [i for i in items if isinstance(i, Record)], [i for i in items if isinstance(i, Problem)]


def lost(problems: list[Problem]) -> list[tuple[str, str]]:
    return sorted((p.where, p.reason) for p in problems)


def write_images(folder: Path, count: int, captions: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i:03d}.jpg").write_bytes(some_image(i))
        if captions:
            (folder / f"{i:03d}.txt").write_text(f"第{i}件红色连衣裙", "utf-8")
    return folder


class TestChoice:
    def test_a_stray_list_never_decides(self, tmp_path):
        write_images(tmp_path, 8)
        (tmp_path / "top2.csv").write_text("image,caption\n000.jpg,一\n001.jpg,二\n", "utf-8")
        with pytest.raises(
            ValueError, match=r"csv: 2 rows in top2.csv; --format folder: 8 images, 8 with a cap"
        ):
            open_source(tmp_path)
        records, problems = read(tmp_path, format="folder")
        assert len(records) == 8 and lost(problems) == [("top2.csv", "not_read")]
        records, problems = read(tmp_path, format="csv")
        assert len(records) == 2 and len(problems) == 14
        assert ("007.jpg", "not_in_list") in lost(problems) and ("007.txt", "not_read") in lost(problems)

    def test_nor_does_a_stray_tar(self, tmp_path):
        write_images(tmp_path / "one", 1)
        shard(ShardConfig(tmp_path / "one", str(tmp_path / "tars"), workers=0))
        write_images(tmp_path / "all", 4)
        os.rename(tmp_path / "tars" / "train-00000.tar", tmp_path / "all" / "backup.tar")
        with pytest.raises(
            ValueError, match=r"webdataset: 1 samples in backup.tar; --format folder: 4 images"
        ):
            open_source(tmp_path / "all")

    def test_shards_of_our_own_beside_an_image_are_shards(self, tmp_path):
        write_images(tmp_path / "in", 3)
        shard(ShardConfig(tmp_path / "in", str(tmp_path / "out"), workers=0))
        (tmp_path / "out" / "look.png").write_bytes(some_image(9, suffix="png"))
        records, problems = read(tmp_path / "out", captions="optional")
        assert len(records) == 3 and lost(problems) == [("look.png", "not_in_list")]

    @pytest.mark.parametrize("captions", ["required", "optional"])
    def test_a_list_beside_images_without_captions_is_read(self, tmp_path, captions):
        write_images(tmp_path / "images", 3, captions=False)
        (tmp_path / "captions.csv").write_text(
            "".join(["Image Path,商品标题\n", *(f"images/{i:03d}.jpg,红裙{i}\n" for i in range(3))]), "utf-8"
        )
        records, problems = read(tmp_path, captions=captions)
        assert [r.captions for r in records] == [("红裙0",), ("红裙1",), ("红裙2",)] and not problems

    @pytest.mark.parametrize(
        ("name", "data", "said"),
        [
            ("a.csv", b"bild,wort\n000.jpg,x\n", "no column is an image among bild, wort"),
            ("a.csv", "图片,标题\n000.jpg,裙\n".encode("gb18030"), "--encoding gb18030"),
            ("a.csv", "image,text\n000.jpg,x\n".encode("utf-16"), "UTF-16 text"),
            ("a.json", b'[{"image": "000.jpg", "text": "x"}]', "a JSON array"),
            ("a.json", b'{"images": [], "annotations": []}', "COCO annotations"),
            ("a.xlsx", b"PK\x03\x04....", "save a workbook as CSV UTF-8"),
            ("a.tar.gz", b"\x1f\x8b....", "gzip"),
            ("sub/a.csv", b"image,text\n000.jpg,x\n", "it lies in a folder below"),
        ],
    )
    def test_what_is_not_read_is_named_with_its_reason(self, tmp_path, name, data, said):
        write_images(tmp_path, 2)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
        records, problems = read(tmp_path)
        assert len(records) == 2 and [p.where for p in problems] == [name] and said in problems[0].detail

    def test_every_command_says_what_it_recognised(self, tmp_path, capsys):
        write_images(tmp_path / "in", 2)
        (tmp_path / "in" / "prices.csv").write_text("货号,价格\n1,2\n", "utf-8")
        inspect_main([str(tmp_path / "in"), "--out", str(tmp_path / "in" / "page.html")])
        shard(ShardConfig(tmp_path / "in", str(tmp_path / "in" / "out"), workers=0))
        said = capsys.readouterr().err
        assert (
            said.count("in: folder") == 2 and said.count("prices.csv is not read: no column is an image") == 2
        )

    def test_results_inside_the_source_change_nothing(self, tmp_path):
        write_images(tmp_path, 2)
        config = ShardConfig(tmp_path, str(tmp_path / "out"), workers=0)
        first = shard(config)
        assert shard(config) == first and first["kept"] == 2 and first["dropped"] == 0

    def test_files_of_img2dataset_are_images(self, tmp_path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        write_images(tmp_path / "00000", 2)
        (tmp_path / "00000" / "000.json").write_text('{"url": "http://a/b", "key": "000"}')
        columns = {n: ["x", "y"] for n in ("key", "status", "error_message", "url", "caption")}
        pq.write_table(pa.table(columns), tmp_path / "00000.parquet")
        records, problems = read(tmp_path)
        assert len(records) == 2 and records[0].meta["url"] == "http://a/b"
        assert lost(problems) == [("00000.parquet", "not_read")]


class TestColumns:
    @pytest.mark.parametrize(
        "name", ["Image Path", "IMAGE-PATH", "ｉｍａｇｅ＿ｐａｔｈ", " image_path ", "imagePath"]
    )
    def test_case_width_and_separators_do_not_matter(self, name):
        assert find_column(["x", name], PATHS) == name

    @pytest.mark.parametrize("name", ["标题", "商品标题", "名称", "描述", "TEXT", "Title", "caption", "name"])
    def test_captions_of_catalogues(self, name):
        assert find_column(["货号", name], CAPTIONS) == name and find_column(["货号", name], KEYS) == "货号"

    @pytest.mark.parametrize("name", ["list.csv", "list.jsonl"])
    @pytest.mark.parametrize("header", [("编码X", "宣传语", "照片档"), ("货号", "商品标题", "图片路径")])
    def test_named_columns_work_for_every_list(self, tmp_path, name, header):
        write_images(tmp_path / "pics", 2, captions=False)
        rows = [(f"k{i}", f"红裙{i}", f"pics/{i:03d}.jpg") for i in range(2)]
        if name.endswith("csv"):
            text = "\n".join(",".join(row) for row in (header, *rows))
        else:
            text = "\n".join(json.dumps(dict(zip(header, row, strict=True))) for row in rows)
        (tmp_path / name).write_text(text, "utf-8")
        flags = dict(zip(("key_column", "caption_column", "image_column"), header, strict=True))
        for path in (tmp_path / name, tmp_path):
            records, problems = read(path, **flags)
            assert [r.key for r in records] == ["k0", "k1"] and not problems

    def test_a_list_without_header(self, tmp_path):
        write_images(tmp_path, 1, captions=False)
        (tmp_path / "a.csv").write_text("000.jpg,红裙\n", "utf-8")
        assert read(tmp_path)[0][0].captions == ("红裙",)


class TestLines:
    TITLE = "甲\u2028乙\x85丙\x0b丁\x0c戊"

    def test_a_line_ends_at_lf_or_crlf_alone(self, tmp_path):
        write_images(tmp_path, 1, captions=False)
        (tmp_path / "000.txt").write_bytes(f"{self.TITLE}\r\n二\r三\n".encode())
        row = {"file_name": "000.jpg", "text": self.TITLE}
        (tmp_path / "l.jsonl").write_text(json.dumps(row, ensure_ascii=False), "utf-8")
        (tmp_path / "l.csv").write_text(f'image,text\n000.jpg,"{self.TITLE}"\n', "utf-8")
        assert read(tmp_path, format="folder")[0][0].captions == (self.TITLE, "二\r三")
        assert read(tmp_path / "l.jsonl")[0][0].captions == (self.TITLE,)
        assert read(tmp_path / "l.csv")[0][0].captions == (self.TITLE,)
        shard(ShardConfig(tmp_path / "l.csv", str(tmp_path / "out"), workers=0))
        assert read(tmp_path / "out")[0][0].captions == (self.TITLE,)

    def test_fields_have_no_hidden_limit(self, tmp_path):
        data = some_image(0, size=(640, 640), suffix="bmp")
        text = base64.encodebytes(data).decode()
        assert len(text) > 1_000_000 and text.count("\n") > 10_000
        (tmp_path / "a.csv").write_text(
            f'id,image,caption\n1,"{text}","红, ""大""裙"\n2,"{text}",二\n', "utf-8"
        )
        records, problems = read(tmp_path / "a.csv")
        assert [r.image for r in records] == [data, data] and not problems
        assert records[0].captions == ('红, "大"裙',)

    def test_rows_split_as_csv_does(self):
        rng = random.Random(0)
        for _ in range(500):
            text = "".join(rng.choice('a,"\n ') for _ in range(rng.randrange(12)))
            try:
                expected = next(csv.reader(io.StringIO(f"{text}\n", newline=""), strict=True), [""])
            except csv.Error:
                continue
            if "\n" not in text:
                assert split_row(text, ",") == (expected or [""]), text

    @pytest.mark.parametrize("encode", [base64.encodebytes, base64.b64encode, base64.urlsafe_b64encode])
    def test_base64_with_white_space(self, tmp_path, encode):
        wrapped = encode(some_image(3)).decode().replace("\n", "\r\n ")
        (tmp_path / "l.jsonl").write_text(json.dumps({"id": 1, "image": wrapped, "text": "裙"}))
        assert read(tmp_path / "l.jsonl")[0][0].image == some_image(3)


class TestImages:
    def test_bytes_decide_what_is_an_image(self, tmp_path):
        for i, name in enumerate(("a.jpg", "b.jfif", "c.jpe", "d", "E.JPEG", "f.dat")):
            (tmp_path / name).write_bytes(some_image(i))
        (tmp_path / "g.jpg").write_bytes(b"<html>not found</html>")
        (tmp_path / "b.txt").write_text("红裙", "utf-8")
        records, problems = read(tmp_path, captions="optional")
        assert {r.where for r in records} == {"a.jpg", "b.jfif", "c.jpe", "d", "E.JPEG", "f.dat"}
        assert lost(problems) == [("g.jpg", "not_an_image")] and "an HTML page" in problems[0].detail
        assert next(r for r in records if r.where == "b.jfif").captions == ("红裙",)

    def test_links_to_folders_are_followed_and_loops_cut(self, tmp_path):
        write_images(tmp_path / "other", 3)
        write_images(tmp_path / "d", 1)
        (tmp_path / "d" / "more").symlink_to(tmp_path / "other")
        (tmp_path / "d" / "loop").symlink_to(tmp_path / "d")
        (tmp_path / "other" / "back").symlink_to(tmp_path / "d")
        (tmp_path / "d" / "gone").symlink_to(tmp_path / "nowhere")
        records, problems = read(tmp_path / "d")
        assert len(records) == 4 and [(p.where, p.reason) for p in problems] == [("gone", "not_read")]

    def test_heic_needs_its_package(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
        (tmp_path / "a.heic").write_bytes(b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(64))
        (tmp_path / "a.txt").write_text("裙", "utf-8")
        with pytest.raises(ValueError, match="pip install pillow-heif"):
            shard(ShardConfig(tmp_path, str(tmp_path / "out"), workers=0))

    def test_profiles_become_srgb(self):
        """A profile whose red and green primaries are exchanged, from sRGB's own tags: red is meant to be green."""
        image = Image.new("RGB", (16, 16), (200, 30, 30))
        data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
        count = int.from_bytes(data[128:132], "big")
        tags = {bytes(data[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
        red, green = tags[b"rXYZ"], tags[b"gXYZ"]
        data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
        data = bytes(data).replace(b"s\0R\0G\0B", b"t\0e\0s\0t").replace(b"sRGB", b"test")
        png = io.BytesIO()
        image.save(png, "PNG", icc_profile=data)
        assert (
            max(
                abs(a - b)
                for a, b in zip(decode(png.getvalue()).getpixel((8, 8)), (30, 200, 30), strict=True)
            )
            < 4
        )

    def test_a_broken_profile_is_ignored_and_counted(self, tmp_path):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), (200, 30, 30)).save(buffer, "PNG", icc_profile=b"no profile" * 20)
        assert profile_state(Image.open(io.BytesIO(buffer.getvalue()))) == "broken"
        assert decode(buffer.getvalue()).getpixel((8, 8)) == (200, 30, 30)
        (tmp_path / "a.png").write_bytes(buffer.getvalue())
        report = shard(
            ShardConfig(tmp_path, str(tmp_path / "out"), workers=0, reader=ReaderOptions(captions="optional"))
        )
        assert report["counts"] == {"broken color profile": 1}


class TestTexts:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("p.csv", 'id,text\n1,红裙\n2,"蓝, 裙"\n'),
            ("p.tsv", "商品编号\t商品标题\n1\t红裙\n2\t蓝, 裙\n"),
            ("p.txt", "id\ttext\n1\t红裙\n2\t蓝, 裙\n"),
            ("p.csv", '1,红裙\n2,"蓝, 裙"\n'),
            ("p.jsonl", '{"货号": 1, "标题": "红裙"}\n{"货号": 2, "标题": "蓝, 裙"}\n'),
        ],
    )
    def test_a_header_is_no_prompt(self, tmp_path, name, text):
        (tmp_path / name).write_text(text, "utf-8")
        assert [(t.key, t.text) for t in read_texts(tmp_path / name)] == [("1", "红裙"), ("2", "蓝, 裙")]
        assert read_ids(tmp_path / name) == {"1": "红裙", "2": "蓝, 裙"}

    def test_what_holds_no_texts_is_named(self, tmp_path):
        (tmp_path / "p.xlsx").write_bytes(b"PK\x03\x04....")
        with pytest.raises(ValueError, match="save a workbook as CSV UTF-8"):
            list(read_texts(tmp_path / "p.xlsx"))


@pytest.mark.parametrize("seed", range(40))
def test_files_seen_are_kept_or_dropped(tmp_path, seed):
    """Any tree: every file is read for a row or left out with a reason, and no image of it is met twice."""
    rng = random.Random(seed)
    folders = ["", "a", "a/b", "images", "train", "空 格", "[x]{y}"][: rng.randrange(1, 8)]
    images = set()
    for number in range(rng.randrange(1, 25)):
        folder = tmp_path / "src" / rng.choice(folders)
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{number}{rng.choice(['', '.v2', ' x'])}"
        kind = rng.choice(["jpg", "JPG", "jfif", "", "txt", "csv", "json", "log", "zip", "broken", "hidden"])
        path = folder / {"": stem, "broken": f"{stem}.png", "hidden": f".{stem}"}.get(kind, f"{stem}.{kind}")
        if kind in ("jpg", "JPG", "jfif", ""):
            path.write_bytes(some_image(number, size=(8, 8)))
            images.add(path)
            if rng.random() < 0.6:
                (folder / f"{stem}.txt").write_text(f"裙{number}", "utf-8")
        else:
            path.write_bytes({"zip": b"PK\x03\x04", "csv": b"x,y\n1,2\n"}.get(kind, b"some text"))
    if not images:
        return
    source = open_source(tmp_path / "src", ReaderOptions(captions="optional"))
    items = list(source)
    records = [item.where for item in items if isinstance(item, Record)]
    problems = [item.where for item in items if isinstance(item, Problem)]
    seen = {p.relative_to(tmp_path / "src").as_posix() for p in (tmp_path / "src").rglob("*") if p.is_file()}
    beside = {name for name in seen if name not in records and name not in problems}
    assert sorted([*records, *problems, *beside]) == sorted(seen) and len({*records}) == len(records)
    assert {name for name in records} == {p.relative_to(tmp_path / "src").as_posix() for p in images}
    assert all(name.endswith((".txt", ".json")) for name in beside)  # captions and metadata of the records
