"""`@secrets`: fetched on this machine, with its credentials. A sandbox gets the values alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from metaflow import metaflow_config
from metaflow.exception import MetaflowException
from metaflow.plugins.secrets.secrets_spec import SecretSpec
from metaflow.plugins.secrets.utils import (
    get_secrets_backend_provider,
    validate_env_vars,
    validate_env_vars_across_secrets,
)

from ..errors import SandboxError
from .request import InvalidParameter


@dataclass(frozen=True)
class Secrets:
    """What a step's @secrets names.

    Attributes:
        specs: Metaflow's, one for each source.
        override: whether they may replace other variables of the step.
    """

    specs: tuple[Any, ...] = ()
    override: bool = False

    @classmethod
    def of(cls, decorators: Iterable[Any]) -> Secrets:
        """Reads a step's decorators. Nothing is fetched.

        Raises:
            InvalidParameter: a source is none, or nobody here can fetch it.
        """
        for deco in decorators:
            if deco.name == "secrets":
                given = deco.attributes
                role = given["role"] or metaflow_config.DEFAULT_SECRETS_ROLE
                try:
                    specs = tuple(_spec(source, role) for source in given["sources"])
                except MetaflowException as e:
                    raise InvalidParameter(f"@secrets: {e}") from None
                return cls(specs, bool(given["allow_override"]))
        return cls()

    def fetch(self, taken: Collection[str]) -> dict[str, str]:
        """The variables that they stand for, with their values. Blocking.

        Args:
            taken: the step's other variables.

        Raises:
            SandboxError: one can't be had, or has a name that another has.
        """
        found = []
        for spec in self.specs:
            provider = get_secrets_backend_provider(spec.secrets_backend_type)
            try:
                values = provider.get_secret_as_dict(
                    spec.secret_id, options=spec.options, role=spec.role
                )
                validate_env_vars(values)
            except Exception as e:  # of a client of some cloud
                raise SandboxError(
                    f"@secrets: {spec} can't be fetched on this machine: {e}", op="stage"
                ) from None
            found.append((spec, values))
        try:
            validate_env_vars_across_secrets(found)
        except MetaflowException as e:
            raise SandboxError(f"@secrets: {e}", op="stage") from None
        merged = {name: value for _, values in found for name, value in values.items()}
        if own := sorted(name for name in merged if name.startswith("MF_")):
            raise SandboxError(f"@secrets: {own[0]} is Metaflow's own name", op="stage")
        if not self.override and (both := sorted(merged.keys() & set(taken))):
            raise SandboxError(
                f"@secrets gives {both[0]}, and so does @environment or env= of the step. Leave "
                "one out, or let the secret win: @secrets(allow_override=True).",
                op="stage",
            )
        return merged


def _spec(source: Any, role: str | None) -> Any:
    if isinstance(source, str):
        spec = SecretSpec.secret_spec_from_str(source, role=role)
    elif isinstance(source, dict):
        spec = SecretSpec.secret_spec_from_dict(source, role=role)
    else:
        raise InvalidParameter(f"@secrets: the source {source!r} is neither a string nor a dict")
    get_secrets_backend_provider(spec.secrets_backend_type)
    return spec
