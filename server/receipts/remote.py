"""Ask a running server to check a receipt: `POST /v1/receipts/verify`."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import IO, Any, Final

from engine import TOLERANCE, Mode, ReceiptError, worst

__all__ = ["RemoteServer", "report_of"]

_PATH: Final = "/v1/receipts/verify"
_SECONDS: Final = 600.0
_MOST_BYTES: Final = 16 << 20  # of an answer
_VERDICTS: Final = ("identical", "reproduced", "consistent", "refuted", "not_checkable")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would take the key to another server."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        return None


@dataclass(frozen=True, slots=True)
class RemoteServer:
    """A server that checks receipts. `url`: with or without `/v1`; `key`: the API key, if it wants one."""

    url: str
    key: str | None = None

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ReceiptError(f"--url must begin with http:// or https://, unlike {self.url!r:.100}.")

    def check(self, document: dict[str, Any], mode: Mode, tolerance: float) -> dict[str, Any]:
        """Return the report about a receipt or an envelope, as `CheckReport.to_json` writes it.

        Raises:
            ReceiptError: the server cannot be reached, or refuses.
        """
        request = urllib.request.Request(
            self._address(mode, tolerance), json.dumps(document).encode(), {"Content-Type": "application/json"}
        )
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=_SECONDS) as answer:
                return report_of(_read(answer))
        except urllib.error.HTTPError as error:
            raise ReceiptError(f"{self.url} answers {error.code}: {_message(error)}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ReceiptError(f"{self.url} cannot be asked: {str(reason) or type(error).__name__:.200}.") from None

    def _address(self, mode: Mode, tolerance: float) -> str:
        base = self.url.rstrip("/").removesuffix("/v1")
        given = {
            **({"mode": mode} if mode != "verify" else {}),
            **({"tolerance": tolerance} if tolerance != TOLERANCE else {}),
        }
        return f"{base}{_PATH}?{urllib.parse.urlencode(given)}".rstrip("?")


def report_of(data: bytes) -> dict[str, Any]:
    """Return the report that a server has sent; ReceiptError if it is none."""
    try:
        report = json.loads(data)
    except (ValueError, RecursionError):
        report = None
    if not _is_report(report):
        raise ReceiptError("the server's answer is no report about a receipt.")
    return report  # type: ignore[no-any-return]


def _read(answer: IO[bytes]) -> bytes:
    """Read an answer whole, within `_MOST_BYTES` and `_SECONDS`, however slowly it comes."""
    data, end = b"", time.monotonic() + _SECONDS
    while len(data) < _MOST_BYTES and (part := answer.read1(1 << 16)):  # type: ignore[attr-defined]
        data += part
        if time.monotonic() > end:
            raise TimeoutError("its answer takes too long")
    return data


_NUMBERS: Final = ("largest_difference", "score")
_COUNTS: Final = ("index", "tokens", "drawn", "different")


def _is_report(report: Any) -> bool:
    """Whether JSON is a report whose every value has its type, and whose verdict is the worst of its choices'."""
    if not isinstance(report, dict) or not all(isinstance(report.get(n), str) for n in ("id", "digest", "sentence")):
        return False
    environment, choices = report.get("environment"), report.get("choices")
    if report.get("verdict") not in _VERDICTS or not isinstance(environment, list) or not isinstance(choices, list):
        return False
    if not all(isinstance(line, str) for line in environment) or not all(_is_choice(choice) for choice in choices):
        return False
    return not choices or report["verdict"] == worst(choice["verdict"] for choice in choices)


def _is_choice(choice: Any) -> bool:
    if not isinstance(choice, dict) or choice.get("verdict") not in _VERDICTS:
        return False
    counts = all(type(choice.get(name)) is int for name in _COUNTS)
    numbers = all(choice.get(name) is None or isinstance(choice[name], int | float) for name in _NUMBERS)
    first = choice.get("first")
    if first is None:
        return counts and numbers
    texts = ("expected_text", "drawn_text")
    return (
        counts
        and numbers
        and isinstance(first, dict)
        and type(first.get("position")) is int
        and all(first.get(name) is None or isinstance(first[name], str) for name in texts)
    )


def _message(error: urllib.error.HTTPError) -> str:
    """Return the message of an error of the API, else the reason of its status."""
    try:
        said = json.loads(error.read(_MOST_BYTES))["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        said = None
    return said[:500] if isinstance(said, str) else f"{error.reason}."
