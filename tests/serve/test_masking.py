"""Personal data masked in prompts, and words that are denied."""

import os

import pytest

from serve.masking import DenyList, mask


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("红色T恤,电话13812345678", "红色T恤,电话[telephone]"),
        ("打 138-1234-5678 或 +86 138 1234 5678", "打 [telephone] 或 [telephone]"),
        ("１３８１２３４５６７８", "[telephone]"),
        ("座机 010-62345678", "座机 [telephone]"),
        ("身份证11010519491231002X的人", "身份证[identity card]的人"),
        ("110105 19491231 002x", "[identity card]"),
        ("卡号 6222 0212 3456 7895 转账", "卡号 6222 0212 3456 7895 转账"),  # fails Luhn
        ("卡号 4111 1111 1111 1111 转账", "卡号 [bank card] 转账"),
        ("写给 Zhang.San+shop@example.com.cn 吧", "写给 [e-mail] 吧"),
        ("尺码 180/96A 货号 20231115001 3件", "尺码 180/96A 货号 20231115001 3件"),
        ("", ""),
    ],
)
def test_personal_data_are_masked_and_product_numbers_stay(text, expected):
    assert mask(text) == expected


def test_the_check_digit_decides_what_is_an_identity_card():
    assert "[identity card]" not in mask("110105194912310021")


def test_denied_words_are_found_in_disguise(tmp_path):
    path = tmp_path / "deny.txt"
    path.write_text("# words\n枪支\nBadWord  # and why\n\n", "utf-8")
    deny = DenyList(path)
    for text in ("一把枪支", "枪 支", "枪\u200b支", "ＢＡＤＷＯＲＤ", "bad\tword"):
        assert deny.find(text), text
    assert deny.find("红色连衣裙") is None
    assert DenyList(None).find("枪支") is None


def test_the_list_is_read_again_when_it_changes(tmp_path):
    path = tmp_path / "deny.txt"
    path.write_text("甲", "utf-8")
    deny = DenyList(path)
    path.write_text("乙乙", "utf-8")
    os.utime(path, ns=(1, 1))
    deny.reload()
    assert deny.find("乙乙") and not deny.find("甲")
    path.unlink()
    with pytest.raises(FileNotFoundError):
        deny.reload()
    assert deny.find("乙乙")  # the list that was read stays in force
