"""What systems cost, the plots against it, the table in Markdown, and the words of the page."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import evaluation
from common.log import logged_hours
from common.machine.memory import peak_memory
from common.outputs.record import OutputDirectory
from common.text.language import words_of
from evaluation.arena_table import main as table
from evaluation.arena_table import to_markdown
from evaluation.compare.arena_plots import Point, pareto, write_plots
from evaluation.compare.costs import Costs, read_costs
from evaluation.human import Result, standings
from evaluation.metrics.rows import Metric
from evaluation.metrics.statistics import Interval

ROOT = Path(evaluation.__file__).parent


def write(folder: Path, numbers: int = 0, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if numbers:
        save_file({"w": torch.zeros(numbers)}, folder / "model.safetensors")
    return folder


def log(path: Path, rows: list[tuple[int, float]]) -> None:
    lines = [{"step": s, "kind": "train", "samples_per_second": r} for s, r in rows]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 9, "kind": "val", "loss": 1}])
    path.write_text(text + '{"step": 1')


def test_hours_of_a_log_by_hand(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log(path, [(1, 8.0), (50, 16.0), (100, 4.0), (150, 1.0)])
    # 1 step at 8 a second, 49 at 16, 50 at 4, eight samples a step
    expected = (8 / 8 + 49 * 8 / 16 + 50 * 8 / 4) / 3600
    assert logged_hours(path, 100, 8) == pytest.approx(expected, abs=1e-4)
    assert logged_hours(path, 400, 8) is None, "the log ends long before"
    assert logged_hours(tmp_path / "none.jsonl", 100, 8) is None


def test_parts_that_a_system_stands_on_count(tmp_path):
    ar = write(tmp_path / "ar", 10, training_hours=2.0, images_seen=100)
    write(ar / "image_tokenizer", 5, training_hours=1.5, images_seen=7)
    assert read_costs(ar) == Costs(15, 3.5, 100)
    write(ar / "image_tokenizer", 5)
    found = read_costs(ar)
    assert (
        found.training_hours == 2.0
        and found.note == "without the image tokenizer, whose hours are not recorded"
    )
    tuned = write(tmp_path / "tuned", 4, training_hours=1.0, images_seen=10)
    (tuned / "config.json").write_text(
        json.dumps(
            {"training_hours": 1, "images_seen": 10, "base_costs": {"training_hours": 3, "images_seen": 50}}
        )
    )
    assert read_costs(tuned) == Costs(4, 4.0, 60)


def test_an_adapter_counts_with_its_base(tmp_path):
    base = write(tmp_path / "base", 100, training_hours=3.0, images_seen=500)
    lora = write(tmp_path / "lora" / "step_00000010", training_hours=0.5, images_seen=40)
    save_file({"a": torch.zeros(3, 2)}, lora / "pytorch_lora_weights.safetensors")
    (tmp_path / "lora" / "latest").symlink_to(lora.name)
    for name in (
        f"{lora}/pytorch_lora_weights.safetensors:0.8",
        str(tmp_path / "lora"),
        f"{tmp_path}/lora:0.5",
    ):
        assert read_costs(base, [name]) == Costs(106, 3.5, 540)
    assert read_costs(tmp_path / "nowhere", ["x:1"]) == Costs()


def test_hours_of_an_older_run_come_from_its_log(tmp_path):
    step = write(tmp_path / "run" / "step_00000100", 2, kind="x", step=100)
    (step / "train_config.json").write_text('{"loop": {"global_batch_size": 8}}')
    log(tmp_path / "run" / "metrics.jsonl", [(100, 8.0)])
    (tmp_path / "run" / "latest").symlink_to(step.name)
    assert read_costs(tmp_path / "run") == Costs(2, pytest.approx(100 / 3600, abs=1e-4), 800)


def test_a_prior_costs_what_its_autoencoder_did(tmp_path):
    write(tmp_path / "autoencoder" / "step_00000001", 8, training_hours=0.5, images_seen=9)
    (tmp_path / "autoencoder" / "latest").symlink_to("step_00000001")
    vae = write(tmp_path / "vae", 7, _class_name="AutoencoderKL")
    assert read_costs(vae) == Costs(7, 0.5, 9)


def test_peak_memory_sees_what_was_freed_again():
    with peak_memory("cpu") as peak:
        block = np.ones(40 * 2**20 // 8)
        del block
    if peak.bytes is None:
        pytest.skip("this system does not tell")
    assert 35 * 2**20 < peak.bytes < 200 * 2**20


def test_the_pareto_front_by_hand():
    def point(cost, quality):
        return Point("", cost, quality, quality, quality)

    points = [point(1, 0.2), point(2, 0.5), point(3, 0.4), point(4, 0.5), point(0.5, 0.1), point(9, 0.9)]
    assert pareto(points, True) == [4, 0, 1, 5]
    assert pareto(points, False) == [4]
    assert pareto([point(1, 0.5), point(1, 0.5)], True) == [0, 1], "equals do not dominate each other"


def fake_match(language="en"):
    def system(name, seconds, hours, right, distance):
        metrics = tuple(
            Metric(n, Interval(v, v - 0.1, v + 0.1), h, "judge", 4)
            for n, v, h in (("category_right[judge]", right, True), ("frechet_distance[x]", distance, False))
        )
        return SimpleNamespace(
            spec=SimpleNamespace(name=name),
            seconds=seconds,
            costs=Costs(training_hours=hours),
            metrics=metrics,
        )

    systems = (
        system("ar", 0.2, 3.0, 0.7, 50.0),
        system("gan", 0.01, None, 0.3, 90.0),
        system("sd", 0.5, 4.0, 0.6, 60.0),
    )
    return SimpleNamespace(systems=systems, options=SimpleNamespace(language=language))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_plots_are_written_and_say_who_is_missing(tmp_path, language):
    from PIL import Image

    with OutputDirectory(tmp_path / "out") as files:
        found = write_plots(files, fake_match(language))
    assert found["quality_hours.png"].missing == ("gan",) and found["quality_seconds.png"].missing == ()
    for plot in found.values():
        with Image.open(plot.path) as image:
            assert image.width > image.height > 300
    one = SimpleNamespace(systems=fake_match().systems[1:2], options=fake_match().options)
    with OutputDirectory(tmp_path / "one") as files:
        assert write_plots(files, one) == {}


def metrics() -> dict:
    def system(share, distance, seconds, **costs):
        def points(values):
            return [{"width": w, "value": {"value": v, "low": v - 0.1, "high": v + 0.1}} for w, v in values]

        return {
            "what": "x",
            "seconds_per_image": seconds,
            "costs": Costs(**costs).to_json(),
            "metrics": [
                {"name": "frechet_distance[n]", "value": distance, "low": distance - 1, "high": None,
                 "higher_is_better": False, "real": 40.0},
            ],
            "best_of": {"category right": {"points": points([(1, share), (4, share + 0.1)])}},
        }  # fmt: skip

    systems = {
        "ar": system(0.5, 60.0, 0.25, parameters=9_900_000, training_hours=3.25, memory_bytes=300 * 2**20),
        "gan": system(0.3, 90.0, 0.004, note="hours as given"),
    }
    return {"systems": systems, "prompts": 12, "options": {"num_images": 8, "seed": 0}}


def test_the_table_by_hand(tmp_path, capsys):
    (tmp_path / "metrics.json").write_text(json.dumps(metrics()))
    text = table([str(tmp_path)])
    assert capsys.readouterr().out == text
    assert text.splitlines() == [
        "| metric | ar | gan | real images |",
        "| --- | --- | --- | --- |",
        "| category right | **50.0% [40%, 60%]** | 30.0% [20%, 40%] |  |",
        "| category right, best of 4 | **60.0% [50%, 70%]** | 40.0% [30%, 50%] |  |",
        "| Frechet distance (lower) | **60.0** | 90.0 | 40.0 |",
        "| seconds an image | 0.25 | **0.004** |  |",
        "| peak memory, MiB | 300 | - |  |",
        "| parameters, million | 9.9 | - |  |",
        "| training hours | 3.25 | - |  |",
        "",
        "12 prompts, 8 images of each prompt, seed 0. Hours: gan: hours as given.",
    ]
    assert "| 品类正确，4 选 1 |" in to_markdown(metrics(), words_of("zh", "arena")).replace(", ", "，")
    for path, message in ((tmp_path / "none", "no arena in"), (ROOT / "__init__.py", "")):
        with pytest.raises(SystemExit) as end:
            table([str(path)])
        assert end.value.code == 2 and message in capsys.readouterr().err


def test_every_word_of_the_page_has_a_translation():
    """Literals in calls of words(...), and keys and headers that reach it through a variable."""
    said = set()
    for name in (
        "arena.py",
        "arena_table.py",
        "compare/arena_page.py",
        "compare/arena_plots.py",
        "compare/arena_results.py",
    ):
        tree = ast.parse((ROOT / name).read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("words", "shown"):
                said |= {
                    a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
                }
    titles = next(
        node for node in ast.walk(ast.parse((ROOT / "compare/arena_page.py").read_text("utf-8")))
        if isinstance(node, ast.Dict) and any(getattr(k, "value", "") == "Summary" for k in node.keys)
    )  # fmt: skip
    said |= {key.value for key in titles.keys}
    assert len(said) > 25 and not said - set(words_of("zh", "arena").table), said - set(
        words_of("zh", "arena").table
    )


def test_standings_of_three_sets_by_hand():
    def row(a, b, wins, losses):
        return Result(a, b, wins, losses, 0, 0, 1, None, (0, 0))

    found = standings([row("a", "b", 8, 2), row("a", "c", 9, 1), row("b", "c", 5, 5)])
    assert [(s.name, s.wins, s.decided) for s in found] == [("a", 17, 20), ("b", 7, 20), ("c", 6, 20)]
    assert found[0].win_rate.value == pytest.approx(0.85)
