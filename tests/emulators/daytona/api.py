"""The control plane: sandboxes, snapshots, the organisation, and events by Socket.IO."""

import asyncio
import base64
import json
from urllib.parse import parse_qs

import socketio
from daytona_api_client_async.models import CreateSandbox, CreateSandboxSnapshot, CreateSnapshot
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from .cloud import ORGANIZATION, REGIONS, Refused, iso

_ITEM = (
    "id", "organizationId", "name", "target", "runnerId", "sandboxClass", "state", "desiredState",
    "snapshot", "user", "errorReason", "public", "networkBlockAll", "networkAllowList",
    "domainAllowList", "cpu", "gpu", "memory", "disk", "labels", "backupState", "autoStopInterval",
    "autoArchiveInterval", "autoDeleteInterval", "autoDestroyAt", "createdAt", "updatedAt",
    "lastActivityAt", "daemonVersion", "toolboxProxyUrl", "spotEvictedAt",
)  # fmt: skip


def parsed(model, body):
    """A request's body as the API takes it: what it doesn't know is an error."""
    try:
        found = model.from_dict(body)
    except Exception as e:
        raise Refused(400, str(e)) from None
    if found.additional_properties:
        names = sorted(found.additional_properties)
        raise Refused(400, f"property {', '.join(names)} should not exist")
    return {k: v for k, v in body.items() if v is not None}


class Api:
    """The routes below /api."""

    def __init__(self, cloud, snapshots, wire):
        self.cloud, self.snapshots, self.wire = cloud, snapshots, wire
        self.base = ""  # http://host:port, when it is known
        self.events = socketio.AsyncServer(async_mode="asgi", cors_allowed_origins="*")
        self.events.on("connect", self._connect)
        cloud.listeners.append(self._tell)
        self._telling = set()

    # --- events

    async def _connect(self, sid, environ, auth):
        if not self.cloud.settings.events:
            raise socketio.exceptions.ConnectionRefusedError("not available")
        if (auth or {}).get("token") != self.cloud.settings.key:
            raise socketio.exceptions.ConnectionRefusedError("unauthorized")
        return True

    def _tell(self, event, box):
        if not self.cloud.settings.events:
            return
        said = self.describe(box)
        if event == "sandbox.state.updated":
            said = {"sandbox": said, "oldState": "unknown", "newState": box.state}
        else:
            said = {"sandbox": said}
        task = asyncio.ensure_future(self.events.emit(event, said))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    # --- sandboxes

    def describe(self, box):
        asked = box.request
        found = {
            "id": box.id, "organizationId": ORGANIZATION, "name": box.name, "user": box.user,
            "snapshot": box.snapshot, "env": asked.get("env") or {},
            "labels": asked.get("labels") or {},
            "public": bool(asked.get("public")),
            "networkBlockAll": bool(asked.get("networkBlockAll")), "kvm": False,
            "target": asked.get("target") or "us", "cpu": box.cpu, "gpu": box.gpu,
            "memory": box.memory, "disk": box.disk, "state": box.state,
            "desiredState": box.desired, "backupState": "None",
            "autoStopInterval": box.intervals["stop"],
            "autoArchiveInterval": box.intervals["archive"],
            "autoDeleteInterval": box.intervals["delete"],
            "createdAt": iso(box.created), "updatedAt": iso(self.cloud.now()),
            "lastActivityAt": iso(box.active), "sandboxClass": "container",
            "daemonVersion": "0.190.0", "runnerId": "runner-1",
            "toolboxProxyUrl": self.base.replace(
                "127.0.0.1", self.cloud.settings.toolbox_host
            ) + "/toolbox",
        }  # fmt: skip
        for name in ("networkAllowList", "domainAllowList"):
            if asked.get(name):
                found[name] = asked[name]
        if self.cloud.settings.restricted:
            found["networkBlockAll"] = False
            found.pop("networkAllowList", None)
            found.pop("domainAllowList", None)
        if box.ends is not None:
            found["autoDestroyAt"] = iso(box.ends)
        if box.evicted:
            found["spotEvictedAt"] = box.evicted
        if error := getattr(box, "error", None):
            found["errorReason"] = error
        return found

    def _sandbox(self, box):
        return self._answer("Sandbox", self.describe(box))

    def _answer(self, model, value, status=200):
        return JSONResponse(self.wire.check("api", model, value), status)

    async def create(self, request):
        asked = parsed(CreateSandbox, await request.json())
        self.cloud.throttle()
        settings = self.cloud.settings
        if settings.suspended:
            raise Refused(403, "Organization is suspended: payment is due")
        if "write:sandboxes" not in settings.may:
            raise Refused(403, "Insufficient permissions: write:sandboxes")
        if asked.get("target", "us") not in REGIONS:
            raise Refused(404, f"Region {asked['target']} not found")
        if asked.get("buildInfo"):
            raise Refused(400, "the emulator makes sandboxes from snapshots alone")
        if any(asked.get(name) for name in ("cpu", "memory", "disk", "gpu")):
            raise Refused(400, "Cannot specify Sandbox resources when using a snapshot")
        if len([n for n in asked.get("networkAllowList", "").split(",") if n]) > 10:
            raise Refused(400, "Network allow list cannot contain more than 10 networks")
        snapshot = self.snapshots.usable(asked.get("snapshot"))
        return self._sandbox(self.cloud.create(asked, snapshot))

    async def get(self, request):
        box = self.cloud.find(request.path_params["id"])
        return self._sandbox(box)

    async def list(self, request):
        query = request.query_params
        wanted = json.loads(query.get("labels") or "{}")
        limit = min(int(query.get("limit") or self.cloud.settings.page), self.cloud.settings.page)
        start = int(base64.b64decode(query["cursor"])) if query.get("cursor") else 0
        found = [
            box
            for box in self.cloud.boxes.values()
            if box.state != "destroyed"
            and wanted.items() <= (box.request.get("labels") or {}).items()
        ]
        items = []
        for box in found[start : start + limit]:
            whole = self.describe(box)
            items.append({name: whole[name] for name in _ITEM if name in whole})
        more = start + limit < len(found)
        cursor = base64.b64encode(b"%d" % (start + limit)).decode() if more else None
        return self._answer("ListSandboxesResponse", {"items": items, "nextCursor": cursor})

    async def delete(self, request):
        box = self.cloud.find(request.path_params["id"])
        if box.state in ("starting", "stopping", "snapshotting"):
            raise Refused(409, "Sandbox state change in progress")
        self.cloud.destroy(box)
        return self._sandbox(box)

    async def stop(self, request):
        box = self.cloud.find(request.path_params["id"])
        await self.cloud.stop(box)
        return self._sandbox(box)

    async def start(self, request):
        box = self.cloud.find(request.path_params["id"])
        await self.cloud.start(box)
        return self._sandbox(box)

    async def interval(self, request):
        box = self.cloud.find(request.path_params["id"])
        kind, minutes = request.path_params["kind"], int(request.path_params["minutes"])
        if kind == "ttl":
            box.ends = self.cloud.now() + minutes * 60 if minutes else None
        else:
            box.intervals[kind.removeprefix("auto")] = minutes
        return self._sandbox(box)

    async def labels(self, request):
        box = self.cloud.find(request.path_params["id"])
        box.request["labels"] = (await request.json())["labels"]
        return self._answer("SandboxLabels", {"labels": box.request["labels"]})

    async def activity(self, request):
        self.cloud.find(request.path_params["id"]).active = self.cloud.now()
        return JSONResponse(None, 201)

    async def capture(self, request):
        box = self.cloud.find(request.path_params["id"])
        asked = parsed(CreateSandboxSnapshot, await request.json())
        self.snapshots.capture(box, asked["name"])
        return self._sandbox(box)

    # --- snapshots

    async def create_snapshot(self, request):
        made = self.snapshots.create(parsed(CreateSnapshot, await request.json()))
        return self._answer("SnapshotDto", self.snapshots.describe(made))

    async def get_snapshot(self, request):
        found = self.snapshots.find(request.path_params["id"])
        return self._answer("SnapshotDto", self.snapshots.describe(found))

    async def list_snapshots(self, request):
        query = parse_qs(request.url.query)
        page, limit = int(query.get("page", [1])[0]), int(query.get("limit", [100])[0])
        every = [self.snapshots.describe(s) for s in self.snapshots.by_name.values()]
        found = {
            "items": every[(page - 1) * limit : page * limit], "total": len(every), "page": page,
            "totalPages": -(-len(every) // limit),
        }  # fmt: skip
        return self._answer("PaginatedSnapshots", found)

    async def delete_snapshot(self, request):
        await self.snapshots.remove(self.snapshots.find(request.path_params["id"]))
        return JSONResponse(None)

    async def activate_snapshot(self, request):
        found = self.snapshots.find(request.path_params["id"])
        self.snapshots.activate(found)
        return self._answer("SnapshotDto", self.snapshots.describe(found))

    async def build_logs_url(self, request):
        found = self.snapshots.find(request.path_params["id"])
        return self._answer("Url", {"url": f"{self.base}/api/snapshots/{found.id}/build-logs"})

    async def build_logs(self, request):
        snapshot = self.snapshots.find(request.path_params["id"])

        async def follow():
            sent = 0
            while True:
                over = snapshot.state in ("active", "build_failed", "error")
                if piece := snapshot.log[sent:]:
                    sent += len(piece)
                    yield piece.encode()
                elif over:
                    return
                await asyncio.sleep(0.02)

        return StreamingResponse(follow(), media_type="text/plain")

    # --- the organisation

    async def current_key(self, request):
        self._may_see()
        now = iso(self.cloud.now())
        found = {
            "name": "tests", "value": "dtn_***", "createdAt": now, "lastUsedAt": now,
            "expiresAt": None, "permissions": list(self.cloud.settings.may), "userId": "user-1",
            "organizationId": ORGANIZATION,
        }  # fmt: skip
        return JSONResponse(self.wire.check("api", "ApiKeyList", found))

    async def organization(self, request):
        self._may_see()
        settings, now = self.cloud.settings, iso(self.cloud.now())
        cpu, memory, disk = settings.largest
        found = {
            "id": ORGANIZATION, "name": "Testers", "createdBy": "user-1", "personal": False,
            "createdAt": now, "updatedAt": now, "suspended": settings.suspended,
            "suspendedAt": now, "suspensionReason": "payment is due" if settings.suspended else "",
            "suspendedUntil": now, "suspensionCleanupGracePeriodHours": 24,
            "maxCpuPerSandbox": cpu, "maxMemoryPerSandbox": memory, "maxDiskPerSandbox": disk,
            "secretQuota": 10, "maxSecretsPerSandbox": 10,
            "snapshotDeactivationTimeoutMinutes": 20160, "defaultQueueTimeout": None,
            "sandboxLimitedNetworkEgress": settings.restricted, "previewWarningEnabled": False,
            "ssoEnabled": False, "scimEnabled": False, "authenticatedRateLimit": 10000,
            "sandboxCreateRateLimit": 300, "sandboxLifecycleRateLimit": 10000,
            "experimentalConfig": {}, "otelConfig": None,
            "authenticatedRateLimitTtlSeconds": 60, "sandboxCreateRateLimitTtlSeconds": 60,
            "sandboxLifecycleRateLimitTtlSeconds": 60,
        }  # fmt: skip
        return JSONResponse(self.wire.check("api", "Organization", found))

    async def regions(self, request):
        now = iso(self.cloud.now())
        found = [
            {"id": name, "name": name, "regionType": "shared", "createdAt": now, "updatedAt": now}
            for name in REGIONS
        ]
        return JSONResponse([self.wire.check("api", "Region", region) for region in found])

    def _may_see(self):
        if not self.cloud.settings.sees_organization:
            raise Refused(403, "Insufficient permissions")

    def routes(self):
        one, snapshot = "/sandbox/{id}", "/snapshots/{id}"
        kinds = "ttl|autostop|autoarchive|autodelete"
        table = [
            ("POST", "/sandbox", self.create),
            ("GET", "/sandbox", self.list),
            ("GET", one, self.get),
            ("DELETE", one, self.delete),
            ("POST", f"{one}/start", self.start),
            ("POST", f"{one}/stop", self.stop),
            ("PUT", f"{one}/labels", self.labels),
            ("POST", f"{one}/last-activity", self.activity),
            ("POST", f"{one}/snapshot", self.capture),
            *[
                ("POST", f"{one}/{kind}/{{minutes}}", _with(self.interval, kind))
                for kind in kinds.split("|")
            ],
            ("POST", "/snapshots", self.create_snapshot),
            ("GET", "/snapshots", self.list_snapshots),
            ("GET", snapshot, self.get_snapshot),
            ("DELETE", snapshot, self.delete_snapshot),
            ("POST", f"{snapshot}/activate", self.activate_snapshot),
            ("GET", f"{snapshot}/build-logs-url", self.build_logs_url),
            ("GET", f"{snapshot}/build-logs", self.build_logs),
            ("GET", "/api-keys/current", self.current_key),
            ("GET", "/organizations/{id}", self.organization),
            ("GET", "/regions", self.regions),
        ]
        return [Route(f"/api{path}", handler, methods=[m]) for m, path, handler in table]


def _with(handler, kind):
    async def route(request):
        request.path_params["kind"] = kind
        return await handler(request)

    return route
