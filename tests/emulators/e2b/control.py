"""The control plane: REST with JSON. Every answer is one that the installed SDK's models read."""

import asyncio
import importlib
import json
import secrets
import tempfile
from dataclasses import replace
from urllib.parse import parse_qsl, unquote

from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .cloud import ENVD_VERSION, Refused, now

_PAGE = 100
_LOG_PAGE = 100


def checked(model, body):
    """A body that the SDK's own model takes, with nothing in it that it doesn't know."""
    name = "".join(f"_{c.lower()}" if c.isupper() else c for c in model).lstrip("_")
    module = importlib.import_module(f"e2b.api.client.models.{_FILES.get(model, name)}")
    read = getattr(module, model).from_dict(json.loads(json.dumps(body)))
    assert not read.additional_properties, f"{model} has no {read.additional_properties}"
    return body


_FILES = {"TemplateRequestResponseV3": "template_request_response_v3"}


def answer(model, body, status=200, headers=None):
    return JSONResponse(checked(model, body), status, headers)


def refusal(error):
    body = checked("Error", {"code": error.status, "message": error.message})
    return JSONResponse(body, error.status, error.headers)


class Control:
    """The routes of one account."""

    def __init__(self, cloud):
        self.cloud = cloud
        routes = [
            ("POST", "/v2/sandboxes", self.create),
            ("GET", "/v2/sandboxes", self.list),
            ("POST", "/v2/sandboxes/{id}/connect", self.connect),
            ("POST", "/sandboxes/{id}/connect", self.connect),
            ("GET", "/sandboxes/{id}", self.info),
            ("DELETE", "/sandboxes/{id}", self.kill),
            ("POST", "/sandboxes/{id}/timeout", self.set_timeout),
            ("POST", "/sandboxes/{id}/pause", self.pause),
            ("GET", "/sandboxes/{id}/metrics", self.metrics),
            ("PUT", "/sandboxes/{id}/network", self.network),
            ("GET", "/templates/aliases/{name}", self.alias),
            ("POST", "/v3/templates", self.request_build),
            ("GET", "/templates/{template}/files/{hash}", self.upload_link),
            ("POST", "/v2/templates/{template}/builds/{build}", self.start_build),
            ("GET", "/templates/{template}/builds/{build}/status", self.build_status),
            ("DELETE", "/templates/{template}", self.delete_template),
        ]
        self.app = Starlette(
            routes=[
                *(Route(path, self._guard(f), methods=[method]) for method, path, f in routes),
                Route("/_upload/{hash}", self.upload, methods=["PUT"]),
                Route("/_test/cloud", self.settings, methods=["GET", "PUT"]),
                Route("/_test/evict", self.evict, methods=["POST"]),
                Route("/_test/advance", self.advance, methods=["POST"]),
            ]
        )

    def _guard(self, endpoint):
        async def guarded(request):
            try:
                if not secrets.compare_digest(request.headers.get("x-api-key", ""), self.cloud.key):
                    raise Refused(401, "Invalid API key, please check your API key is correct")
                return await endpoint(request)
            except Refused as e:
                return refusal(e)
            except (KeyError, ValueError, TypeError) as e:
                return refusal(Refused(400, f"Error when parsing request: {e!r}"))

        return guarded

    def _find(self, request):
        return self.cloud.find(request.path_params["id"])

    # --- sandboxes

    async def create(self, request):
        body = await request.json()
        checked("NewSandboxV2", body)
        sandbox = await self.cloud.create(body, request.headers.get("idempotency-key"))
        return answer("Sandbox", self._sandbox(sandbox), 201)

    @staticmethod
    def _sandbox(sandbox):
        return {
            "templateID": sandbox.template.id, "sandboxID": sandbox.id, "clientID": "emulator",
            "envdVersion": ENVD_VERSION, "envdAccessToken": sandbox.token, "domain": None,
        }  # fmt: skip

    @staticmethod
    def _details(sandbox):
        return {
            "templateID": sandbox.template.id, "sandboxID": sandbox.id, "clientID": "emulator",
            "startedAt": sandbox.started.isoformat(), "endAt": sandbox.ends.isoformat(),
            "envdVersion": ENVD_VERSION, "cpuCount": sandbox.template.cpus,
            "memoryMB": sandbox.template.memory, "diskSizeMB": 22_000, "state": sandbox.state,
            "metadata": sandbox.metadata, "alias": sandbox.template.names[0],
        }  # fmt: skip

    async def list(self, request):
        query = request.query_params
        wanted = dict(parse_qsl(query.get("metadata", "")))
        wanted = {unquote(k): unquote(v) for k, v in wanted.items()}
        states = (query.get("state") or "running,paused").split(",")
        limit, first = int(query.get("limit") or _PAGE), int(query.get("nextToken") or 0)
        found = [
            self._details(s)
            for s in sorted(self.cloud.sandboxes.values(), key=lambda s: s.started, reverse=True)
            if s.state in states and wanted.items() <= s.metadata.items()
        ]
        more = {"x-next-token": str(first + limit)} if len(found) > first + limit else {}
        page = [checked("ListedSandbox", d) for d in found[first : first + limit]]
        return JSONResponse(page, headers=more)

    async def info(self, request):
        sandbox = self._find(request)
        details = {**self._details(sandbox), "envdAccessToken": sandbox.token, "domain": None}
        return answer("SandboxDetail", details)

    async def connect(self, request):
        sandbox, body = self._find(request), await request.json()
        seconds = body.get("timeout", 300)
        if sandbox.state == "paused":
            await self.cloud.resume(sandbox, seconds)
            return answer("Sandbox", self._sandbox(sandbox), 201)
        left = (sandbox.ends - sandbox.started).total_seconds()
        if seconds > left:  # it only ever lengthens
            self.cloud.set_timeout(sandbox, seconds)
        return answer("Sandbox", self._sandbox(sandbox))

    async def kill(self, request):
        await self.cloud.kill(self._find(request))
        return Response(status_code=204)

    async def set_timeout(self, request):
        self.cloud.set_timeout(self._find(request), (await request.json())["timeout"])
        return Response(status_code=204)

    async def pause(self, request):
        sandbox = self._find(request)
        if sandbox.state == "paused":
            raise Refused(409, f"Sandbox {sandbox.id} is already paused")
        await self.cloud.pause(sandbox)
        return Response(status_code=204)

    async def metrics(self, request):
        self._find(request)
        return JSONResponse([])

    async def network(self, request):
        self._find(request).request["network"] = await request.json()
        return Response(status_code=204)

    # --- templates

    async def alias(self, request):
        template = self.cloud.find_template(request.path_params["name"])
        return answer("TemplateAliasResponse", {"templateID": template.id, "public": False})

    async def request_build(self, request):
        body = await request.json()
        checked("TemplateBuildRequestV3", body)
        template, build = self.cloud.request_build(body)
        found = {
            "templateID": template.id, "buildID": build.id, "public": False,
            "names": template.names, "tags": ["default"], "aliases": template.names,
        }  # fmt: skip
        return answer("TemplateRequestResponseV3", found, 202)

    async def upload_link(self, request):
        self.cloud.find_template(request.path_params["template"])
        wanted = request.path_params["hash"]
        url = f"http://{request.headers['host']}/_upload/{wanted}"
        found = {"present": wanted in self.cloud.uploads, "url": url}
        return answer("TemplateBuildFileUpload", found, 201)

    async def upload(self, request):
        with tempfile.NamedTemporaryFile(dir=self.cloud.directory, delete=False) as file:
            async for piece in request.stream():
                await asyncio.to_thread(file.write, piece)
        self.cloud.uploads[request.path_params["hash"]] = file.name
        return Response(status_code=200)

    def _build(self, request):
        template = self.cloud.find_template(request.path_params["template"])
        if request.path_params["build"] not in template.builds:
            raise Refused(404, "build not found")
        return template, template.builds[request.path_params["build"]]

    async def start_build(self, request):
        body = await request.json()
        checked("TemplateBuildStartV2", body)
        template, build = self._build(request)
        self.cloud.start_build(template, build, body)
        return Response(status_code=202)

    async def build_status(self, request):
        template, build = self._build(request)
        offset = int(request.query_params.get("logsOffset") or 0)
        found = {
            "logs": [], "logEntries": build.log[offset : offset + _LOG_PAGE],
            "templateID": template.id, "buildID": build.id, "status": build.status,
        }  # fmt: skip
        if build.reason:
            found["reason"] = build.reason
        return answer("TemplateBuildInfo", found)

    async def delete_template(self, request):
        await self.cloud.delete_template(request.path_params["template"])
        return Response(status_code=204)

    # --- the test's own

    async def settings(self, request):
        if request.method == "PUT":
            self.cloud.settings = replace(self.cloud.settings, **await request.json())
        sandboxes = {s.id: {**self._details(s), "request": s.request} for s in
                     self.cloud.sandboxes.values()}  # fmt: skip
        templates = {t.id: t.names for t in self.cloud.templates.values()}
        return JSONResponse({"sandboxes": sandboxes, "templates": templates})

    async def evict(self, request):
        """Ends sandboxes as the provider might: those in the body, or all."""
        wanted = await request.json()
        for sandbox in list(self.cloud.sandboxes.values()):
            if not wanted or sandbox.id in wanted:
                await self.cloud.kill(sandbox)
        return JSONResponse({})

    async def advance(self, request):
        """Lets so many seconds of each sandbox's life pass at once."""
        passed = await request.json()
        for sandbox in list(self.cloud.sandboxes.values()):
            left = (sandbox.ends - now()).total_seconds() - passed
            if left > 0:
                self.cloud.set_timeout(sandbox, left)
            else:
                await self.cloud.kill(sandbox)
        return JSONResponse({})
