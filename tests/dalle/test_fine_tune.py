"""--init: a generator goes on from another one's weights, and what must be the same."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny_data import write_image_tokenizer, write_made, write_token_shards

import train_dalle
from common.checkpoint import read_config, read_weights
from dalle.model import KIND
from vq.model import ImageTokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """images/, tokenizer/, tokens/, and first/: a run of 4 steps."""
    folder = write_made(tmp_path_factory.mktemp("made"))
    sizes = ("--model.dim", "16", "--model.num-layers", "2", "--model.num-heads", "2", "--max-text-len", "24")
    tokenizer = ("--image-tokenizer", str(folder / "tokenizer"))
    assert train_dalle.main([*flags(folder, folder / "first", *sizes, *tokenizer), "--optim.name", "muon"])
    return folder


def flags(made: Path, run_dir: Path, *more: str, steps: int = 4) -> list[str]:
    return [
        *("--data", str(made / "tokens"), "--loop.run-dir", str(run_dir), "--loop.num-steps", str(steps)),
        *("--loop.global-batch-size", "8", "--loop.log-every", "1", "--loop.tensorboard", "False"),
        *(
            "--num-workers",
            "0",
            "--device",
            "cpu",
            "--sample-images",
            "0",
            "--optim.warmup-steps",
            "2",
            *more,
        ),
    ]


def refusal(capsys, arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        train_dalle.main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_it_starts_where_the_other_ended(made, tmp_path):
    still = ("--optim.lr", "1e-12", "--ema-decay", "0", "--model.dropout", "0.1")
    train_dalle.main(flags(made, tmp_path / "run", "--init", str(made / "first"), *still, steps=1))
    before, after = read_weights(made / "first" / "latest"), read_weights(tmp_path / "run" / "latest")
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)
    config = read_config(tmp_path / "run" / "latest", KIND)["model"]
    assert (config["dim"], config["max_text_len"], config["dropout"]) == (16, 24, 0.1)


def test_a_started_run_goes_on_from_its_own_checkpoint(made, tmp_path):
    arguments = flags(made, tmp_path / "run", "--init", str(made / "first"), "--loop.save-every", "2")
    train_dalle.main(arguments)
    whole = read_weights(tmp_path / "run" / "latest")
    shutil.rmtree(tmp_path / "run" / "step_00000004")
    train_dalle.main(arguments)
    again = read_weights(tmp_path / "run" / "latest")
    assert all(torch.equal(again[n], whole[n]) for n in whole)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--init", "{made}/nowhere"), "no checkpoint directory"),
        (("--init", "{made}/tokenizer"), "kind 'image_tokenizer', not 'generator'"),
        (
            ("--init", "{made}/first", "--model.dim", "32"),
            "has dim 16, not 32: leave sizes and tokenizers out",
        ),
        (("--init", "{made}/first", "--max-text-len", "40"), "has max_text_len 24, not 40"),
        (("--init", "{made}/first", "--image-tokenizer", "{made}/other"), "codes of its own image tokenizer"),
        (
            ("--init", "{made}/first", "--new-codes"),
            "new_codes needs --init GENERATOR and the --image-tokenizer",
        ),
        (("--init", "{made}/first", "--text-tokenizer", "{made}/chars"), "cuts captions otherwise"),
    ],
)
def test_what_does_not_fit_is_one_sentence(more, said, made, tmp_path, capsys):
    if not (made / "other").is_dir():
        write_image_tokenizer(made / "other", seed=1)
        write_token_shards(made / "other_tokens", made / "images", made / "other")
        from dalle.text_tokenizer import TextTokenizer

        (made / "chars").mkdir()
        texts = ["盘盘盘盘圆圆一个红色的", "黑黑黑绿绿蓝"]  # the same characters, other ids
        TextTokenizer.train(texts, vocab_size=60, model_type="char").save(made / "chars")
    arguments = flags(made, tmp_path / "run", *(m.format(made=made) for m in more))
    if "other" in " ".join(more):
        arguments[1] = str(made / "other_tokens")
    assert said in refusal(capsys, arguments)


def test_codes_of_a_tokenizer_that_was_trained_on_are_taken_when_said(made, tmp_path):
    """A generator of one tokenizer's codes goes on with another's; the checkpoint carries the new one."""
    write_image_tokenizer(tmp_path / "later", seed=2)
    write_token_shards(tmp_path / "tokens", made / "images", tmp_path / "later")
    new = ("--init", str(made / "first"), "--image-tokenizer", str(tmp_path / "later"), "--new-codes")
    arguments = flags(made, tmp_path / "run", *new, "--optim.lr", "1e-12", "--ema-decay", "0", steps=1)
    arguments[1] = str(tmp_path / "tokens")
    train_dalle.main(arguments)
    before, after = read_weights(made / "first" / "latest"), read_weights(tmp_path / "run" / "latest")
    torch.testing.assert_close(after["image_embed.weight"], before["image_embed.weight"], rtol=0, atol=1e-6)
    carried = ImageTokenizer.from_pretrained(tmp_path / "run/latest/image_tokenizer")
    assert carried.codes_sha256 == ImageTokenizer.from_pretrained(tmp_path / "later").codes_sha256
