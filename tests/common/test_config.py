"""Defaults < config file < flags, and every mistake ends in one sentence."""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from common.config import command, expand_home, from_mapping, parse_options, to_mapping


@dataclass(frozen=True)
class Inner:
    """A group."""

    lr: float = 1e-3
    """Rate."""
    kind: Literal["cosine", "linear"] = "cosine"
    """Curve."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")


@dataclass(frozen=True)
class Options:
    """All kinds of fields."""

    inner: Inner = field(default_factory=Inner)
    steps: int = 10
    """Steps."""
    folder: Path = Path("runs")
    """Folder."""
    sizes: tuple[int, ...] = (1, 2)
    """Sizes."""
    pair: tuple[float, float] = (0.5, 1.0)
    """Pair."""
    limit: int | None = None
    """Limit."""
    resume: bool = True
    """Resume."""


def write(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def test_home_is_known_behind_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    assert expand_home(["--checkpoint=~/a", "--x=~", "~/text", "--y=a~/b", "a=~/b"]) == [
        "--checkpoint=/home/x/a",
        "--x=/home/x",
        "~/text",
        "--y=a~/b",
        "a=~/b",
    ]
    assert parse_options(Options, ["--folder=~/runs"]).folder == Path("/home/x/runs")


def test_a_shipped_config_is_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="unknown option"):  # it was read
        parse_options(Options, ["--config", "configs/demo/vqgan.yaml"])
    with pytest.raises(FileNotFoundError, match=r"no config file configs/none\.yaml"):
        parse_options(Options, ["--config=configs/none.yaml"])


def test_defaults_give_way_to_the_file_and_the_file_to_flags(tmp_path):
    path = write(tmp_path / "c.yaml", "steps: 20\nsizes: [3, 4, 5]\ninner:\n  lr: 1e-4\nfolder: x/y\n")
    options = parse_options(Options, ["--config", str(path), "--steps", "30", "--inner.kind", "linear"])
    assert options == Options(
        Inner(1e-4, "linear"), steps=30, folder=Path("x/y"), sizes=(3, 4, 5), pair=(0.5, 1.0), limit=None
    )
    assert isinstance(options.inner.lr, float), "YAML reads 1e-4 as a string"
    assert parse_options(Options, [f"--config={path}"]).steps == 20


def test_a_file_of_every_field_gives_them_back(tmp_path):
    options = Options(Inner(0.2, "linear"), 7, Path("a b"), (9,), (0.0, 2.0), 3, False)
    path = write(tmp_path / "c.json", json.dumps(to_mapping(options)))
    assert parse_options(Options, ["--config", str(path)]) == options
    assert from_mapping(Options, to_mapping(options)) == options


@pytest.mark.parametrize("flags", [["--resume"], ["--resume", "True"], ["--resume", "--steps", "10"]])
def test_a_flag_alone_means_true(flags, tmp_path):
    path = write(tmp_path / "c.yaml", "resume: false\n")
    assert parse_options(Options, ["--config", str(path), *flags]).resume
    assert not parse_options(Options, ["--resume", "False"]).resume


@pytest.mark.parametrize(
    "flags", [["--resume", "false"], ["--resume=false"], ["--resume=False"], ["--resume", "FALSE"]]
)
def test_false_may_be_written_small_as_in_yaml(flags):
    assert not parse_options(Options, [*flags, "--steps", "3"]).resume
    assert parse_options(Options, ["--resume", "true", "--folder", "true"]).folder == Path("true")


@pytest.mark.parametrize("flag", [["--local_rank=1"], ["--local-rank", "1"], ["--local_rank", "1"]])
def test_the_launchers_local_rank_is_ignored(flag):
    assert parse_options(Options, [*flag, "--steps", "3"]).steps == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "unknown option stepz .known: folder, inner"),
        ("inner:\n  lrr: 3", "inner: unknown option lrr"),
        ("inner: 3", "inner must be a mapping"),
        ("steps: many", "steps must be a number, not 'many'"),
        ("steps: true", "steps must be int, not True"),
        ("resume: 3", "resume must be bool, not 3"),
        ("inner:\n  kind: round", "kind must be one of cosine, linear, not 'round'"),
        ("inner:\n  lr: -1", "lr must be above 0"),
        ("sizes: 3", "sizes must be a list"),
        ("pair: [1.0]", "pair must have 2 entries, not 1"),
        ("- 3", "must hold a mapping"),
        ("a: [", "is not valid yaml"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, text, message):
    path = write(tmp_path / "c.yaml", text)
    with pytest.raises(ValueError, match=message):
        parse_options(Options, ["--config", str(path)])


@dataclass(frozen=True)
class Stored:
    width: int
    depth: int = 1


@pytest.mark.parametrize(
    ("values", "message"), [({"depth": 2}, "c lacks width"), (None, "c must be a mapping, not None")]
)
def test_a_stored_mapping_that_is_not_whole_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        from_mapping(Stored, values, where="c")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config file .*nothing\.yaml"):
        parse_options(Options, ["--config", str(tmp_path / "nothing.yaml")])
    with pytest.raises(ValueError, match="--config needs a file"):
        parse_options(Options, ["--config"])


@pytest.mark.parametrize("columns", ["40", "200"])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--stps", "3"), "Unrecognized options: --stps, 3 (perhaps --steps); --help shows all options"),
        (("--steps", "many"), "--steps: invalid literal for int() with base 10: 'many'"),
        (("--steps",), "Missing value for argument '--steps'. Expected 1 values."),
    ],
)
def test_a_bad_flag_is_one_sentence(arguments, sentence, encoding, columns, monkeypatch):
    """However wide the terminal is, and whether it can draw boxes."""
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(ValueError) as raised:
        parse_options(Options, list(arguments))
    assert str(raised.value) == sentence


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ValueError("the size 3\n is odd"), 2, "error: the size 3 is odd"),
        (FileNotFoundError("no shards in x"), 2, "error: no shards in x"),
        (PermissionError(13, "Permission denied", "/x"), 2, "error: /x: Permission denied"),
        (ModuleNotFoundError("no", name="wandb"), 2, "error: the package wandb is not installed"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_a_user_did_ends_in_a_sentence(error, code, sentence, capsys):
    @command
    def main(argv=None):
        raise error

    with pytest.raises(SystemExit) as exit_info:
        main([])
    shown = capsys.readouterr().err
    assert exit_info.value.code == code
    assert shown.startswith(sentence) and shown.count("\n") == 1


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    @command
    def main(argv=None):
        raise argv[0]

    with pytest.raises(KeyError):
        main([KeyError("x")])
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(ValueError, match="odd"):
        main([ValueError("odd")])


def test_bytes_of_a_gbk_terminal_are_one_sentence():
    import os

    with pytest.raises(ValueError, match="is not UTF-8"):
        parse_options(Options, ["--name", os.fsdecode("红色的裙子".encode("gbk"))])


@dataclass(frozen=True)
class Renamed:
    EARLIER_NAMES: ClassVar = {"rest_s": "retry_cooldown_s"}
    retry_cooldown_s: float = 300.0


@dataclass(frozen=True)
class RenamedInside:
    remote: Renamed = Renamed()
    text: str = ""


def test_options_go_by_their_earlier_names_too(tmp_path):
    for flags in (["--remote.rest-s", "5"], ["--remote.rest_s=5"], ["--remote.retry-cooldown-s", "5"]):
        assert parse_options(RenamedInside, flags).remote.retry_cooldown_s == 5
    assert parse_options(RenamedInside, ["--text=--remote.rest-s"]).text == "--remote.rest-s"
    (tmp_path / "c.yaml").write_text("remote: {rest_s: 7}\n", "utf-8")
    assert parse_options(RenamedInside, ["--config", str(tmp_path / "c.yaml")]).remote.retry_cooldown_s == 7
