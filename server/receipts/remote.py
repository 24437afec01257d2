"""Ask a running server to check a receipt: `POST /v1/receipts/verify`."""

from __future__ import annotations

import http.client
import json
import queue
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, Final

from engine import TOLERANCE, Mode, ReceiptError
from server.receipts.files import Entry
from server.receipts.report import report_of

__all__ = ["NoRedirect", "RemoteServer", "message_of"]

_PATH: Final = "/v1/receipts/verify"
_SECONDS: Final = 600.0
"""For the whole of an answer."""
_MOST_BYTES: Final = 16 << 20  # of an answer


class NoRedirect(urllib.request.HTTPRedirectHandler):
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

    def check(self, entry: Entry, mode: Mode, tolerance: float) -> dict[str, Any]:
        """Return the report about a receipt, as `CheckReport.to_json` writes it.

        Raises:
            ReceiptError: the server cannot be reached, refuses, is too slow, or answers no report about this receipt.
        """
        assert entry.receipt is not None
        request = urllib.request.Request(
            self._address(mode, tolerance), json.dumps(entry.document).encode(), {"Content-Type": "application/json"}
        )
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        return report_of(_within(_SECONDS, self.url, lambda: self._answer(request)), entry.receipt)

    def _answer(self, request: urllib.request.Request) -> bytes:
        try:
            with urllib.request.build_opener(NoRedirect).open(request, timeout=_SECONDS) as answer:
                content: bytes = answer.read(_MOST_BYTES)
                return content
        except urllib.error.HTTPError as error:
            raise ReceiptError(f"{self.url} answers {error.code}: {message_of(error)}") from None
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


def _within(seconds: float, url: str, work: Callable[[], bytes]) -> bytes:
    """Return what `work` returns, on a thread of its own: a server that sends byte after byte holds nobody up.

    Raises:
        ReceiptError: it takes longer. Its thread is left behind, and ends with the program.
    """
    found: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            found.put(work())
        except BaseException as error:
            found.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        result = found.get(timeout=seconds)
    except queue.Empty:
        raise ReceiptError(f"{url} has not answered within {seconds:g} seconds.") from None
    if isinstance(result, BaseException):
        raise result
    return result


def message_of(error: urllib.error.HTTPError) -> str:
    """Return the message of an error of the API, else the reason of its status."""
    try:
        said = json.loads(error.read(_MOST_BYTES))["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        said = None
    return said[:500] if isinstance(said, str) else f"{error.reason}."
