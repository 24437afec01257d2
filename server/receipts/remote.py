"""Ask a running server to check a receipt: `POST /v1/receipts/verify`."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import IO, Any, Final

from engine import TOLERANCE, Mode, ReceiptError

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
                return report_of(answer.read(_MOST_BYTES))
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
    if (
        not isinstance(report, dict)
        or report.get("verdict") not in _VERDICTS
        or not isinstance(report.get("choices"), list)
    ):
        raise ReceiptError("the server's answer is no report about a receipt.")
    return report


def _message(error: urllib.error.HTTPError) -> str:
    """Return the message of an error of the API, else the reason of its status."""
    try:
        said = json.loads(error.read(_MOST_BYTES))["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        said = None
    return said[:500] if isinstance(said, str) else f"{error.reason}."
