"""The command `metaflow-sandbox`."""

from __future__ import annotations

import sys

import anyio
import click

from .backends import registry
from .errors import SandboxError


@click.group()
@click.version_option(package_name="metaflow-sandbox")
def main() -> None:
    """Looks after the sandboxes of Metaflow steps."""


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("name")
@click.argument("command", nargs=-1)
@click.option("--backend", default="bubblewrap", show_default=True, help="Who kept it.")
def shell(name: str, command: tuple[str, ...], backend: str) -> None:
    """Opens a shell in a sandbox like the one that a failed step had, with its files.

    NAME is what the run printed; a COMMAND runs in the place of the shell. The files
    and what runs there are the step's: what they print goes to your terminal as it is.
    """
    try:
        found = registry.load(backend)
        code = anyio.run(found.shell, name, command or ("sh",))
    except SandboxError as e:
        raise click.ClickException(str(e)) from None
    sys.exit(code)


if __name__ == "__main__":
    main()
