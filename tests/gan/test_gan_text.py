import json

import pytest
import torch
from tiny_gan import TEXTS

from gan.text import TextTower, is_known, load_ranker_weights, open_tokenizer, ranker_text, tokens_of
from rankers.model import load_model


def test_a_rankers_text_tower_gives_the_rankers_vectors(ranker_dir):
    folder, width = ranker_text(ranker_dir)
    tower = TextTower(folder, width).eval()
    load_ranker_weights(tower, ranker_dir)
    ids = tokens_of(open_tokenizer(folder), TEXTS[:3])
    model, _ = load_model(ranker_dir)
    with torch.no_grad():
        torch.testing.assert_close(tower(ids), model.encode_text(ids) * width**0.5, atol=1e-4, rtol=1e-4)


def test_padding_does_not_matter_and_no_caption_is_finite(ranker_dir):
    folder, width = ranker_text(ranker_dir)
    tower, tokenizer = TextTower(folder, width).eval(), open_tokenizer(folder)
    both = tokens_of(tokenizer, [TEXTS[0], ""])
    with torch.no_grad():
        found = tower(both)
        torch.testing.assert_close(found[:1], tower(tokens_of(tokenizer, TEXTS[:1])), atol=1e-5, rtol=1e-4)
    assert bool(found.isfinite().all())


def test_known_texts(ranker_dir):
    tokenizer = open_tokenizer(ranker_text(ranker_dir)[0])
    assert is_known(tokenizer, TEXTS[0]) and is_known(tokenizer, "q红")
    assert not is_known(tokenizer, "qwz") and not is_known(tokenizer, "  ")


def test_a_ranker_with_other_towers_is_refused(ranker_dir, tmp_path):
    config = json.loads((ranker_dir / "config.json").read_text("utf-8"))
    config["model"]["architecture"] = "chinese_clip"
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="chinese_clip towers"):
        ranker_text(tmp_path)


def test_weights_of_another_tower_are_named(ranker_dir):
    folder, width = ranker_text(ranker_dir)
    with pytest.raises(ValueError, match=r"proj\.weight is missing or of another shape"):
        load_ranker_weights(TextTower(folder, width + 8), ranker_dir)
