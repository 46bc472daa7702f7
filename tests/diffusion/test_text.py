import pytest
import torch
from tiny_base import tiny_base

from diffusion.base import make_pipeline
from diffusion.text import count_truncated, encode_texts, hidden_states, text_conditions


def test_bert_ids_are_marks_pieces_and_padding(tmp_path):
    base = tiny_base(tmp_path)
    pieces = base.tokenizer.get_vocab()
    ids = encode_texts(base.tokenizer, ["红色的鞋", ""], 8)
    expected = [pieces[p] for p in ["[CLS]", "红", "色", "的", "鞋", "[SEP]", "[PAD]", "[PAD]"]]
    assert ids.tolist() == [expected, [pieces["[CLS]"], pieces["[SEP]"]] + [pieces["[PAD]"]] * 6]


def test_long_texts_are_cut_at_the_text_length_and_counted(tmp_path):
    base = tiny_base(tmp_path)
    ids = encode_texts(base.tokenizer, ["红" * 20], 8)
    assert ids.shape == (1, 8)
    assert ids[0, -1] == base.tokenizer.sep_token_id
    assert count_truncated(base.tokenizer, ["红" * 20, "红" * 6, "红" * 7, ""], 8) == 2


@pytest.mark.parametrize("text", ["bert", "clip"])
def test_hidden_states_are_those_of_the_diffusers_pipeline(text, tmp_path):
    base = tiny_base(tmp_path, text)
    prompt = "红色的连衣裙" if text == "bert" else "red dress"
    ours = text_conditions(base.text_encoder, base.tokenizer, [prompt, ""], base.text_len)
    theirs = make_pipeline(base).encode_prompt(prompt, "cpu", 1, True, "")
    assert ours.shape == (2, 12, 16)
    torch.testing.assert_close(ours, torch.cat([theirs[0], theirs[1]]), rtol=0, atol=0)


def test_padding_is_read_as_the_pipeline_reads_it(tmp_path):
    """No mask: the same text padded to another length has other hidden states, so the length must be kept."""
    base = tiny_base(tmp_path)
    states = [
        hidden_states(base.text_encoder, encode_texts(base.tokenizer, ["红色"], n))[:, :4] for n in (6, 12)
    ]
    assert (states[0] - states[1]).abs().max() > 1e-3
