"""Positions and vocabularies, by hand."""

import pytest
import torch

from dalle import sequence

TEXT = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 0, 0, 0], [0, 0, 0, 0, 0]])


def test_padding_is_hidden_but_the_first_position_never_is():
    mask = sequence.text_mask(TEXT, 0)
    assert mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert TEXT[2].eq(0).all()


def test_trim_drops_common_padding_alone():
    assert sequence.trim(TEXT, 0).tolist() == TEXT[:, :3].tolist()
    assert sequence.trim(sequence.null_captions(2, 7, 0), 0).shape == (2, 1)


def test_text_targets_are_the_following_tokens():
    mask, targets = sequence.text_target_mask(TEXT, 0), sequence.text_targets(TEXT, 0)
    assert mask.tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert targets.tolist() == [6, 7, 6]
    assert int(mask.sum()) == len(targets)


def test_targets_survive_trimming():
    trimmed = sequence.trim(TEXT, 0)
    assert sequence.text_targets(trimmed, 0).tolist() == sequence.text_targets(TEXT, 0).tolist()


def test_positions_text_on_the_diagonal_images_in_rows():
    table = sequence.positions(max_text_len=3, grid_size=2)
    assert table.tolist() == [[0, 0], [1, 1], [2, 2], [3, 3], [4, 4], [4, 5], [5, 4], [5, 5]]


@pytest.mark.parametrize("text_len", [1, 3])
def test_a_trimmed_text_leaves_the_image_where_it_is(text_len):
    rows = torch.arange(8)
    text, image = (rows[r] for r in sequence.input_rows(text_len, 3, 4))
    assert text.tolist() == list(range(text_len)) and image.tolist() == [3, 4, 5, 6]


def test_attention_bias_by_hand():
    bias = sequence.attention_bias(torch.tensor([[True, True], [True, False]]), 2, torch.float32)
    seen = (bias[:, 0] == 0).int().tolist()
    assert seen[0] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert seen[1] == [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    assert sequence.attention_bias(torch.ones(2, 2, dtype=torch.bool), 2, torch.float32) is None


def test_key_bias_is_the_last_row_of_attention_bias():
    visible = torch.tensor([[True, True, False], [True, False, False]])
    full = sequence.attention_bias(visible, 4, torch.float32)
    assert torch.equal(sequence.key_bias(visible, 4, torch.float32)[:, 0, 0], full[:, 0, -1])
