"""The embedded default: pure, varied, truthful captions, whole shards."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.synthetic import shards as synthetic
from data_tools.synthetic.rendering import _placement
from data_tools.synthetic.shapes import SHAPES
from data_tools.synthetic.shards import (
    BACKGROUNDS,
    COLOR_RGB,
    COLORS,
    KINDS,
    PATTERNS,
    VAL_START,
    render_goods,
    render_sample,
)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers()}


def draw(dst: Path, **options) -> Path:
    return synthetic.ensure_synthetic(
        dst, **({"num_train": 40, "num_val": 6, "image_size": 32, "num_workers": 1} | options)
    )


def test_a_sample_depends_on_seed_and_index_alone():
    first = [render_sample(3, i) for i in range(12)]
    again = [render_sample(3, i) for i in reversed(range(12))][::-1]
    for a, b in zip(first, again, strict=True):
        assert a.image.tobytes() == b.image.tobytes()
        assert (a.caption, a.kind, a.color, a.pattern, a.background) == (
            b.caption,
            b.kind,
            b.color,
            b.pattern,
            b.background,
        )
    assert (
        len({s.image.tobytes() for s in first} | {render_sample(4, i).image.tobytes() for i in range(12)})
        == 24
    )


@pytest.mark.parametrize("index", range(6))
def test_the_scene_is_the_same_at_every_size(index):
    small, large = render_sample(0, index, 64), render_sample(0, index, 128)
    assert small.caption == large.caption and large.image.size == (128, 128)
    assert np.abs(pixels(small.image) - pixels(large.image.reduce(2))).mean() < 4.0


@pytest.mark.parametrize("kind", KINDS)
def test_goods_stay_in_the_frame(kind):
    for seed in range(30):
        rng = np.random.default_rng(seed)
        goods = SHAPES[kind](rng)
        look = synthetic._look(rng, "red", "plain", "white", goods.standing)
        matrix, shift = _placement(goods, look)
        points = np.concatenate([m.points for m in goods.marks]) @ matrix + shift
        assert np.abs(points).max() < 1.0
        assert np.ptp(points, axis=0).max() > 1.1, "the goods fill more than half of the frame"


@pytest.mark.parametrize("color", COLORS)
def test_the_named_colour_is_the_commonest_on_the_goods(color):
    others = np.array([COLOR_RGB[c] for c in COLORS], dtype=np.float64)
    for kind in KINDS:
        drawn = [render_goods(np.random.default_rng(seed), kind, color, "plain", "grey") for seed in range(3)]
        image = np.concatenate([pixels(picture) for picture in drawn])
        near = np.linalg.norm(image[:, :, None] - others, axis=3)
        hits = np.bincount(near.argmin(axis=2)[near.min(axis=2) < 45], minlength=len(others))
        assert list(COLORS)[hits.argmax()] == color, kind


@pytest.mark.parametrize("kind", KINDS)
def test_white_goods_show_on_white_background(kind):
    image = pixels(render_goods(np.random.default_rng(1), kind, "white", "plain", "white"))
    assert (image.mean(axis=2) < 225).mean() > 0.03


@pytest.mark.parametrize("pattern", ["striped", "dotted"])
def test_a_pattern_covers_less_than_half_of_the_goods(pattern):
    for kind in ("tshirt", "dress", "cup"):
        plain, patterned = (
            pixels(render_goods(np.random.default_rng(2), kind, "blue", p, "wood"))
            for p in ("plain", pattern)
        )
        goods = plain[..., 2] - plain[..., 0] > 60
        accent = goods & (np.abs(plain - patterned).max(axis=2) > 60)
        assert 0.12 < accent.sum() / goods.sum() < 0.5, kind


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'sofa' is none of tshirt"):
        render_goods(np.random.default_rng(0), "sofa", "red", "plain", "white")


def test_captions_are_true_and_varied():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(3000):
        kind, color = (str(rng.choice(list(t))) for t in (KINDS, COLORS))
        pattern, background = (str(rng.choice(list(t))) for t in (PATTERNS, BACKGROUNDS))
        caption = synthetic.write_caption(rng, kind, color, pattern, background)
        rest = caption
        for word in BACKGROUNDS[background]:
            rest = rest.replace(word, "")
        assert not any(word in rest for g in BACKGROUNDS for word in BACKGROUNDS[g])
        assert COLORS[color] in rest
        assert not any(zh in rest for c, zh in COLORS.items() if c != color)
        assert any(noun in rest for noun in KINDS[kind].nouns)
        assert not any(word in rest for p in PATTERNS if p != pattern for word in PATTERNS[p])
        assert 2 <= len(caption) <= 20
        seen.add(caption)
    assert len(seen) > 1200


def test_all_kinds_and_colours_occur_about_equally():
    samples = [render_sample(0, i, 16) for i in range(1000)]
    assert len({(s.kind, s.color) for s in samples}) == 100
    for key, table in (("kind", KINDS), ("color", COLORS)):
        counts = [sum(getattr(s, key) == name for s in samples) for name in table]
        assert min(counts) > 60 and max(counts) < 145


def test_prompts_are_one_a_kind_and_colour():
    prompts = {synthetic.prompt(k, c) for k in KINDS for c in COLORS}
    assert len(prompts) == 100 and "一件红色的连衣裙" in prompts


def test_shards_hold_the_samples(tmp_path):
    dst = draw(tmp_path / "data")
    assert json.loads((dst / "dataset.json").read_text())["splits"] == {"train": 40, "val": 6}
    train, val = members(dst / "train-00000.tar"), members(dst / "val-00000.tar")
    assert len(train) == 3 * 40 and len(val) == 3 * 6
    for shard, key, index in ((train, "0000000007", 7), (val, f"{VAL_START + 2:010d}", VAL_START + 2)):
        sample = render_sample(0, index, 32)
        meta = json.loads(shard[f"{key}.json"])
        assert shard[f"{key}.txt"].decode() == sample.caption
        assert {k: meta[k] for k in ("kind", "color", "pattern", "ground", "label")} == {
            "kind": sample.kind,
            "color": sample.color,
            "pattern": sample.pattern,
            "ground": sample.background,
            "label": sample.kind,
        }
        stored = Image.open(io.BytesIO(shard[f"{key}.webp"]))
        assert stored.format == "WEBP" and stored.size == (32, 32)
        assert np.abs(pixels(stored.convert("RGB")) - pixels(sample.image)).mean() < 6.0


def test_the_number_of_workers_changes_no_byte(tmp_path):
    one, two = draw(tmp_path / "one"), draw(tmp_path / "two", num_workers=2)
    for name in ("train-00000.tar", "val-00000.tar", "dataset.json", "synthetic.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_what_is_whole_is_reused_and_what_is_missing_is_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(synthetic, "SAMPLES_PER_SHARD", 15)
    dst = draw(tmp_path / "data")
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in dst.iterdir()}
    draw(dst)
    assert "reused" in capsys.readouterr().out
    assert before == {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in dst.iterdir()}
    (dst / "train-00001.tar").unlink()
    (dst / "dataset.json").unlink()
    draw(dst)
    assert {n: b for n, (b, _) in before.items()} == {p.name: p.read_bytes() for p in dst.iterdir()}
    assert (dst / "train-00000.tar").stat().st_mtime_ns == before["train-00000.tar"][1]


def test_a_killed_run_goes_on_and_leaves_no_worker(tmp_path):
    dst = tmp_path / "data"
    arguments = [
        str(dst),
        "--num-train",
        "2400",
        "--num-val",
        "10",
        "--image-size",
        "32",
        "--num-workers",
        "2",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(
        [sys.executable, "-m", "data_tools.synthetic", *arguments], env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (dst / "train-00000.tar").is_file():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    # beside them Python's tracker of semaphores, which ends by itself
    workers = [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = (dst / "train-00000.tar").stat().st_mtime_ns
    assert not (dst / "dataset.json").exists()
    synthetic.main(arguments)
    assert (dst / "train-00000.tar").stat().st_mtime_ns == whole
    keys = [
        n.removesuffix(".txt")
        for s in range(3)
        for n in members(dst / f"train-{s:05d}.tar")
        if n.endswith(".txt")
    ]
    assert keys == [f"{i:010d}" for i in range(2400)]
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)


def test_of_two_processes_one_draws(tmp_path):
    def start(name: str) -> subprocess.Popen:
        arguments = [
            "-m",
            "data_tools.synthetic",
            str(tmp_path / name),
            "--num-train",
            "300",
            "--num-val",
            "5",
        ]
        arguments += ["--image-size", "32", "--num-workers", "1"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
        return subprocess.Popen(
            [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, text=True
        )

    runs = [start("both"), start("both"), start("alone")]
    outputs = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert "".join(outputs[:2]).count("drawing") == 1
    for name in ("train-00000.tar", "val-00000.tar", "dataset.json"):
        assert (tmp_path / "both" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.parametrize("change", [{"seed": 1}, {"image_size": 48}, {"num_train": 41}])
def test_another_recipe_is_refused_and_nothing_lost(tmp_path, change):
    dst = draw(tmp_path / "data")
    before = (dst / "train-00000.tar").read_bytes()
    with pytest.raises(ValueError, match=f"{next(iter(change))} .* instead of .*name another folder"):
        draw(dst, **change)
    assert (dst / "train-00000.tar").read_bytes() == before


def test_a_folder_of_other_shards_is_refused(tmp_path):
    (tmp_path / "train-00000.tar").write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds other shards"):
        draw(tmp_path)
    assert (tmp_path / "train-00000.tar").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num-train", "0"], "num_train must be at least 1"),
        (["--image-size", "8"], "image_size must be 16 to 1024"),
        (["--seed", "-1"], "seed and num_workers"),
        (["--num-trian", "9"], "--num-trian"),
    ],
)
def test_bad_flags_end_with_code_2(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        synthetic.main([str(tmp_path / "data"), *flags])
    assert stop.value.code == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "data").exists()


def test_a_file_in_place_of_the_folder_ends_with_code_2(tmp_path, capsys):
    (tmp_path / "data").write_text("notes")
    with pytest.raises(SystemExit) as stop:
        synthetic.main([str(tmp_path / "data")])
    assert stop.value.code == 2 and "is a file" in capsys.readouterr().err


def test_what_one_command_renders_is_in_no_other_ones_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for side in (16, 64, 16):
        folder = synthetic.embedded_default(side)
        synthetic.ensure_synthetic(folder, image_size=side, num_train=2, num_val=1)
    made = {
        p.name: json.loads((p / "synthetic.json").read_text())["image_size"] for p in Path("data").iterdir()
    }
    assert made == {"synthetic": 64, "synthetic_16": 16}
