"""Words that mean nothing, put into captions in training."""

import torch

from dalle.training.captions import insert_unknown

PAD, SIZE = 0, 50
ROWS = torch.tensor([[2, 7, 8, 3, 0, 0], [2, 9, 3, 0, 0, 0], [2, 7, 8, 9, 6, 3], [0, 0, 0, 0, 0, 0]])
KEYS = ["a", "b", "c", "d"]


def test_a_piece_comes_between_the_marks_and_the_rest_moves():
    places, pieces = set(), set()
    for step in range(300):
        found = insert_unknown(ROWS, KEYS, PAD, SIZE, 1.0, (0, step))
        assert torch.equal(found[2:], ROWS[2:]), "full and empty rows stay"
        for before, after in zip(ROWS[:2].tolist(), found[:2].tolist(), strict=True):
            old, new = [i for i in before if i], [i for i in after if i]
            assert len(new) == len(old) + 1 and new[0] == 2 and new[-1] == 3
            place = next(i for i in range(1, len(new)) if new[:i] + new[i + 1 :] == old)
            places.add((len(old), place))
            pieces.add(new[place])
    assert {(4, 1), (4, 2), (4, 3), (3, 1), (3, 2)} <= places
    assert PAD not in pieces and max(pieces) < SIZE and len(pieces) > 40


def test_the_share_and_the_choice():
    rows, keys = ROWS[:1].repeat(2000, 1), [f"{i}" for i in range(2000)]
    found = insert_unknown(rows, keys, PAD, SIZE, 0.3, (0, 1))
    changed = (found != rows).any(1)
    assert 0.26 < float(changed.float().mean()) < 0.34
    assert torch.equal(found[:7], insert_unknown(rows[:7], keys[:7], PAD, SIZE, 0.3, (0, 1))), "of any batch"
    assert not torch.equal(found, insert_unknown(rows, keys, PAD, SIZE, 0.3, (0, 2)))
    assert insert_unknown(rows, keys, PAD, SIZE, 0.0, (0, 1)) is rows
