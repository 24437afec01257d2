"""Keys, balances and what was used: one database, written in transactions. Knows no HTTP, no model, no text.

    credit      adds to a key's balance
    hold        sets a request's worst case aside, or refuses: balance − held never falls below zero
    settle      ends a hold with what was really used; one row for each settled request
    release     ends a hold with nothing

Each is one transaction, and taking money is one conditional UPDATE: two requests cannot spend the same balance,
whatever runs beside them, in this process or in another. Amounts are integers, in micro-credits or tokens as the prices
say. A key without a balance is not metered: its requests are recorded, not charged.

Times are Unix seconds from the `clock` that the ledger is given.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import hmac
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ColumnElement,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    and_,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import SQLAlchemyError

from engine import InvalidParameter, Usage, VerbatimError

__all__ = [
    "Key", "Ledger", "LedgerFault", "Limits", "NewKey", "NoBalance", "Prices", "Settled", "UnknownKey", "cost_of",
    "read_since",
]  # fmt: skip

BUSY_SECONDS: Final = 5.0
"""How long a write waits for another process's."""
_PREFIX: Final = "vk-"


class LedgerFault(VerbatimError):
    """The database cannot be used: locked, full, damaged. Nothing was changed."""

    code = "ledger_fault"


class NoBalance(VerbatimError):
    """The key's balance does not cover the request."""

    code = "insufficient_balance"


class UnknownKey(VerbatimError):
    """No key has this id or name."""

    code = "unknown_key"


@dataclass(frozen=True, slots=True)
class Prices:
    """Of one token, in micro-credits. At one each, a balance counts tokens."""

    prompt: int = 1
    cached_prompt: int = 1
    completion: int = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one key; None is no limit of its own."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    context: int | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it is stored: never the secret, which nobody can show again.

    `balance`: None is not metered. `held`: of it, set aside for requests that run. `models`: empty is all of them.
    """

    id: str
    name: str
    shown: str
    created: float
    expires: float | None
    revoked: float | None
    models: tuple[str, ...]
    balance: int | None
    held: int
    limits: Limits

    def usable(self, now: float) -> bool:
        """Neither revoked nor expired."""
        return self.revoked is None and (self.expires is None or now < self.expires)


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made, with the secret that is shown this once."""

    key: Key
    secret: str


@dataclass(frozen=True, slots=True)
class Settled:
    """A request that has ended: what it used and cost, and what is needed to repeat it. Never its text."""

    request_id: str
    key_id: str
    model: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cost: int
    seed: int
    fingerprint: str
    finish_reason: str
    started: float
    ended: float


_META: Final = MetaData()
_MIGRATIONS: Final = Table("migrations", _META, Column("name", String(64), primary_key=True), Column("at", Float))
_KEYS: Final = Table(
    "keys",
    _META,
    Column("id", String(32), primary_key=True),
    Column("name", String(200), nullable=False, unique=True),
    Column("hash", String(64), nullable=False, unique=True),
    Column("shown", String(16), nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("revoked", Float),
    Column("models", Text, nullable=False, default="[]"),
    Column("balance", BigInteger),
    Column("held", BigInteger, nullable=False, default=0),
    Column("requests_per_minute", Integer),
    Column("tokens_per_minute", Integer),
    Column("concurrent", Integer),
    Column("context", Integer),
    CheckConstraint("balance IS NULL OR balance >= 0", name="no_debt"),
    CheckConstraint("held >= 0", name="no_negative_hold"),
)
_CREDITS: Final = Table(
    "credits",
    _META,
    Column("id", Integer, primary_key=True),
    Column("key_id", String(32), ForeignKey("keys.id"), nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("note", Text, nullable=False, default=""),
    Column("at", Float, nullable=False),
)
_HOLDS: Final = Table(
    "holds",
    _META,
    Column("request_id", String(64), primary_key=True),
    Column("key_id", String(32), ForeignKey("keys.id"), nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("owner", String(64), nullable=False),
    Column("at", Float, nullable=False),
)
_REQUESTS: Final = Table(
    "requests",
    _META,
    Column("request_id", String(64), primary_key=True),
    Column("key_id", String(32), ForeignKey("keys.id"), nullable=False),
    Column("model", String(200), nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("cached_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("reasoning_tokens", Integer, nullable=False),
    Column("cost", BigInteger, nullable=False),
    Column("seed", String(24), nullable=False),  # 64 bits unsigned: more than a signed integer holds
    Column("fingerprint", String(64), nullable=False),
    Column("finish_reason", String(32), nullable=False),
    Column("started", Float, nullable=False),
    Column("ended", Float, nullable=False),
    Index("requests_by_key", "key_id", "ended"),
)


def _first(connection: Connection) -> None:
    """The tables as they were first."""
    _META.create_all(connection)


_STEPS: Final[tuple[tuple[str, Callable[[Connection], None]], ...]] = (("0001-first", _first),)
"""Every change of the tables, in order; a name that was applied is never applied again."""


class Ledger:
    """The database behind keys and balances. Safe to use from several threads and processes.

    Args:
        url: SQLAlchemy's; `sqlite:///FILE` or `postgresql+psycopg://…`.
        clock: Unix seconds.
        owner: names this process among those that hold; a fresh one each start.

    Raises:
        LedgerFault: it cannot be opened, is damaged, or is of a newer version.
    """

    def __init__(self, url: str, clock: Callable[[], float], owner: str = "") -> None:
        self._clock = clock
        self.owner = owner or secrets.token_hex(8)
        with _faults():
            self._engine = _open(url)
            with self._write() as connection:
                _migrate(connection, clock)

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    # -- keys --------------------------------------------------------------------------------------------------------

    def create_key(
        self,
        name: str,
        *,
        balance: int | None = None,
        expires: float | None = None,
        models: Sequence[str] = (),
        limits: Limits = Limits(),
    ) -> NewKey:
        """A key of 256 random bits. Only its hash is kept: nobody can read the secret from the database.

        Raises:
            VerbatimError: the name is taken, or the balance is negative.
        """
        if balance is not None and balance < 0:
            raise VerbatimError(f"a balance must not be negative, and {balance} is.")
        secret = _PREFIX + secrets.token_urlsafe(32)
        row: dict[str, Any] = {
            "id": f"key_{secrets.token_hex(8)}",
            "name": name,
            "hash": _hash(secret),
            "shown": secret[:9] + "…",
            "created": self._clock(),
            "expires": expires,
            "models": json.dumps(list(models)),
            "balance": balance,
            "held": 0,
            **asdict(limits),
        }
        with self._write() as connection:
            if connection.execute(select(_KEYS.c.id).where(_KEYS.c.name == name)).first():
                raise VerbatimError(f"there is a key named {name!r} already.")
            connection.execute(insert(_KEYS).values(row))
            if balance:
                self._note_credit(connection, row["id"], balance, "at creation")
            return NewKey(self._key(connection, row["id"]), secret)

    def authenticate(self, secret: str) -> Key | None:
        """The key that a secret opens, or None. Looked up by its hash, so that time says nothing of near misses."""
        with self._read() as connection:
            row = connection.execute(select(_KEYS).where(_KEYS.c.hash == _hash(secret))).first()
        key = None if row is None or not hmac.compare_digest(row.hash, _hash(secret)) else _as_key(row)
        return key if key is not None and key.usable(self._clock()) else None

    def all_keys(self) -> list[Key]:
        """All of them, oldest first, revoked ones too."""
        with self._read() as connection:
            return [_as_key(row) for row in connection.execute(select(_KEYS).order_by(_KEYS.c.created, _KEYS.c.id))]

    def key(self, name: str) -> Key:
        """By id or name.

        Raises:
            UnknownKey: there is none.
        """
        with self._read() as connection:
            return self._key(connection, name)

    def revoke(self, name: str) -> Key:
        """From now on the key opens nothing; running requests end as they would. Its history stays."""
        with self._write() as connection:
            key = self._key(connection, name)
            if key.revoked is None:
                connection.execute(update(_KEYS).where(_KEYS.c.id == key.id).values(revoked=self._clock()))
            return self._key(connection, key.id)

    def limit(self, name: str, limits: Limits, models: Sequence[str] | None = None) -> Key:
        """Replace a key's limits; `models`: also what it may use."""
        with self._write() as connection:
            key = self._key(connection, name)
            values: dict[str, Any] = asdict(limits)
            if models is not None:
                values["models"] = json.dumps(list(models))
            connection.execute(update(_KEYS).where(_KEYS.c.id == key.id).values(values))
            return self._key(connection, key.id)

    def credit(self, name: str, amount: int, note: str = "") -> Key:
        """Add to a balance; a negative amount takes away what is there and not held. Makes a free key a metered one.

        Raises:
            NoBalance: less is free than is to be taken away.
        """
        with self._write() as connection:
            key = self._key(connection, name)
            free = func.coalesce(_KEYS.c.balance, 0) - _KEYS.c.held
            done = connection.execute(
                update(_KEYS)
                .where(and_(_KEYS.c.id == key.id, free + amount >= 0))
                .values(balance=func.coalesce(_KEYS.c.balance, 0) + amount)
            )
            if done.rowcount != 1:
                raise NoBalance(f"{key.name} has {(key.balance or 0) - key.held} to take away, not {-amount}.")
            self._note_credit(connection, key.id, amount, note)
            return self._key(connection, key.id)

    # -- requests ----------------------------------------------------------------------------------------------------

    def hold(self, key_id: str, request_id: str, amount: int) -> None:
        """Set a request's worst case aside.

        Raises:
            NoBalance: the balance does not cover it.
            UnknownKey: there is no such key, or it was revoked in between.
        """
        with self._write() as connection:
            held = connection.execute(
                update(_KEYS)
                .where(
                    and_(
                        _KEYS.c.id == key_id,
                        _KEYS.c.revoked.is_(None),
                        (_KEYS.c.balance.is_(None)) | (_KEYS.c.balance - _KEYS.c.held >= amount),
                    )
                )
                .values(held=_KEYS.c.held + amount)
            )
            if held.rowcount != 1:
                key = self._key(connection, key_id)
                if key.revoked is not None:
                    raise UnknownKey(f"the key {key.name!r} was revoked.")
                free = (key.balance or 0) - key.held
                raise NoBalance(
                    f"the key {key.name!r} has {free} left, and this request may cost {amount}. Ask for fewer tokens "
                    "(max_completion_tokens), or have it credited.",
                    available=free,
                    needed=amount,
                )
            connection.execute(
                insert(_HOLDS).values(
                    request_id=request_id, key_id=key_id, amount=amount, owner=self.owner, at=self._clock()
                )
            )

    def settle(self, row: Settled) -> None:
        """End a hold with what was used; `cost` is capped by the hold. A request that is settled stays as it is."""
        with self._write() as connection:
            amount = self._take_hold(connection, row.request_id)
            if amount is None:
                return
            metered = connection.scalar(select(_KEYS.c.balance).where(_KEYS.c.id == row.key_id)) is not None
            cost = min(row.cost, amount) if metered else 0
            connection.execute(
                update(_KEYS)
                .where(_KEYS.c.id == row.key_id)
                .values(held=_KEYS.c.held - amount, balance=_KEYS.c.balance - cost)  # null stays null
            )
            values = {name: getattr(row, name) for name in Settled.__slots__}
            connection.execute(insert(_REQUESTS).values({**values, "cost": cost, "seed": str(row.seed)}))

    def release(self, request_id: str) -> None:
        """End a hold with nothing. Does nothing if there is none."""
        with self._write() as connection:
            key_id = connection.scalar(select(_HOLDS.c.key_id).where(_HOLDS.c.request_id == request_id))
            amount = self._take_hold(connection, request_id)
            if amount is not None:
                connection.execute(update(_KEYS).where(_KEYS.c.id == key_id).values(held=_KEYS.c.held - amount))

    def release_lost(self, alive: Callable[[str], bool] | None = None, older_than: float | None = None) -> int:
        """Release the holds of processes that are gone, and those made before a time.

        Args:
            alive: whether the process with this owner's name still runs. None: no other does.

        Returns how many there were.
        """
        with self._write() as connection:
            owners = set(connection.scalars(select(_HOLDS.c.owner).distinct())) - {self.owner}
            gone = [owner for owner in owners if alive is None or not alive(owner)]
            lost: ColumnElement[bool] = _HOLDS.c.owner.in_(gone)
            if older_than is not None:
                lost = lost | (_HOLDS.c.at < older_than)
            rows = connection.execute(select(_HOLDS.c.request_id, _HOLDS.c.key_id, _HOLDS.c.amount).where(lost)).all()
            for request_id, key_id, amount in rows:
                connection.execute(delete(_HOLDS).where(_HOLDS.c.request_id == request_id))
                connection.execute(update(_KEYS).where(_KEYS.c.id == key_id).values(held=_KEYS.c.held - amount))
            return len(rows)

    # -- reports -----------------------------------------------------------------------------------------------------

    def usage(
        self, *, key: str | None = None, since: float | None = None, by: str | None = None
    ) -> list[dict[str, Any]]:
        """Sums over settled requests, one row for each key and, with `by`, each `day` (`2026-11-01`) or `model`."""
        columns: list[Any] = [_KEYS.c.name.label("key")]
        if by == "model":
            columns.append(_REQUESTS.c.model.label("model"))
        elif by == "day":
            days = _REQUESTS.c.ended / 86400
            whole = days if self._engine.dialect.name == "sqlite" else func.floor(days)  # whose cast rounds
            columns.append(func.cast(whole, Integer).label("day"))
        sums = [
            func.count().label("requests"),
            *(
                func.sum(_REQUESTS.c[name]).label(name)
                for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "cost")
            ),
        ]
        query = select(*columns, *sums).join(_KEYS, _KEYS.c.id == _REQUESTS.c.key_id)
        if key is not None:
            query = query.where(_KEYS.c.id == self.key(key).id)
        if since is not None:
            query = query.where(_REQUESTS.c.ended >= since)
        with self._read() as connection:
            rows = [dict(row._mapping) for row in connection.execute(query.group_by(*columns).order_by(*columns))]
        if by == "day":
            for row in rows:
                row["day"] = dt.datetime.fromtimestamp(row["day"] * 86400, dt.UTC).date().isoformat()
        return rows

    def check(self) -> list[str]:
        """What does not add up, in words; empty if all of it does: credits − costs = balance, holds = held."""
        problems = []
        with self._read() as connection:
            for key in (_as_key(row) for row in connection.execute(select(_KEYS))):
                credits, costs, held = (
                    connection.scalar(select(func.sum(column)).where(column.table.c.key_id == key.id)) or 0
                    for column in (_CREDITS.c.amount, _REQUESTS.c.cost, _HOLDS.c.amount)
                )
                if key.balance is not None and key.balance != credits - costs:
                    problems.append(f"{key.name}: balance {key.balance}, but credits {credits} − costs {costs}")
                if key.held != held:
                    problems.append(f"{key.name}: held {key.held}, but holds of {held}")
        return problems

    # -- the parts ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with _faults(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        """One transaction, a writer's from the start: two that read first and write then could wait for each other."""
        with _faults(), self._engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection

    def _key(self, connection: Connection, name: str) -> Key:
        row = connection.execute(select(_KEYS).where((_KEYS.c.id == name) | (_KEYS.c.name == name))).first()
        if row is None:
            raise UnknownKey(f"there is no key {name[:200]!r}.")
        return _as_key(row)

    def _note_credit(self, connection: Connection, key_id: str, amount: int, note: str) -> None:
        connection.execute(insert(_CREDITS).values(key_id=key_id, amount=amount, note=note, at=self._clock()))

    def _take_hold(self, connection: Connection, request_id: str) -> int | None:
        """Remove a hold and say how much it was; None if there is none (any more)."""
        amount: int | None = connection.scalar(select(_HOLDS.c.amount).where(_HOLDS.c.request_id == request_id))
        if amount is None or connection.execute(delete(_HOLDS).where(_HOLDS.c.request_id == request_id)).rowcount != 1:
            return None
        return amount


def _open(url: str) -> Engine:
    engine = create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
    if engine.dialect.name == "sqlite":
        file = engine.url.database
        if file and not file.startswith("file:") and file != ":memory:":
            with contextlib.suppress(OSError):  # what is wrong with it is said when it is opened
                os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite's other files take the same mode

        @event.listens_for(engine, "connect")
        def prepare(connection: Any, _: Any) -> None:
            connection.isolation_level = None  # the driver must not begin transactions of its own
            for line in (
                "PRAGMA journal_mode = WAL",
                "PRAGMA synchronous = FULL",  # a settled request survives a power cut
                "PRAGMA foreign_keys = ON",
                f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}",
            ):
                connection.execute(line)

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            writes = connection.get_execution_options().get("writes")
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _migrate(connection: Connection, clock: Callable[[], float]) -> None:
    _MIGRATIONS.create(connection, checkfirst=True)
    applied = set(connection.scalars(select(_MIGRATIONS.c.name)))
    unknown = applied - {name for name, _ in _STEPS}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise LedgerFault(f"the ledger is of a newer version: it has changes that this one does not know ({names}).")
    for name, step in _STEPS:
        if name not in applied:
            step(connection)
            connection.execute(insert(_MIGRATIONS).values(name=name, at=clock()))


@contextmanager
def _faults() -> Iterator[None]:
    """Whatever the database says, as one sentence without its statements, which hold hashes."""
    try:
        yield
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        raise LedgerFault(f"the ledger cannot be used: {str(cause).splitlines()[0][:200]}") from error


def _hash(secret: str) -> str:
    """A random key of 256 bits needs no slow hash: there is nothing to guess."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _as_key(row: Any) -> Key:
    return Key(
        row.id,
        row.name,
        row.shown,
        row.created,
        row.expires,
        row.revoked,
        tuple(json.loads(row.models)),
        row.balance,
        row.held,
        Limits(row.requests_per_minute, row.tokens_per_minute, row.concurrent, row.context),
    )


def read_since(text: str | None) -> float | None:
    """A date (`2026-11-01`, from its first second UTC) or Unix seconds, as Unix seconds.

    Raises:
        InvalidParameter: it is neither.
    """
    if text is None:
        return None
    try:
        return dt.datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=dt.UTC).timestamp()
    except ValueError:
        pass
    with contextlib.suppress(ValueError):
        if math.isfinite(seconds := float(text)):
            return seconds
    raise InvalidParameter(f"since must be a date like 2026-11-01 or Unix seconds, not {text[:100]!r}.", param="since")


def cost_of(usage: Usage, prices: Prices) -> int:
    """What a request costs; cached tokens of the prompt have a price of their own."""
    cold, cached = usage.prompt_tokens - usage.cached_tokens, usage.cached_tokens
    return cold * prices.prompt + cached * prices.cached_prompt + usage.completion_tokens * prices.completion
