import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_goods import draw

from rankers import load_ranker
from rankers.release import main


def test_a_released_ranker_scores_alike_at_half_the_size(ranker_dir, tmp_path, capsys):
    released = main([str(ranker_dir), str(tmp_path / "r")])
    assert "MiB" in capsys.readouterr().out
    weights = load_file(released / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float16, torch.int64}
    images = [draw("杯子", "红色", i) for i in range(4)]
    before, after = (
        load_ranker(d, precision="fp32").score("红色的杯子", images) for d in (ranker_dir, released)
    )
    torch.testing.assert_close(before, after, atol=5e-3, rtol=0)
    main([str(ranker_dir), str(tmp_path / "r"), "--precision", "float32"])
    again = load_ranker(tmp_path / "r", precision="fp32").score("红色的杯子", images)
    torch.testing.assert_close(before, again, atol=1e-6, rtol=0)


def test_nothing_else_is_replaced(ranker_dir, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        main([str(ranker_dir), str(tmp_path)])
    assert caught.value.code == 2 and "no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"kind": "generator"}))
    with pytest.raises(SystemExit):
        main([str(ranker_dir), str(tmp_path)])
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
