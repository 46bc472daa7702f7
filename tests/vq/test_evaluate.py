import numpy as np
import pytest
import torch
from PIL import Image

from common.files import read_json
from vq.evaluate import levels, main
from vq.losses.perceptual import FeatureConfig, PerceptualDistance
from vq.losses.reconstruction import psnr
from vq.model import ImageTokenizer


@pytest.fixture
def checkpoint(small_model, tmp_path):
    (tmp_path / "model").mkdir()
    small_model.write(tmp_path / "model", 0)
    return tmp_path / "model"


@pytest.fixture
def network(tmp_path):
    torch.manual_seed(0)
    (tmp_path / "network").mkdir()
    PerceptualDistance(FeatureConfig(channels=(16, 16), trained_on="label")).write(tmp_path / "network", 0)
    return tmp_path / "network"


def test_metrics_and_page_worst_first(checkpoint, network, shards, tmp_path):
    flags = [
        "--out",
        str(tmp_path / "out"),
        "--perceptual",
        str(network),
        "--batch-size",
        "3",
        "--device",
        "cpu",
    ]
    metrics = main([str(checkpoint), str(shards), *flags, "--show", "5", "--precision", "fp32"])
    assert metrics["pictures"] == 8
    assert metrics["perceptual_kind"].startswith("own features (label-trained")
    assert 0 < metrics["usage"] <= 1 and metrics["encode_per_second"] > 0 and metrics["decode_per_second"] > 0
    stored = read_json(tmp_path / "out" / "figures.json")
    assert stored["psnr"] == metrics["psnr"] and len(stored["codes_sha256"]) == 64

    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<figure>") == 5 and page.count("data:image/webp;base64,") == 10
    assert "http" not in page  # one file, nothing fetched
    values = [
        float(part.split("<")[0].split()[0]) for part in page.split("perceptual ")[1:] if part[0].isdigit()
    ]
    assert len(values) == 5 and values == sorted(values, reverse=True)


def test_psnr_is_that_of_the_8_bit_images(checkpoint, shards, tmp_path, small_model):
    from data_tools.shards.index import ShardIndex
    from data_tools.shards.loader import DecodeImage, eval_batches

    flags = ["--out", str(tmp_path / "out"), "--perceptual", "none", "--device", "cpu", "--precision", "fp32"]
    metrics = main([str(checkpoint), str(shards), *flags])
    images = next(eval_batches(ShardIndex.open(shards, "val"), DecodeImage(16, first_caption=True), 8))[
        "image"
    ]
    decoded = ImageTokenizer.from_pretrained(checkpoint).decode_ids(small_model.encode_ids(images))
    a, b = (np.asarray(levels(t), np.float64) for t in (images, decoded))
    expected = np.mean([10 * np.log10(255**2 / ((x - y) ** 2).mean()) for x, y in zip(a, b, strict=True)])
    assert metrics["psnr"] == pytest.approx(expected, abs=2e-3)
    assert metrics["perceptual"] is None and metrics["perceptual_kind"] == "not measured"


def test_a_missing_perceptual_network_is_said(checkpoint, shards, tmp_path, monkeypatch, capsys, no_imagenet):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    main([str(checkpoint), str(shards), "--out", "out", "--device", "cpu", "--limit", "3"])
    assert "the perceptual metric is left out" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(checkpoint), str(shards), "--out", "out", "--device", "cpu", "--perceptual", "lpips"])
    assert "no LPIPS weights" in capsys.readouterr().err


def test_other_sizes_and_plain_folders(checkpoint, tmp_path, make_sample):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(make_sample(i)["png"])
    flags = ["--out", str(tmp_path / "out"), "--perceptual", "none", "--device", "cpu", "--folder", "True"]
    metrics = main([str(checkpoint), str(tmp_path), *flags, "--image-size", "24", "--split", "train"])
    assert metrics["pictures"] == 3
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<figure>") == 3


def test_psnr_over_a_mask_by_hand():
    images = torch.zeros(1, 3, 4, 4)
    reconstruction = images.clone()
    reconstruction[..., 0, 0] = 0.5
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 0, :2] = 1
    assert psnr(reconstruction, images, mask).item() == pytest.approx(10 * np.log10(4 / (0.25 / 2)), abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/x/y", "{data}"], "no checkpoint directory"),
        (["{model}", "/nowhere"], "no data folder"),
        (["{model}", "{data}", "--split", "test"], "no test-*.tar"),
        (["{model}", "{data}", "--image-size", "17"], "multiples of 4"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, message, checkpoint, shards, tmp_path, capsys):
    filled = [a.format(model=checkpoint, data=shards) for a in arguments]
    with pytest.raises(SystemExit) as stop:
        main([*filled, "--out", str(tmp_path / "out"), "--perceptual", "none", "--device", "cpu"])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_white_stays_white_in_eight_bits():
    white = Image.new("RGB", (2, 2), "white")
    from common.image import to_image, to_tensor

    assert to_image(to_tensor(white)).getpixel((0, 0)) == (255, 255, 255)
    assert levels(torch.tensor([-1.0, 0.0, 1.0, 3.0])).tolist() == [0, 128, 255, 255]
