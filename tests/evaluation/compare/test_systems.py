import sys

import pytest
from PIL import Image

from common.files import write_json
from common.outputs.out_directory import OutDirectory
from dalle.pipeline import Request
from dalle.sampling import SamplingOptions
from evaluation.compare import systems
from evaluation.compare.generating import Plan, common_texts, generate_into
from evaluation.compare.systems import AnySystem, Setting, SystemSpec, open_system
from evaluation.sets import LIKELIHOOD, SampleSet


class Painter:
    """A pipeline that remembers what it was asked; image i of seed s has the colour (s, i, text length)."""

    def __init__(self) -> None:
        self.calls = []

    def __call__(self, text, num_images, seed=0, **sampling):
        self.calls.append((text, num_images, seed, sampling))
        return [Image.new("RGB", (8, 8), (seed, 10 * i, len(text))) for i in range(num_images)]


def test_how_an_arm_is_written():
    assert SystemSpec.parse("a=runs/x") == SystemSpec("a", "runs/x")
    spec = SystemSpec.parse("红.1+b=runs/x=y?cfg_scale=4&top_p=0.9")
    assert (spec.name, spec.what, spec.sampling) == (
        "红.1+b",
        "runs/x=y",
        {"cfg_scale": "4", "top_p": "0.9"},
    )
    for text in ("runs/x", "=runs/x", "a=", "a/b=runs", ".a=x", "a=x?", "a=x?cfg_scale", "a=x?cfg_scale="):
        with pytest.raises(ValueError, match=r"NAME=PATH|KEY=VALUE"):
            SystemSpec.parse(text)


def test_our_generator_draws_what_its_pipeline_draws(generator_dir):
    spec = SystemSpec("ours", str(generator_dir), {"cfg_scale": "1.5"})
    system = open_system(spec, Setting(3, SamplingOptions(top_k=5), 2, "cpu"))
    assert system.origin["sampling"]["cfg_scale"] == 1.5 and system.origin["sampling"]["top_k"] == 5
    drawn = list(system.generate([Request("一双黑色的鞋", 1), Request("白色的杯子", 0)]))
    direct = system.pipeline("一双黑色的鞋", 2, seed=3, cfg_scale=1.5, top_k=5)
    assert drawn[0].image.tobytes() == direct[1].tobytes()
    assert system.complaint("一双黑色的鞋") == "" and "holds only characters" in system.complaint("@@@")
    with pytest.raises(ValueError, match="system ours: unknown option cfg_scal "):
        open_system(SystemSpec("ours", str(generator_dir), {"cfg_scal": "1"}), Setting(device="cpu"))


def test_another_kind_of_checkpoint_plugs_in_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(systems, "_LOADERS", dict(systems._LOADERS))
    write_json(tmp_path / "config.json", {"kind": "painter", "sha256": "12"})
    spec = SystemSpec("p", str(tmp_path), {"steps": "20", "strength": "0.5", "mode": "fast"})
    with pytest.raises(
        ValueError, match=r"system p: .* of kind painter, which makes no images .kinds that do: "
    ):
        open_system(spec, Setting())
    painter = Painter()
    systems.register("painter", lambda directory, device: painter)
    system = open_system(spec, Setting(5))
    assert system.origin == {
        "seed": 5,
        "sampling": {"steps": 20, "strength": 0.5, "mode": "fast"},
        "checkpoint": "12",
    }
    drawn = list(system.generate([Request("ab", 2), Request("ab", 0), Request("c", 0)]))
    assert [d.image.getpixel((0, 0)) for d in drawn] == [(5, 20, 2), (5, 0, 2), (5, 0, 1)]
    assert painter.calls[0] == ("ab", 3, 5, {"steps": 20, "strength": 0.5, "mode": "fast"})
    assert all(d.log_likelihood is None and d.seconds > 0 for d in drawn)


def test_a_function_in_python_is_a_system(tmp_path, monkeypatch):
    code = "from PIL import Image\ndef load():\n    return lambda text, n, seed=0: [Image.new('L', (8, 8), 9)] * {}\n"
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "painter_one.py").write_text(code.format("n"))
    (tmp_path / "painter_bad.py").write_text(code.format("1"))
    system = open_system(SystemSpec("p", "python:painter_one:load"), Setting())
    assert [d.image.mode for d in system.generate([Request("a", 0), Request("a", 1)])] == ["RGB", "RGB"]
    assert system.origin["checkpoint"].startswith("python:painter_one:load@")
    with pytest.raises(ValueError, match="gave 1 images of 'a' instead of 2"):
        list(open_system(SystemSpec("p", "python:painter_bad:load"), Setting()).generate([Request("a", 1)]))
    for name, message in [
        ("python:painter_one", "python:package.module:function"),
        ("python:no_such_painter:load", "no module no_such_painter"),
        ("python:painter_one:draw", "has no function draw"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_system(SystemSpec("p", name), Setting())
    sys.modules.pop("painter_one"), sys.modules.pop("painter_bad")


class TestDrawing:
    PLAN = Plan(("a", "bb"), 3)

    def test_a_killed_run_goes_on_and_ends_with_the_same_files(self, tmp_path):
        whole = generate_into(tmp_path / "whole", "w", AnySystem(Painter(), "x", 3, {"cfg": 0.1}), self.PLAN)
        assert len(whole) == 6 and whole.texts == ["a", "bb"]
        system = AnySystem(Painter(), "x", 3, {"cfg": 0.1})
        with OutDirectory(tmp_path / "part", system.origin) as out:
            for image in list(system.generate(self.PLAN.requests))[:2]:
                out.add(image)
        with (tmp_path / "part" / "images.jsonl").open("a") as file:
            file.write('{"file": "0002.png", "te')
        painter = Painter()
        found = generate_into(tmp_path / "part", "w", AnySystem(painter, "x", 3, {"cfg": 0.1}), self.PLAN)
        assert painter.calls == [("a", 3, 3, {"cfg": 0.1}), ("bb", 3, 3, {"cfg": 0.1})]
        for one, other in zip(whole.samples, found.samples, strict=True):
            assert (one.text, one.index) == (other.text, other.index)
            assert one.path.read_bytes() == other.path.read_bytes()
        again = Painter()
        generate_into(tmp_path / "part", "w", AnySystem(again, "x", 3, {"cfg": 0.1}), self.PLAN)
        assert again.calls == []

    def test_more_prompts_and_images_are_added_and_fewer_taken(self, tmp_path):
        first = generate_into(tmp_path / "o", "o", AnySystem(Painter(), "x", 0, {}), Plan(("a",), 2))
        before = {s.path: s.path.read_bytes() for s in first.samples}
        more = generate_into(tmp_path / "o", "o", AnySystem(Painter(), "x", 0, {}), Plan(("c", "a"), 3))
        assert [(s.text, s.index) for s in more.samples] == [(t, i) for t in ("a", "c") for i in range(3)]
        assert {path: path.read_bytes() for path in before} == before
        fewer = generate_into(tmp_path / "o", "o", AnySystem(Painter(), "x", 0, {}), Plan(("a",), 1))
        assert len(fewer) == 1 and len(SampleSet.from_out_dir(tmp_path / "o")) == 6

    def test_images_of_another_setting_are_never_mixed_or_lost(self, tmp_path):
        generate_into(tmp_path / "o", "o", AnySystem(Painter(), "x", 0, {"cfg": 1}), self.PLAN)
        before = (tmp_path / "o" / "images.jsonl").read_bytes()
        for identity, seed, sampling in [("y", 0, {"cfg": 1}), ("x", 1, {"cfg": 1}), ("x", 0, {"cfg": 2})]:
            with pytest.raises(ValueError, match="choose another --out, or remove"):
                generate_into(tmp_path / "o", "o", AnySystem(Painter(), identity, seed, sampling), self.PLAN)
        assert (tmp_path / "o" / "images.jsonl").read_bytes() == before

    def test_our_generator_records_likelihoods(self, tmp_path, generator_dir):
        system = open_system(SystemSpec("ours", str(generator_dir)), Setting(batch_size=4, device="cpu"))
        found = generate_into(tmp_path / "o", "ours", system, Plan(("白色的杯子",), 2))
        assert all(LIKELIHOOD in s.scores and s.seconds > 0 for s in found.samples)
        assert found.settings["checkpoint"] == system.pipeline.sha256

    def test_texts_that_an_arm_cannot_draw_are_left_out_for_all(self, generator_dir):
        ours = open_system(SystemSpec("ours", str(generator_dir)), Setting(device="cpu"))
        both = [AnySystem(Painter(), "x", 0, {}), ours]
        usable, complaints = common_texts(["白色的杯子", "@@@", "鞋" * 10_000], both)
        assert usable == ["白色的杯子", "鞋" * 10_000] and len(complaints) == 1

    def test_a_drawn_set_must_have_all_images(self, tmp_path):
        found = generate_into(tmp_path / "o", "o", AnySystem(Painter(), "x", 0, {}), self.PLAN)
        with pytest.raises(ValueError, match="o has 3 images of 'a', 4 are needed"):
            Plan(("a",), 4).of(found)
        with pytest.raises(ValueError, match="o has 0 images of 'z'"):
            Plan(("z",), 1).of(found)
