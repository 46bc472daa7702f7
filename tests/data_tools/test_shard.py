"""Source to shards: contents, determinism, and the same bytes after a kill at any moment."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from make_sources import (
    SOURCES,
    rows,
    some_image,
    write_folder,
    write_line_drawing,
    write_mixed,
    write_t2i,
    write_webdataset,
)

from common.files import write_json
from data_tools import shard as module
from data_tools.images.decode import decode
from data_tools.readers.detect import open_source
from data_tools.shard import main
from data_tools.shards.targets import REPORT_FILE, LocalTarget
from data_tools.split import hash_split, split_unit

ROOT = Path(__file__).parents[2]
T2I = ROOT.parent / "shared" / "data" / "raw" / "ecommerce_t2i"
needs_t2i = pytest.mark.skipif(not T2I.is_dir(), reason="the raw samples are not on this machine")


def run(src, dst, *flags, workers=0):
    return main([str(src), str(dst), "--workers", str(workers), "--size", "16", *flags])


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()
    }


def dropped(folder):
    return [json.loads(line) for line in (Path(folder) / "dropped.jsonl").read_text("utf-8").splitlines()]


@needs_t2i
def test_t2i_samples_give_exactly_what_is_expected(tmp_path):
    expected = json.loads((T2I / "T2I_broken.expected.json").read_text())
    report = run(T2I, tmp_path / "out", "--split", "broken")
    reasons = {
        "bad base64": "bad_base64",
        "truncated jpeg": "truncated_image",
        "empty image field": "empty_image",
        "missing id": "missing_id",
        "duplicate id (of line 1)": "duplicate_key",
        "bytes are not an image": "not_an_image",
    }
    found = {row["where"]: row["reason"] for row in dropped(tmp_path / "out")}
    for row in expected:
        where = f"T2I_broken.img.tsv:{row['line']}"
        assert found.pop(where, "keep") == ("keep" if row["expect"] == "keep" else reasons[row["reason"]]), (
            row
        )
    assert found == {"T2I_broken.text.tsv:5": "no_image"}  # the text whose image had lost its id in line 5
    assert (report["read"], report["kept"], report["dropped"]) == (8, 1, 7)
    (record,) = open_source(tmp_path / "out")
    assert record.key == expected[0]["img_id"]
    report = run(T2I, tmp_path / "all", "--split", "train")
    assert (report["kept"], report["dropped"]) == (120, 0)


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "csv"])
def test_any_format_becomes_shards_with_the_same_captions(name, tmp_path):
    source = SOURCES[name](tmp_path / "src", 7)
    report = run(source, tmp_path / "out", "--samples-per-shard", "3")
    assert (report["read"], report["kept"], report["dropped"]) == (7, 7, 0)
    before, after = list(open_source(source)), list(open_source(tmp_path / "out"))
    assert [(r.key, r.captions) for r in before] == [(r.key, r.captions) for r in after]
    assert len(list((tmp_path / "out").glob("train-*.tar"))) == 3
    for old, new in zip(before, after, strict=True):
        assert new.suffix == "webp" and decode(new.image).size == (16, 16)
        means = [np.asarray(decode(r.image), float).mean() for r in (old, new)]
        assert abs(means[0] - means[1]) < 4
        assert {**old.meta, **new.meta} == new.meta or name == "webdataset"


def test_rows_read_are_kept_or_dropped(tmp_path):
    report = run(write_mixed(tmp_path / "src"), tmp_path / "out")
    reasons = [row["reason"] for row in dropped(tmp_path / "out")]
    assert report["read"] == 30 == report["kept"] + len(reasons)
    assert report["reasons"] == {"truncated_image": 4, "bad_base64": 3}
    assert all(row["where"] and row["detail"] for row in dropped(tmp_path / "out"))


def test_the_same_bytes_with_any_number_of_workers(tmp_path):
    source = write_mixed(tmp_path / "src")
    run(source, tmp_path / "a", "--samples-per-shard", "4", "--val-share", "0.2")
    run(source, tmp_path / "b", "--samples-per-shard", "4", "--val-share", "0.2", workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


class Killed(BaseException):
    """Stands for kill -9: nothing is cleaned up."""


def crash_at(monkeypatch, operation, before):
    """End the run at the n-th change of the file system that others could see."""
    count = {"n": 0}

    def breaking(function):
        def wrapper(*args, **kwargs):
            count["n"] += 1
            if count["n"] == operation and before:
                raise Killed
            result = function(*args, **kwargs)
            if count["n"] == operation:
                raise Killed
            return result

        return wrapper

    monkeypatch.setattr(os, "replace", breaking(os.replace))
    monkeypatch.setattr(LocalTarget, "remove", breaking(LocalTarget.remove))
    monkeypatch.setattr("data_tools.shards.image_shards.ShardWriter.abort", lambda self: None)


@pytest.mark.parametrize("before", [True, False])
def test_continued_after_a_crash_at_every_step_byte_for_byte(before, tmp_path, monkeypatch):
    source = write_mixed(tmp_path / "src", 18)
    flags = ["--samples-per-shard", "4", "--val-share", "0.3"]
    run(source, tmp_path / "whole", *flags)
    operation, crashed = 0, True
    while crashed:
        operation, crashed = operation + 1, False
        with monkeypatch.context() as patch:
            crash_at(patch, operation, before)
            try:
                run(source, tmp_path / f"out{operation}", *flags)
            except Killed:
                crashed = True
        run(source, tmp_path / f"out{operation}", *flags)
        assert contents(tmp_path / f"out{operation}") == contents(tmp_path / "whole"), operation
    assert operation > 12


def test_finished_shards_are_not_prepared_again(tmp_path, monkeypatch):
    source = write_mixed(tmp_path / "src")
    with monkeypatch.context() as patch:
        crash_at(patch, 10, True)
        with pytest.raises(Killed):
            run(source, tmp_path / "out", "--samples-per-shard", "4")
    prepared = []
    original = module.Prepare.one
    monkeypatch.setattr(module.Prepare, "one", lambda self, r: prepared.append(r.key) or original(self, r))
    whole = len(list((tmp_path / "out").glob("train-*.tar")))
    run(source, tmp_path / "out", "--samples-per-shard", "4")
    assert whole >= 3 and len(prepared) <= 27 - 4 * (whole - 1)


def kill_at_random_moments(source, out, flags, moments, generator):
    """Start the command again and again, killing it with signal 9 each time."""
    command = [sys.executable, "-m", "data_tools.shard", str(source), str(out), "--workers", "2", *flags]
    for _ in range(moments):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while (
            not (out / ".journal" / "job.json").exists()
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)


@pytest.mark.slow
def test_kill_9_at_ten_random_moments(tmp_path):
    source = write_mixed(tmp_path / "src", 3000)
    flags = ["--samples-per-shard", "100", "--val-share", "0.1", "--size", "64"]
    main([str(source), str(tmp_path / "whole"), *flags])
    kill_at_random_moments(source, tmp_path / "out", flags, 10, random.Random(0))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_second_run_does_nothing(tmp_path, capsys):
    source = write_t2i(tmp_path / "src")
    report = run(source, tmp_path / "out")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert run(source, tmp_path / "out") == report
    assert "complete already" in capsys.readouterr().err
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}


def test_a_folder_made_before_options_were_renamed_is_complete(tmp_path, capsys):
    source = write_t2i(tmp_path / "src")
    report = run(source, tmp_path / "out")
    options = report["job"]["options"]
    earlier = {"picture" if name == "image" else name: value for name, value in options.items()}
    write_json(tmp_path / "out" / REPORT_FILE, report | {"job": report["job"] | {"options": earlier}})
    before = contents(tmp_path / "out")
    run(source, tmp_path / "out")
    assert "complete already" in capsys.readouterr().err and contents(tmp_path / "out") == before


def test_other_options_or_data_need_a_word(tmp_path, capsys):
    source = write_t2i(tmp_path / "src")
    run(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    for change in (["--quality", "50"], ["--samples-per-shard", "2"]):
        with pytest.raises(SystemExit) as error:
            run(source, tmp_path / "out", *change)
        assert error.value.code == 2 and "data_tools.shard --overwrite" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
    run(source, tmp_path / "out", "--samples-per-shard", "2", "--overwrite", "True")
    run(source, tmp_path / "fresh", "--samples-per-shard", "2")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "0"], "--size must be 1 to 8192"),
        (["--quality", "101"], "--quality must be 1 to 100, not 101"),
        (["--val-share", "1"], "--val-share must be"),
        (["--image-format", "same", "--resize", "square"], "needs --resize keep"),
        (["--samples-per-shard", "0"], "--samples-per-shard must be at least 1"),
        (["--split", "nope"], "no split 'nope'"),
        (["--encoding", "utf-16"], "utf-16"),
        (["--split-file", "x.tsv", "--val-share", "0.1"], "leave out"),
    ],
)
def test_bad_options_end_in_one_sentence(flags, message, tmp_path, capsys):
    write_t2i(tmp_path / "src")
    with pytest.raises(SystemExit) as error:
        main([str(tmp_path / "src"), str(tmp_path / "out"), *flags])
    shown = " ".join(re.findall(r"[ -~]+", capsys.readouterr().err.replace("\n", " ")))  # without the frame
    assert error.value.code == 2 and message in " ".join(shown.split())


def test_urls_alone_say_to_download(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        run(SOURCES["csv"](tmp_path / "src"), tmp_path / "out")
    message = capsys.readouterr().err
    assert error.value.code == 2 and "none of 5 rows" in message and "data_tools.download" in message
    assert len(dropped(tmp_path / "out")) == 5


def test_texts_without_images_are_left_out(tmp_path, capsys):
    source = write_t2i(tmp_path / "src", 3)
    (source / "T2I_test.text.tsv").write_text("a\t只有文字\n", "utf-8")
    assert run(source, tmp_path / "out")["left_out"] == ["test"]
    with pytest.raises(SystemExit):
        run(source, tmp_path / "test", "--split", "test")
    assert "texts without images" in capsys.readouterr().err


# --- splits ----------------------------------------------------------------------------------------------------


def keys_of(folder, split):
    paths = sorted(Path(folder).glob(f"{split}-*.tar"))
    return [name[:-4] for path in paths for name in tarfile.open(path).getnames() if name.endswith("txt")]


def test_val_share_by_hash_is_stable_when_data_is_added(tmp_path):
    run(write_t2i(tmp_path / "a", 40), tmp_path / "out_a", "--val-share", "0.25")
    run(write_t2i(tmp_path / "b", 60), tmp_path / "out_b", "--val-share", "0.25")
    val_a, val_b = keys_of(tmp_path / "out_a", "val"), keys_of(tmp_path / "out_b", "val")
    known = {key for key, _, _ in rows(40)}
    assert val_a and set(val_a) == {k for k in val_b if k in known}
    shares = {"train": 0.75, "val": 0.25}
    assert all(hash_split(split_unit(key), shares) == "val" for key in val_a)
    assert len(keys_of(tmp_path / "out_b", "train")) + len(val_b) == 60
    dataset = json.loads((tmp_path / "out_b" / "dataset.json").read_text())
    assert dataset["splits"]["val"] == len(val_b)


def test_own_val_split_is_not_mixed_with_a_share(tmp_path, capsys):
    write_t2i(tmp_path / "src", 3)
    write_t2i(tmp_path / "src", 2, "val")
    with pytest.raises(SystemExit):
        run(tmp_path / "src", tmp_path / "out", "--val-share", "0.5")
    assert "own val split" in capsys.readouterr().err
    run(tmp_path / "src", tmp_path / "out")
    assert len(keys_of(tmp_path / "out", "train")) == 3 and len(keys_of(tmp_path / "out", "val")) == 2


def test_groups_and_split_files(tmp_path):
    lines = []
    (tmp_path / "src").mkdir()
    for i in range(24):
        (tmp_path / "src" / f"{i}.jpg").write_bytes(some_image(i))
        lines.append(json.dumps({"file_name": f"{i}.jpg", "text": "裙", "item": i // 2}))
    (tmp_path / "src" / "metadata.jsonl").write_text("\n".join(lines))
    run(tmp_path / "src", tmp_path / "out", "--val-share", "0.5", "--group-by", "item")
    val = {int(key) // 2 for key in keys_of(tmp_path / "out", "val")}
    assert val and not val & {int(key) // 2 for key in keys_of(tmp_path / "out", "train")}
    (tmp_path / "splits.tsv").write_text("".join(f"{i}\t{'test' if i < 3 else 'train'}\n" for i in range(20)))
    report = run(tmp_path / "src", tmp_path / "out2", "--split-file", str(tmp_path / "splits.tsv"))
    assert keys_of(tmp_path / "out2", "test") == ["0", "1", "2"] and report["reasons"] == {
        "not_in_split_file": 4
    }


# --- images --------------------------------------------------------------------------------------------------


def test_resize_and_format_options(tmp_path):
    source = write_t2i(tmp_path / "src", 2)  # 48 x 40
    for flags, size, suffix in [
        (["--resize", "longest", "--image-format", "jpg"], (16, 13), "jpg"),
        (["--resize", "pad", "--image-format", "png"], (16, 16), "png"),
        (["--resize", "keep", "--quality", "30"], (48, 40), "webp"),
    ]:
        out = tmp_path / "-".join(flags)
        run(source, out, *flags)
        record = next(iter(open_source(out)))
        assert record.suffix == suffix and decode(record.image).size == size


def test_same_keeps_sound_bytes_and_rewrites_others(tmp_path):
    source = write_folder(tmp_path / "src", 3)
    (source / "grey.png").write_bytes(some_image(7, suffix="png", mode="L"))
    (source / "grey.txt").write_text("灰")
    run(source, tmp_path / "out", "--resize", "keep", "--image-format", "same")
    records = {r.key: r for r in open_source(tmp_path / "out")}
    assert records["001"].image == some_image(1)
    assert records["grey"].suffix == "png" and records["grey"].image != some_image(7, suffix="png", mode="L")


def test_small_long_and_huge_images_are_dropped_when_asked(tmp_path):
    source = write_folder(tmp_path / "src", 2)
    for name, size in {"small": (20, 20), "long": (200, 40), "huge": (400, 300)}.items():
        (source / f"{name}.jpg").write_bytes(some_image(1, size))
        (source / f"{name}.txt").write_text(name)
    report = run(source, tmp_path / "out", "--min-side", "30", "--max-aspect", "3", "--max-pixels", "100000")
    assert report["reasons"] == {"aspect_ratio": 1, "image_too_small": 1, "too_many_pixels": 1}
    assert run(source, tmp_path / "all")["kept"] == 5


def test_drawings_are_cut_like_their_photos(tmp_path):
    run(write_line_drawing(tmp_path / "src", 3), tmp_path / "out", "--size", "24")
    for record in open_source(tmp_path / "out"):
        assert decode(record.extra["drawing.png"]).size == decode(record.image).size == (24, 24)


def test_shards_of_shards_keep_everything(tmp_path):
    source = write_webdataset(tmp_path / "src", 5)
    run(source, tmp_path / "out", "--resize", "keep", "--image-format", "same")
    before, after = list(open_source(source)), list(open_source(tmp_path / "out"))
    plain = [(r.key, r.image, r.captions, r.meta) for r in before]
    assert plain == [(r.key, r.image, r.captions, r.meta) for r in after]
