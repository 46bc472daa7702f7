"""Options of every command: frozen dataclasses, read as defaults < `--config FILE` < flags.

The file is YAML or JSON and has the schema of the dataclass: an unknown key is an error, never ignored.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import shutil
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from common.console.progress import QUIET
from common.console.terminal import first_line, make_streams_safe
from common.files import DISK_FULL, shipped

Options = TypeVar("Options")


def parse_options(
    cls: type[Options],
    argv: Sequence[str] | None = None,
    description: str = "",
    embedded: Path | None = None,
) -> Options:
    """Build `cls` from the command line; `argv` defaults to `sys.argv[1:]`.

    `embedded`: the config file of the embedded default, read when neither a config nor data of one's own are named.

    Nested dataclasses become `--group.field`; `--flag` alone means `--flag True`. `--local_rank`, which the deepspeed
    launcher inserts, is dropped: processes read their rank from the environment.
    `--quiet` is every command's: no progress bars and no messages, see common/console/progress.py.
    Raises ValueError or FileNotFoundError for a bad file, ValueError for a flag that is unknown or has a bad value.
    """
    import tyro

    args = _drop_local_rank(expand_home(sys.argv[1:] if argv is None else argv))
    args = _take_quiet(args)
    _require_text(args)
    path, args = _take_config_flag(args)
    if path is None and not any(a.startswith(("--data", "--image-folder")) for a in args):
        path = embedded
    values = read_mapping(path) if path else {}
    default = from_mapping(cls, values, where=str(path)) if path else None
    kwargs = {} if default is None else {"default": default}
    description = f"{description.strip()}\n\n{OF_EVERY_COMMAND}"
    args = _complete_bare_flags(
        _with_present_flags(args, dict(_earlier_flags(cls))), set(_boolean_flags(cls))
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                cls, args=args, description=description, config=(tyro.conf.FlagConversionOff,), **kwargs
            )
    except SystemExit as stop:
        if stop.code != 2:
            raise
        raise ValueError(_from_box(said.getvalue())) from None


OF_EVERY_COMMAND = (
    "Every command takes --config FILE, and --quiet: no progress and no messages but errors and results."
)


def _take_quiet(args: list[str]) -> list[str]:
    """Without `--quiet`, which is noted for this process and those that it starts."""
    kept = [arg for arg in args if arg != "--quiet"]
    if len(kept) < len(args):
        os.environ[QUIET] = "1"
    return kept


def _from_box(text: str) -> str:
    """tyro's box of explanations as one sentence: what is wrong, and which flag it may have been.

    A title, alone or in the box's upper border, then sections between lines of dashes: the first one says it.
    """
    sections: list[list[str]] = [[]]
    for line in (line.strip(" \u2502") for line in text.splitlines()):
        if line.startswith(("\u256d", "\u2570")) or set(line) <= {"\u2500", "-"}:
            sections.append([])
        else:
            sections[-1].append(line)
    title_is_bare = "\u256d" not in text
    said, *others = [section for section in sections if any(section)][title_is_bare:] or [["bad options"]]
    message = re.sub(r"^Error parsing (\w*Options: )?", "", " ".join(said).strip())
    flags = [line.split()[0] for section in others for line in section if line.startswith("--")]
    message += f" (perhaps {' or '.join(dict.fromkeys(flags))})" if "Perhaps" in text and flags else ""
    return f"{message}; --help shows all options" if message.startswith("Unrecognized") else message


def _earlier_flags(cls: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(earlier, present) `--flag` of every option that its class names in EARLIER_NAMES."""
    annotated = typing.get_type_hints(cls, include_extras=True)
    for earlier, name in getattr(cls, "EARLIER_NAMES", {}).items():
        yield tuple(f"--{prefix}{n}".replace("_", "-") for n in (earlier, name))
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from _earlier_flags(kind, f"{prefix}{name}.")
            if annotated[name] is not kind:
                yield from _earlier_flags(kind, prefix)


def _with_present_flags(args: list[str], renamed: dict[str, str]) -> list[str]:
    """Earlier names of flags by their present ones, in `--flag value` and `--flag=value`."""
    parts = [arg.partition("=") for arg in args]
    return [_present_flag(flag, renamed) + equals + value for flag, equals, value in parts]


def _present_flag(flag: str, renamed: dict[str, str]) -> str:
    """`--earlier` and, where that is a group, `--earlier.field`."""
    name, dot, field = flag.replace("_", "-").rpartition(".")
    whole = renamed.get(name + dot + field)
    return whole or (renamed[name] + dot + field if name in renamed else flag)


def _boolean_flags(cls: type, prefix: str = "") -> Iterator[str]:
    """`--flag` of every field that is True or False; an annotated group may go without its name."""
    annotated = typing.get_type_hints(cls, include_extras=True)
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from _boolean_flags(kind, f"{prefix}{name}.")
            if annotated[name] is not kind:
                yield from _boolean_flags(kind, prefix)
        elif kind is bool:
            yield f"--{prefix}{name}".replace("_", "-")


_BOOLEANS = {"true": "True", "false": "False"}


def _complete_bare_flags(args: list[str], boolean: set[str]) -> list[str]:
    """`--flag` alone is True; true and false may be written small, as in YAML."""
    result: list[str] = []
    for arg in args:
        if result and _normal(result[-1]) in boolean:  # what follows is its value, or it stood alone
            if arg.lower() in _BOOLEANS:
                result.append(_BOOLEANS[arg.lower()])
                continue
            result.append("True")
        name, equals, value = arg.partition("=")
        if equals and _normal(name) in boolean:
            arg = f"{name}={_BOOLEANS.get(value.lower(), value)}"
        result.append(arg)
    if result and _normal(result[-1]) in boolean:
        result.append("True")
    return result


def _normal(flag: str) -> str:
    return flag.replace("_", "-")


def _require_text(args: Sequence[str]) -> None:
    """Raises ValueError for bytes that are no text in the terminal's encoding, as GBK terminals send them."""
    for arg in args:
        try:
            arg.encode()
        except UnicodeEncodeError as error:
            data = os.fsencode(arg)
            raise ValueError(
                f"the argument {arg[:40].encode(errors='replace').decode()!r} is not UTF-8 ({data[:8]!r}, GBK?): "
                "set the terminal to UTF-8, or put texts into a UTF-8 file (--prompts-file) and go into the folder"
            ) from error


def expand_home(args: Sequence[str]) -> list[str]:
    """`--flag=~/x` as a shell expands `--flag ~/x`; `~` stays where nobody knows the home."""
    flags = (re.match(r"(--[\w.-]+=)(~.*)", arg, re.DOTALL) for arg in args)
    return [m[1] + os.path.expanduser(m[2]) if m else arg for arg, m in zip(args, flags, strict=True)]


def _drop_local_rank(args: list[str]) -> list[str]:
    kept, skip = [], False
    for arg in args:
        if skip:
            skip = False
        elif arg in ("--local_rank", "--local-rank"):
            skip = True
        elif not arg.startswith(("--local_rank=", "--local-rank=")):
            kept.append(arg)
    return kept


def _take_config_flag(args: list[str]) -> tuple[Path | None, list[str]]:
    for i, arg in enumerate(args):
        if arg == "--config":
            if i + 1 == len(args):
                raise ValueError("--config needs a file: --config configs/goods_128/vqgan.yaml")
            return shipped(args[i + 1]), args[:i] + args[i + 2 :]
        if arg.startswith("--config="):
            return shipped(arg.removeprefix("--config=")), args[:i] + args[i + 1 :]
    return None, args


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file. Raises ValueError naming the file when it holds anything else."""
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"no config file {path}")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        kind = path.suffix[1:] or "yaml"
        raise ValueError(f"{path} is not valid {kind}: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of option names to values, not {type(values).__name__}")
    return values


def from_mapping(cls: type[Options], values: dict[str, Any], where: str = "config") -> Options:
    """A dataclass from nested mappings, recursively. Raises ValueError for what is no mapping, for unknown keys (it
    names the known ones) and for missing ones without a default."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a mapping, not {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    renamed = getattr(cls, "EARLIER_NAMES", {})  # of options, for one release
    values = {renamed.get(name, name): value for name, value in values.items()}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{where}: unknown option {', '.join(unknown)} (known: {', '.join(sorted(fields))})")
    none = dataclasses.MISSING
    needed = {name for name, f in fields.items() if f.default is none and f.default_factory is none}
    if missing := sorted(needed - set(values)):
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    kwargs = {}
    for name, value in values.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            kwargs[name] = from_mapping(kind, value, where=f"{where}: {name}")
        else:
            kwargs[name] = _coerce(kind, value, f"{where}: {name}")
    return cls(**kwargs)


def _coerce(kind: Any, value: Any, where: str) -> Any:
    """JSON and YAML know no tuples or paths, and YAML reads `1e-4` as a string: convert, and refuse other types."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{where} must be one of {', '.join(map(str, args))}, not {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} must be a list, not {value!r}")
        kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
        if len(kinds) != len(value):
            raise ValueError(f"{where} must have {len(kinds)} entries, not {len(value)}")
        return tuple(_coerce(k, v, where) for k, v in zip(kinds, value, strict=True))
    if args and type(None) in args:  # Optional
        inner = [a for a in args if a is not type(None)]
        return None if value is None else _coerce(inner[0], value, where)
    if kind is Path:
        return Path(value)
    try:
        if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return float(value)
        if kind is int and isinstance(value, str):
            return int(value)
    except ValueError as error:
        raise ValueError(f"{where} must be a number, not {value!r}") from error
    if isinstance(kind, type) and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise ValueError(f"{where} must be {kind.__name__}, not {value!r}")
    return value


def to_mapping(config: Any) -> dict[str, Any]:
    """A dataclass as JSON-ready nested dictionaries; `from_mapping` reads them back."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def command(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command's `main(argv=None)`: what a user did wrong ends in one sentence and exit code 2.

    ValueError and OSError are such mistakes by our convention (STYLE: errors); anything else is our bug and keeps its
    traceback. `TRACEBACK=1` shows it for the former too.
    """

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> Any:
        make_streams_safe()
        try:
            return main(argv)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            if os.environ.get("TRACEBACK") == "1":
                raise
            print(f"error: {_one_sentence(error)}", file=sys.stderr, flush=True)
            raise SystemExit(2) from error
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            raise SystemExit(130) from None

    return wrapper


def _one_sentence(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is not installed: pip install -r requirements.txt"
    if isinstance(error, OSError) and error.errno in DISK_FULL and "disk full" not in str(error):
        return _full_disk(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _full_disk(error: OSError) -> str:
    """Which file, and how much is free where: the file is not always named by who failed to write it."""
    name = error.filename
    folders = [Path(str(name)).parent] if name else [Path(), Path(tempfile.gettempdir())]
    free = []
    for folder in folders:
        with contextlib.suppress(OSError):
            free.append(f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB are free in {folder.resolve()}")
    where = f"disk full while writing {name}" if name else "disk full"
    return f"{where}: {' and '.join(free)}; free some space there and run the same command again"
