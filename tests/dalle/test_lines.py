"""Line control: where features enter, that without a drawing nothing changes, and that every engine agrees."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_generator import CODES, GRID, TEXT_LEN, VOCAB, tiny_config, tiny_ids, tiny_model

from common.config import from_mapping, to_mapping
from dalle.engines.cpu_kernel import CpuKernelDecoder
from dalle.engines.cuda_graph import CudaGraphDecoder
from dalle.engines.eager import TorchDecoder
from dalle.engines.packed import PackedDecoder
from dalle.lines import LineControl, LineEncoder, LineFeatures, encode_control, to_drawing
from dalle.model import Dalle, DalleConfig, ModelOptions, config_mapping
from dalle.sampling import Canvas, SamplingOptions, noise_generator, sample_ids
from kernels import decode

FACTOR = 4
needs_native = pytest.mark.skipif(
    bool(decode.unavailable_reason()), reason=f"no cpu_kernel engine: {decode.unavailable_reason()}"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def line_model(seed: int = 0, **options) -> Dalle:
    torch.manual_seed(seed)
    config = replace(tiny_config(**options), line_factor=FACTOR, line_width=16)
    model = Dalle(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.copy_(0.3 * torch.randn_like(parameter))
            elif "line_encoder.out" in name:
                parameter.copy_(0.5 * torch.randn_like(parameter))
    return model


def drawings(count: int = 3, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, 1, FACTOR * GRID, FACTOR * GRID, generator=generator) > 0.8).float()


class TestModel:
    def test_without_an_encoder_config_and_weights_are_the_old_ones(self):
        config = tiny_config()
        assert "line" not in " ".join(config_mapping(config))
        assert from_mapping(DalleConfig, config_mapping(config)) == config
        assert not any("line" in name for name in Dalle(config).state_dict())
        followed = replace(config, line_factor=FACTOR)
        assert config_mapping(followed) == to_mapping(followed)

    def test_a_new_encoder_changes_nothing(self):
        plain = tiny_model()
        model = Dalle(replace(plain.config, line_factor=FACTOR, line_width=16)).eval()
        encoder = {n: t for n, t in model.state_dict().items() if n.startswith("line_encoder.")}
        model.load_state_dict(plain.state_dict() | encoder)
        text, image = tiny_ids()
        expected = plain(text, image).image
        assert torch.equal(model(text, image).image, expected)
        assert torch.equal(model(text, image, drawings()).image, expected)

    def test_a_drawing_that_does_not_count_is_none(self):
        model, (text, image) = line_model(), tiny_ids()
        with_some = model(text, image, drawings(), torch.tensor([True, False, True])).image
        with_all, without = model(text, image, drawings()).image, model(text, image).image
        assert torch.equal(with_some[1], without[1])
        torch.testing.assert_close(with_some[[0, 2]], with_all[[0, 2]])
        assert (with_all - without).abs().amax((1, 2)).min() > 0.1

    def test_a_feature_enters_one_position_ahead(self):
        model, (text, image) = line_model(), tiny_ids(1)
        x, *_ = model._inputs(text, image[:, :-1])
        features = torch.arange(GRID**2).float()[None, :, None].expand(1, -1, model.config.dim)
        moved, *_ = model._inputs(text, image[:, :-1], features)
        difference = (moved - x)[0, :, 0]
        assert difference[:TEXT_LEN].abs().max() == 0
        torch.testing.assert_close(difference[TEXT_LEN:], torch.arange(GRID**2).float())  # f_0 at BOI

    def test_features_lie_where_the_lines_are(self):
        encoder = LineEncoder(8, FACTOR, 16)
        torch.nn.init.normal_(encoder.out.weight)
        blank, dot = torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64)
        dot[0, 0, 2, 62] = 1  # the upper right corner
        change = (encoder(dot) - encoder(blank)).abs().sum(-1).view(16, 16)
        assert change[:5, 11:].max() > 5 * change[8:, :8].max()

    def test_gradients_reach_the_encoder(self):
        model, (text, image) = Dalle(replace(tiny_config(), line_factor=FACTOR, line_width=16)), tiny_ids()
        model(text, image, drawings()).image.square().mean().backward()
        assert model.line_encoder.out.weight.grad.abs().max() > 0

    @pytest.mark.parametrize(
        "bad", [{"line_factor": 6}, {"line_factor": 1}, {"line_factor": 8, "line_width": 12}]
    )
    def test_bad_sizes(self, bad):
        with pytest.raises(ValueError, match="line_"):
            replace(tiny_config(), **bad)

    def test_drawings_of_another_side_and_models_without(self):
        text, image = tiny_ids()
        with pytest.raises(ValueError, match="takes no line drawings"):
            tiny_model()(text, image, drawings())
        with pytest.raises(ValueError, match="gives 4 tokens"):
            line_model()(text, image, torch.zeros(3, 1, 8, 8))


@torch.inference_mode()
def step_logits(decoder, text, image, lines, known: int) -> torch.Tensor:
    """(R, N - known, V) through the cache."""
    cache = decoder.new_cache(text, lines)
    steps = [decoder.prefill(text, cache, image[:, :known] if known else None).clone()]
    last = image.shape[1] - 1
    steps += [decoder.decode_step(image[:, n], n, cache).clone() for n in range(known, last)]
    return torch.stack(steps, 1).float()


ENGINES = [
    pytest.param(TorchDecoder, torch.float32, 1e-4, id="torch"),
    pytest.param(PackedDecoder, torch.float32, 2e-4, id="packed"),
    pytest.param(CpuKernelDecoder, torch.bfloat16, 0.03, id="cpu_kernel", marks=needs_native),
    pytest.param(CpuKernelDecoder, torch.int8, 0.06, id="cpu_kernel-int8", marks=needs_native),
]


class TestEngines:
    @pytest.mark.parametrize(("engine", "weights", "share"), ENGINES)
    @pytest.mark.parametrize("known", [0, 5])
    def test_cached_logits_equal_uncached_ones(self, engine, weights, share, known):
        torch.manual_seed(3)
        config = ModelOptions(dim=64, num_layers=2, num_heads=4).config(VOCAB, 0, TEXT_LEN, CODES, GRID)
        model = Dalle(replace(config, line_factor=FACTOR, line_width=16)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2 or "line_encoder.out" in name:
                    parameter.copy_(0.15 * torch.randn_like(parameter))
        text, image = tiny_ids()
        with torch.inference_mode():
            lines = model.line_features(drawings(), torch.tensor([True, True, False]))
            expected = model(text, image, drawings(), torch.tensor([True, True, False])).image[:, known:]
            without = model(text, image).image[:, known:]
        decoder = (
            engine(model)
            if weights == torch.float32 and engine is not PackedDecoder
            else engine(model, weights)
        )
        found = step_logits(decoder, text, image, lines, known)
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=share * scale)
        assert (expected - without)[
            :2
        ].abs().max() > 0.2 * scale  # the drawing matters far above the tolerance
        torch.testing.assert_close(
            step_logits(decoder, text, image, None, known), without, rtol=0, atol=share * scale
        )

    @pytest.mark.gpu
    @needs_gpu
    def test_graphs_equal_plain_steps(self):
        model = line_model().cuda()
        text, image = (t.cuda() for t in tiny_ids())
        graph = CudaGraphDecoder(model)
        for seed in (2, 3):  # the second drawing goes into the buffers of the first
            lines = model.line_features(drawings(seed=seed).cuda()).detach()
            expected = step_logits(TorchDecoder(model), text, image, lines, 0)
            torch.testing.assert_close(
                step_logits(graph, text, image, lines, 0), expected, rtol=1e-4, atol=1e-4
            )

    def test_rows_of_one_text_with_two_drawings_stay_apart(self):
        model = line_model()
        text, image = (t[:1].expand(3, -1) for t in tiny_ids())
        lines = model.line_features(drawings()).detach()
        lines = torch.stack([lines[0], lines[0], lines[1]])
        expected = step_logits(TorchDecoder(model), text, image, lines, 5)
        found = step_logits(PackedDecoder(model, torch.float32), text, image, lines, 5)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def sample(model, lines=None, batch=2, cfg=3.0, seed=0, canvas=None):
    text, _ = tiny_ids(1)
    text = text.expand(batch, -1)
    generators = [noise_generator(seed, i) for i in range(batch)]
    options = SamplingOptions(cfg_scale=cfg)
    return sample_ids(TorchDecoder(model), text, torch.zeros_like(text), generators, options, canvas, lines)


def features(model, seed=2, **options) -> LineFeatures:
    lines = (drawings(1, seed)[0, 0] * 255).byte().numpy()
    return encode_control(model.line_encoder, LineControl(lines, **options), torch.device("cpu"))


class TestSampling:
    def test_a_drawing_of_scale_0_is_none(self):
        model = line_model()
        assert torch.equal(sample(model, features(model, scale=0.0)).ids, sample(model).ids)
        assert not torch.equal(sample(model, features(model)).ids, sample(model).ids)

    @pytest.mark.parametrize("cfg", [1.0, 3.0])
    @pytest.mark.parametrize("line_cfg", [1.0, 2.0])
    def test_an_image_does_not_depend_on_its_batch(self, cfg, line_cfg):
        model = line_model()
        lines = features(model, cfg_scale=line_cfg)
        together = sample(model, lines, batch=3, cfg=cfg)
        alone = sample(model, lines, batch=1, cfg=cfg)
        assert torch.equal(together.ids[0], alone.ids[0])
        assert (alone.null_log_likelihood is None) == (cfg == 1.0)

    @pytest.mark.parametrize("cfg", [1.0, 3.0])
    def test_guidance_on_the_drawing_by_hand(self, cfg):
        """Scale 0 leaves the text's share alone; the limits agree with plain runs where no text guides."""
        model = line_model()
        if cfg == 1.0:
            assert torch.equal(
                sample(model, features(model, cfg_scale=0.0), cfg=1.0).ids, sample(model, cfg=1.0).ids
            )
            return
        from dalle.sampling import _guided

        full, null, bare = (torch.randn(2, 5) for _ in range(3))
        found = _guided(
            (full, null, bare), 3.0, SamplingOptions(cfg_scale=3.0), features(model, cfg_scale=2.0)
        )
        torch.testing.assert_close(found, bare + 2 * (null - bare) + 3 * (full - null))

    def test_the_likelihood_is_that_of_one_pass_with_the_drawing(self):
        model = line_model()
        lines = features(model)
        found = sample(model, lines)
        text = tiny_ids(1)[0].expand(2, -1)
        logits = model(text, found.ids, drawings(1).expand(2, -1, -1, -1)).image.log_softmax(-1)
        expected = logits.gather(-1, found.ids[..., None]).sum((1, 2))
        torch.testing.assert_close(found.log_likelihood, expected, rtol=1e-3, atol=1e-3)

    def test_a_prefix_is_kept_beside_a_drawing(self):
        model = line_model()
        ids = tiny_ids(1)[1].expand(2, -1)
        keep = torch.arange(GRID**2).expand(2, -1) < 6
        found = sample(model, features(model), canvas=Canvas(ids, keep, 6))
        assert torch.equal(found.ids[:, :6], ids[:, :6])

    def test_a_generator_without_an_encoder_says_what_to_do(self):
        with pytest.raises(ValueError, match="--lines"):
            encode_control(None, LineControl(np.zeros((16, 16), np.uint8)), torch.device("cpu"))

    @pytest.mark.parametrize("bad", [{"scale": -1.0}, {"cfg_scale": 11.0}, {"scale": float("nan")}])
    def test_bad_scales(self, bad):
        with pytest.raises(ValueError, match="line"):
            LineControl(np.zeros((16, 16), np.uint8), **bad)

    def test_levels_become_zero_to_one(self):
        found = to_drawing(np.array([[0, 255], [51, 0]], np.uint8))
        torch.testing.assert_close(found, torch.tensor([[[0.0, 1.0], [0.2, 0.0]]]))


def test_hidden_tokens_hide_their_lines_too():
    """Else RMSNorm of a feature near zero alone multiplies its gradient by a thousand."""
    config = replace(tiny_config(token_dropout=0.5), line_factor=FACTOR, line_width=16)
    torch.manual_seed(0)
    model, (text, image) = Dalle(config).train(), tiny_ids()
    model(text, image, drawings()).image.logsumexp(-1).mean().backward()
    assert model.line_encoder.out.weight.grad.norm() < 10
