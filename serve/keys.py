"""API keys: made, listed and revoked here; stored as salted hashes in SQLite, or in PostgreSQL by URL.

    python -m serve.keys create --name editors --images-per-day 2000
    python -m serve.keys list
    python -m serve.keys revoke 3f9c2a51d0b7
    python -m serve.keys list --database postgresql+psycopg://user@host/name

A key is shown once, when it is made: `pp-ID-SECRET`. The secret has 256 random bits, so one round of SHA-256 over salt
and secret is as hard to turn back as the secret is to guess; slow password hashes are for what people make up.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro
from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    insert,
    select,
    update,
)
from sqlalchemy.engine import Engine
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from common.config import command, parse_options
from common.console.terminal import first_line
from common.log import say

DEFAULT_DATABASE = "sqlite:///serve.db"
WINDOWS = {60: "minute", 86400: "day"}  # seconds
Scope = Literal["generate", "edit", "admin"]

metadata = MetaData()
KEYS = Table(
    "api_keys",
    metadata,
    Column("id", String(12), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("salt", String(32), nullable=False),
    Column("hash", String(64), nullable=False),
    Column("scopes", String(100), nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("revoked", Float),
    Column("requests_per_minute", Integer, nullable=False),
    Column("requests_per_day", Integer, nullable=False),
    Column("images_per_minute", Integer, nullable=False),
    Column("images_per_day", Integer, nullable=False),
)
USAGE = Table(
    "api_usage",
    metadata,
    Column("key_id", String(12), primary_key=True),
    Column("window_seconds", Integer, primary_key=True),
    Column("window_index", BigInteger, nullable=False),
    Column("requests", Integer, nullable=False),
    Column("images", Integer, nullable=False),
)


@dataclass(frozen=True)
class Limits:
    """What a key may ask for; 0 means no limit."""

    requests_per_minute: int = 60
    requests_per_day: int = 0
    images_per_minute: int = 240
    images_per_day: int = 0

    def __post_init__(self) -> None:
        for name in LIMIT_NAMES:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (no limit) or more, not {getattr(self, name)}")


LIMIT_NAMES = ("requests_per_minute", "requests_per_day", "images_per_minute", "images_per_day")


@dataclass(frozen=True)
class ApiKey:
    """A key as the database knows it; the secret is not in it."""

    id: str
    name: str
    scopes: tuple[str, ...]
    created: float
    expires: float | None
    revoked: float | None
    limits: Limits

    def is_valid(self, now: float) -> bool:
        return self.revoked is None and (self.expires is None or now < self.expires)


def open_database(url: str) -> Engine:
    """An engine with its tables. Raises ValueError in one sentence when the URL is wrong or nothing can be written."""
    try:
        engine = create_engine(url)
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", _prepare_sqlite)
        metadata.create_all(engine)
        with engine.begin() as connection:  # that a row can be written shows now, not at the first request
            connection.execute(insert(USAGE).values(key_id="probe", window_seconds=0, **_EMPTY_WINDOW))
            connection.rollback()
    except (ArgumentError, NoSuchModuleError) as error:
        raise ValueError(f"{url!r} is no database URL: for example {DEFAULT_DATABASE}") from error
    except ModuleNotFoundError as error:
        raise ValueError(f"this database needs the package {error.name}: pip install {error.name}") from error
    except SQLAlchemyError as error:
        said = first_line(getattr(error, "orig", error))
        raise ValueError(f"the database {engine.url!r} cannot be used: {said}") from error
    return engine


_EMPTY_WINDOW = {"window_index": 0, "requests": 0, "images": 0}


def _prepare_sqlite(connection, _record) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")  # readers do not wait for the writer
    cursor.execute("PRAGMA busy_timeout=5000")
    cursor.close()


def _hash(salt: str, secret: str) -> str:
    return hashlib.sha256(bytes.fromhex(salt) + secret.encode()).hexdigest()


class KeyStore:
    """Keys and their usage in a database. `now` is in seconds since 1970."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def create(
        self,
        name: str,
        scopes: Sequence[str] = ("generate", "edit"),
        limits: Limits = Limits(),
        days: float = 0,
        now: float | None = None,
    ) -> tuple[str, ApiKey]:
        """A new key and what is stored of it; the key itself cannot be had again. days 0: it does not expire."""
        now = time.time() if now is None else now
        identifier, secret, salt = secrets.token_hex(6), secrets.token_urlsafe(32), secrets.token_hex(16)
        row = {
            "id": identifier,
            "name": name,
            "salt": salt,
            "hash": _hash(salt, secret),
            "scopes": ",".join(scopes),
            "created": now,
            "expires": now + days * 86400 if days else None,
            "revoked": None,
            **{n: getattr(limits, n) for n in LIMIT_NAMES},
        }
        with self.engine.begin() as connection:
            connection.execute(insert(KEYS).values(**row))
            for seconds in WINDOWS:
                connection.execute(
                    insert(USAGE).values(key_id=identifier, window_seconds=seconds, **_EMPTY_WINDOW)
                )
        return f"pp-{identifier}-{secret}", _to_key(row)

    def list(self) -> list[ApiKey]:
        """All keys, the oldest first."""
        with self.engine.connect() as connection:
            rows = connection.execute(select(KEYS).order_by(KEYS.c.created)).mappings()
            return [_to_key(row) for row in rows]

    def revoke(self, identifier: str, now: float | None = None) -> None:
        """Raises ValueError for a key that is unknown or revoked already."""
        now = time.time() if now is None else now
        valid = (KEYS.c.id == identifier) & KEYS.c.revoked.is_(None)
        with self.engine.begin() as connection:
            if not connection.execute(update(KEYS).where(valid).values(revoked=now)).rowcount:
                raise ValueError(f"no key {identifier!r} that could be revoked; `list` shows all")

    def verify(self, key: str, now: float | None = None) -> ApiKey | None:
        """The key's record, or None when it is unknown, wrong, expired or revoked.

        Compared in constant time; an unknown id costs the same work as a wrong secret.
        """
        now = time.time() if now is None else now
        prefix, _, rest = key.partition("-")
        identifier, _, secret = rest.partition("-")
        with self.engine.connect() as connection:
            row = connection.execute(select(KEYS).where(KEYS.c.id == identifier[:12])).mappings().first()
        salt, expected = (row["salt"], row["hash"]) if row else ("00" * 16, "0" * 64)
        same = hmac.compare_digest(_hash(salt, secret), expected)
        if not (row and same and prefix == "pp"):
            return None
        found = _to_key(row)
        return found if found.is_valid(now) else None

    def spend(self, key: ApiKey, images: int, now: float | None = None) -> float:
        """Count one request for `images` images. Returns 0.0, or the seconds to wait when a limit is reached.

        What is refused is not counted. A clock that goes backwards stays in the window it had reached.
        """
        now = time.time() if now is None else now
        mine = USAGE.c.key_id == key.id
        with self.engine.begin() as connection:
            # a write before the read: whoever counts for this key at the same time waits here, in every database
            connection.execute(update(USAGE).where(mine).values(requests=USAGE.c.requests))
            windows = []
            for row in connection.execute(select(USAGE).where(mine)).mappings().all():
                seconds = row["window_seconds"]
                index = max(int(now // seconds), row["window_index"])
                used = (row["requests"], row["images"]) if row["window_index"] == index else (0, 0)
                allowed = [
                    getattr(key.limits, f"{what}_per_{WINDOWS[seconds]}") for what in ("requests", "images")
                ]
                if any(m and u + more > m for u, more, m in zip(used, (1, images), allowed, strict=True)):
                    return max(1.0, (index + 1) * seconds - now)
                windows.append((seconds, index, used))
            for seconds, index, (requests, spent) in windows:
                values = {"window_index": index, "requests": requests + 1, "images": spent + images}
                connection.execute(
                    update(USAGE).where(mine, USAGE.c.window_seconds == seconds).values(**values)
                )
        return 0.0


def _to_key(row) -> ApiKey:
    limits = Limits(**{n: row[n] for n in LIMIT_NAMES})
    scopes = tuple(s for s in row["scopes"].split(",") if s)
    names = ("id", "name", "created", "expires", "revoked")
    return ApiKey(**{n: row[n] for n in names}, scopes=scopes, limits=limits)


@dataclass(frozen=True)
class Options:
    """Make, list and revoke API keys."""

    action: tyro.conf.Positional[Literal["create", "list", "revoke"]]
    """create shows a new key once; revoke ends one at once."""
    id: tyro.conf.Positional[str] = ""
    """The key to revoke: the part between the dashes."""
    name: str = "unnamed"
    """Who uses the key."""
    scopes: tuple[Scope, ...] = ("generate", "edit")
    """What it may do."""
    days: float = 0
    """Days until it expires; 0: never."""
    limits: Limits = Limits()
    """What it may ask for."""
    database: str = DEFAULT_DATABASE
    """SQLAlchemy URL."""

    def __post_init__(self) -> None:
        if (self.action == "revoke") != bool(self.id):
            raise ValueError("revoke needs a key's id, and create and list take none")
        if self.days < 0 or not self.scopes:
            raise ValueError("--days must be 0 or more, and --scopes needs at least one")


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, argv, description=__doc__)
    store = KeyStore(open_database(options.database))
    if options.action == "create":
        key, _ = store.create(options.name, options.scopes, options.limits, options.days)
        say(key)
        say("this key is shown once: keep it now; the database holds a salted hash")
    elif options.action == "revoke":
        store.revoke(options.id)
        say(f"revoked {options.id}")
    else:
        for key in store.list():
            state = "valid" if key.is_valid(time.time()) else "revoked" if key.revoked else "expired"
            made = time.strftime("%Y-%m-%d %H:%M", time.localtime(key.created))
            say(f"{key.id} | {key.name} | {','.join(key.scopes)} | {state} | made {made}")


if __name__ == "__main__":
    main()
