"""Holds answers against the published specification, where PROVIDER_SPECS names its folder.

It isn't part of this project. It is older than the installed SDK, whose models decide where the
two differ.
"""

import os
import re
from pathlib import Path

FILE = Path(os.environ.get("PROVIDER_SPECS", "/nonexistent"), "e2b-openapi.yml")
#: What SDK 2.63 has and the specification has not.
NEWER = {("post", "/v2/sandboxes"), ("post", "/v2/sandboxes/{sandboxID}/connect")}
_KINDS = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list,
    "object": dict,
}  # fmt: skip


class Specification:
    def __init__(self):
        import yaml

        self.document = yaml.safe_load(FILE.read_text())

    def problems(self, method, path, status, body):
        """What is wrong with an answer, in words; None if the request isn't specified."""
        for pattern, operations in self.document["paths"].items():
            if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", pattern), path) and method in operations:
                answers = operations[method]["responses"]
                if (found := answers.get(str(status))) is None:
                    return [f"{status} is no answer to {method} {pattern}: {[*answers]}"]
                content = self._resolve(found).get("content", {}).get("application/json")
                return [] if content is None else [*self._check(content["schema"], body, "")]
        return None

    def _resolve(self, schema):
        while "$ref" in schema:
            found = self.document
            for part in schema["$ref"].removeprefix("#/").split("/"):
                found = found[part]
            schema = found
        return schema

    def _check(self, schema, value, where):
        schema = self._resolve(schema)
        for part in schema.get("allOf", ()):
            yield from self._check(part, value, where)
        if value is None and schema.get("nullable"):
            return
        kind = schema.get("type")
        if kind and not isinstance(value, _KINDS[kind]):
            yield f"{where} is {value!r}, not {kind}"
            return
        if "enum" in schema and value not in schema["enum"]:
            yield f"{where} is {value!r}, not one of {schema['enum']}"
        if isinstance(value, dict):
            for name in set(schema.get("required", ())) - set(value):
                yield f"{where} has no {name}"
            for name, below in schema.get("properties", {}).items():
                if name in value:
                    yield from self._check(below, value[name], f"{where}.{name}")
        if isinstance(value, list) and "items" in schema:
            for number, item in enumerate(value):
                yield from self._check(schema["items"], item, f"{where}[{number}]")
