"""What a decorator asks for, checked: first by itself, then against a backend."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from metaflow import metaflow_config
from metaflow.plugins.timeout_decorator import get_run_time_limit_for_task

from metaflow_extensions.sandbox.plugins.tainted import class_names

from ..backends import registry
from ..backends.base import Backend, SandboxSpec, network_kind
from ..egress.rules import Rules, is_address
from ..errors import NotEnforceable, SandboxError

#: Seconds that a step which has a @timeout may go on after it, to record its failure.
TIMEOUT_MARGIN = 60
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


class InvalidParameter(SandboxError):
    """A parameter of the decorator has a value that can't be meant."""

    code = "invalid_parameter"


def _number(name: str, value: Any, unit: str, whole: bool = True, least: float = 0) -> Any:
    try:
        number = float(value) if not isinstance(value, bool) else float("nan")
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not 0 < number < 1e15 or (whole and number != int(number)):
        kind = "a whole number" if whole else "a number"
        raise InvalidParameter(f"{name}={value!r}: give {kind} of {unit} above 0.")
    if number < least:
        raise InvalidParameter(f"{name}={value!r}: give at least {least:g} {unit}.")
    return int(number) if whole else number


def _text(name: str, value: Any, example: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidParameter(f'{name}={value!r}: give a string such as {name}="{example}".')
    return value


def _choice(name: str, value: Any, choices: Mapping[str, str | None]) -> str:
    """One of `choices`; a choice that can't be had yet maps to the reason."""
    if not isinstance(value, str) or value not in choices:
        known = " or ".join(f'"{c}"' for c, reason in choices.items() if not reason)
        raise InvalidParameter(f"{name}={value!r}: give {known}.")
    if reason := choices[value]:
        raise NotEnforceable(f"{name}={value!r} {reason}")
    return str(value)


def _environment(value: Any) -> tuple[str, ...] | dict[str, str]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise InvalidParameter(
            f"env={type(value).__name__}: give a list of variables to pass on, "
            'such as env=["OPENAI_API_KEY"], or a dict of plain values.'
        )
    names = list(value)
    for name in names:
        if not isinstance(name, str) or not _VARIABLE.match(name):
            raise InvalidParameter(
                f"env: {name!r} is not a name of an environment variable. Give names such as "
                '["OPENAI_API_KEY"].'
            )
        if name.startswith(("METAFLOW_", "MF_")):
            raise InvalidParameter(
                f"env: {name} is Metaflow's own and is set for the step. Leave it out."
            )
    if isinstance(value, Mapping):
        for name, content in value.items():
            if not isinstance(content, str) or "\0" in content:
                raise InvalidParameter(f"env: the value of {name} is not a string. Give one.")
        return dict(value)
    return tuple(names)


def _spoken(value: Any) -> Any:
    """A boolean that came as text: `--with` knows only "false", and Metaflow hands on "False"."""
    return {"true": True, "false": False}.get(value.lower(), value) if type(value) is str else value


def _network(value: Any) -> bool | tuple[str, ...]:
    value = _spoken(value)
    if isinstance(value, bool):
        return value
    hosts = [value] if isinstance(value, str) and ("." in value or ":" in value) else value
    if not isinstance(hosts, (list, tuple)) or not hosts:
        raise InvalidParameter(
            f"network={value!r}: give False, True or a list of hosts, "
            'such as network=["api.openai.com"].'
        )
    if not all(isinstance(host, str) for host in hosts):
        raise InvalidParameter(f"network={value!r}: give hosts as strings.")
    try:
        rules = Rules(tuple(hosts))
    except ValueError as e:
        raise InvalidParameter(
            f"{e}. Give each host as api.openai.com or *.openai.com, without scheme, port and "
            "path; network=True is every host."
        ) from None
    from ..egress.addresses import is_public

    for host in rules.hosts or ():
        public = is_public(host) if is_address(host) else "." in host
        if not public:
            raise InvalidParameter(
                f"network: {host} is not on the public internet, and a sandbox reaches nothing "
                "else. Leave it out."
            )
    return rules.hosts or ()


def _list_of_text(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise InvalidParameter(f"{name}={value!r}: give a list of shell commands.")
    return tuple(value)


def _flag(name: str, value: Any) -> bool:
    value = _spoken(value)
    if not isinstance(value, bool):
        raise InvalidParameter(f"{name}={value!r}: give True or False.")
    return value


def _trust(value: Any) -> str | tuple[str, ...]:
    """ "data", "all", or names of classes: a list, or a string where there are dots in it."""
    if value in ("data", "all"):
        return str(value)
    if isinstance(value, str) and "." not in value:
        raise InvalidParameter(
            f'trust={value!r}: give "data", "all", or names of classes such as ["pkg.Result"], '
            'or ["__main__.Result"] for one of the flow\'s own file.'
        )
    try:
        return class_names(value)
    except ValueError as e:
        raise InvalidParameter(f"trust: {e}.") from None


_TRANSFER: dict[str, str | None] = {
    "relay": None,
    "direct": "is not there yet: leave it out, and inputs and results pass through this machine.",
}
_CHECKS: dict[str, Callable[[Any], Any]] = {
    "backend": lambda v: _text("backend", v, "bubblewrap"),
    "cpu": lambda v: _number("cpu", v, "CPUs", whole=False, least=0.01),
    "memory": lambda v: _number("memory", v, "megabytes", least=64),
    "disk": lambda v: _number("disk", v, "megabytes"),
    "gpu": lambda v: _number("gpu", v, "GPUs"),
    "image": lambda v: _text("image", v, "python:3.12-slim"),
    "env": _environment,
    "network": _network,
    "timeout": lambda v: _number("timeout", v, "seconds"),
    "trust": _trust,
    "transfer": lambda v: _choice("transfer", v, _TRANSFER),
    "setup": lambda v: _list_of_text("setup", v),
    "cache": lambda v: _flag("cache", v),
    "keep": lambda v: _choice("keep", v, {"on-failure": None}),
    "executable": lambda v: _text("executable", v, "python3"),
}
_INSTEAD = {
    "setup": " Programs and libraries come with @conda(packages=…) and --environment=conda, too, "
    "which need no root.",
}
_AMOUNTS = ("cpu", "memory", "disk", "gpu", "shared_memory")


@dataclass(frozen=True)
class Request:
    """The parameters of one step's sandbox. None: the user didn't ask.

    `wishes` names the amounts that only come from @resources, as `shared_memory` always
    does: a backend that can't enforce these applies what it can, and says so. `options`
    are the parameters that only one backend has.
    """

    backend: str | None = None
    cpu: float | None = None
    memory: int | None = None
    disk: int | None = None
    gpu: int | None = None
    shared_memory: int | None = None
    image: str | None = None
    env: tuple[str, ...] | dict[str, str] = ()
    network: bool | tuple[str, ...] | None = None
    timeout: int | None = None
    trust: str | tuple[str, ...] = "data"
    transfer: str = "relay"
    setup: tuple[str, ...] = ()
    cache: bool | None = None
    keep: str | None = None
    executable: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    step_timeout: int | None = None
    wishes: frozenset[str] = frozenset()

    @classmethod
    def from_decorator(cls, deco: Any, decos: Iterable[Any]) -> Request:
        """Reads a decorator, its siblings @resources and @timeout, and the configuration.

        Raises:
            InvalidParameter, NotEnforceable: with what to write instead.
        """
        given = dict(deco.attributes)
        given["env"] = deco.env
        given["backend"] = deco.backend or given["backend"]
        if given["backend"] is None:
            given["backend"] = metaflow_config.SANDBOX_BACKEND or None
        if given["trust"] is None:
            given["trust"] = metaflow_config.SANDBOX_TRUST
        given = {k: v for k, v in given.items() if v is not None}
        values = {k: _CHECKS[k](v) for k, v in given.items() if k in _CHECKS}
        own = {k: _text(k, v, "…") for k, v in given.items() if k not in _CHECKS}
        values["options"] = own
        wishes = set()
        for other in decos:
            if other.name == "resources":
                for name in _AMOUNTS:
                    asked = other.attributes.get(name)
                    if name in other._user_defined_attributes and asked not in (None, 0, "0"):
                        amount = _number(f"@resources {name}", asked, "units", name != "cpu")
                        if name not in values:
                            wishes.add(name)
                        values[name] = max(values.get(name, 0), amount)
            elif other.name == "timeout":
                values["step_timeout"] = int(get_run_time_limit_for_task(decos))
        return cls(**values, wishes=frozenset(wishes))

    @property
    def deadline(self) -> float:
        """Seconds after which the launcher ends the step, whatever goes on inside."""
        limits = [self.timeout, self.step_timeout and self.step_timeout + TIMEOUT_MARGIN]
        return min(
            (float(limit) for limit in limits if limit),
            default=float(metaflow_config.DEFAULT_RUNTIME_LIMIT),
        )

    def variables(self) -> dict[str, str]:
        """The variables that `env=` stands for, with their values.

        Raises:
            InvalidParameter: one that is to be passed on isn't set here.
        """
        if isinstance(self.env, dict):
            return self.env
        for name in self.env:
            if name not in os.environ:
                raise InvalidParameter(
                    f"env: {name} is not set where the flow was started: export {name}=…"
                )
        return {name: os.environ[name] for name in self.env}

    def check(self, backend: Backend | None = None) -> tuple[Request, list[str]]:
        """Holds the request against what a backend can enforce on this machine.

        Returns:
            The request without the wishes that can't be fulfilled, and a sentence
            for each of those.

        Raises:
            BackendUnavailable: there is no such backend.
            NotEnforceable: something was asked that it can't enforce.
        """
        backend = backend or registry.load(self.backend or "")
        limits = backend.limits()
        dropped: dict[str, Any] = {}
        notes = []
        for name in _AMOUNTS:
            value = getattr(self, name)
            if value is None or getattr(limits, name):
                continue
            if name in self.wishes:
                dropped[name] = None
                notes.append(f"{name}={value} of @resources can't be enforced by {backend.name}.")
                continue
            raise NotEnforceable(
                f"{name}={value} can't be enforced by {backend.name} here. Leave it out, or choose "
                "a backend that can: `metaflow-sandbox doctor` shows what each has."
            )
        asked = {
            "image": (self.image, limits.image),
            "setup": (self.setup, limits.setup),
            "keep": (self.keep, limits.keep),
            "executable": (self.executable, limits.image),
        }
        for name, (value, can) in asked.items():
            if value and not can:
                raise NotEnforceable(
                    f"{name} can't be had from {backend.name}. Leave it out, or choose a backend "
                    "that has it: `metaflow-sandbox doctor` shows what each has."
                    f"{_INSTEAD.get(name, '')}"
                )
        for name in sorted(set(self.options) - set(backend.options)):
            raise NotEnforceable(f"{backend.name} has no parameter {name}. Leave it out.")
        network = self.network
        if network is not None and network_kind(network) not in limits.network:
            raise NotEnforceable(
                f"network={network!r} can't be had from {backend.name}, which gives: "
                f"{', '.join(limits.network)}. Leave it out, or choose another backend."
            )
        if isinstance(network, (list, tuple)) and backend.hosts_remark:
            notes.append(backend.hosts_remark)
        if self.cache is False and backend.keeps_builds:
            raise NotEnforceable(
                f"cache=False can't be had from {backend.name}: what is built there stays, and the "
                "next run finds it by what is in it. Leave it out; delete what is to be built anew."
            )
        if self.cache is False and self.keep:
            raise NotEnforceable(
                "keep can't be had with cache=False: what is kept is looked at with the step's "
                "environment, which is removed when the run ends. Leave cache=False out; "
                "--force-rebuild-environments builds anew, too, and keeps what it built."
            )
        longest = backend.longest_step
        if longest is not None and self.deadline > longest:
            if self.timeout or self.step_timeout:
                raise NotEnforceable(
                    f"a step of {self.deadline:.0f} s can't be had from {backend.name}, which ends "
                    f"it after {longest:.0f} s. Give it a smaller timeout. "
                    f"{backend.longest_step_remedy}"
                )
            dropped["timeout"] = int(longest)
            notes.append(
                f"it is ended after {longest:.0f} s, since {backend.name} ends its sandboxes then. "
                f"{backend.longest_step_remedy}"
            )
        request = replace(self, **dropped)
        amounts = {name: getattr(request, name) for name in _AMOUNTS}
        backend.refuse(
            SandboxSpec(**amounts, image=self.image, network=network, options=self.options)
        )
        return request, notes
