"""Every error that this package raises on purpose.

    SandboxError                infrastructure failed; has a code, an operation and a remedy
    ├── BackendUnavailable      the backend can't be used here (not installed, forbidden, no key)
    ├── NotEnforceable          the backend can't give what the decorator asked for
    ├── SandboxGone             the sandbox ended while it was in use
    ├── ConnectionLost          its connection dropped, and it may go on
    └── ProtocolError           what came out of a sandbox is not what the agent sends
    Rejected                    admission refused what a sandbox delivered

The built-in exceptions keep their meaning: `TimeoutError` for a deadline,
`FileNotFoundError`, `PermissionError` and `IsADirectoryError` for files in a
sandbox. A command that exits with a non-zero code is a result, not an error.
"""

from __future__ import annotations

#: The code of a `SandboxError` that passes when somebody's sandbox ends, in minutes or hours.
NO_PLACE = "no_place"
#: The code of a `BackendUnavailable` whose user never meant to use it: no key, SDK or program.
NOT_SET_UP = "not_set_up"


class SandboxError(Exception):
    """A fault of the infrastructure, never of the user's code.

    Args:
        message: what failed, on what, and how to mend it; shown to the user as it is.
        code: stable, short, for programs: "backend_unavailable", "create_failed", …
        op: the operation that failed: "preflight", "create", "exec", "read", …
        retryable: True or False when it is certain that the user's code did not
            run and the same call may succeed later (or will not); None when it
            can't be known, so that nothing is ever run twice on a guess.
    """

    code = "sandbox_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        op: str = "",
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.code
        self.op = op
        self.retryable = retryable


class BackendUnavailable(SandboxError):
    """The backend can't be used on this machine, or with this account."""

    code = "backend_unavailable"


class NotEnforceable(SandboxError):
    """The backend can't enforce a parameter that the decorator was given."""

    code = "not_enforceable"


class SandboxGone(SandboxError):
    """The sandbox ended while something still used it."""

    code = "sandbox_gone"


class ConnectionLost(SandboxError):
    """The connection to a sandbox dropped. What ran there may go on; nothing is run again."""

    code = "connection_lost"


class ProtocolError(SandboxError):
    """A stream that should come from the agent breaks the agent's protocol."""

    code = "protocol"


class Rejected(Exception):
    """Admission refuses what a sandbox delivered; nothing of it was recorded."""
