"""rerank.py on what generate.py writes, with a real tiny generator and a real tiny ranker, both untrained."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import rerank
from common.checkpoint import write_model
from common.config import to_mapping
from common.outputs.label import open_labelled, read_labels
from common.outputs.record import OutputDirectory
from common.text.bert_text import TextTowerConfig, write_text_tower
from dalle.model import Dalle, ModelOptions
from dalle.text_tokenizer import TextTokenizer
from rankers import load_ranker
from rankers.calibration import Calibration, NegativeWords, quantiles
from rankers.model import ModelConfig, RankerModel, save_ranker
from vq.autoencoder import FastConfig
from vq.model import ImageTokenizer, TokenizerConfig

TEXTS = ["一个红色的杯子", "一双蓝色的鞋子", "一顶绿色的帽子"]


@pytest.fixture(scope="module")
def generator_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("generator")
    torch.manual_seed(0)
    fast = FastConfig(channels=(32, 32), encoder_blocks=(1, 1), decoder_blocks=(1, 1), attention=False)
    (directory / "image_tokenizer").mkdir()
    tokenizer = ImageTokenizer(TokenizerConfig(image_size=32, fast=fast, codebook_size=16))
    tokenizer.write(directory / "image_tokenizer", 0)
    text = TextTokenizer.train(TEXTS * 20, vocab_size=60, model_type="char")
    text.save(directory)
    sizes = ModelOptions(dim=32, num_layers=1, num_heads=2, text_embed_dim=16)
    config = sizes.config(text.vocab_size, text.pad_id, 16, 16, tokenizer.grid_size)
    write_model(directory, "generator", to_mapping(config), Dalle(config).state_dict(), 0)
    return directory


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, generator_dir) -> Path:
    """Six images of one text."""
    out = tmp_path_factory.mktemp("drawn")
    generate.main([TEXTS[0], "6", str(out), "--checkpoint", str(generator_dir), "--device", "cpu"])
    return out


@pytest.fixture(scope="module")
def ranker_dir(tmp_path_factory, drawn) -> Path:
    """Random weights, with a calibration whose median is the median score of the images of `drawn`."""
    folder = tmp_path_factory.mktemp("ranker")
    write_text_tower(folder / "t", TEXTS, TextTowerConfig(32, 1, 2, 16), None)
    torch.manual_seed(1)
    config = ModelConfig(image_tower="resnet-xs", embed_dim=16, image_size=32, max_text_len=16)
    model = RankerModel(config, folder / "t")
    directory = folder / "checkpoint"
    directory.mkdir()
    save_ranker(directory, config, model.state_dict(), folder / "t", 0)
    images = [Image.open(drawn / f"{i:04d}.png") for i in range(6)]
    scores = load_ranker(directory).score(TEXTS[0], images).numpy()
    spread = np.linspace(scores.min() - 0.01, scores.max() + 0.01, 101)
    lexicon = NegativeWords(("红色", "蓝色", "绿色"), ("杯子", "鞋子", "帽子"))
    table = quantiles(spread)
    calibration = Calibration(str(directory), "test", 6, table, quantiles(spread - 0.1), (), lexicon)
    calibration.save(directory / "calibration.json")
    return directory


@pytest.fixture
def out(drawn, tmp_path) -> Path:
    shutil.copytree(drawn, tmp_path / "out")
    return tmp_path / "out"


def rank(out: Path, ranker: Path | str, *more: str) -> dict:
    rerank.main([str(out), "--ranker", str(ranker), *more])
    return json.loads((out / "ranking.json").read_text("utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_the_best_come_first_with_what_their_scores_mean(out, ranker_dir, capsys):
    ranking = rank(out, ranker_dir)
    (entry,) = ranking["texts"]
    rows = entry["pictures"]
    images = [Image.open(out / f"{i:04d}.png") for i in range(6)]
    scores = load_ranker(ranker_dir).score(TEXTS[0], images)
    assert [row["file"] for row in rows] == [f"{int(i):04d}.png" for i in scores.argsort(descending=True)]
    assert [row["score"] for row in rows] == pytest.approx(sorted(scores.tolist(), reverse=True), abs=1e-5)
    assert entry["text"] == TEXTS[0] and ranking["calibration"]["num_pictures"] == 6
    for row in rows:
        assert 0 < row["percentile"] < 100 and row["mismatched_percentile"] >= row["percentile"]
        assert row["hard_negative"] != TEXTS[0] and row["passed"]
    wrong = load_ranker(ranker_dir).score_matrix([rows[0]["hard_negative"]], images)[0]
    best = int(rows[0]["file"][:4])
    assert rows[0]["margin"] == pytest.approx(float(scores[best] - wrong[best]), abs=1e-5)
    for i in range(4):
        assert (out / f"rank{i:02d}.png").read_bytes() == (out / rows[i]["file"]).read_bytes()
    assert not (out / "rank04.png").exists()
    assert Image.open(out / "ranked.png").size == (6 * 130 - 2, 144)
    assert rows[0]["file"] in capsys.readouterr().out


def test_twice_gives_the_same_and_fewer_leaves_nothing_behind(out, ranker_dir):
    rank(out, ranker_dir)
    before = contents(out)
    rank(out, ranker_dir)
    assert contents(out) == before
    rank(out, ranker_dir, "--top-k", "1")
    assert sorted(p.name for p in out.glob("rank[0-9]*")) == ["rank00.png"]
    rank(out, ranker_dir)
    assert contents(out) == before


def test_several_texts_are_ranked_apart(tmp_path, generator_dir, ranker_dir, drawn):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS[:2]) + "\n", "utf-8")
    out = tmp_path / "out"
    generate.main(["", "3", str(out), "--prompts-file", str(prompts), "--checkpoint", str(generator_dir)])
    ranking = rank(out, ranker_dir, "--top-k", "2")
    assert [entry["text"] for entry in ranking["texts"]] == TEXTS[:2]
    assert [len(entry["pictures"]) for entry in ranking["texts"]] == [3, 3]
    names = [f"rank{i:02d}_text{t:02d}.png" for i in range(2) for t in range(2)]
    assert sorted(p.name for p in out.glob("rank[0-9]*")) == names
    assert Image.open(out / "ranked.png").size == (8 * 130 - 2, 2 * 146 - 2)
    generate.main([TEXTS[0], "2", str(out), "--checkpoint", str(generator_dir)])
    assert not list(out.glob("rank*"))


def test_what_real_images_would_not_pass_is_not_kept(out, ranker_dir, capsys):
    rows = rank(out, ranker_dir)["texts"][0]["pictures"]
    middle = (rows[2]["percentile"] + rows[3]["percentile"]) / 2
    ranking = rank(out, ranker_dir, "--min-percentile", str(middle))
    assert [row["passed"] for row in ranking["texts"][0]["pictures"]] == [True] * 3 + [False] * 3
    assert len(list(out.glob("rank[0-9]*"))) == 3
    rank(out, ranker_dir, "--min-percentile", "100")
    assert not list(out.glob("rank[0-9]*")) and (out / "ranked.png").is_file()
    assert "none of the 6 images passes" in capsys.readouterr().out


def test_it_draws_on_until_enough_pass(out, ranker_dir, generator_dir, tmp_path):
    rows = rank(out, ranker_dir)["texts"][0]["pictures"]
    middle = str((rows[1]["percentile"] + rows[2]["percentile"]) / 2)
    more = ["--min-percentile", middle, "--until", "3", "--checkpoint", str(generator_dir), "--budget", "60"]
    ranking = rank(out, ranker_dir, *more)
    count = len(ranking["texts"][0]["pictures"])
    straight = tmp_path / "straight"
    generate.main([TEXTS[0], "60", str(straight), "--checkpoint", str(generator_dir)])
    scored = sorted(rank(straight, ranker_dir)["texts"][0]["pictures"], key=lambda row: row["file"])
    passing = np.cumsum([row["percentile"] >= float(middle) for row in scored])
    assert count == next((n for n in (14, 22, 30, 38, 46, 54) if passing[n - 1] >= 3), 60)
    assert sum(row["passed"] for row in ranking["texts"][0]["pictures"]) == passing[count - 1]
    for i in range(count):
        name = f"{i:04d}.png"
        assert (out / name).read_bytes() == (straight / name).read_bytes(), "as if drawn at once"
    before = contents(out)
    rank(out, ranker_dir, *more)
    assert contents(out) == before


def test_the_budget_ends_the_drawing(out, ranker_dir, generator_dir, capsys):
    more = ["--min-percentile", "100", "--until", "9", "--budget", "9", "--checkpoint", str(generator_dir)]
    ranking = rank(out, ranker_dir, *more)
    images = ranking["texts"][0]["pictures"]
    passing = sum(row["passed"] for row in images)
    highest = Calibration.load(ranker_dir / "calibration.json").matched[-1]
    assert len(images) == 9 and passing == sum(row["score"] >= highest for row in images) < 9
    assert f"{passing} of 9 pass after 9 images, the budget" in capsys.readouterr().out


def test_the_generators_own_scores_rank_too(out):
    lines = [json.loads(line) for line in (out / "images.jsonl").read_text("utf-8").splitlines()]
    gains = {line["file"]: line["log_likelihood"] - line["null_log_likelihood"] for line in lines}
    rows = rank(out, f"likelihood:{out}")["texts"][0]["pictures"]
    assert [row["file"] for row in rows] == sorted(gains, key=gains.get, reverse=True)
    assert rows[0]["percentile"] is None and rows[0]["margin"] is None and rows[0]["passed"]


def damage(out: Path, what: str) -> None:
    lines = (out / "images.jsonl").read_text("utf-8").splitlines()
    if what == "no list":
        (out / "images.jsonl").unlink()
    elif what == "empty list":
        (out / "images.jsonl").write_text("")
    elif what == "bad line":
        (out / "images.jsonl").write_text("\n".join([*lines, "{"]), "utf-8")
    elif what == "no text":
        (out / "images.jsonl").write_text(json.dumps({"file": "0000.png"}))
    elif what == "elsewhere":
        (out / "images.jsonl").write_text(json.dumps({"file": "../0000.png", "text": "x"}))
    elif what == "gone":
        (out / "0003.png").unlink()
    elif what == "cut":
        (out / "0003.png").write_bytes((out / "0003.png").read_bytes()[:100])
    else:
        raise ValueError(what)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no list", "no images.jsonl"),
        ("empty list", "lists no images"),
        ("bad line", "images.jsonl:7 is not valid JSON"),
        ("no text", "images.jsonl:1 has no text"),
        ("elsewhere", "no plain file name"),
        ("gone", "names 0003.png, which is not in"),
        ("cut", "0003.png is no readable image"),
    ],
)
def test_damaged_out_directories_are_one_sentence(out, ranker_dir, what, words, capsys):
    damage(out, what)
    before = contents(out)
    with pytest.raises(SystemExit) as caught:
        rank(out, ranker_dir)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and words in error and error.count("\n") == 1
    assert contents(out) == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--ranker", "none"], "no checkpoint directory none"),
        (["--ranker", "GENERATOR"], "of kind 'generator', not 'ranker'"),
        (["--top-k", "0"], "top_k"),
        (["--min-percentile", "101"], "min_percentile"),
        (["--until", "3"], "--min-percentile"),
        (["--rankr", "x"], "Unrecognized"),
        (["--ranker", "likelihood:OUT", "--min-percentile", "5"], "no calibration"),
        (["--min-percentile", "99", "--until", "99", "--checkpoint", "none"], "no checkpoint directory none"),
    ],
)
def test_bad_flags_end_with_code_2(out, ranker_dir, generator_dir, more, words, capsys):
    more = [m.replace("GENERATOR", str(generator_dir)).replace("OUT", str(out)) for m in more]
    more = more if "--ranker" in more else ["--ranker", str(ranker_dir), *more]
    before = contents(out)
    with pytest.raises(SystemExit) as caught:
        rerank.main([str(out), *more])
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert caught.value.code == 2 and words in error
    assert contents(out) == before


@pytest.mark.parametrize("name", ["ranking.json", "ranked.png", "rank00.png", "rank03.png"])
def test_the_users_files_are_refused(out, ranker_dir, name, capsys):
    (out / name).write_bytes(b"mine")
    before = contents(out)
    with pytest.raises(SystemExit) as caught:
        rank(out, ranker_dir)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and f"holds {name}, not written here" in error
    assert contents(out) == before


def test_other_names_of_the_users_stay(out, ranker_dir):
    rank(out, ranker_dir)
    mine = ("rank1_backup.png", "rank04.png", "rank00_text00.png", "rank0.png", "ranking.json.bak")
    for name in mine:
        (out / name).write_bytes(b"mine")
    rank(out, ranker_dir, "--top-k", "2")
    assert all((out / name).read_bytes() == b"mine" for name in mine)


def test_drawing_on_never_replaces_the_users_files(out, ranker_dir, generator_dir, capsys):
    (out / "0007.png").write_bytes(b"mine")
    before = contents(out)
    more = ["--min-percentile", "100", "--until", "9", "--budget", "9", "--checkpoint", str(generator_dir)]
    with pytest.raises(SystemExit):
        rank(out, ranker_dir, *more)
    assert "holds 0007.png" in capsys.readouterr().err and contents(out) == before


def test_not_while_another_command_writes_there(out, ranker_dir, capsys):
    with OutputDirectory(out), pytest.raises(SystemExit) as caught:
        rank(out, ranker_dir)
    assert caught.value.code == 2 and "another command is writing to" in capsys.readouterr().err


def test_an_out_directory_that_is_a_file(tmp_path, ranker_dir, capsys):
    (tmp_path / "out").write_text("")
    with pytest.raises(SystemExit) as caught:
        rank(tmp_path / "out", ranker_dir)
    assert caught.value.code == 2 and "images.jsonl" in capsys.readouterr().err


def test_labels_are_kept(generator_dir, ranker_dir, tmp_path):
    flags = ("--checkpoint", str(generator_dir), "--device", "cpu", "--label", "implicit")
    out = generate.main([TEXTS[0], "3", str(tmp_path / "out"), *flags])
    until = ("--min-percentile", "99.9", "--until", "3", "--budget", "4", "--checkpoint", str(generator_dir))
    rank(out, ranker_dir, *until, "--device", "cpu")
    for name in ("rank00.png", "ranked.png", "0003.png"):  # the last one was made by --until
        if (out / name).exists() or name != "rank00.png":
            with open_labelled(out / name) as image:
                assert read_labels(image), name
    rank(out, ranker_dir)
    with open_labelled(out / "rank00.png") as image:
        assert read_labels(image)


def test_until_does_not_go_on_from_whitened_images(generator_dir, ranker_dir, tmp_path, capsys):
    flags = ("--checkpoint", str(generator_dir), "--device", "cpu", "--whiten")
    out = generate.main([TEXTS[0], "2", str(tmp_path / "out"), *flags])
    with pytest.raises(SystemExit) as stop:
        rank(out, ranker_dir, "--min-percentile", "99.9", "--until", "3")
    assert stop.value.code == 2 and "put on white" in capsys.readouterr().err


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS])
def test_generate_with_rank_writes_what_both_commands_write(
    tmp_path, drawn, generator_dir, ranker_dir, texts, monkeypatch
):
    """To the byte, the record of what was written included; the clock stands, for images.jsonl holds seconds."""
    monkeypatch.setattr("dalle.pipeline.time.perf_counter", lambda: 0.0)
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    several = ["--prompts-file", str(tmp_path / "texts.txt")] if len(texts) > 1 else []
    found = []
    for name, more in (("two", []), ("one", ["--rank", "--ranker", str(ranker_dir)])):
        out = tmp_path / name
        text = "" if several else texts[0]
        given = [text, "3", str(out), *several, "--checkpoint", str(generator_dir), "--device", "cpu"]
        generate.main([*given, *more])
        if not more:
            rerank.main([str(out), "--ranker", str(ranker_dir), "--device", "cpu"])
        found.append(contents(out))
    assert found[0] == found[1] and "ranked.png" in found[0]


def test_rank_refuses_before_it_generates(tmp_path, generator_dir, ranker_dir, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "ranked.png").write_bytes(b"mine")
    given = [TEXTS[0], "2", str(out), "--checkpoint", str(generator_dir), "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        generate.main([*given, "--rank", "--ranker", str(ranker_dir)])
    assert stop.value.code == 2 and "ranked.png" in capsys.readouterr().err
    assert contents(out) == {"ranked.png": b"mine"}
    for name, flags in (
        ("no-such-ranker", ["--rank", "--ranker", "no-such-ranker"]),
        ("needs --rank", ["--ranker", "x"]),
    ):
        with pytest.raises(SystemExit) as stop:
            generate.main([*given[:2], str(tmp_path / "other"), *given[3:], *flags])
        assert stop.value.code == 2 and name in capsys.readouterr().err
