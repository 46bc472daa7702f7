"""Where products are: the flood on known masks, PoolNet against a second computation from its weights, ONNX inputs."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from benchmarks.quality.whiten import Options as MeasureOptions
from benchmarks.quality.whiten import measure
from data_tools.images.border import background_light, border_matte
from diffusion.saliency import open_saliency
from diffusion.saliency.onnx import PRESETS, OnnxSaliency, preset_of
from diffusion.saliency.poolnet import MEANS, PoolNet, PoolNetSaliency


def ring_on(background, size=(96, 80), colour=(30, 90, 200)) -> tuple[Image.Image, np.ndarray]:
    """A ring, as of a handle, on a background (H, W, 3), and where it is."""
    image = Image.fromarray(np.broadcast_to(np.uint8(background), (size[1], size[0], 3)).copy())
    mask = Image.new("L", size)
    for canvas, fill, hole in ((image, colour, None), (mask, 255, 0)):
        draw = ImageDraw.Draw(canvas)
        draw.ellipse((20, 12, 76, 68), fill=fill)
        if hole is not None:
            draw.ellipse((36, 28, 60, 52), fill=hole)
    hole = Image.new("L", size)
    ImageDraw.Draw(hole).ellipse((36, 28, 60, 52), fill=255)
    image.paste(
        Image.fromarray(np.broadcast_to(np.uint8(background), (size[1], size[0], 3)).copy()), mask=hole
    )
    return image, np.asarray(mask) > 0


class TestBorder:
    @pytest.mark.parametrize("background", [(255, 255, 255), (180, 180, 184), (20, 20, 20), (90, 160, 90)])
    def test_a_product_with_an_opening_on_a_plain_background(self, background):
        image, true = ring_on(background)
        found = border_matte(image) > 0.5
        assert (found & true).sum() / (found | true).sum() > 0.98

    def test_a_smooth_change_of_light_is_background(self):
        slope = np.linspace(150, 230, 96)[None, :, None] + np.linspace(-15, 15, 80)[:, None, None]
        image, true = ring_on(slope)
        found = border_matte(image)
        assert found[~true].mean() < 0.02
        assert np.abs(background_light(np.asarray(image, np.float32)) - np.floor(slope)).max() < 1.5

    def test_the_metrics_on_synthetic_products(self):
        found = measure(MeasureOptions(num_images=30))
        assert found["all"]["iou"] >= 0.95 and found["all"]["white"] >= 0.995
        assert found["others"]["iou"] >= 0.98 and found["others"]["white"] >= 0.999

    def test_tiny_and_blank_images(self):
        assert border_matte(Image.new("RGB", (5, 40))).min() == 1
        assert border_matte(Image.new("RGB", (40, 40), "white")).max() == 0

    def test_large_images_keep_their_size(self):
        image, true = ring_on((255, 255, 255))
        found = border_matte(image.resize((960, 800)))
        assert found.shape == (800, 960) and found.dtype == np.float32
        large = np.asarray(Image.fromarray(true).resize((960, 800)))
        assert ((found > 0.5) & large).sum() / ((found > 0.5) | large).sum() > 0.95


def test_grabcut_finds_a_product_on_a_textured_background():
    noise = np.random.default_rng(0).integers(140, 220, (80, 96, 1)).repeat(3, 2)
    image, true = ring_on(noise)
    found = open_saliency("grabcut").mask(image) > 0.5
    assert (found & true).sum() / (found | true).sum() > 0.9
    assert np.array_equal(found, open_saliency("grabcut").mask(image) > 0.5)


class SecondPoolNet:
    """The same network written from the paper's wiring over bare tensors, sharing no code with the module."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.w = weights

    def conv(self, name, x, **options):
        weight = self.w[f"{name}.weight"]
        options.setdefault("padding", options.get("dilation", 1) * (weight.shape[2] // 2))
        return F.conv2d(x, weight, self.w.get(f"{name}.bias"), **options)

    def norm(self, name, x):
        mean, var, gain, shift = (
            self.w[f"{name}.{part}"].view(1, -1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * gain + shift

    def block(self, name, x, stride, dilation):
        y = self.norm(f"{name}.bn1", self.conv(f"{name}.conv1", x, stride=stride)).relu()
        y = self.norm(f"{name}.bn2", self.conv(f"{name}.conv2", y, dilation=dilation)).relu()
        y = self.norm(f"{name}.bn3", self.conv(f"{name}.conv3", y))
        if f"{name}.downsample.0.weight" in self.w:
            x = self.norm(f"{name}.downsample.1", self.conv(f"{name}.downsample.0", x, stride=stride))
        return (x + y).relu()

    def __call__(self, image):
        up = lambda x, like: F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)  # noqa: E731
        x = [self.norm("base.resnet.bn1", self.conv("base.resnet.conv1", image, stride=2)).relu()]
        y = F.max_pool2d(x[0], 3, 2, 1, ceil_mode=True)
        for layer, (count, stride, dilation) in enumerate(((3, 1, 1), (4, 2, 1), (6, 2, 1), (3, 1, 2)), 1):
            for i in range(count):
                y = self.block(f"base.resnet.layer{layer}.{i}", y, stride if i == 0 else 1, dilation)
            x.append(y)
        p = self.conv("base.ppms_pre", x[4])
        pooled = [
            up(self.conv(f"base.ppms.{i}.1", F.adaptive_avg_pool2d(p, k)).relu(), p)
            for i, k in enumerate((1, 3, 5))
        ]
        g = self.conv("base.ppm_cat.0", torch.cat([p, *pooled], 1)).relu()
        infos = [self.conv(f"base.infos.{k}.0", up(g, x[3 - k])).relu() for k in range(4)]
        c = [self.conv(f"convert.convert0.{i}.0", x[i]).relu() for i in range(5)]
        h = c[4]
        for k in range(5):
            r = h
            for i, pool in enumerate((2, 4, 8)):
                r = r + up(self.conv(f"deep_pool.{k}.convs.{i}", F.avg_pool2d(h, pool)), h)
            r = r.relu()
            r = up(r, c[3 - k]) if k in (1, 2, 3) else r
            h = self.conv(f"deep_pool.{k}.conv_sum", r)
            h = self.conv(f"deep_pool.{k}.conv_sum_c", h + c[3 - k] + infos[k]) if k < 4 else h
        return up(self.conv("score.score", h), image)


@pytest.fixture(scope="module")
def poolnet() -> PoolNet:
    torch.manual_seed(0)
    model = PoolNet()
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_mean", "bn1.bias")):
            tensor.normal_(std=0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    return model.eval()


class TestPoolNet:
    def test_the_published_names_and_numbers(self, poolnet):
        state = poolnet.state_dict()
        assert len(state) == 358 and sum(p.numel() for p in poolnet.parameters()) == 68_261_057
        for name in (
            "base.ppms.2.1.weight",
            "base.infos.3.0.weight",
            "deep_pool.3.conv_sum_c.weight",
            "score.score.bias",
        ):
            assert name in state
        assert "deep_pool.4.conv_sum_c.weight" not in state

    def test_against_a_second_computation(self, poolnet):
        image = torch.randn(1, 3, 130, 146, generator=torch.Generator().manual_seed(1)) * 60
        with torch.no_grad():
            found, expected = poolnet(image), SecondPoolNet(poolnet.state_dict())(image)
        assert found.shape == (1, 1, 130, 146)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))

    def test_its_input_is_bgr_levels_minus_means(self, poolnet, monkeypatch):
        seen = {}
        monkeypatch.setattr(poolnet, "forward", lambda x: seen.setdefault("x", x)[:, :1] * 0)
        matte = PoolNetSaliency(poolnet).mask(Image.new("RGB", (150, 140), (10, 20, 30)))
        assert matte.shape == (140, 150) and np.allclose(matte, 0.5)
        expected = torch.tensor([30 - MEANS[0], 20 - MEANS[1], 10 - MEANS[2]])
        torch.testing.assert_close(seen["x"][0, :, 7, 9], expected)

    def test_a_file_of_weights(self, poolnet, tmp_path):
        old = {n: t for n, t in poolnet.state_dict().items() if not n.endswith("num_batches_tracked")}
        torch.save(old, tmp_path / "final.pth")
        found = open_saliency("poolnet", tmp_path / "final.pth").model.state_dict()
        assert all(torch.equal(found[n], t) for n, t in old.items())

    @pytest.mark.parametrize("spoil", ["lacks", "has the unknown", "has another shape of", "no torch file"])
    def test_a_file_of_another_architecture(self, poolnet, tmp_path, spoil):
        tensors = {n: t for n, t in poolnet.state_dict().items() if t.numel() < 10_000}
        if spoil != "lacks":
            tensors = dict(poolnet.state_dict())
        if spoil == "has the unknown":
            tensors["edge.weight"] = torch.zeros(1)
        if spoil == "has another shape of":
            tensors["score.score.bias"] = torch.zeros(2)
        torch.save(tensors, tmp_path / "other.pth")
        if spoil == "no torch file":
            (tmp_path / "other.pth").write_bytes(b"not at all")
        with pytest.raises(ValueError, match=spoil):
            open_saliency("poolnet", tmp_path / "other.pth")


class Session:
    """Gives the first channel of its input back, with the interface of onnxruntime's session."""

    def __init__(self, shape):
        self.shape, self.inputs = shape, []

    def get_inputs(self):
        return [type("Input", (), {"shape": self.shape, "name": "img"})()]

    def run(self, _, feed):
        self.inputs.append(feed["img"])
        return [feed["img"][:, :1], None]


class TestOnnx:
    @pytest.mark.parametrize("name", list(PRESETS))
    def test_input_and_output_of_each_preset(self, name):
        pixels = np.zeros((64, 48, 3), np.uint8)
        pixels[10:40, 15:45] = 128
        session = Session([1, 3, 64, 48])
        matte = OnnxSaliency(session, PRESETS[name]).mask(Image.fromarray(pixels))
        x = session.inputs[0]
        assert x.shape == (1, 3, 64, 48) and x.dtype == np.float32 and matte.shape == (64, 48)
        white = {"u2net": (1 - 0.485) / 0.229, "isnet": 0.5, "birefnet": (128 / 255 - 0.485) / 0.229}[name]
        assert abs(x[0, 0, 32, 24] - white) < 1e-4  # the brightest pixel
        if PRESETS[name].gives_logits:
            assert abs(matte[25, 30] - 1 / (1 + np.exp(-white))) < 1e-3
        else:  # stretched to [0, 1]
            assert matte[25, 30] > 0.99 and matte[1, 1] < 0.02

    def test_a_matte_has_the_images_size(self):
        saliency = OnnxSaliency(Session([1, 3, 16, 24]), PRESETS["u2net"])
        assert saliency.size == (24, 16) and saliency.mask(Image.new("RGB", (60, 50))).shape == (50, 60)

    def test_an_open_size_takes_the_presets(self):
        assert OnnxSaliency(Session(["b", 3, "h", "w"]), PRESETS["u2net"]).size == (320, 320)

    def test_another_network_is_refused(self):
        with pytest.raises(ValueError, match="not images"):
            OnnxSaliency(Session([1, 77]), PRESETS["u2net"])
        saliency = OnnxSaliency(Session([1, 3, 8, 8]), PRESETS["u2net"])
        saliency.session.run = lambda *_: [np.zeros((1, 1000))[..., None, None]]
        with pytest.raises(ValueError, match="not one mask"):
            saliency.mask(Image.new("RGB", (8, 8)))

    def test_the_preset_by_the_files_name(self):
        assert preset_of(Path("isnet-general-use.onnx"), "auto") is PRESETS["isnet"]
        assert preset_of(Path("u2net_cloth_seg.onnx"), "auto") is PRESETS["u2net"]
        with pytest.raises(ValueError, match="--onnx-preset"):
            preset_of(Path("model.onnx"), "auto")

    def test_without_the_optional_package(self, tmp_path, monkeypatch):
        import sys

        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        (tmp_path / "u2net.onnx").write_bytes(b"")
        with pytest.raises(ValueError, match="pip install onnxruntime"):
            open_saliency("onnx", tmp_path / "u2net.onnx")


def test_weights_belong_to_networks_alone():
    with pytest.raises(ValueError, match="has no weights"):
        open_saliency("border", Path("final.pth"))
    with pytest.raises(ValueError, match="needs a file of weights"):
        open_saliency("poolnet")
    with pytest.raises(FileNotFoundError):
        open_saliency("poolnet", Path("nowhere.pth"))
