"""The command `metaflow-sandbox`, and what `flow.py sandbox` has in common with it."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import anyio
import click

from . import cache, manage
from .backends import registry
from .errors import NOT_SET_UP, SandboxError


@click.group()
@click.version_option(package_name="metaflow-sandbox")
def main() -> None:
    """Looks after the sandboxes of Metaflow steps."""


@main.command("list")
@click.option("--backend", multiple=True, help="Only this one; may be given more than once.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def list_command(backend: tuple[str, ...], as_json: bool) -> None:
    """Lists the living sandboxes of every installed backend."""
    show(backend, {}, as_json)


@main.command()
@click.argument("ids", nargs=-1, required=True)
@click.option("--backend", multiple=True, help="Look only there.")
def kill(ids: tuple[str, ...], backend: tuple[str, ...]) -> None:
    """Ends sandboxes by their ids, as `list` shows them. Their steps fail."""
    end(ids, backend, {})


@main.command()
@click.option("--backend", multiple=True, help="Look only there.")
@click.option("--dry-run", is_flag=True, help="Only say what would be ended.")
def gc(backend: tuple[str, ...], dry_run: bool) -> None:
    """Ends sandboxes whose time is over, or whose run has ended, of this user on this machine.

    And removes what such runs left on this machine, and environments beyond what the cache may
    have.
    """
    with plainly():
        try:
            collect(backend, {}, dry_run)
        finally:  # a backend in trouble has nothing to do with the cache
            if not dry_run:
                manage.sweep(backend or registry.names())
                for entry in cache.bound():
                    click.echo(f"removed the environment {entry.key} ({entry.bytes >> 20} MB)")


@main.group(invoke_without_command=True, name="cache")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.pass_context
def cache_command(context: click.Context, as_json: bool) -> None:
    """Lists the environments that were built on this machine.

    Those that were not used for longest go when all have more than METAFLOW_SANDBOX_CACHE
    megabytes.
    """
    if context.invoked_subcommand is None:
        with plainly():
            _show_cache(cache.entries(), as_json)


@cache_command.command("clear")
@click.argument("keys", nargs=-1)
def clear_command(keys: tuple[str, ...]) -> None:
    """Removes the environments with these KEYS, or all; not those that a run uses."""
    with plainly():
        removed, kept = cache.clear(set(keys) if keys else None)
        if missing := set(keys) - {entry.key for entry in (*removed, *kept)}:
            raise click.ClickException(f"there is no environment {', '.join(sorted(missing))}")
    size = sum(entry.bytes for entry in removed)
    click.echo(f"removed {len(removed)}, which had {size >> 20} MB")
    for entry in kept:
        click.echo(f"{entry.key} is in use")


@main.command()
@click.argument("backends", nargs=-1)
def doctor(backends: tuple[str, ...]) -> None:
    """Says of each backend whether it works here, and what to do if it doesn't.

    Exits with 0 if the named BACKENDS work; without names, if one does that a plain
    @sandbox would use.
    """
    names = backends or tuple(dict.fromkeys([*registry.PROMISED, *registry.names()]))
    working = set()
    for name in names:
        examined = anyio.run(manage.examine, name)
        if examined.problem is None:
            working.add(name)
        mark = click.style("works", fg="green") if name in working else "no"
        click.echo(f"{name}: {mark}")
        for line in (examined.problem or "\n".join(examined.lines)).splitlines():
            click.echo(f"    {line}")
    wanted = set(backends) <= working if backends else working & set(registry.local_order())
    sys.exit(0 if wanted else 1)


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("name")
@click.argument("command", nargs=-1)
@click.option("--backend", default="bubblewrap", show_default=True, help="Who kept it.")
def shell(name: str, command: tuple[str, ...], backend: str) -> None:
    """Opens a shell in a sandbox like the one that a failed step had, with its files.

    NAME is what the run printed; a COMMAND runs in the place of the shell. The files
    and what runs there are the step's: what they print goes to your terminal as it is.
    """
    with plainly():
        enter(backend, name, command)


@main.command()
@click.argument("artifact")
@click.option("--trust", "classes", multiple=True, help="A class that may be in it; repeatable.")
@click.option("--all", "everything", is_flag=True, help="Load it as Metaflow loads any other.")
@click.option("--yes", is_flag=True, help="Don't ask.")
def release(artifact: str, classes: tuple[str, ...], everything: bool, yes: bool) -> None:
    """Lets an artifact that a sandbox wrote be loaded on this side, after showing what it names.

    ARTIFACT is FLOW/RUN/STEP/TASK/NAME. Without --trust or --all, the classes are those
    that it names. Their code, and whatever it is given, then runs where the artifact is loaded.
    --all runs whatever program the sandbox wrote.
    """
    from . import release as releasing

    try:
        found = releasing.find(artifact)
        click.echo(f"{artifact}")
        click.echo(f"    written as    {found.origin}, in a sandbox")
        click.echo(f"    type          {found.kind}, as the sandbox says")
        click.echo(f"    size          {found.size:,} bytes, as {found.encoding}")
        click.echo(f"    loaded now    {'no: ' + found.refused if found.refused else 'yes'}")
        click.echo(f"    may have      {', '.join(found.classes) or 'data only'}")
        nothing = "nothing" if found.refused else "nothing but data"
        click.echo(f"    names         {', '.join(found.names) or nothing}")
        wanted = None if everything else releasing.chosen(found, classes)
        asked = "Run it as the program that it may be, wherever it is loaded from now on?"
        if wanted is not None:
            asked = f"Load {', '.join(wanted)} out of it from now on?"
        if not yes:
            click.confirm(asked, abort=True)
        changed, kept = releasing.release(found, wanted)
    except SandboxError as e:
        raise click.ClickException(str(e)) from None
    for path in changed:
        click.echo(f"released {path}")
    if kept:
        click.echo(
            "The metadata service keeps its own records, so Metaflow's client goes on refusing it; "
            "steps, resume and dump do not. In a notebook: metaflow_sandbox.trusting(…).",
            err=True,
        )


@contextlib.contextmanager
def plainly(error: type[Exception] = click.ClickException) -> Iterator[None]:
    """Raises errors of ours as one that a command line prints without a traceback."""
    try:
        yield
    except SandboxError as e:
        raise error(str(e)) from None


def _show_cache(entries: list[cache.Entry], as_json: bool) -> None:
    if as_json:
        for entry in entries:
            click.echo(json.dumps(asdict(entry)))
        return
    if entries:
        rows = [("KEY", "MB", "LAST USED", "WHAT")]
        for e in entries:
            rows.append((e.key, str(e.bytes >> 20), _age(e.used), e.description))
        _table(rows)
    total = sum(entry.bytes for entry in entries)
    click.echo(f"{total >> 20} of {cache.limit() >> 20} MB in {cache.directory()}")


# --- what both commands do


def show(backends: tuple[str, ...], labels: Mapping[str, str], as_json: bool) -> None:
    """Prints the living sandboxes that have these labels."""
    found, problems = anyio.run(manage.find, backends or registry.names(), labels)
    if as_json:
        for item in found:
            click.echo(json.dumps(item.as_dict()))
    elif found:
        rows = [("BACKEND", "ID", "AGE", "STEP")]
        rows += [(f.backend, f.info.id, _age(f.info.created), f.pathspec) for f in found]
        _table(rows)
    _report(problems, backends)


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = zip(row, widths, strict=True)
        click.echo("  ".join(cell.ljust(width) for cell, width in cells).rstrip())


def end(ids: tuple[str, ...], backends: tuple[str, ...], labels: Mapping[str, str]) -> None:
    """Ends the sandboxes with these ids."""
    found, problems = anyio.run(manage.find, backends or registry.names(), labels)
    known = {f.info.id: f for f in found}
    failures = _destroy([known[sandbox_id] for sandbox_id in ids if sandbox_id in known])
    if missing := [i for i in ids if i not in known]:
        failures.append(f"there is no sandbox {', '.join(missing)}")
    _report(problems, backends, failures)


def collect(backends: tuple[str, ...], labels: Mapping[str, str], dry_run: bool) -> None:
    """Ends the sandboxes that nobody wants, or says which.

    Raises:
        SandboxError: it can't be known which runs live.
    """
    found, problems = anyio.run(manage.orphans, backends or registry.names(), labels)
    failures = []
    if dry_run:
        for item in found:
            click.echo(f"would end {item.backend} {item.info.id} ({item.pathspec})")
    else:
        failures = _destroy(found)
    _report(problems, backends, failures)


def enter(backend: str, name: str, command: tuple[str, ...]) -> None:
    """Runs a command, or a shell, in what was kept of a sandbox; exits with its exit code.

    Raises:
        SandboxError: there is no such sandbox, or no terminal for a shell.
    """
    if not command and not sys.stdin.isatty():
        raise SandboxError(
            f"there is no terminal for a shell: give a command, such as {name} sh -c 'ls; pwd'",
            op="shell",
        )
    argv = command[1:] if command[:1] == ("--",) else command
    sys.exit(anyio.run(registry.load(backend).shell, name, argv or ("sh",)))


def _destroy(found: Sequence[manage.Found]) -> list[str]:
    """Ends sandboxes, and says which live on: one that can't be ended keeps no other alive."""
    failures = []
    for item in found:
        what = f"{item.backend} {item.info.id} ({item.pathspec})"
        try:
            anyio.run(manage.destroy, item)
            click.echo(f"ended {what}")
        except SandboxError as e:
            failures.append(f"{what} lives on: {e}")
    return failures


def _report(
    problems: Mapping[str, SandboxError], named: tuple[str, ...], failures: Sequence[str] = ()
) -> None:
    """Says what went wrong. Exits with 1 after a failure, or if a named backend wasn't asked."""
    for name, problem in problems.items():
        if problem.code == NOT_SET_UP and name not in named:
            continue  # whoever doesn't use it has nothing there
        click.echo(f"{name} could not be asked: {problem}", err=True)
    for failure in failures:
        click.echo(failure, err=True)
    if failures or set(problems) & set(named):
        sys.exit(1)


def _age(created: float | None) -> str:
    if created is None:
        return "?"
    seconds = max(0, int(time.time() - created))
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds % 60:02}s"


if __name__ == "__main__":
    main()
