"""Feature networks and what is kept of them on disk."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pickling_cluster import PicklingCluster
from PIL import Image
from ray_nodes import losing_a_node, needs_ray, two_nodes
from reference_shards import write_out_dir
from tiny_goods import draw

from data_tools.engine import RayCluster
from data_tools.images.decode import BadImage
from evaluation.compare.parts import Networks
from evaluation.embed import main as embed_main
from evaluation.judges.goods import GoodsJudge
from evaluation.metrics.features import (
    INCEPTION_FILE,
    FeatureStore,
    Inception,
    ListedImages,
    MirroredImages,
    PerceptualHash,
    RankerTower,
    SampleImages,
    embed,
    find_inception,
    short_name,
)
from evaluation.metrics.rows import name_on
from evaluation.options import MeasuringOptions
from evaluation.sets import SampleSet
from rankers import load_ranker

ROOT = Path(__file__).parents[3]


class Counting:
    """A network that counts what it computes: the mean level of each channel."""

    name = "counting"
    identity = hashlib.sha256(b"counting").hexdigest()

    def __init__(self) -> None:
        self.computed = 0

    def features(self, images):
        self.computed += len(images)
        return np.stack([np.asarray(image, np.float32).mean((0, 1)) for image in images])

    def probabilities(self, features):
        return None


class Damaged(ListedImages):
    """One image cannot be read."""

    def __init__(self, images, bad: int = 1) -> None:
        super().__init__(images)
        self.bad = bad

    def open(self, i):
        if i == self.bad:
            raise BadImage("undecodable", "cut short")
        return super().open(i)


def some_images(count: int) -> list[Image.Image]:
    return [draw("杯子", "红色", seed) for seed in range(count)]


def test_what_was_computed_once_comes_from_disk(tmp_path):
    network, images = Counting(), some_images(5)
    first, kept = embed(network, ListedImages([*images, images[0]]), FeatureStore(network, tmp_path), 2)
    assert (
        network.computed == 5 and kept.tolist() == [0, 1, 2, 3, 4, 5] and np.array_equal(first[0], first[5])
    )
    again, _ = embed(network, ListedImages(images[::-1]), FeatureStore(network, tmp_path), 2)
    assert network.computed == 5 and np.array_equal(again, first[4::-1])
    other = Counting()
    other.identity = hashlib.sha256(b"other weights").hexdigest()
    embed(other, ListedImages(images), FeatureStore(other, tmp_path))
    assert other.computed == 5 and len(list(tmp_path.glob("*.sqlite"))) == 2


def test_batches_that_were_done_survive_a_kill(tmp_path):
    code = (
        "import sys, os\nsys.path[:0] = ['tests', 'tests/evaluation', 'tests/evaluation/metrics']\n"
        "from pathlib import Path\nimport test_features as t\n"
        "class Killed(t.Counting):\n"
        "    def features(self, images):\n"
        "        if self.computed == 4: os.kill(os.getpid(), 9)\n"
        "        return super().features(images)\n"
        "n = Killed()\n"
        "t.embed(n, t.ListedImages(t.some_images(8)), t.FeatureStore(n, Path(sys.argv[1])), 2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()[-2000:]
    network = Counting()
    rows, _ = embed(network, ListedImages(some_images(8)), FeatureStore(network, tmp_path))
    assert network.computed == 4 and rows.shape == (8, 3)


def test_damaged_images_are_left_out():
    rows, kept = embed(Counting(), Damaged(some_images(3)))
    assert kept.tolist() == [0, 2] and rows.shape == (2, 3)
    with pytest.raises(ValueError, match="none of the 1 images"):
        embed(Counting(), Damaged(some_images(1), bad=0))


def test_mirrored_images_have_keys_of_their_own():
    plain = ListedImages([draw("鞋子", "红色", 1), draw("帽子", "蓝色", 4)])
    mirrored = MirroredImages(plain)
    assert plain.key(0) != mirrored.key(0) and len(mirrored) == 2
    twice = np.asarray(mirrored.open(1))[:, ::-1]
    np.testing.assert_array_equal(twice, np.asarray(plain.open(1)))


def test_the_key_of_a_sample_is_its_file(tmp_path):
    for name in "ab":
        draw("杯子", "红色", 1).save(tmp_path / f"{name}.png")
    found = SampleImages(SampleSet.from_out_dir(tmp_path, text="x").samples)
    assert found.key(0) == found.key(1) and found.open(0).mode == "RGB"


def test_a_ranker_gives_its_tower(ranker_dir):
    ranker = load_ranker(ranker_dir, precision="fp32")
    tower = RankerTower(ranker)
    rows = tower.features(some_images(3))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    assert tower.identity == ranker.identity and tower.probabilities(rows) is None
    with pytest.raises(ValueError, match="no image features"):
        RankerTower(load_ranker(f"{ranker_dir},{ranker_dir}"))


def test_names_are_short_but_keep_published_ones():
    assert short_name("runs/goods_128_ranker/step_00003000") == "goods_128_ranker"
    assert short_name("clip:xlm-roberta-base-ViT-B-32/laion5b") == "clip:xlm-roberta-base-ViT-B-32/laion5b"


# --- Inception -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    """The architecture with random weights, as a file of the published layout."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    built: list[dict[str, torch.Tensor]] = []
    load = FeatureExtractorInceptionV3.load_state_dict
    with pytest.MonkeyPatch.context() as patch:
        empty = path.with_name("empty.pth")
        torch.save({}, empty)
        patch.setattr(
            FeatureExtractorInceptionV3,
            "load_state_dict",
            lambda self, state: built.append(self.state_dict()),
        )
        FeatureExtractorInceptionV3("x", ["2048"], str(empty))
    assert FeatureExtractorInceptionV3.load_state_dict is load
    torch.save(built[0], path)
    return path


def test_other_weights_than_the_published_ones_never_make_a_fid(inception_file):
    network = Inception(inception_file)
    assert network.name.startswith("inception-v3@")
    assert name_on("frechet_distance", network) == f"frechet_distance[{network.name}]"
    network.name = "inception-v3"
    assert [
        name_on(n, network) for n in ("frechet_distance", "kernel_distance", "inception_score", "recall")
    ] == [
        "FID",
        "KID",
        "IS",
        "recall[inception-v3]",
    ]


def test_inception_equals_torch_fidelity_and_takes_mixed_sizes(inception_file):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = [draw("杯子", "红色", 1), draw("鞋子", "蓝色", 2, 64), draw("帽子", "绿色", 3)]
    network = Inception(inception_file, "cpu")
    rows = network.features(images)
    assert rows.shape == (3, 2048)
    plain = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception_file))
    pixels = torch.from_numpy(np.array(images[1])).permute(2, 0, 1)[None]
    expected, logits = plain(pixels)
    np.testing.assert_allclose(rows[1], expected[0].numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(network.probabilities(rows)[1], logits[0].softmax(0).numpy(), rtol=1e-3)


def test_weights_are_looked_for_and_never_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("downloaded"))
    assert find_inception() is None
    with pytest.raises(FileNotFoundError, match=rf"none.pth.*{INCEPTION_FILE}"):
        find_inception("none.pth")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / INCEPTION_FILE).write_bytes(b"x")
    assert find_inception() == tmp_path / "checkpoints" / INCEPTION_FILE
    with pytest.raises(ValueError, match="no file of PyTorch weights"):
        Inception(find_inception())
    other = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match="does not hold the weights"):
        Inception(other)


def test_a_pickled_program_is_not_run(tmp_path):
    import pickle

    class Program:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Program()))
    with pytest.raises(ValueError, match="no file of PyTorch weights"):
        Inception(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()


def test_all_networks_keep_the_contract(judge_dir, ranker_dir):
    for network in (
        GoodsJudge.from_pretrained(judge_dir),
        RankerTower(load_ranker(ranker_dir)),
        PerceptualHash(),
    ):
        rows = network.features([*some_images(2), Image.new("L", (20, 30), 7)])
        assert rows.dtype == np.float32 and rows.shape[0] == 3 and rows.ndim == 2
        assert len(network.identity) == 64 and network.name
        probabilities = network.probabilities(rows)
        assert probabilities is None or np.allclose(probabilities.sum(1), 1)


class CountedImages(ListedImages):
    """Counts what is opened."""

    opened = 0

    def open(self, index):
        self.opened += 1
        return super().open(index)


def test_a_cluster_gives_the_same_features(tmp_path):
    network, images = PerceptualHash(), Damaged(some_images(9))
    alone, kept = embed(network, images, batch_size=4)
    spread, same = embed(network, images, FeatureStore(network, tmp_path), 4, PicklingCluster())
    assert np.array_equal(spread, alone) and same.tolist() == kept.tolist()
    stored, _ = embed(network, images, FeatureStore(network, tmp_path))
    assert np.array_equal(stored, alone)


@needs_ray
@pytest.mark.slow
def test_ray_gives_the_same_features_also_when_a_node_dies(judge_dir):
    with two_nodes() as nodes, RayCluster(nodes.address).connected():
        cluster = RayCluster(nodes.address)
        for network in (PerceptualHash(), GoodsJudge.from_pretrained(judge_dir)):
            images = CountedImages(some_images(60))
            alone, kept = embed(network, images, batch_size=4)
            images.opened = 0
            # 3 batches ahead for each of two nodes are opened at once, the next when a result has come
            with losing_a_node(nodes, lambda seen=images: seen.opened > 6 * 4):
                spread, same = embed(network, images, None, 4, cluster)
            assert np.array_equal(spread, alone) and same.tolist() == kept.tolist()


def test_features_ahead_of_measuring(shards, tmp_path, monkeypatch, capsys):
    write_out_dir(tmp_path / "out")
    network = Counting()
    monkeypatch.setattr(MeasuringOptions, "networks", lambda self: Networks((network,)))
    flags = [str(tmp_path / "out"), "--reference", str(shards), "--cache", str(tmp_path / "cache")]
    count = embed_main([*flags, "--device", "cpu"])
    assert count == len(SampleSet.from_out_dir(tmp_path / "out").samples) + 96 + 24
    computed = network.computed
    assert embed_main([*flags, "--device", "cpu"]) == count and network.computed == computed
    assert f"{count} features of 1 networks" in capsys.readouterr().out
