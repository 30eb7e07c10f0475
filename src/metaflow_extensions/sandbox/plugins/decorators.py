"""`@sandbox` and its aliases: what a user writes on a step.

The decorator checks what it was given, and puts the launcher in the place of the
task. It holds no logic of any backend and imports the host's package only in the
process that launches: this module is loaded inside every sandbox too.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from metaflow.decorators import StepDecorator
from metaflow.exception import MetaflowException
from metaflow.metaflow_config import FEAT_ALWAYS_UPLOAD_CODE_PACKAGE

from . import settings
from .tainted import WORKLOAD, inside_sandbox
from .text import printable

if TYPE_CHECKING:
    from metaflow_sandbox.launch.session import Session

# Commands that start tasks by themselves, out of our launcher's reach. Others that
# do so are caught by `task_pre_step`.
_DEPLOYERS = {"argo-workflows", "step-functions", "airflow"}


_ENVIRONMENTS = {"local", "conda", "pypi", "uv"}


class SandboxException(MetaflowException):
    headline = "Sandbox"


class SandboxDecorator(StepDecorator):
    """
    Runs a step in a disposable sandbox, with nothing of yours inside it.

    Parameters
    ----------
    backend : str, optional
        Who provides the sandbox: `bubblewrap`, `boxlite`, `docker`, `daytona`, `e2b` or one
        that another package provides. Default: METAFLOW_SANDBOX_BACKEND, else the first local
        backend that works here.
    cpu : float, optional
        Number of CPUs.
    memory : int, optional
        Memory in MB.
    disk : int, optional
        Space that the step can write, in MB.
    gpu : int, optional
        Number of GPUs.
    image : str, optional
        What the sandbox is made from.
    env : list of str or dict of str to str, optional
        Names of environment variables to pass on, or plain values. Nothing else is passed.
    network : bool or list of str, optional
        False for none, True for the public internet, or the hosts that may be reached.
    timeout : int, optional
        Seconds until the step is ended.
    trust : str or list of str, optional
        What the host may load of what the step leaves: "data" (default), names of classes, or
        "all".
    transfer : str, optional
        "relay" (default): inputs and results pass through this machine.
    setup : list of str, optional
        Shell commands that prepare the image.
    cache : bool, optional
        Whether prepared environments are kept.
    keep : str, optional
        "on-failure" keeps the sandbox of a failed step for inspection.
    executable : str, optional
        The Python interpreter inside the sandbox.
    """

    name = "sandbox"
    backend: str | None = None  # an alias names its backend here
    defaults = {
        "backend": None,
        "cpu": None,
        "memory": None,
        "disk": None,
        "gpu": None,
        "image": None,
        "env": None,
        "network": None,
        "timeout": None,
        "trust": None,
        "transfer": None,
        "setup": None,
        "cache": None,
        "keep": None,
        "executable": None,
    }
    # For @conda, which asks compute decorators: that its environment is made elsewhere, and
    # for which platform.
    supports_conda_environment = True
    target_platform = "linux-64"

    # What all sandboxed steps of a run share in the scheduler's process: a
    # `metaflow_sandbox.launch.session.Session`. Metaflow gives its hooks no other place.
    _session: Session | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Metaflow calls `init` only where a class itself defines it.
        if "init" not in cls.__dict__:
            cls.init = SandboxDecorator.init  # type: ignore[method-assign]

    def init(self) -> None:
        # Attributes end up in `_graph_info`, which every later task and every
        # viewer reads: keep the values out of it.
        self.env = self.attributes["env"]
        if isinstance(self.env, dict):
            self.attributes["env"] = sorted(self.env)
        if self.backend and self.attributes["backend"] not in (None, self.backend):
            raise SandboxException(
                f"@{self.name} is the {self.backend} backend; "
                f"backend={self.attributes['backend']!r} contradicts it. Use @sandbox(backend=…)."
            )

    def step_init(
        self,
        flow: Any,
        graph: Any,
        step: str,
        decos: list[Any],
        environment: Any,
        flow_datastore: Any,
        logger: Any,
    ) -> None:
        self.step = step
        self.flow_datastore = flow_datastore
        self.logger = logger
        _print_harmlessly(type(flow))
        self.environment = environment
        for deco in decos:
            if deco.name == "secrets":
                # It would fetch them where the step runs. The launcher does, and gives the values.
                deco.task_pre_step = lambda *args, **kwargs: None
        # There is nothing to check inside a sandbox, where Metaflow starts commands of
        # its own too (it renders cards), nor on the host for the sake of another task.
        if inside_sandbox() or not (self.system_ctx.is_launch or self.system_ctx.is_trampoline):
            return
        settings.check()
        self._refuse_deployers()
        self._refuse_companions(graph[step], decos, environment)
        if self.env is not None and not self.statically_defined:
            raise SandboxException(
                f"@{self.name} on step *{step}*: `env` can't be given by --with, since command "
                "lines are visible to every user of the machine. Write it in the flow."
            )
        from metaflow_sandbox.errors import SandboxError
        from metaflow_sandbox.launch.request import Request
        from metaflow_sandbox.launch.secrets import Secrets

        try:
            self.request = Request.from_decorator(self, decos)
            Secrets.of(decos)
            if self.request.backend and self.system_ctx.is_launch:
                self.request.check()
            if self.system_ctx.is_launch:
                from metaflow_sandbox import environments

                environments.take_over(environment, step)
        except SandboxError as e:
            raise SandboxException(f"@{self.name} on step *{step}*: {e}") from None

    def _refuse_deployers(self) -> None:
        from metaflow._vendor import click

        context = click.get_current_context(silent=True)
        while context is not None and not hasattr(context, "saved_args"):
            context = context.parent
        command = (getattr(context, "saved_args", None) or ["run"])[0]
        from metaflow.plugins import DEPLOYER_IMPL_PROVIDERS

        deployers = {d.TYPE for d in DEPLOYER_IMPL_PROVIDERS} | _DEPLOYERS
        if self.system_ctx.is_launch and command in deployers:
            raise SandboxException(
                f"`{command}` would run step *{self.step}* outside of any sandbox, since it "
                "starts tasks without Metaflow's scheduler. Run the flow with `run`, or take "
                f"@{self.name} off."
            )

    def _refuse_companions(self, node: Any, decos: list[Any], environment: Any) -> None:
        from metaflow.plugins import get_trampoline_cli_names

        compute = {"batch", "kubernetes"} | set(get_trampoline_cli_names())
        for deco in decos:
            if deco is self:
                continue
            if isinstance(deco, SandboxDecorator) or deco.name in compute:
                one, other = sorted((self.name, deco.name))
                raise SandboxException(
                    f"Step *{self.step}* has both @{one} and @{other}, and can run in only one "
                    "place. Take one of them off (a --with adds a decorator to every step)."
                )
        if node.parallel_step or node.parallel_foreach:
            raise SandboxException(
                f"Step *{self.step}* takes part in a `num_parallel` split, whose tasks talk to "
                f"each other: sandboxes can't. Use foreach, or take @{self.name} off."
            )
        if environment.TYPE not in _ENVIRONMENTS:
            raise SandboxException(
                f"--environment={environment.TYPE} is not supported for sandboxed steps: step "
                f"*{self.step}* would not get its packages. Use --environment=pypi, conda or uv, "
                "or image=…."
            )

    def runtime_init(self, flow: Any, graph: Any, package: Any, run_id: str) -> None:
        from metaflow_sandbox.errors import SandboxError
        from metaflow_sandbox.launch.session import Session

        self.package = package
        for deco in graph[self.step].decorators:
            if deco.name == "environment":
                # It would set the step's variables for our launcher on the host
                # (LD_PRELOAD, PYTHONPATH); the launcher passes them to the step.
                deco.runtime_step_cli = lambda *args, **kwargs: None
        if SandboxDecorator._session is None:
            SandboxDecorator._session = Session(flow.name, _with_specs(flow))
        try:
            SandboxDecorator._session.admit(self.step, self.request, self.environment, self.logger)
        except SandboxError as e:
            SandboxDecorator._end_session()
            raise SandboxException(f"@{self.name} on step *{self.step}*: {e}") from None
        except BaseException:  # Ctrl-C while it is made ready: Metaflow ends no run that has none
            SandboxDecorator._end_session()
            raise

    def runtime_task_created(
        self,
        task_datastore: Any,
        task_id: str,
        split_index: int | None,
        input_paths: list[str],
        is_cloned: bool,
        ubf_context: Any,
    ) -> None:
        session = self._run_session
        if is_cloned or session.package is not None:
            return
        if FEAT_ALWAYS_UPLOAD_CODE_PACKAGE:
            url, sha = self.package.package_url(), self.package.package_sha()
        else:
            url, sha = self.flow_datastore.save_data([self.package.blob], len_hint=1)[0]
        package = (self.package.package_metadata, sha, url)
        session.pack(package, self.package.user_tuples(), self.logger)

    def runtime_step_cli(
        self, cli_args: Any, retry_count: int, max_user_code_retries: int, ubf_context: Any
    ) -> None:
        if retry_count > max_user_code_retries:
            return  # the fallback of @catch runs none of the user's code
        session = self._run_session
        cli_args.commands = ["sandbox", "step"]
        cli_args.command_args.extend(session.package)
        cli_args.command_options["backend"] = session.backends[self.step]
        cli_args.command_options["workspace"] = str(session.workspace.path)
        cli_args.entrypoint[0] = sys.executable
        cli_args.entrypoint[:0] = session.client()

    def runtime_finished(self, exception: Any) -> None:
        SandboxDecorator._end_session()

    @property
    def _run_session(self) -> Session:
        if SandboxDecorator._session is None:
            raise SandboxException(f"@{self.name} on step *{self.step}*: no run has begun.")
        return SandboxDecorator._session

    @staticmethod
    def _end_session() -> None:
        session, SandboxDecorator._session = SandboxDecorator._session, None
        if session is not None:
            session.close()

    def task_pre_step(
        self,
        step_name: str,
        task_datastore: Any,
        metadata: Any,
        run_id: str,
        task_id: str,
        flow: Any,
        graph: Any,
        retry_count: int,
        max_user_code_retries: int,
        ubf_context: Any,
        inputs: Any,
    ) -> None:
        if inside_sandbox():
            return
        if retry_count <= max_user_code_retries:
            raise SandboxException(
                f"Step *{step_name}* has @{self.name} and was about to run outside of any sandbox "
                f"({WORKLOAD} is not set). Start the flow with `run` under Metaflow's own "
                "scheduler."
            )
        # What follows the last attempt is @catch's, and runs here. Decorators that the user
        # wrote would run around it, and may run the step.
        getattr(flow, step_name).__func__.wrappers = []

    def task_decorate(
        self,
        step_func: Any,
        flow: Any,
        graph: Any,
        retry_count: int,
        max_user_code_retries: int,
        ubf_context: Any,
    ) -> Any:
        names = [deco.name for deco in graph[self.step].decorators]
        fallback_comes_first = "catch" in names[: names.index(self.name)]
        return step_func if inside_sandbox() or fallback_comes_first else _refuse


def _refuse(*_: Any) -> None:
    raise SandboxException(
        "the step's own code was about to run outside of any sandbox, in the place of what "
        "follows its last attempt. Start the flow with `run`."
    )


def _print_harmlessly(flow_class: Any) -> None:
    """Has a flow's text, which Metaflow prints when a task fails, without control characters.

    The item of a foreach is in it, and a sandbox may have made that.
    """
    plain = flow_class.__str__
    if getattr(plain, "is_harmless", False):
        return

    def harmless(self: Any) -> str:
        return printable(plain(self))

    harmless.is_harmless = True  # type: ignore[attr-defined]
    flow_class.__str__ = harmless


def _with_specs(flow: Any) -> list[str]:
    """What `--with` and its kin gave to the steps of a flow, as command line arguments."""
    specs = {}
    for step in flow:
        for kind in ("decorators", "wrappers", "config_decorators"):
            for deco in getattr(step, kind, ()):
                if not deco.statically_defined and deco.inserted_by is None:
                    specs[deco.make_decorator_spec()] = True
    return list(specs)


class BubblewrapDecorator(SandboxDecorator):
    """Runs a step in a Linux sandbox on this machine. Parameters: see `@sandbox`."""

    name = backend = "bubblewrap"


class BoxliteDecorator(SandboxDecorator):
    """Runs a step in a microVM on this machine. Parameters: see `@sandbox`."""

    name = backend = "boxlite"


class DockerDecorator(SandboxDecorator):
    """
    Runs a step in a container of Docker or Podman. Parameters: see `@sandbox`, and two more.

    Parameters
    ----------
    runtime : str, optional
        What the engine runs the container by, such as "runsc" (gVisor) or "kata".
    root : str, optional
        "writable": the whole root file system can be written, on the engine's disk.
    """

    name = backend = "docker"
    defaults = {**SandboxDecorator.defaults, "runtime": None, "root": None}


class DaytonaDecorator(SandboxDecorator):
    """
    Runs a step in one of Daytona's cloud sandboxes. Parameters: those of `@sandbox`, and

    Parameters
    ----------
    snapshot : str, optional
        A snapshot of your organisation that the sandbox is made from, with its size.
    """

    name = backend = "daytona"
    defaults = {**SandboxDecorator.defaults, "snapshot": None}


class E2BDecorator(SandboxDecorator):
    """
    Runs a step in one of E2B's cloud sandboxes.

    Parameters
    ----------
    template : str, optional
        A template of your own that it is made from. All others: see `@sandbox`.
    """

    name = backend = "e2b"
    defaults = {**SandboxDecorator.defaults, "template": None}
