"""`flow.py sandbox …`: the commands that Metaflow's scheduler and the launcher start."""

from __future__ import annotations

from pathlib import Path
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
def step(**options: Any) -> None:
    raise click.UsageError("Metaflow's scheduler runs this, through the run's supervisor.")


@sandbox.command(
    hidden=True,
    help="Host the sandboxed tasks of a run. Their first client starts this; you don't.",
)
@click.option("--workspace", required=True, help="The run's directory on this machine.")
@click.option("--scheduler", type=int, required=True, help="Process id of the scheduler.")
@click.option("--ready", type=int, required=True, help="Descriptor that is told of the start.")
@click.pass_context
def supervise(ctx: Any, workspace: str, scheduler: int, ready: int) -> None:
    from metaflow_sandbox.launch.supervisor import supervise

    def parse(words: list[str]) -> dict[str, Any]:
        options: dict[str, Any] = step.make_context("step", words, parent=ctx.parent).params
        return options

    supervise(ctx, parse, Path(workspace), scheduler, ready)


@sandbox.command("list", help="List the living sandboxes of this flow.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_context
def list_command(ctx: Any, as_json: bool) -> None:
    from metaflow_sandbox import cli

    cli.show((), {"metaflow-flow": ctx.obj.flow.name}, as_json)


@sandbox.command(help="End sandboxes of this flow by their ids. Their steps fail.")
@click.argument("ids", nargs=-1, required=True)
@click.pass_context
def kill(ctx: Any, ids: tuple[str, ...]) -> None:
    from metaflow_sandbox import cli

    cli.end(ids, (), {"metaflow-flow": ctx.obj.flow.name})


@sandbox.command(help="End sandboxes of this flow that nobody wants any more.")
@click.option("--dry-run", is_flag=True, help="Only say what would be ended.")
@click.pass_context
def gc(ctx: Any, dry_run: bool) -> None:
    from metaflow_sandbox import cli

    with cli.plainly(click.ClickException):  # Metaflow has a click of its own
        cli.collect((), {"metaflow-flow": ctx.obj.flow.name}, dry_run)


@sandbox.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    help="Open a shell with the files of a failed task: RUN/STEP/TASK.",
)
@click.argument("task")
@click.argument("command", nargs=-1)
@click.option("--backend", default="bubblewrap", help="Who kept it.")
def shell(task: str, command: tuple[str, ...], backend: str) -> None:
    from metaflow_sandbox import cli

    with cli.plainly(click.ClickException):  # Metaflow has a click of its own
        cli.enter(backend, task, command)
