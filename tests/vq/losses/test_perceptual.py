import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vq.losses.imagenet_features import TRAINING_NETWORK, imagenet_weights, load_imagenet_features
from vq.losses.perceptual import (
    VGG_WIDTHS,
    FeatureConfig,
    FeatureNet,
    PerceptualDistance,
    load_perceptual,
    lpips_from_files,
)
from vq.train_perceptual import main


def test_fused_network_is_the_trained_one_in_eval_mode():
    torch.manual_seed(0)
    net = FeatureNet((32, 32), norm=True)
    for _ in range(3):
        net(torch.randn(4, 3, 16, 16))  # moves the running statistics
    images = torch.randn(2, 3, 16, 16)
    for own, fused in zip(net.eval()(images), net.fused()(images), strict=True):
        torch.testing.assert_close(own, fused, atol=1e-5, rtol=1e-4)


def test_distance_is_zero_on_itself_symmetric_and_grows_with_the_damage():
    torch.manual_seed(0)
    distance = PerceptualDistance(FeatureConfig(channels=(32, 32)))
    images, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 3, 16, 16)
    assert distance(images, images).abs().max() < 1e-12
    little, much = distance(images, images + 0.05 * noise), distance(images, images + 0.5 * noise)
    assert torch.all(little > 0) and torch.all(little < much)
    torch.testing.assert_close(distance(images, noise), distance(noise, images))
    assert torch.allclose(distance(images, noise)[1], distance(images[1:], noise[1:]), atol=1e-6)


def test_flat_background_is_not_blown_up_by_the_normalisation():
    torch.manual_seed(0)
    distance = PerceptualDistance(FeatureConfig(channels=(32, 32)))
    for stage in distance.net.stages:
        nn.init.zeros_(stage[0].bias)
        nn.init.zeros_(stage[3].bias)
    flat = torch.zeros(1, 3, 16, 16)
    speck = 1e-3 * torch.randn(1, 3, 16, 16)
    loud = distance(flat, speck).item()
    distance.set_floor_(torch.randn(4, 3, 16, 16))
    assert distance(flat, speck).item() < 1e-3 * loud


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory):
    """Random weights in the layouts of torchvision, of lpips and of a taming checkpoint."""
    from torchvision.models import vgg16

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lpips")
    network = {f"features.{n}": t for n, t in vgg16(weights=None).features.state_dict().items()}
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(VGG_WIDTHS)}
    torch.save(network | {"classifier.0.weight": torch.zeros(2, 2)}, folder / "vgg16.pth")
    torch.save(linear, folder / "vgg.pth")
    slices = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}
    prefix = "loss.perceptual_loss."
    taming = {f"{prefix}{n}": t for n, t in linear.items()}
    for name, tensor in network.items():
        number, leaf = name.split(".")[1:]
        taming[f"{prefix}net.slice{slices[int(number)]}.{number}.{leaf}"] = tensor
    torch.save({"state_dict": taming, "global_step": 3}, folder / "last.ckpt")
    return folder, network, linear


def test_lpips_equals_an_independent_computation_and_reads_from_a_taming_checkpoint(lpips_files):
    folder, network, linear = lpips_files
    model = lpips_from_files(folder / "vgg16.pth", folder / "vgg.pth")
    torch.manual_seed(1)
    images, others = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1

    def taps(x):
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x = (x - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1)
        found, number = [], 0
        for block, convolutions in enumerate((2, 2, 3, 3, 3)):
            if block:
                x, number = F.max_pool2d(x, 2), number + 1
            for _ in range(convolutions):
                name = f"features.{number}"
                x = F.relu(F.conv2d(x, network[f"{name}.weight"], network[f"{name}.bias"], padding=1))
                number += 2
            found.append(x)
        return found

    expected = 0.0
    for i, (a, b) in enumerate(zip(taps(images), taps(others), strict=True)):
        unit_a, unit_b = (t / (t.square().sum(1, keepdim=True).sqrt() + 1e-10) for t in (a, b))
        expected = expected + (linear[f"lin{i}.model.1.weight"] * (unit_a - unit_b) ** 2).sum(1).mean((1, 2))
    torch.testing.assert_close(model(images, others), expected, rtol=1e-3, atol=1e-5)
    assert model.name.startswith("LPIPS")

    same = load_perceptual(str(folder / "last.ckpt"))
    torch.testing.assert_close(same(images, others), model(images, others))


def test_lpips_gradient_reaches_the_image(lpips_files):
    folder, _, _ = lpips_files
    model = lpips_from_files(folder / "vgg16.pth", folder / "vgg.pth")
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    model(images, torch.rand(1, 3, 32, 32)).sum().backward()
    assert images.grad.abs().sum() > 0


def test_distance_of_imagenet_features_against_an_independent_computation(tmp_path, monkeypatch):
    try:
        imagenet_weights(TRAINING_NETWORK)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # no LPIPS there
    monkeypatch.chdir(tmp_path)
    distance = load_perceptual("auto")
    assert distance.name.startswith("EfficientNet-Lite0")
    torch.manual_seed(0)
    images, targets = torch.rand(2, 3, 48, 48, requires_grad=True), torch.rand(2, 3, 48, 48)
    network = load_imagenet_features(TRAINING_NETWORK)
    expected = torch.zeros(2)
    for a, b in zip(network(images), network(targets), strict=True):
        difference = F.normalize(a, dim=1) - F.normalize(b, dim=1)
        expected += difference.square().sum(1).mean((1, 2)) / 8
    found = distance(images, targets)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    (gradient,) = torch.autograd.grad(found.sum(), images)
    (wanted,) = torch.autograd.grad(expected.sum(), images)
    torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-3)
    assert distance(targets, targets).abs().max() < 1e-6


def test_a_missing_network_is_said_never_replaced(tmp_path, monkeypatch, lpips_files, no_imagenet):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"vq\.train_perceptual"):
        load_perceptual("auto")
    with pytest.raises(FileNotFoundError, match="no LPIPS weights"):
        load_perceptual("lpips")
    with pytest.raises(ValueError, match="holds no LPIPS network"):
        load_perceptual(str(lpips_files[0] / "vgg.pth"))


@pytest.mark.parametrize("target", ["label", "caption"])
def test_train_perceptual_learns_names_itself_and_is_found_by_auto(
    tmp_path, monkeypatch, shards, target, capsys, no_imagenet
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(shards), "--target", target, "--image-size", "16", "--channels", "16", "16"]
    flags += [
        "--loop.num-steps",
        "3",
        "--loop.global-batch-size",
        "8",
        "--num-workers",
        "0",
        "--device",
        "cpu",
    ]
    metrics = main(flags)
    assert 0 <= metrics["accuracy"] <= 1
    model = load_perceptual("auto")
    assert f"{target}-trained" in model.name
    assert model(torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)).shape == (1,)
    assert not any(p.requires_grad for p in model.parameters())


def test_train_perceptual_refuses_shards_that_teach_nothing(tmp_path, capsys, make_tar, make_sample):
    for start, split in ((0, "train"), (4, "val")):
        images = [{"png": make_sample(i)["png"]} for i in range(start, start + 4)]
        make_tar(tmp_path / f"{split}-00000.tar", images)
    with pytest.raises(SystemExit) as stop:
        main(["--data", str(tmp_path), "--loop.run-dir", str(tmp_path / "run"), "--device", "cpu"])
    assert stop.value.code == 2
    assert "neither labels nor captions" in capsys.readouterr().err
