"""Holds every answer to the models of the installed SDK, and to the published specification.

A flaw is written down, and a test that finds one fails: an emulator that answers as nobody
does proves nothing.
"""

import functools
import json
import os
from pathlib import Path

import daytona_api_client_async.models as api_models
import daytona_toolbox_api_client_async.models as toolbox_models

#: Where the specification is, if it is there: it isn't part of this project.
SPECIFICATIONS = Path(os.environ.get("PROVIDER_SPECS", "/nonexistent"))
_FILES = {"api": "daytona-api.json", "toolbox": "daytona-toolbox.json"}
#: What SDK 0.226.1 has and the specification of 0.205.1 has not.
_NEWER = {"kvm", "outboundProxyUrl", "otelEndpointOverride", "sourceSandboxId"}


#: Models whose meaning is another in the specification: the SDK's decide.
_CHANGED = {"Organization", "ApiKeyList"}


class Wire:
    """Looks at answers.

    Attributes:
        flaws: what was wrong with them, in sentences.
    """

    def __init__(self):
        self.flaws = []
        self.checked = 0
        self.specified = 0

    def check(self, kind, model, value):
        """`value` as the body of an answer, of a model of the "api" or the "toolbox"."""
        self.checked += 1
        found = getattr(api_models if kind == "api" else toolbox_models, model)
        try:
            parsed = found.from_dict(json.loads(json.dumps(value)))
            for path, extra in additional(parsed):
                self.flaws.append(f"{model}{path} has {sorted(extra)}, which the SDK does not know")
        except Exception as e:
            self.flaws.append(f"{model}: {e}")
        if model not in _CHANGED and (schema := schemas(kind).get(model)) is not None:
            self.specified += 1
            for flaw in mismatches(kind, schema, value):
                self.flaws.append(f"{model}{flaw} (specification)")
        return value


def additional(model, path=""):
    """(where, names) of what a parsed model holds that is no field of it."""
    if isinstance(model, list):
        for number, item in enumerate(model):
            yield from additional(item, f"{path}[{number}]")
    elif hasattr(model, "additional_properties"):
        if model.additional_properties:
            yield path, set(model.additional_properties)
        for name in type(model).model_fields:
            yield from additional(getattr(model, name), f"{path}.{name}")


@functools.lru_cache
def schemas(kind):
    file = SPECIFICATIONS / _FILES[kind]
    if not file.exists():
        return {}
    content = json.loads(file.read_text())
    return content.get("definitions") or content["components"]["schemas"]


_TYPES = {
    "string": str, "boolean": bool, "integer": int, "number": (int, float), "object": dict,
    "array": list,
}  # fmt: skip


def mismatches(kind, schema, value, path=""):
    """Where a value is not what a schema says: types, required and unknown properties, enums."""
    if "$ref" in schema:
        yield from mismatches(kind, schemas(kind)[schema["$ref"].rpartition("/")[2]], value, path)
        return
    for part in schema.get("allOf", ()):
        yield from mismatches(kind, part, value, path)
    if value is None:
        if not schema.get("nullable") and not schema.get("x-nullable") and "type" in schema:
            yield f"{path} is null"
        return
    kinds = _TYPES.get(schema.get("type"))
    if kinds and (not isinstance(value, kinds) or (kinds is int and isinstance(value, bool))):
        yield f"{path} is {type(value).__name__}, not {schema['type']}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path} is {value!r}"
    if isinstance(value, dict) and "properties" in schema:
        for name in schema.get("required", ()):
            if name not in value:
                yield f"{path} lacks {name}"
        for name, item in value.items():
            if name in schema["properties"]:
                yield from mismatches(kind, schema["properties"][name], item, f"{path}.{name}")
            elif name not in _NEWER:
                yield f"{path} has {name}"
    if isinstance(value, list) and "items" in schema:
        for number, item in enumerate(value):
            yield from mismatches(kind, schema["items"], item, f"{path}[{number}]")
