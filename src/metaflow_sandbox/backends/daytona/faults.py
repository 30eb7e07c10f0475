"""What Daytona's SDK and its daemon's answers raise, said in this package's errors.

The SDK has a class for most statuses, but not for all ways to fail. So errors are told apart by
status and by what caused them, never by class.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import (
    NO_PLACE,
    BackendUnavailable,
    ConnectionLost,
    NotEnforceable,
    SandboxError,
    SandboxGone,
)

_KEYS = "https://app.daytona.io/dashboard/keys"
_LIMITS = "https://app.daytona.io/dashboard/limits"
# An organisation's quota is a plain 400 or 403: only its words tell it from a bad request.
_QUOTA = re.compile(r"(limit|quota)s? (exceeded|reached)|exceed\w* \w*\s?(limit|quota)", re.I)
_NOT_STARTED = re.compile(r"is the sandbox started|sandbox is not (started|running)", re.I)
_REGION = re.compile(r"\b(region|target)\b", re.I)
_SUSPENDED = re.compile(r"suspended", re.I)
_NETWORK = re.compile(r"network|egress|allow ?list", re.I)
_RUNNERS = re.compile(r"no (available )?runners?", re.I)
_TRANSIENT = (408, 500, 502, 503, 504)


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what caused it."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error; None if there was no answer."""
    for cause in chain(error):
        for name in ("status_code", "status"):
            value = getattr(cause, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def words(error: BaseException) -> str:
    """What the server said."""
    body = getattr(error, "body", None)
    if isinstance(body, str):
        try:
            said = json.loads(body)
            message = said.get("message") or said.get("error") or said.get("errors") or body
            return ("; ".join(message) if isinstance(message, list) else str(message))[:1000]
        except (ValueError, AttributeError, TypeError, RecursionError):
            return body[:500]
    return str(error)[:1000]


def headers_of(error: BaseException) -> dict[str, str]:
    for cause in chain(error):
        found: Mapping[str, Any] | None = getattr(cause, "headers", None)
        if found:
            return {str(k).lower(): str(v) for k, v in found.items()}
    return {}


def wait_of(error: BaseException) -> float:
    """Seconds to wait after a 429, with jitter.

    The header is `Retry-After-{throttler}`, such as retry-after-sandbox-create: the longest
    counts, and none means five seconds.
    """
    found = []
    for name, value in headers_of(error).items():
        if name.startswith("retry-after"):
            try:
                found.append(float(value))
            except ValueError:
                continue
    wait = min(max(found, default=5.0), 120.0)
    return wait + random.uniform(0.05, 0.5 + wait / 4)  # noqa: S311


def is_transient(error: BaseException) -> bool:
    """Whether nothing was decided by the server: no answer, or one from before it."""
    status = status_of(error)
    return status in _TRANSIENT if status is not None else not is_local(error)


def is_unanswered(error: BaseException) -> bool:
    """Whether what was asked for may still be on its way."""
    return status_of(error) in (None, 408, 504) and not is_local(error)


def is_local(error: BaseException) -> bool:
    """Whether the SDK refused by itself."""
    return any(type(e).__module__.startswith("pydantic") for e in chain(error))


def is_quota(error: BaseException) -> bool:
    return status_of(error) in (400, 402, 403) and bool(_QUOTA.search(words(error)))


def is_gone(error: BaseException) -> bool:
    """Whether an answer about a sandbox says that it ended."""
    status = status_of(error)
    return status in (404, 410) or (status == 400 and bool(_NOT_STARTED.search(words(error))))


def as_file_error(error: BaseException, path: str) -> OSError | None:
    """The built-in exception for what is wrong with a file, if that is it."""
    text, status = words(error).lower(), status_of(error)
    if "is a directory" in text:
        return IsADirectoryError(21, f"is a directory in the sandbox: {path}")
    if "not a directory" in text:
        return NotADirectoryError(20, f"not a directory in the sandbox: {path}")
    # The last is what there is of a file that can't be opened.
    if "permission denied" in text or (
        status == 403 and ("access" in text or text.strip() == "403 forbidden")
    ):
        return PermissionError(13, f"permission denied in the sandbox: {path}")
    if "no such file" in text or (status == 404 and "file" in text):
        return FileNotFoundError(2, f"no such file in the sandbox: {path}")
    if "no space left" in text:
        return OSError(28, f"no space left in the sandbox: {path}")
    return None


def explain(error: BaseException, op: str, url: str, *, nothing_ran: bool = True) -> SandboxError:
    """One of this package's errors for one of the SDK's.

    Args:
        op: what was tried: "create", "list", …
        url: the API's, which the user may have set.
        nothing_ran: whether it is certain that none of the user's code did.
    """
    status, said = status_of(error), words(error)
    retry = True if nothing_ran else None
    if isinstance(error, SandboxError):
        return error
    # Whoever is asked for the first time may be a dashboard, or another server.
    if op == "preflight" and (status == 404 or is_local(error)):
        return BackendUnavailable(
            f"there is no API of Daytona's at {url}. If it is your own, name it by DAYTONA_API_URL "
            "with its /api: http://localhost:3000/api, say.",
            code="no_api",
            op=op,
            retryable=False,
        )
    if status is None:
        if is_local(error) or "credentials" in said.lower():
            return BackendUnavailable(f"Daytona's SDK refuses: {said}", op=op, retryable=False)
        reason = said or type(error).__name__
        message = (
            f"Daytona can't be reached at {url}: {reason}. Check the network and, if you set it, "
            "DAYTONA_API_URL."
        )
        if nothing_ran:
            return BackendUnavailable(message, op=op, retryable=True)
        return ConnectionLost(message, op=op)
    if status == 401:
        return BackendUnavailable(
            f"Daytona refuses the key in DAYTONA_API_KEY (at {url}). Make one at {_KEYS}, and "
            "export DAYTONA_API_KEY=…",
            code="unauthorized",
            op=op,
            retryable=False,
        )
    if is_quota(error):
        return SandboxError(
            f"the organisation's quota at Daytona is used up: {said} Wait until other sandboxes "
            "have ended, ask for less, run fewer at once (METAFLOW_SANDBOX_CONCURRENT="
            f"daytona=…), or raise it at {_LIMITS}.",
            code=NO_PLACE,
            op=op,
            retryable=retry,
        )
    if status == 429:
        return SandboxError(
            "Daytona's rate limit did not let a request through in time. Make fewer sandboxes a "
            f"second (METAFLOW_SANDBOX_PER_SECOND=daytona=…), or see {_LIMITS}.",
            code="rate_limited",
            op=op,
            retryable=retry,
        )
    if _SUSPENDED.search(said):
        return BackendUnavailable(
            f"Daytona has suspended the organisation: {said} See {_LIMITS}.",
            code="suspended",
            op=op,
            retryable=False,
        )
    if op == "create" and _REGION.search(said) and status in (400, 403, 404, 422):
        return BackendUnavailable(
            f"the region can't be used: {said} Set DAYTONA_TARGET to one that your organisation "
            "has, or unset it for the default.",
            code="region_unavailable",
            op=op,
            retryable=False,
        )
    if op == "create" and _NETWORK.search(said) and status in (400, 403, 422):
        return NotEnforceable(
            f"network: Daytona refuses it: {said} Leave it out, or see what your tier may have at "
            f"{_LIMITS}.",
            op=op,
            retryable=False,
        )
    if status == 403:
        return BackendUnavailable(
            f"the key in DAYTONA_API_KEY may not do this ({op}): {said} Give it the permission to "
            f"write sandboxes and snapshots, at {_KEYS}.",
            code="forbidden",
            op=op,
            retryable=False,
        )
    if status in _TRANSIENT or _RUNNERS.search(said):
        return SandboxError(
            f"Daytona could not do this now ({op}, HTTP {status}): {said} Try again; if it "
            "persists, see https://status.daytona.io.",
            code="unavailable",
            op=op,
            retryable=retry,
        )
    return SandboxError(
        f"Daytona refuses this ({op}, HTTP {status}): {said}",
        code=f"{op}_failed",
        op=op,
        retryable=False if nothing_ran else None,
    )


def gone(sandbox_id: str, why: str = "") -> SandboxGone:
    detail = f" ({why})" if why else ""
    return SandboxGone(f"the sandbox {sandbox_id} is gone{detail}", op="exec")
