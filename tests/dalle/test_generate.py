import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_checkpoint import CAPTIONS

from common.checkpoint import resolve
from common.outputs.label import open_labelled, read_labels, read_manifest
from common.outputs.record import OutputDirectory
from dalle import default_checkpoint
from data_tools.images.decode import open_file as open_image
from generate import main, open_mask
from serve.label import main as label_command

ROOT = Path(__file__).parent.parent.parent


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "images.jsonl").read_text("utf-8").splitlines()]


def some_images(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("0*.png"))}


def run(generator_dir, out, *arguments: str) -> Path:
    text, count = CAPTIONS[0], "3"
    if arguments and not arguments[0].startswith("-"):
        text, count, *arguments = arguments
    return main([text, count, str(out), "--checkpoint", str(generator_dir), "--device", "cpu", *arguments])


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([*CAPTIONS, "", "qwz"]) + "\n", encoding="utf-8")
    return path


def test_writes_the_out_directory(generator_dir, tmp_path):
    out = run(generator_dir, tmp_path / "out", "--seed", "5", "--cfg-scale", "2.5", "--top-k", "12")
    assert sorted(p.name for p in out.iterdir()) == [
        ".written.jsonl",
        "0000.png",
        "0001.png",
        "0002.png",
        "grid.png",
        "images.jsonl",
    ]
    first = lines(out)[0]
    assert first["file"] == "0000.png" and first["text"] == CAPTIONS[0] and first["seed"] == 5
    assert first["sampling"]["cfg_scale"] == 2.5 and first["sampling"]["top_k"] == 12
    assert first["checkpoint"] == json.loads((generator_dir / "config.json").read_text())["sha256"]
    assert first["log_likelihood"] < 0 and first["null_log_likelihood"] < 0 and first["seconds"] > 0
    with Image.open(out / "0000.png") as image, Image.open(out / "grid.png") as grid:
        assert image.size == (40, 40) and image.mode == "RGB" and grid.size == (82, 82)


def test_the_same_seed_gives_the_same_bytes_in_any_batch(generator_dir, tmp_path):
    first = run(generator_dir, tmp_path / "a", "--batch-size", "8")
    second = run(generator_dir, tmp_path / "b", "--batch-size", "2")
    other = run(generator_dir, tmp_path / "c", "--seed", "1")
    assert some_images(first) == some_images(second) != some_images(other)
    assert (first / "grid.png").read_bytes() == (second / "grid.png").read_bytes()


@pytest.mark.slow
def test_the_released_generator_gives_the_same_bytes_in_any_batch(tmp_path):
    """Also on two threads, as a user's machine has them."""
    before, found = torch.get_num_threads(), []
    try:
        for threads, batch in ((1, 8), (2, 3), (2, 1), (2, 5)):
            torch.set_num_threads(threads)
            out = tmp_path / f"{threads}_{batch}"
            arguments = [
                "\u4e00\u4ef6\u7ea2\u8272\u7684T\u6064",
                "8",
                str(out),
                "--seed",
                "3",
                "--batch-size",
                str(batch),
            ]
            main(
                [*arguments, "--checkpoint", str(ROOT / "pretrained/goods-128/generator"), "--device", "cpu"]
            )
            found.append(some_images(out))
    finally:
        torch.set_num_threads(before)
    assert len(found[0]) == 8 and all(one == found[0] for one in found)


def test_the_default_generator_is_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_checkpoint() == ROOT / "pretrained/goods-128/generator"
    assert resolve("pretrained/goods-128/generator") == ROOT / "pretrained/goods-128/generator"


def test_fewer_images_leave_none_of_the_earlier_run(generator_dir, tmp_path):
    run(generator_dir, tmp_path / "out")
    with OutputDirectory(tmp_path / "out") as files:
        files.write_json("ranking.json", {})
    (tmp_path / "out" / "mine.png").write_bytes(b"not ours")
    out = run(generator_dir, tmp_path / "out", CAPTIONS[1], "2")
    assert sorted(p.name for p in out.iterdir()) == [
        ".written.jsonl",
        "0000.png",
        "0001.png",
        "grid.png",
        "images.jsonl",
        "mine.png",
    ]
    assert [line["text"] for line in lines(out)] == [CAPTIONS[1]] * 2


@pytest.mark.parametrize("name", ["0000.png", "0002.png", "grid.png", "images.jsonl"])
def test_the_users_files_are_refused_before_anything_is_made(name, generator_dir, tmp_path, capsys):
    out = tmp_path / "mine"
    out.mkdir()
    for mine in (name, "rank1_backup.png", "ranked.png"):
        (out / mine).write_bytes(b"mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        run(generator_dir, out)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert f"{out} holds {name}, not written here or changed since" in error
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_one_writer_at_a_time(generator_dir, tmp_path, capsys):
    with OutputDirectory(tmp_path / "out"), pytest.raises(SystemExit) as stopped:
        run(generator_dir, tmp_path / "out")
    assert stopped.value.code == 2 and "another command is writing to" in capsys.readouterr().err
    assert len(some_images(run(generator_dir, tmp_path / "out"))) == 3


@pytest.mark.slow
def test_two_at_once_in_one_directory(generator_dir, tmp_path):
    """One does all, the other says why not and ends with 2; the list and the images belong together."""
    commands = []
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("\n".join(CAPTIONS * 8), encoding="utf-8")
        commands.append([sys.executable, "generate.py", "", "2", str(tmp_path / "out"), "--device", "cpu"])
        commands[-1] += ["--prompts-file", str(tmp_path / f"{name}.txt"), "--checkpoint", str(generator_dir)]
    running = [subprocess.Popen(c, cwd=ROOT, stderr=subprocess.PIPE, text=True) for c in commands]
    said = [process.communicate()[1] for process in running]
    codes = [process.returncode for process in running]
    assert sorted(codes) == [0, 2]
    assert "another command is writing to" in said[codes.index(2)] and "Traceback" not in "".join(said)
    assert len(lines(tmp_path / "out")) == len(some_images(tmp_path / "out")) == 80


def test_a_file_of_prompts(generator_dir, tmp_path, prompts, capsys):
    out = run(generator_dir, tmp_path / "out", "", "2", "--prompts-file", str(prompts), "--batch-size", "3")
    assert [(x["text"], x["index"]) for x in lines(out)] == [(t, i) for t in CAPTIONS for i in range(2)]
    assert "skipped 1 of the texts" in capsys.readouterr().out
    single = run(generator_dir, tmp_path / "single", CAPTIONS[3], "2")
    assert some_images(single)["0001.png"] == some_images(out)["0007.png"]


def test_a_file_of_prompts_goes_on_where_it_was(generator_dir, tmp_path, prompts):
    arguments = ("", "2", "--prompts-file", str(prompts))
    whole = run(generator_dir, tmp_path / "whole", *arguments)
    expected = some_images(whole)
    listed = (whole / "images.jsonl").read_bytes().splitlines(keepends=True)
    part = tmp_path / "part"
    part.mkdir()
    for name in list(expected)[:6]:
        (part / name).write_bytes(expected[name])
    (part / "images.jsonl").write_bytes(b"".join(listed[:5]) + listed[5][:40])  # killed while writing line 6
    before = {name: (part / name).stat().st_mtime_ns for name in list(expected)[:5]}
    run(generator_dir, part, *arguments)
    assert some_images(part) == expected and len(lines(part)) == 10
    assert before == {name: (part / name).stat().st_mtime_ns for name in before}


def test_other_options_start_anew(generator_dir, tmp_path, prompts):
    out = run(generator_dir, tmp_path / "out", "", "1", "--prompts-file", str(prompts))
    before = some_images(out)
    run(generator_dir, out, "", "1", "--prompts-file", str(prompts), "--seed", "3")
    assert not set(before.values()) & set(some_images(out).values()) and len(lines(out)) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed", "-1"), "seed must be 0 or more"),
        (("--negative", "红色", "--cfg-scale", "1"), "works through guidance"),
        (("--prompts-file", "UNKNOWN"), "no text that can be generated"),
        (("--prime", "UNKNOWN"), "no readable image"),
    ],
)
def test_a_command_that_fails_leaves_the_earlier_images(
    arguments, message, generator_dir, tmp_path, prompts, capsys
):
    out = run(generator_dir, tmp_path / "out", "", "1", "--prompts-file", str(prompts))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "unknown.txt").write_text("qwz\n")
    given = [str(tmp_path / "unknown.txt") if a == "UNKNOWN" else a for a in arguments]
    with pytest.raises(SystemExit):
        run(generator_dir, out, "", "1", "--prompts-file", str(prompts), *given)
    assert message in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_what_gives_way_is_counted(generator_dir, tmp_path, prompts, capsys):
    out = run(generator_dir, tmp_path / "out", "", "1", "--prompts-file", str(prompts))
    run(
        generator_dir, out, "", "1", "--prompts-file", str(prompts), "--fast.engine", "plain"
    )  # an earlier name
    assert f"5 images in {out} were generated otherwise and give way" in capsys.readouterr().out
    assert {line["engine"] for line in lines(out)} == {"torch"}


def test_fewer_prompts_leave_none_of_the_others(generator_dir, tmp_path, prompts):
    out = run(generator_dir, tmp_path / "out", "", "1", "--prompts-file", str(prompts))
    prompts.write_text("\n".join(CAPTIONS[:2]), encoding="utf-8")
    run(generator_dir, out, "", "1", "--prompts-file", str(prompts))
    assert [line["text"] for line in lines(out)] == CAPTIONS[:2] and len(some_images(out)) == 2


def test_a_negative_text_and_a_schedule_change_the_images(generator_dir, tmp_path):
    plain = run(generator_dir, tmp_path / "plain")
    negative = run(generator_dir, tmp_path / "negative", "--negative", CAPTIONS[1])
    rising = run(generator_dir, tmp_path / "rising", "--cfg-schedule", "cosine")
    drawn = [some_images(out) for out in (plain, negative, rising)]
    assert len({tuple(p.values()) for p in drawn}) == 3
    assert (
        lines(negative)[0]["null_log_likelihood"] is None
        and lines(rising)[0]["sampling"]["cfg_schedule"] == "cosine"
    )


@pytest.mark.slow
def test_kill_9_loses_nothing_and_the_same_command_goes_on(generator_dir, tmp_path):
    prompts = tmp_path / "many.txt"
    prompts.write_text("\n".join(CAPTIONS * 20), encoding="utf-8")
    command = [
        sys.executable,
        "generate.py",
        "",
        "1",
        str(tmp_path / "out"),
        "--checkpoint",
        str(generator_dir),
    ]
    command += ["--prompts-file", str(prompts), "--batch-size", "2", "--device", "cpu"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    listed = tmp_path / "out" / "images.jsonl"
    while not listed.is_file() or len(listed.read_bytes().splitlines()) < 7:
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(lines(tmp_path / "out")) < 100
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "going on behind them" in again.stdout
    whole = run(generator_dir, tmp_path / "whole", "", "1", "--prompts-file", str(prompts))
    assert some_images(tmp_path / "out") == some_images(whole)


def test_starting_from_a_image(generator_dir, tmp_path):
    source = run(generator_dir, tmp_path / "source")
    mask = tmp_path / "mask.png"
    Image.new("L", (40, 40), 255).save(mask)
    image = str(source / "0000.png")
    for arguments in (
        ("--prime", image, "--keep-rows", "6"),
        ("--inpaint", image, "--mask", str(mask)),
        ("--vary", image, "--strength", "0.2"),
    ):
        out = run(generator_dir, tmp_path / arguments[0].strip("-"), *arguments)
        assert lines(out)[0]["source"][arguments[0].strip("-")] == image
        assert len(some_images(out)) == 3


def test_images_are_read_as_those_of_a_catalogue(tmp_path):
    """What is transparent lies on white, 16 bits are scaled, a camera's turn is undone."""
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    clear.paste((200, 0, 0, 255), (0, 0, 20, 40))
    clear.save(tmp_path / "clear.png")
    read = open_image(tmp_path / "clear.png")
    assert read.getpixel((5, 5)) == (200, 0, 0) and read.getpixel((35, 5)) == (255, 255, 255)
    assert open_image(tmp_path / "clear.png", background="black").getpixel((35, 5)) == (0, 0, 0)
    Image.fromarray(np.full((4, 4), 0x4080, np.uint16)).save(tmp_path / "deep.png")
    assert open_image(tmp_path / "deep.png").getpixel((0, 0)) == (64, 64, 64)
    turned, exif = Image.new("RGB", (40, 20)), Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (20, 40)


def test_a_mask_of_another_shape_is_refused(tmp_path):
    image = Image.new("RGB", (40, 40))
    Image.new("L", (80, 80), 255).save(tmp_path / "larger.png")
    assert open_mask(tmp_path / "larger.png", image).size == (80, 80)
    Image.new("L", (80, 40), 255).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match="80 x 40, the image 40 x 40: both must have the same shape"):
        open_mask(tmp_path / "wide.png", image)


def test_another_image_under_the_same_name_starts_anew(generator_dir, tmp_path, prompts):
    source = tmp_path / "source.png"
    arguments = ("", "1", "--prompts-file", str(prompts), "--prime", str(source))
    Image.new("RGB", (40, 40), "red").save(source)
    before = some_images(run(generator_dir, tmp_path / "out", *arguments))
    Image.new("RGB", (40, 40), "blue").save(source)
    after = some_images(run(generator_dir, tmp_path / "out", *arguments))
    assert len(after) == len(before) == 5 and not set(before.values()) & set(after.values())


BAD = [
    (["", "3", "OUT"], "is empty"),
    (["   ", "3", "OUT"], "is empty"),
    (["qwz", "3", "OUT"], "only characters"),
    (["鞋", "0", "OUT"], "num_images must be at least 1, not 0"),
    (["鞋", "-1", "OUT"], "num_images must be at least 1, not -1"),
    (["鞋", "two", "OUT"], "two"),
    (["鞋", "3", "FILE/out"], "cannot write to the directory"),
    (["鞋", "3", "OUT", "--cfgscale", "3"], "--cfgscale"),
    (["鞋", "3", "OUT", "--cfg-scale", "-3"], "cfg_scale"),
    (["鞋", "3", "OUT", "--batch-size", "0"], "batch_size"),
    (["鞋", "3", "OUT", "--seed", "-4"], "seed"),
    (["鞋", "3", "OUT", "--device", "gpu"], "gpu"),
    (["鞋", "3", "OUT", "--prime", "nowhere.png"], "no image nowhere.png"),
    (["鞋", "3", "OUT", "--prime", "FILE"], "no readable image"),
    (["鞋", "3", "OUT", "--keep-rows", "3"], "--keep-rows needs --prime"),
    (["鞋", "3", "OUT", "--strength", "0.5"], "--strength needs --vary"),
    (["鞋", "3", "OUT", "--inpaint", "a.png"], "--inpaint needs --mask"),
    (["鞋", "3", "OUT", "--prime", "a.png", "--vary", "b.png"], "choose one of"),
    (["鞋", "3", "OUT", "--prompts-file", "FILE"], "not both"),
    (["", "3", "OUT", "--prompts-file", "nowhere.txt"], "no prompts file"),
    (["", "3", "OUT", "--prompts-file", "FILE"], "no text that can be generated"),
    (["鞋", "3", "OUT", "--checkpoint", "nowhere"], "no checkpoint directory nowhere"),
    (["鞋", "3", "OUT", "--checkpoint", "TOKENIZER"], "kind 'image_tokenizer', not 'generator'"),
    (["鞋", "3", "OUT", "--fast.engine", "cuda_graph"], "GPU"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_ends_in_one_sentence_and_code_2(arguments, message, generator_dir, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("qwz\n")
    tokenizer = generator_dir / "image_tokenizer"
    names = {"OUT": tmp_path / "out", "FILE/out": file / "out", "FILE": file, "TOKENIZER": tokenizer}
    filled = [str(names.get(a, a)) for a in arguments]
    if "--checkpoint" not in filled:
        filled += ["--checkpoint", str(generator_dir)]
    with pytest.raises(SystemExit) as stopped:
        main([*filled, "--device", "cpu"] if "--device" not in filled else filled)
    captured = capsys.readouterr().err
    assert stopped.value.code == 2 and message in captured
    assert (
        captured.splitlines()[-1].startswith("error: ")  # above it, at most a progress bar
        and captured.count("error: ") == 1
        and not list((tmp_path / "out").glob("*.png"))
    )


def test_a_long_prompt_is_cut_with_a_note(generator_dir, tmp_path, capsys):
    out = run(generator_dir, tmp_path / "out", "红色的鞋" * 2500, "1")
    assert "note: the text" in capsys.readouterr().out and len(some_images(out)) == 1


def test_labels(generator_dir, tmp_path):
    out = run(generator_dir, tmp_path / "out", "--label", "implicit", "--label-producer", "店")
    plain = run(generator_dir, tmp_path / "plain")
    with open_labelled(out / "0001.png") as image, Image.open(plain / "0001.png") as bare:
        assert read_labels(image)[0].label.ContentProducer == "店" and read_labels(bare) == []
        manifest = read_manifest(image)
        assert image.tobytes() == bare.tobytes()
    checkpoint = json.loads((generator_dir / "config.json").read_text())["sha256"]
    assert (manifest["model"], manifest["text"], manifest["index"]) == (checkpoint, CAPTIONS[0], 1)
    assert label_command(["check", str(out / "0000.png"), str(out / "grid.png")]) is None
    with pytest.raises(SystemExit) as stop:
        run(generator_dir, tmp_path / "x", "--label", "visible")
    assert stop.value.code == 2
