import pytest
import torch
import torch.nn.functional as F

from gan.model import GAIN, SLOPE, FirstMap, Generator, GeneratorConfig, StyleConv, unit

CONFIG = GeneratorConfig(img_size=32, z_dim=16, style_dim=16, max_channels=16, channels=8)


@pytest.fixture
def generator() -> Generator:
    torch.manual_seed(0)
    return Generator(CONFIG, text_dim=12, num_labels=3).eval()


def inputs(count: int = 3) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    z, text = torch.randn(count, 16, generator=g), torch.randn(count, 12, generator=g)
    return z, text, torch.arange(count) % 4, torch.ones(count, dtype=torch.bool)


def test_a_style_convolution_is_stylegan2s_modulated_and_demodulated_one():
    torch.manual_seed(0)
    layer, x, style = StyleConv(6, 5, 4), torch.randn(3, 6, 8, 8), torch.randn(3, 4)
    layer.bias.data.normal_()
    found, weight = layer(x, style), layer.weight / (6 * 9) ** 0.5
    for i in range(3):
        modulated = weight * layer.affine(style)[i].view(1, 6, 1, 1)  # equations 1 and 3
        modulated = modulated / (modulated.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        expected = F.leaky_relu(F.conv2d(x[i : i + 1], modulated, layer.bias, padding=1), SLOPE) * GAIN
        torch.testing.assert_close(found[i : i + 1], expected, atol=1e-5, rtol=1e-4)


def test_sizes_follow_from_the_config():
    config = GeneratorConfig(img_size=128, channels=64, max_channels=256)
    assert config.sides == (4, 8, 16, 32, 64)
    assert [config.width(side) for side in config.sides] == [256, 256, 256, 128, 64]


@pytest.mark.parametrize("size", [32, 64, 128])
def test_images_have_the_size_asked_for(size):
    config = GeneratorConfig(img_size=size, z_dim=16, style_dim=16, max_channels=8, channels=8)
    images = Generator(config, 12)(*inputs(2))
    assert (
        images.shape == (2, 3, size, size) and images.dtype == torch.float32 and bool(images.isfinite().all())
    )


def test_noise_caption_and_category_all_matter_and_samples_do_not_mix(generator):
    z, text, labels, has_text = inputs()
    images = generator(z, text, labels, has_text)
    assert not torch.allclose(images, generator(z.flip(0), text, labels, has_text), atol=1e-3)
    assert not torch.allclose(images, generator(z, text.flip(0), labels, has_text), atol=1e-3)
    assert not torch.allclose(images, generator(z, text, (labels + 1) % 4, has_text), atol=1e-3)
    assert not torch.allclose(images, generator(z, text, labels, ~has_text), atol=1e-3)
    single = torch.cat([generator(*(x[i : i + 1] for x in (z, text, labels, has_text))) for i in range(3)])
    torch.testing.assert_close(images, single, atol=1e-5, rtol=1e-4)


def test_a_hidden_caption_is_none_at_all(generator):
    z, text, labels, has_text = inputs()
    images = generator(z, text, labels, ~has_text)
    torch.testing.assert_close(images, generator(z, torch.zeros_like(text), labels, ~has_text))


def test_truncation_goes_from_the_mean_style_of_a_caption_to_that_of_the_noise(generator):
    z, text, labels, has_text = inputs()
    condition = generator.condition(text, labels, has_text)
    whole, centre = (generator.truncated(z, condition, psi) for psi in (1.0, 0.0))
    torch.testing.assert_close(generator.synthesis(whole), generator(z, text, labels, has_text))
    torch.testing.assert_close(centre, generator.truncated(z.flip(0), condition, 0.0))
    torch.testing.assert_close(generator.truncated(z, condition, 0.5), (whole + centre) / 2)
    many = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    mean = generator.mapping(many, condition[:1].expand(64, -1))[0].mean(0)
    torch.testing.assert_close(centre[0, :16], mean)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"img_size": 100}, "img_size must be 32"),
        ({"z_dim": 2}, "z_dim"),
        ({"channels": 512}, "max_channels"),
        ({"first_map": "none"}, "first_map must be noise or constant"),
    ],
)
def test_bad_sizes_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        GeneratorConfig(**values)


def test_the_first_maps_are_of_noise_by_half_and_of_nothing_that_all_images_share():
    torch.manual_seed(0)
    first, count = FirstMap(24, 16, 4), 4000
    z, conditions = torch.randn(count, 24), unit(torch.randn(count, 16))
    maps = first(z, conditions)
    assert maps.shape == (count, 4, 4, 4)
    torch.testing.assert_close(maps.mean(0), torch.zeros(4, 4, 4), atol=0.1, rtol=0)
    torch.testing.assert_close(maps.std(0), torch.ones(4, 4, 4), atol=0.1, rtol=0)
    of_one = first(z, conditions[:1].expand(count, -1))
    torch.testing.assert_close(of_one.var(0), torch.full((4, 4, 4), 0.5), atol=0.06, rtol=0)
    first.of_condition.data.mul_(100)  # training cannot drown the noise
    torch.testing.assert_close(first(z, conditions), maps)
