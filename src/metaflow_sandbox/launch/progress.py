"""Shows that something goes on while an image or an environment is made ready."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from ..backends.base import Say

_SHORT = 60  # characters of a line that the spinner repeats


@contextlib.contextmanager
def shown(step: str, log: Callable[[str], None]) -> Iterator[Say]:
    """Gives a `Say` whose lines are logged; on a terminal a spinner with the time runs beside them.

    Args:
        log: prints a line, and keeps it where the run's log is.
    """
    if not sys.stderr.isatty():

        async def plainly(line: str) -> None:
            log(f"Step {step}: {line}")

        yield plainly
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    # Nothing is drawn before something was said: most steps are ready at once.
    progress = Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # which prints above; but what is piped stays piped
    )
    task = progress.add_task("")
    with contextlib.ExitStack() as running:

        async def lively(line: str) -> None:
            if not progress.live.is_started:
                running.enter_context(progress)
            progress.update(task, description=f"{step}: {line}"[:_SHORT])
            log(f"Step {step}: {line}")

        yield lively
