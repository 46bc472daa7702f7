"""Our checkpoints and published layouts, each against an independent computation."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_goods import draw
from torch.nn import functional as F
from transformers import BertTokenizer

from common.checkpoint import read_config, read_weights, save_weights, write_model
from common.text.bert_text import TextTowerConfig, write_text_tower
from rankers import load_ranker
from rankers.chinese_clip import load_folder
from rankers.model import IMAGE_TOWERS, KIND, RESNETS, TOWERS, ModelConfig, RankerModel

TEXT = "红色的杯子"


def test_score_equals_the_bare_open_clip_model(ranker_dir):
    ranker = load_ranker(ranker_dir, precision="fp32")
    images = [draw("杯子", "红色", i, 32) for i in range(3)]
    model = ranker.towers.model.clip
    pixels = torch.stack(
        [
            torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1)
            for i in images
        ]
    )
    with torch.no_grad():
        image = F.normalize(model.encode_image(pixels / 127.5 - 1), dim=1)
        ids = BertTokenizer.from_pretrained(str(ranker_dir / TOWERS))(TEXT, return_tensors="pt")["input_ids"]
        text = F.normalize(model.encode_text(ids), dim=1)
    torch.testing.assert_close(ranker.score(TEXT, images), (image @ text.T)[:, 0], atol=1e-5, rtol=0)


def test_every_small_tower_takes_images(tmp_path):
    write_text_tower(tmp_path, [TEXT], TextTowerConfig(32, 1, 2, 16), None)
    for name in RESNETS:
        model = RankerModel(ModelConfig(image_tower=name, embed_dim=8, image_size=64), tmp_path).eval()
        features = model.encode_image(torch.zeros(2, 3, 64, 64))
        assert features.shape == (2, 8)
        assert model.encode_image(torch.zeros(1, 3, 96, 96)).shape == (1, 8), "any side"
    assert {"vit-s-16", "resnet-50"} <= set(IMAGE_TOWERS)
    model = RankerModel(ModelConfig(image_tower="vit-ti-16", embed_dim=8, image_size=32), tmp_path)
    assert model.encode_image(torch.zeros(1, 3, 32, 32)).shape == (1, 8)


def test_the_goods_ranker_fits_ten_mebibytes_in_16_bits():
    from pathlib import Path

    from common.config import from_mapping, read_mapping
    from rankers.train import Options

    config = Path(__file__).parents[2] / "configs/goods_128/ranker.yaml"
    options = from_mapping(Options, read_mapping(config), where="ranker.yaml")
    with torch.device("meta"):
        import timm

        from rankers.model import _register_towers

        _register_towers()
        tower = timm.create_model(IMAGE_TOWERS[options.model.image_tower]["timm_model_name"], num_classes=0)
    text = options.model.text
    pieces = 700  # the goods captions use fewer
    weights = sum(p.numel() for p in tower.parameters())
    weights += 12 * text.width**2 * text.layers + (pieces + text.max_text_len) * text.width
    weights += options.model.embed_dim * (tower.num_features + text.width)
    assert weights * 2 < 10 * 2**20


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "kind", "towers", "file"])
def test_a_checkpoint_that_does_not_fit_is_refused(ranker_dir, tmp_path, damage):
    directory = tmp_path / "r"
    shutil.copytree(ranker_dir, directory)
    weights = read_weights(directory)
    config = json.loads((directory / "config.json").read_text())
    if damage == "missing":
        del weights["clip.logit_scale"]
    elif damage == "extra":
        weights["more"] = torch.zeros(1)
    elif damage == "shape":
        weights["clip.logit_scale"] = torch.zeros(3)
    elif damage == "kind":
        config["kind"] = "generator"
    elif damage == "towers":
        shutil.rmtree(directory / "towers")
    elif damage == "file":
        (directory / "model.safetensors").unlink()
    if damage not in ("file",):
        save_weights(directory / "model.safetensors", weights)
    (directory / "config.json").write_text(json.dumps(config))
    words = {
        "missing": "lacks clip.logit_scale",
        "extra": "unknown more",
        "shape": "has shape",
        "kind": "of kind 'generator', not 'ranker'",
        "towers": "not whole",
        "file": "no model.safetensors",
    }[damage]
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_ranker(directory)


def test_half_precision_weights_load(ranker_dir, tmp_path):
    directory = tmp_path / "half"
    shutil.copytree(ranker_dir, directory)
    weights = {n: t.half() if t.is_floating_point() else t for n, t in read_weights(directory).items()}
    write_model(directory, KIND, read_config(directory, KIND)["model"], weights, 0)
    images = [draw("鞋子", "蓝色", i) for i in range(4)]
    full, half = (load_ranker(d, precision="fp32").score(TEXT, images) for d in (ranker_dir, directory))
    torch.testing.assert_close(full, half, atol=5e-3, rtol=0)


# --- Chinese-CLIP ----------------------------------------------------------------------------------------------------


def test_chinese_clip_equals_transformers(chinese_clip):
    from transformers import BertTokenizer, ChineseCLIPImageProcessor, ChineseCLIPModel

    images = [draw("杯子", "红色", 1, 50).resize((50, 38)), draw("鞋子", "蓝色", 2, 70)]
    model = ChineseCLIPModel.from_pretrained(str(chinese_clip)).eval()
    pixels = ChineseCLIPImageProcessor.from_pretrained(str(chinese_clip))(images=images, return_tensors="pt")
    ids = BertTokenizer(vocab=str(chinese_clip / "vocab.txt"))(TEXT, return_tensors="pt")
    with torch.no_grad():
        output = model(**ids, pixel_values=pixels["pixel_values"])
    expected = output.logits_per_text[0] / model.logit_scale.exp()
    for name in (str(chinese_clip), f"chinese_clip:{chinese_clip}"):
        scores = load_ranker(name, precision="fp32").score(TEXT, images)
        torch.testing.assert_close(scores, expected, atol=2e-4, rtol=0)


def test_chinese_clip_folders_that_are_not_whole(chinese_clip, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_ranker(f"chinese_clip:{tmp_path}")
    for missing, words in (("model.safetensors", "neither"), ("preprocessor_config.json", "preprocessor")):
        folder = tmp_path / missing
        shutil.copytree(chinese_clip, folder)
        (folder / missing).unlink()
        with pytest.raises(FileNotFoundError, match=words):
            load_folder(folder)
    folder = tmp_path / "cropped"
    shutil.copytree(chinese_clip, folder)
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config | {"do_center_crop": True}))
    with pytest.raises(ValueError, match="do_center_crop"):
        load_folder(folder)


@pytest.fixture(scope="module")
def five(chinese_clip, tmp_path_factory):
    """As transformers 5 saves model and processor, the weights in several files."""
    from transformers import ChineseCLIPModel

    folder = tmp_path_factory.mktemp("five")
    ChineseCLIPModel.from_pretrained(str(chinese_clip)).save_pretrained(str(folder), max_shard_size="20KB")
    images = json.loads((chinese_clip / "preprocessor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": images}))
    shutil.copyfile(chinese_clip / "vocab.txt", folder / "vocab.txt")
    assert (folder / "model.safetensors.index.json").is_file() and len(list(folder.glob("model-*"))) > 2
    return folder


def test_chinese_clip_of_transformers_5(chinese_clip, five):
    images = [draw("杯子", "红色", 1, 50), draw("鞋子", "蓝色", 2, 70)]
    one, other = (load_ranker(str(f), precision="fp32").score(TEXT, images) for f in (chinese_clip, five))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("shard gone", "which is not in"),
        ("shard cut", "is no safetensors file"),
        ("pointer", "Git LFS pointer"),
        ("nan", "not finite"),
        ("empty index", "lists no weights"),
        ("no image processor", "says nothing of an image_processor"),
        ("no size", "does not say size"),
    ],
)
def test_chinese_clip_shards_that_are_not_whole(five, tmp_path, damage, words):
    folder = tmp_path / "f"
    shutil.copytree(five, folder)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    if damage == "shard gone":
        shard.unlink()
    elif damage == "shard cut":
        shard.write_bytes(shard.read_bytes()[:-8])
    elif damage == "pointer":
        shard.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif damage == "nan":
        weights = load_file(shard)
        next(iter(weights.values())).view(-1)[0] = float("nan")
        save_weights(shard, weights)
    elif damage == "empty index":
        (folder / "model.safetensors.index.json").write_text("{}")
    elif damage == "no image processor":
        (folder / "processor_config.json").write_text("{}")
    else:
        (folder / "processor_config.json").write_text('{"image_processor": {"do_center_crop": false}}')
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_folder(folder)


def test_chinese_clip_under_wrapped_names(chinese_clip, tmp_path):
    folder = tmp_path / "wrapped"
    shutil.copytree(chinese_clip, folder)
    weights = load_file(folder / "model.safetensors")
    save_weights(folder / "model.safetensors", {f"module._orig_mod.{n}": t for n, t in weights.items()})
    images = [draw("杯子", "红色", 1, 50)]
    one, other = (load_ranker(str(f), precision="fp32").score(TEXT, images) for f in (chinese_clip, folder))
    assert torch.equal(one, other)


def test_published_weights_that_are_not_here_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="OFA-Sys/chinese-clip-vit-base-patch16") as caught:
        load_ranker("OFA-Sys/chinese-clip-vit-huge-patch99")
    assert "hub" in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no weights file"):
        load_ranker(f"clip:RN50@{tmp_path}/none.safetensors")
    with pytest.raises(ValueError, match="knows no model"):
        load_ranker("clip:RN5000/openai")
    with pytest.raises(ValueError, match="has the tags"):
        load_ranker("clip:xlm-roberta-base-ViT-B-32/none")


def test_a_published_open_clip_layout_from_a_local_file(tmp_path):
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-for-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(5)
    model, _, transform = open_clip.create_model_and_transforms("tiny-for-test", pretrained=None)
    save_weights(tmp_path / "w.safetensors", model.state_dict())
    images = [draw("杯子", "红色", 1, 60), draw("鞋子", "蓝色", 2, 40)]
    with torch.no_grad():
        image = model.eval().encode_image(torch.stack([transform(i) for i in images]), normalize=True)
        text = model.encode_text(open_clip.get_tokenizer("tiny-for-test")(["a red cup"]), normalize=True)
    ranker = load_ranker(f"clip:tiny-for-test@{tmp_path}/w.safetensors", precision="fp32")
    torch.testing.assert_close(ranker.score("a red cup", images), (image @ text.T)[:, 0], atol=1e-5, rtol=0)
    assert isinstance(images[0], Image.Image)
    wrapped = {f"module._orig_mod.{n}": t for n, t in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, tmp_path / "wrapped.pt")
    other = load_ranker(f"clip:tiny-for-test@{tmp_path}/wrapped.pt", precision="fp32")
    assert torch.equal(other.score("a red cup", images), ranker.score("a red cup", images))
    whole = (tmp_path / "wrapped.pt").read_bytes()
    nan = {n: torch.full_like(t, float("nan")) for n, t in model.state_dict().items()}
    torch.save(nan, tmp_path / "nan.pt")
    torch.save({"visual.conv1.weight": torch.zeros(2, 2)}, tmp_path / "foreign.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, data in (("junk", bytes(range(1, 250))), ("empty", b""), ("cut", whole[: len(whole) // 2])):
        (tmp_path / f"{name}.pt").write_bytes(data)
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><html></html>")
    for name in ("junk", "empty", "cut", "page", "foreign", "other", "list", "nan"):
        with pytest.raises((ValueError, FileNotFoundError), match=rf"{name}\.pt"):
            load_ranker(f"clip:tiny-for-test@{tmp_path}/{name}.pt")
