"""What E2B's SDK raises, as this package's errors.

The SDK has several unrelated roots, lets exceptions of its HTTP and RPC libraries through
from some calls, and puts "the sandbox is gone" and "your time is over" under one class. So
everything is looked at here, and the order of the questions matters.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import (
    NO_PLACE,
    BackendUnavailable,
    ConnectionLost,
    ProtocolError,
    SandboxError,
    SandboxGone,
)

KEY_REMEDY = (
    "Get one at https://e2b.dev/dashboard?tab=keys and set it where you start the flow: "
    "export E2B_API_KEY=…"
)
NETWORK_REMEDY = (
    "Check the network, HTTPS_PROXY and NO_PROXY; for a service of your own, E2B_DOMAIN or "
    "E2B_API_URL and E2B_SANDBOX_URL."
)
#: Operations of which it is certain that nothing of the user's has run when they fail.
_BEFORE = ("preflight", "create", "list", "prepare")


@contextmanager
def translated(op: str, what: str = "") -> Iterator[None]:
    """Raises what the SDK raises inside as one of our errors, or as a built-in one.

    Args:
        op: the operation, for `SandboxError.op`.
        what: the sandbox, file or template that it is about, for the message.
    """
    try:
        yield
    except (SandboxError, FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as e:
        raise translate(e, op, what) from e


def translate(e: Exception, op: str, what: str = "") -> Exception:
    """The error that stands for what the SDK raised."""
    import e2b
    import httpx

    about = f"{op} {what}".strip()
    said = str(e) or type(e).__name__
    before = True if op in _BEFORE else None
    if isinstance(e, (e2b.SandboxNotRunningException, e2b.SandboxNotFoundException)):
        return SandboxGone(f"{about}: the sandbox has ended: {_short(said)}", op=op)
    if isinstance(e, e2b.SandboxUnreachableException):
        return ConnectionLost(f"{about}: E2B's sandbox can't be reached: {_short(said)}", op=op)
    if isinstance(e, e2b.AuthenticationException) or getattr(e, "status_code", None) == 403:
        return BackendUnavailable(f"E2B refused the API key: {_short(said)}. {KEY_REMEDY}", op=op)
    if "larger than configured max" in said:  # the RPC library's, to which it is one of the limits
        return ProtocolError(f"{about}: more comes at once than E2B sends", op=op)
    if isinstance(e, e2b.RateLimitException):
        return _limited(said, op)
    if isinstance(e, e2b.ServiceBusyException):
        return SandboxError(
            f"{about}: E2B is busy: {_short(said)}. Try again later.",
            code="busy", op=op, retryable=True,
        )  # fmt: skip
    if isinstance(e, e2b.NotFoundException):
        return FileNotFoundError(errno.ENOENT, "no such file in the sandbox", what)
    if isinstance(e, e2b.NotEnoughSpaceException):
        return OSError(errno.ENOSPC, "no space is left in the sandbox", what)
    if isinstance(e, e2b.InvalidArgumentException):
        return _invalid(said, op, what)
    if isinstance(e, (httpx.ConnectError, httpx.ConnectTimeout)):
        error: type[SandboxError] = ConnectionLost if before is None else BackendUnavailable
        return error(f"E2B can't be reached ({_short(said)}). {NETWORK_REMEDY}", op=op,
                     retryable=before)  # fmt: skip
    if isinstance(e, (e2b.TimeoutException, httpx.TransportError, OSError)) or _dropped(e):
        return ConnectionLost(f"{about}: the connection to E2B dropped: {_short(said)}", op=op)
    if isinstance(e, e2b.BuildException):
        return SandboxError(f"{about}: {_short(said)}", code="build_failed", op=op, retryable=False)
    status = getattr(e, "status_code", None)
    # What isn't E2B's own, such as a gateway's page, the SDK can't read.
    unread = isinstance(e, (LookupError, ValueError, TypeError, AttributeError))
    if unread:
        said = f"something that its SDK can't read ({type(e).__name__}: {said})"
    if isinstance(e, e2b.SandboxException) or unread:
        faulty = status is None or status >= 500
        return SandboxError(
            f"{about}: E2B answered: {_short(said)}",
            code="provider_failed" if faulty else "refused", op=op,
            retryable=before if faulty else False,
        )  # fmt: skip
    return e


def _limited(said: str, op: str) -> SandboxError:
    """A 429. One kind goes away by itself; the other when somebody's sandbox ends."""
    full = "concurrent" in said
    remedy = (
        "Other runs, or other users of the account, have the rest: METAFLOW_SANDBOX_CONCURRENT="
        "e2b=… makes this one keep to a part, and E2B raises the limit on paid plans."
        if full
        else "METAFLOW_SANDBOX_PER_SECOND=e2b=… makes this run slower."
    )
    return SandboxError(
        f"E2B's limit was reached: {_short(said)}. {remedy}",
        # Others may go on making theirs for as long as they go on having them.
        code=NO_PLACE if full or op == "create" else "rate_limited", op=op, retryable=True,
    )  # fmt: skip


def _invalid(said: str, op: str, what: str) -> Exception:
    if "not a directory" in said:
        return NotADirectoryError(errno.ENOTDIR, "not a directory in the sandbox", what)
    if "directory" in said:
        return IsADirectoryError(errno.EISDIR, "a directory in the sandbox", what)
    return SandboxError(
        f"{op} {what}: E2B refused it: {_short(said)}", code="refused", op=op, retryable=False
    )


def _dropped(e: Exception) -> bool:
    """Whether a stream ended without its end: those errors have no class of their own."""
    module = type(e).__module__.partition(".")[0]
    return module in ("connectrpc", "pyqwest") or "without an end event" in str(e)


def _short(text: str) -> str:
    """The first sentence or two: the SDK's go on about its own parameters."""
    text = " ".join(text.split())
    return text if len(text) <= 240 else text[:240] + "…"
