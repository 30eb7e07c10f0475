"""`flow.py sandbox step`: the launcher of one attempt, started by Metaflow's scheduler."""

from __future__ import annotations

import sys
from typing import Any

from metaflow._vendor import click


@click.group()
def cli() -> None:
    pass


@cli.group(help="Commands related to sandboxes.")
def sandbox() -> None:
    pass


@sandbox.command(
    hidden=True,
    help="Run a single task in a sandbox. Metaflow calls this; you normally don't.",
)
@click.argument("step-name")
@click.argument("code-package-metadata")
@click.argument("code-package-sha")
@click.argument("code-package-url")
@click.option("--backend", required=True, help="Who provides the sandbox.")
@click.option("--scheduler", type=int, default=None, help="Process id of the scheduler.")
@click.option("--workspace", required=True, help="The run's directory on this machine.")
@click.option("--run-id", required=True)
@click.option("--task-id", required=True)
@click.option("--input-paths", default="")
@click.option("--split-index", type=int, default=None)
@click.option("--clone-run-id", default=None)
@click.option("--tag", multiple=True, default=None)
@click.option("--namespace", default=None)
@click.option("--retry-count", type=int, default=0)
@click.option("--max-user-code-retries", type=int, default=0)
@click.option("--ubf-context", default=None)
@click.pass_context
def step(ctx: Any, **options: Any) -> None:
    from metaflow_sandbox.launch.main import launch

    sys.exit(launch(ctx, options))
