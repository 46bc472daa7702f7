"""The text tower of the GAN: a BERT over the captions' word pieces, to one vector a caption.

It is trained along with the discriminator, whose matching-aware loss tells right captions from wrong ones (Reed et al.
2016, arXiv:1605.05396, section 4.2), or taken over frozen from a ranker made by rankers.train, where it has learned
from the same captions already. Either way its config and vocabulary are in the folder `text/` of a checkpoint.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import checkpoint
from common.files import atomic_directory
from common.text.bert_text import CaptionTokenizer

RANKER_KIND = "ranker"  # what rankers.train writes into config.json
RANKER_PREFIX = "clip.text."
RANKER_TOWERS = "towers"
FOLDER = "text"


class TextTower(nn.Module):
    """BERT, the mean over its tokens, a linear layer: as open_clip builds the text tower of a ranker."""

    def __init__(self, folder: Path, embed_dim: int) -> None:
        """`folder`: config.json and vocab.txt as common.text.bert_text writes them; the weights are random."""
        from transformers import BertConfig, BertModel

        super().__init__()
        config = BertConfig.from_pretrained(str(folder))
        self.pad_id, self.embed_dim = config.pad_token_id, embed_dim
        self.transformer = BertModel(config, add_pooling_layer=False)
        self.proj = nn.Linear(config.hidden_size, embed_dim, bias=False)

    def forward(self, text_ids: Tensor) -> Tensor:
        """text_ids (B, T) long -> (B, D) float32 of length sqrt(D), so that entries are about 1."""
        mask = (text_ids != self.pad_id).long()
        tokens = self.transformer(input_ids=text_ids, attention_mask=mask).last_hidden_state  # (B, T, W)
        weights = mask.unsqueeze(-1).to(tokens.dtype)
        mean = (tokens * weights).sum(1) / weights.sum(1)
        return F.normalize(self.proj(mean).float(), dim=-1) * self.embed_dim**0.5


def ranker_text(directory: Path) -> tuple[Path, int]:
    """Folder of the text tower and width of its vectors of a ranker's checkpoint.

    Raises ValueError where the ranker has another text tower than rankers.train builds.
    """
    model = checkpoint.read_config(directory, RANKER_KIND)["model"]
    if model.get("architecture") != "open_clip":
        raise ValueError(
            f"{directory} is a ranker with {model.get('architecture')} towers: text.ranker takes one that "
            "rankers.train built from a config"
        )
    return directory / RANKER_TOWERS, int(model["embed_dim"])


def load_ranker_weights(tower: TextTower, directory: Path) -> None:
    """The ranker's text weights into `tower`, which was built from its folder. Raises ValueError for weights that do
    not fit."""
    checkpoint.require_intact(directory)
    weights = checkpoint.read_weights(directory)
    found = {n.removeprefix(RANKER_PREFIX): t for n, t in weights.items() if n.startswith(RANKER_PREFIX)}
    own = tower.state_dict()
    wrong = sorted(set(own) - set(found)) + [
        n for n, t in own.items() if n in found and found[n].shape != t.shape
    ]
    if wrong:
        raise ValueError(
            f"{directory} holds no text tower of rankers.train: {wrong[0]} is missing or of another shape"
        )
    tower.load_state_dict({name: found[name] for name in own})


def copy_text_folder(source: Path, target: Path) -> None:
    """config.json, vocab.txt and tokenizer_config.json, whole or not at all."""
    with atomic_directory(target) as temporary:
        for name in ("config.json", "vocab.txt", "tokenizer_config.json"):
            if not (source / name).is_file():
                raise FileNotFoundError(f"{source} holds no {name}: it is no folder of a text tower")
            shutil.copyfile(source / name, temporary / name)


def open_tokenizer(folder: Path) -> CaptionTokenizer:
    """The tokenizer of a text tower's folder."""
    length = json.loads((folder / "config.json").read_text("utf-8"))["max_position_embeddings"]
    return CaptionTokenizer(folder, int(length))


def is_known(tokenizer: CaptionTokenizer, text: str) -> bool:
    """Whether the tokenizer knows a piece of `text`."""
    return any(i not in (tokenizer.unk_id,) for i in tokenizer.ids(text)[1:-1])


def tokens_of(tokenizer: CaptionTokenizer, texts: Sequence[str]) -> Tensor:
    """(B, T) long, padded to the longest; a caption without words is [CLS] [SEP], the null caption."""
    return tokenizer.batch(texts) if texts else torch.zeros(0, 2, dtype=torch.long)
