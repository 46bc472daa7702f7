"""Every format: what is read, what is lost and why, and that nothing is held in memory."""

import base64
import io
import json
import tarfile
from pathlib import Path

import pytest
from make_sources import (
    CAPTIONS,
    SOURCES,
    rows,
    some_image,
    url_safe,
    write_chinese_clip,
    write_folder,
    write_t2i,
)

from data_tools.ingest.records import HINTS, Problem, Record, validate_key
from data_tools.readers.base import KeyTable, ReaderOptions, decode_base64, iter_lines
from data_tools.readers.detect import open_source

RAW = Path(__file__).parents[3] / "shared" / "data" / "raw"


def read(path, **options):
    items = list(open_source(path, ReaderOptions(**options)))
    assert all(item.reason in HINTS for item in items if isinstance(item, Problem))
    return [i for i in items if isinstance(i, Record)], [i for i in items if isinstance(i, Problem)]


def lost(problems):
    return [(item.where, item.reason) for item in problems]


@pytest.mark.parametrize("name", SOURCES)
def test_every_format_is_recognised_and_read(name, tmp_path):
    path = SOURCES[name](tmp_path / "src", 7)
    source = open_source(path)
    assert (source.format == name and source.num_bytes > 0) or name in ("folder", "line_drawing")
    records, problems = read(path)
    assert not problems and len(records) == 7
    assert sorted(r.captions[0].split(",")[0] for r in records) == sorted(CAPTIONS[i % 5] for i in range(7))
    assert len({validate_key(r.key) for r in records}) == 7
    expected = set() if name == "csv" else {some_image(i) for i in range(7)}
    assert {r.image for r in records} - {b""} == expected
    assert {r.suffix for r in records} == ({""} if name == "csv" else {"jpg"})
    for record in records:
        json.dumps(record.meta, ensure_ascii=False, allow_nan=False).encode()
        assert record.where


@pytest.mark.parametrize("name", SOURCES)
def test_a_format_can_be_named_and_a_wrong_one_is_refused(name, tmp_path):
    path = SOURCES[name](tmp_path / "src")
    assert len(read(path, format=name)[0]) == 5
    wrong = "easynlp" if name == "parquet" else "parquet"
    with pytest.raises(ValueError, match=wrong):
        open_source(path, ReaderOptions(format=wrong))


def test_what_is_not_there_or_not_known(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.tsv"):
        open_source(tmp_path / "nothing.tsv")
    with pytest.raises(ValueError, match=r"an empty folder.*known formats: ecommerce_t2i"):
        open_source(tmp_path)
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.md"):
        open_source(tmp_path)
    write_t2i(tmp_path)
    with pytest.raises(ValueError, match="no split 'test': it has train"):
        open_source(tmp_path, ReaderOptions(split="test"))


# --- ECommerce-T2I ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not RAW.is_dir(), reason="the raw samples are not on this machine")
def test_t2i_samples_are_read_as_expected():
    assert tuple(map(len, read(RAW / "ecommerce_t2i", split="train"))) == (120, 0)
    test, problems = read(RAW / "ecommerce_t2i", split="test")
    assert len(test) == 20 and not problems and {r.image for r in test} == {b""}
    records, problems = read(RAW / "ecommerce_t2i" / "T2I_broken.img.tsv")
    assert [r.where for r in records] == [
        "T2I_broken.img.tsv:1",
        "T2I_broken.img.tsv:3",
    ]  # 3 is cut: see test_shard
    assert lost(problems) == [
        ("T2I_broken.img.tsv:2", "bad_base64"),
        ("T2I_broken.img.tsv:4", "empty_image"),
        ("T2I_broken.img.tsv:5", "missing_id"),
        ("T2I_broken.img.tsv:6", "duplicate_key"),
        ("T2I_broken.img.tsv:7", "not_an_image"),
        ("T2I_broken.text.tsv:5", "no_image"),
    ]
    assert "row 1" in problems[3].detail


@pytest.mark.parametrize("name", ["text", "txt"])
@pytest.mark.parametrize("alphabet", [url_safe, lambda data: base64.b64encode(data).decode().rstrip("=")])
def test_t2i_names_and_alphabets(name, alphabet, tmp_path):
    records, problems = read(write_t2i(tmp_path, 6, alphabet=alphabet, name=name))
    assert not problems and [(r.key, r.captions[0], r.image) for r in records] == rows(6)


def test_t2i_splits_by_name(tmp_path):
    write_t2i(tmp_path, 3, "test")
    write_t2i(tmp_path, 3, "val")
    write_t2i(tmp_path, 3, "train")
    assert [part.split for part in open_source(tmp_path).parts] == ["train", "val", "test"]


def test_t2i_join_reports_both_sides(tmp_path):
    write_t2i(tmp_path, 3)
    with (tmp_path / "T2I_train.text.tsv").open("ab") as file:
        file.write("lonely\t没有图片\nno tab\n\t没有编号\nempty\t  \n".encode() + b"bad\t\xff\xfe\n")
    with (tmp_path / "T2I_train.img.tsv").open("a") as file:
        file.write(f"stranger\t{url_safe(some_image(8))}\nx\ty\tz\n")
    records, problems = read(tmp_path)
    assert len(records) == 3
    assert lost(problems) == [
        ("T2I_train.text.tsv:5", "bad_column_count"),
        ("T2I_train.text.tsv:6", "missing_id"),
        ("T2I_train.text.tsv:7", "no_caption"),
        ("T2I_train.text.tsv:8", "bad_encoding"),
        ("T2I_train.img.tsv:4", "no_caption"),
        ("T2I_train.img.tsv:5", "bad_column_count"),
        ("T2I_train.text.tsv:4", "no_image"),
    ]
    records, problems = read(tmp_path, captions="optional")
    assert len(records) == 4 and records[-1].captions == ()


def test_several_texts_of_one_id_are_several_captions(tmp_path):
    write_t2i(tmp_path, 2)
    with (tmp_path / "T2I_train.text.tsv").open("a", encoding="utf-8") as file:
        file.write(f"{rows(1)[0][0]}\t另一句\n")
    records, problems = read(tmp_path)
    assert not problems and records[0].captions == (CAPTIONS[0], "另一句")


def test_a_confused_hash_never_confuses_captions(tmp_path, monkeypatch):
    monkeypatch.setattr("data_tools.readers.join.hash64", lambda text: len(text))
    records, problems = read(write_t2i(tmp_path, 6))
    assert not problems and [(r.key, r.captions[0]) for r in records] == [row[:2] for row in rows(6)]


def test_byte_order_mark_crlf_and_gb18030(tmp_path):
    write_t2i(tmp_path, 3)
    path = tmp_path / "T2I_train.text.tsv"
    text = path.read_text("utf-8")
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert [r.captions[0] for r in read(tmp_path)[0]] == CAPTIONS[:3]
    path.write_bytes(text.encode("gb18030"))
    records, problems = read(tmp_path)
    assert not records and {p.reason for p in problems} == {"bad_encoding", "no_caption"}
    assert "gb18030" in problems[0].detail
    assert [r.captions[0] for r in read(tmp_path, encoding="gb18030")[0]] == CAPTIONS[:3]
    with pytest.raises(ValueError, match="utf-16"):
        ReaderOptions(encoding="utf-16")
    with pytest.raises(ValueError, match="klingon"):
        ReaderOptions(encoding="klingon")


# --- lists -----------------------------------------------------------------------------------------------------


def test_wukong_quotes_and_missing_header(tmp_path):
    path = tmp_path / "wukong.csv"
    path.write_text(
        'url,caption\nhttp://a/1,"逗号,在""引号""里"\nhttp://a/2,"开口\nhttp://a/3,三\nhttp://a/4,a,b\n',
        "utf-8",
    )
    records, problems = read(path)
    assert [(r.meta["url"], r.captions[0]) for r in records] == [
        ("http://a/1", '逗号,在"引号"里'),
        ("http://a/3", "三"),
    ]
    assert lost(problems) == [("wukong.csv:3", "bad_csv"), ("wukong.csv:5", "bad_column_count")]
    path.write_text("http://a/1,没有表头\n", "utf-8")
    assert read(path)[0][0].captions == ("没有表头",)
    path.write_text('url,caption\nhttp://a/1,"两行\n的句子"\nhttp://a/1,"两行\n的句子"\n', "utf-8")
    records, problems = read(path)
    assert records[0].captions == ("两行 的句子",) and lost(problems) == [("wukong.csv:4", "duplicate_key")]


def test_open_clip_list_with_local_images(tmp_path):
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a.b.jpg").write_bytes(some_image(1))
    (tmp_path / "train.tsv").write_text(
        "title\tfilepath\n红裙\timg/a.b.jpg\n没有\timg/x.jpg\n外面\t../../etc/passwd\n", "utf-8"
    )
    records, problems = read(tmp_path / "train.tsv")
    assert (
        records[0].key == "img%2Fa%2Eb"
        and records[0].meta["id"] == "img/a.b"
        and records[0].captions == ("红裙",)
    )
    assert lost(problems) == [("train.tsv:3", "missing_file"), ("train.tsv:4", "path_outside_root")]


def test_absolute_paths_need_a_root(tmp_path):
    write_folder(tmp_path / "pictures")
    row = {"image_path": str(tmp_path / "pictures" / "001.jpg"), "sentences": "红裙"}
    (tmp_path / "lists").mkdir()
    path = tmp_path / "lists" / "a.jsonl"
    path.write_text(json.dumps(row))
    assert lost(read(path)[1]) == [("a.jsonl:1", "path_outside_root")]
    assert read(path, image_root=tmp_path / "pictures")[0][0].image == some_image(1)
    with pytest.raises(FileNotFoundError, match="image-root"):
        read(path, image_root=tmp_path / "nowhere")


def test_jsonl_forms(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(some_image(i))
    lines = [
        {"file_name": "0.jpg", "text": "一"},
        {"image_id": "1.jpg", "sentences": [["sur_text", "二"], ["sur_text", "三"]], "bbox": [[0, 0, 1, 1]]},
        {"id": 7, "image": base64.b64encode(some_image(4)).decode(), "title": "四", "price": 9.5},
        {"url": "https://a/b.jpg", "caption": "五"},
        {"file_name": "2.jpg", "text": 5},
        {"file_name": "2.jpg", "text": ""},
        {"text": "没有图"},
        ["no", "object"],
        {"file_name": "\ud800.jpg", "text": "x"},
    ]
    text = (
        "\n".join(json.dumps(line) for line in lines)
        + '\n{"broken": \n'
        + '{"file_name": "2.jpg", "text": "\\ud800"}\n'
    )
    (tmp_path / "all.jsonl").write_text(text)
    records, problems = read(tmp_path / "all.jsonl")
    assert [(r.key, r.captions) for r in records] == [
        ("0", ("一",)),
        ("1", ("二", "三")),
        ("7", ("四",)),
        (records[3].key, ("五",)),
    ]
    assert records[1].meta["bbox"] == [[0, 0, 1, 1]] and records[2].meta["price"] == 9.5
    reasons = ["bad_value", "no_caption", "no_image", "bad_json", "missing_file", "bad_json", "bad_encoding"]
    assert [p.reason for p in problems] == reasons and problems[0].where == "all.jsonl:5"


def test_half_characters_in_ids_and_urls_can_still_be_written(tmp_path):
    (tmp_path / "0.jpg").write_bytes(some_image(0))
    lines = [
        {"id": "a\ud800", "file_name": "0.jpg", "text": "x", "\ud800": 1},
        {"url": "http://a/\udfff", "text": "y"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    records, _ = read(tmp_path / "a.jsonl")
    assert (
        records[0].key == "a%D800"
        and records[0].meta["id"] == "a?"
        and records[0].meta["?"] == 1
        and records[1].meta["url"] == "http://a/?"
    )


def test_columns_can_be_named(tmp_path):
    (tmp_path / "0.jpg").write_bytes(some_image(0))
    (tmp_path / "a.csv").write_text("sku,bild,image,name\n17,0.jpg,x,红裙\n", "utf-8")
    records, _ = read(tmp_path / "a.csv", key_column="sku", image_column="bild", caption_column="name")
    assert (
        records[0].key == "17"
        and records[0].captions == ("红裙",)
        and records[0].meta == {"image": "x", "source": "csv"}
    )
    with pytest.raises(ValueError, match=r"'titel': the columns are sku, bild"):
        read(tmp_path / "a.csv", caption_column="titel")


def test_an_unknown_header_says_what_it_found(tmp_path):
    (tmp_path / "a.csv").write_text("bild,name\n0.jpg,x\n")
    with pytest.raises(
        ValueError, match=r"a\.csv \(no column is an image among bild, name: name it with --image-column\)"
    ):
        open_source(tmp_path / "a.csv")


def test_chinese_clip_many_to_many(tmp_path):
    records, problems = read(write_chinese_clip(tmp_path, 3))
    assert not problems
    assert [(r.key, r.captions) for r in records] == [
        ("1000", (CAPTIONS[0], "共同的描述")),
        ("1001", (CAPTIONS[1], "共同的描述")),
        ("1002", (CAPTIONS[2],)),
    ]
    with (tmp_path / "train_texts.jsonl").open("a") as file:
        file.write(
            '{"text_id": 9, "text": "x", "image_ids": []}\n{"text_id": 9, "text": "x", "image_ids": "1000"}\n'
        )
        file.write('{"text_id": 10, "text": "y", "image_ids": [4711]}\n')
    _, problems = read(tmp_path)
    assert [p.reason for p in problems] == ["no_image", "bad_value", "no_image"] and problems[2].key == "4711"


def test_parquet_rows_lists_and_damage(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "d").mkdir()
    for i in range(2):
        (tmp_path / "d" / f"l{i}.png").write_bytes(some_image(i, suffix="png"))
        (tmp_path / "d" / f"r{i}.jpg").write_bytes(some_image(i + 5))
    table = {"pd_line_drawing": ["d/l0.png", "d/l1.png"], "pd_realistic_drawing": ["d/r0.jpg", "d/r1.jpg"]}
    pq.write_table(pa.table({**table, "pd_title": ["red dress", None]}), tmp_path / "train_data.parquet")
    source = open_source(tmp_path)
    assert source.format == "line_drawing"
    records, problems = read(tmp_path)
    assert records[0].image == some_image(5) and records[0].extra == {
        "drawing.png": some_image(0, suffix="png")
    }
    assert lost(problems) == [("train_data.parquet:2", "no_caption")]
    (tmp_path / "train_data.parquet").write_bytes(b"PAR1 nonsense PAR1")
    assert [p.reason for p in read(tmp_path)[1]] == ["unreadable_file"] + ["not_in_list"] * 4


def test_a_damaged_row_group_costs_only_its_rows(tmp_path):
    import pyarrow.parquet as pq

    path = SOURCES["parquet"](tmp_path, 12) / "train-00000-of-00001.parquet"
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 60] = b"\xff" * 60
    path.write_bytes(data)
    records, problems = read(tmp_path)
    assert len(records) == 8 and lost(problems) == [(f"{path.name}:5", "unreadable_file")]
    assert "rows 5 to 8" in problems[0].detail


# --- folders and tars ------------------------------------------------------------------------------------------


def test_folder_keys_captions_and_leftovers(tmp_path):
    write_folder(tmp_path, 3)
    (tmp_path / "x.y.png").write_bytes(some_image(9, suffix="png"))
    (tmp_path / "x.y.txt").write_text("点\n")
    (tmp_path / "silent.jpg").write_bytes(some_image(10))
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "empty.txt").write_text("空")
    (tmp_path / "alone.txt").write_text("只有字")
    (tmp_path / ".hidden.jpg").write_bytes(some_image(11))
    records, problems = read(tmp_path)
    assert sorted(r.key for r in records) == ["001", "002", "more%2F000", "x%2Ey"]
    assert records[0].captions == (CAPTIONS[1], "第二句")
    assert sorted(lost(problems)) == [
        (".hidden.jpg", "hidden_file"),
        ("alone.txt", "no_image"),
        ("empty.jpg", "empty_image"),
        ("silent.jpg", "no_caption"),
    ]
    assert len(read(tmp_path, captions="optional")[0]) == 5


def test_folder_with_images_and_captions_side_by_side(tmp_path):
    for name in ("images", "captions"):
        (tmp_path / name).mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(some_image(1))
    (tmp_path / "captions" / "a.txt").write_text("卡通风格", "utf-8")
    records, problems = read(tmp_path)
    assert not problems and records[0].key == "a" and records[0].captions == ("卡通风格",)


def test_folders_named_like_splits_are_splits(tmp_path):
    write_folder(tmp_path / "train", 3)
    write_folder(tmp_path / "validation", 2)
    assert [part.split for part in open_source(tmp_path).parts] == ["train", "val"]
    assert len(read(tmp_path, split="val")[0]) == 2


def test_imagefolder_with_metadata(tmp_path):
    (tmp_path / "0.jpg").write_bytes(some_image(0))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.jpg", "text": "红裙"}\n', "utf-8")
    assert open_source(tmp_path).format == "jsonl" and read(tmp_path)[0][0].captions == ("红裙",)


def test_a_pipe_in_a_list_does_not_block(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "a.jsonl").write_text('{"file_name": "pipe.jpg", "text": "x"}\n')
    assert lost(read(tmp_path / "a.jsonl")[1]) == [("a.jsonl:1", "unsafe_name")]


def test_line_drawings_by_name_with_gaps(tmp_path):
    path = SOURCES["line_drawing"](tmp_path, 4)
    (path / "Line Drawing" / "24806.png").unlink()
    (path / "Realistic Drawing" / "24809.jpg").unlink()
    records, problems = read(path)
    assert [r.key for r in records] == ["24805", "24808"] and "drawing.png" in records[0].extra
    assert {p.reason for p in problems} == {"no_pair"} and {p.key for p in problems} == {"24806", "24809"}


def test_control_net_tutorial_layout(tmp_path):
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(some_image(len(name), suffix="png", mode="L"))
    (tmp_path / "prompt.json").write_text(
        '{"source": "source/0.png", "target": "target/0.png", "prompt": "圆形"}\n'
    )
    records, problems = read(tmp_path)
    assert (
        open_source(tmp_path).format == "line_drawing" and not problems and records[0].captions == ("圆形",)
    )
    assert records[0].extra == {"drawing.png": (tmp_path / "source" / "0.png").read_bytes()}


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def test_tar_members_that_leave_the_archive_are_never_read(tmp_path):
    good = [("a.jpg", some_image(1)), ("a.txt", "红裙".encode()), ("a.cls", b"5")]
    bad = [
        ("../../evil.jpg", some_image(2)),
        ("/abs.jpg", some_image(2)),
        ("link.jpg", None),
        ("x/../y.jpg", b"1"),
    ]
    records, problems = read(tar_of(tmp_path / "x.tar", good + bad))
    assert len(records) == 1 and records[0].extra == {"cls": b"5"}
    assert [p.reason for p in problems] == ["unsafe_name"] * 4


def test_tar_samples_without_parts(tmp_path):
    members = [
        ("a.jpg", some_image(1)),
        ("b.jpg", some_image(2)),
        ("b.json", '{"caption": "来自json"}'.encode()),
        ("c.txt", b"alone"),
        ("d.jpg", some_image(3)),
        ("d.json", b"{broken"),
        ("e.jpg", b""),
        ("e.txt", b"x"),
        ("dir/f.jpg", some_image(4)),
        ("dir/f.txt", b"x\ny"),
    ]
    records, problems = read(tar_of(tmp_path / "x.tar", members))
    assert [(r.key, r.captions) for r in records] == [("b", ("来自json",)), ("dir%2Ff", ("x", "y"))]
    assert [(p.key, p.reason) for p in problems] == [
        ("a", "no_caption"),
        ("c", "no_image"),
        ("d", "bad_json"),
        ("e", "empty_image"),
    ]


def test_truncated_and_damaged_tars_say_so(tmp_path):
    path = SOURCES["webdataset"](tmp_path, 3) / "train-00000.tar"
    data = path.read_bytes()
    for size in (3000, 1500, 900):  # inside the third header, the image, its header
        path.write_bytes(data[:size])
        records, problems = read(path)
        assert not records and {p.reason for p in problems} == {"truncated_file"}
    damaged = bytearray(data)
    second = data.index(rows(2)[1][0].encode())
    damaged[second : second + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(damaged)
    records, problems = read(path)
    assert (
        len(records) == 1
        and problems[-1].reason == "unreadable_file"
        and "bytes unread" in problems[-1].detail
    )


# --- what all share --------------------------------------------------------------------------------------------


def test_base64_alphabets_and_strictness():
    data = bytes(range(256))
    for text in (base64.b64encode(data), base64.urlsafe_b64encode(data), base64.b64encode(data).rstrip(b"=")):
        assert decode_base64(text) == data
    assert decode_base64(base64.encodebytes(data)) == decode_base64(b" \t" + base64.b64encode(data)) == data
    assert decode_base64(b'"data:image/png;base64,' + base64.b64encode(data) + b'"') == data
    for text in (b"abc*", b"ab=c", b"a", "中文".encode(), b"ab-+/_c*"):
        with pytest.raises(ValueError):
            decode_base64(text)


def test_lines_longer_than_allowed_are_skipped_unread(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n" + b"x" * 5000 + b"\r\ntwo\n\n" + b"y" * 5000)
    lines = list(iter_lines(path, 100))
    assert [(n, data) for n, _, data in lines] == [(1, b"one"), (2, None), (3, b"two"), (5, None)]
    assert path.read_bytes()[lines[2].offset :].startswith(b"two")


def test_huge_rows_and_images_are_problems(tmp_path):
    write_t2i(tmp_path, 3)
    assert {p.reason for p in read(tmp_path, max_row_bytes=50)[1]} == {"row_too_large", "no_image"}
    assert {p.reason for p in read(tmp_path, max_image_bytes=50)[1]} == {"image_too_large"}


def test_key_table_finds_the_first_row():
    table = KeyTable()
    assert [table.first_row(f"k{i % 3000}", i + 1) for i in range(6000)] == [0] * 3000 + list(range(1, 3001))


def test_memory_does_not_grow_with_the_images(tmp_path):
    import tracemalloc

    def peak(count):
        folder = tmp_path / str(count)
        folder.mkdir()
        field = url_safe(some_image(0, (300, 300)))
        with (
            (folder / "T2I_train.img.tsv").open("w") as images,
            (folder / "T2I_train.text.tsv").open("w") as texts,
        ):
            for i in range(count):
                images.write(f"{i:032x}\t{field}\n")
                texts.write(f"{count - 1 - i:032x}\t裙\n")
        tracemalloc.start()
        assert sum(isinstance(item, Record) for item in open_source(folder)) == count
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    small, large = peak(100), peak(3000)  # 3 kB an image: holding them would take 9 MB
    assert large - small < 1_500_000
