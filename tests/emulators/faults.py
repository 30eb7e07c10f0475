"""What stands before an emulator: latency, faults on demand, and a journal of what came in.

An ASGI application around the emulator's own, with the test's own requests below /_test:

    GET     /_test/journal     what was received: [{method, path, query, headers, status, …}]
    DELETE  /_test/journal     forgets it
    PUT     /_test/settings    {"latency": seconds before each request is looked at,
                                "bodies": a directory that gets what each request carried}
    GET     /_test/faults      those that there are
    POST    /_test/faults      adds a fault, below
    DELETE  /_test/faults      takes all faults away
    DELETE  /_test/connections resets every connection that there is but this one

A fault is an object. `match` is a regular expression for "METHOD /path"; `times` is how many
such requests meet it (1; -1 for all), after `skip` that don't (0). One of these says what
happens, and `delay` (seconds, before that or by itself) may be with it:

    {"status": 429, "body": {…}, "headers": {"retry-after": "1"}}   that answer; the emulator
                                                                   never hears of the request
    {"instead": 504, "body": "<html>"}   the emulator does its work, and this is said instead of its
                               answer; a body that is a string is one of HTML
    {…, "after": seconds}      the answer is a fault's, "status" or "lose", and so much later the
                               emulator does its work
    {"flood": megabytes}       an answer so large, with its "status" (200) and "headers", which
                               begins with "start" (""); the emulator never hears of the request
    {"lose": true}             the emulator does its work, and the connection is reset instead of
                               its answer
    {"reset_upload": bytes}    the connection is reset when so much of the body has come
    {"reset_download": bytes}  … when so much of the answer has been sent
    {"cut_download": bytes}    the answer ends there, in good order
    {"stall": bytes}           nothing more comes after so much of the answer
"""

import asyncio
import json
import os
import re
import time

_MAX_BODY = 1 << 20


class Front:
    """The application around `app`.

    Attributes:
        connections: gives the server's connections, which have `client` and `transport`
            (uvicorn's `server.server_state.connections`): by these one is reset.
    """

    def __init__(self, app):
        self.app = app
        self.connections = lambda: ()
        self.latency = 0.0
        self.bodies = None
        self.journal = []
        self.faults = []
        self.later = []

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["path"].startswith("/_test/") and await self._configure(scope, receive, send):
            return None
        entry = self._enter(scope)
        if self.latency:
            await asyncio.sleep(self.latency)
        return await _Exchange(self, scope, receive, send, entry).run(self._fault(entry))

    def abort(self, client):
        """Resets a client's connection."""
        for connection in list(self.connections()):
            if connection.client == tuple(client):
                connection.transport.abort()

    def _enter(self, scope):
        headers = {k.decode(): v.decode("latin-1") for k, v in scope["headers"]}
        entry = {
            "number": len(self.journal), "method": scope["method"], "path": scope["path"],
            "query": scope["query_string"].decode(), "headers": headers, "began": time.time(),
            "status": None, "received": 0, "sent": 0, "ended": None,
        }  # fmt: skip
        self.journal.append(entry)
        return entry

    def _fault(self, entry):
        for fault in self.faults:
            if fault["times"] and re.search(fault["match"], f"{entry['method']} {entry['path']}"):
                if fault["skip"]:
                    fault["skip"] -= 1
                    continue
                fault["times"] -= 1
                return fault
        return {}

    async def _configure(self, scope, receive, send):
        """Answers a test's own request; False if it isn't one that is known here."""
        name, method = scope["path"].removeprefix("/_test/"), scope["method"]
        answer = {}
        if (name, method) == ("journal", "GET"):
            answer = self.journal
        elif (name, method) == ("journal", "DELETE"):
            self.journal = []
        elif (name, method) == ("faults", "GET"):
            answer = self.faults
        elif (name, method) == ("faults", "DELETE"):
            self.faults = []
        elif (name, method) == ("faults", "POST"):
            self.faults.append({"times": 1, "skip": 0, **json.loads(await _body(receive))})
        elif (name, method) == ("settings", "PUT"):
            settings = json.loads(await _body(receive))
            self.latency = settings.get("latency", self.latency)
            self.bodies = settings.get("bodies", self.bodies)
        elif (name, method) == ("connections", "DELETE"):
            for connection in list(self.connections()):
                if connection.client != tuple(scope["client"]):
                    connection.transport.abort()
        else:
            return False
        await respond(send, 200, answer)
        return True


class _Exchange:
    """One request and its answer, with what a fault does to them."""

    def __init__(self, front, scope, receive, send, entry):
        self.front, self.scope, self.entry = front, scope, entry
        self._receive, self._send = receive, send
        self.fault = {}

    async def run(self, fault):
        self.fault = fault
        try:
            await asyncio.sleep(fault.get("delay", 0))
            if "after" in fault:
                await self.later(fault["after"])
            if "flood" in fault:
                self.entry["status"] = fault.get("status", 200)
                await self.flood(self.entry["status"], fault)
            elif "status" in fault:
                self.entry["status"] = fault["status"]
                headers, body = fault.get("headers", {}), fault.get("body", {})
                await respond(self._send, fault["status"], body, headers)
            else:
                await self.front.app(self.scope, self.receive, self.send)
        finally:
            self.entry["ended"] = time.time()

    async def later(self, seconds):
        """Has the emulator do its work when its client has heard something else."""
        messages = [await self._receive()]
        while messages[-1].get("more_body"):
            messages.append(await self._receive())

        async def send(message):
            pass

        async def receive():
            return messages.pop(0)

        async def work():
            await asyncio.sleep(seconds)
            await self.front.app(self.scope, receive, send)

        self.front.later.append(asyncio.ensure_future(work()))
        if self.fault.get("lose"):
            self.reset()

    async def flood(self, status, fault):
        raw = [(k.encode(), v.encode()) for k, v in fault.get("headers", {}).items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})
        start = {"body": fault.get("start", "").encode(), "more_body": True}
        await self._send({"type": "http.response.body", **start})
        client = tuple(self.scope["client"])
        for left in reversed(range(fault["flood"])):
            await asyncio.sleep(0.001)
            if all(connection.client != client for connection in self.front.connections()):
                return  # it has read enough
            piece = {"body": b"x" * (1 << 20), "more_body": left > 0}
            await self._send({"type": "http.response.body", **piece})

    async def receive(self):
        message = await self._receive()
        body = message.get("body", b"")
        self.entry["received"] += len(body)
        if self.front.bodies and body:
            path = os.path.join(self.front.bodies, f"{os.getpid()}-{self.entry['number']}")
            with open(path, "ab") as file:
                file.write(body)
        if self.entry["received"] >= self.fault.get("reset_upload", float("inf")):
            self.reset()
        return message

    async def send(self, message):
        if self.fault.get("lose"):
            self.reset()
        if "instead" in self.fault:
            self.entry["status"] = self.fault["instead"]
            if not message.get("more_body") and message["type"] == "http.response.body":
                await respond(self._send, self.fault["instead"], self.fault.get("body", {}))
            return None
        if message["type"] == "http.response.start":
            self.entry["status"] = message["status"]
            return await self._send(message)
        body = message.get("body", b"")
        for kind in ("reset_download", "cut_download", "stall"):
            left = self.fault.get(kind, float("inf")) - self.entry["sent"]
            if len(body) >= left:
                await self._send({**message, "body": body[: int(left)], "more_body": True})
                if kind == "stall":
                    await asyncio.Event().wait()
                elif kind == "reset_download":
                    await asyncio.sleep(0.05)  # what was sent gets there first
                    self.reset()
                raise ConnectionAbortedError("cut")  # which ends the connection
        self.entry["sent"] += len(body)
        return await self._send(message)

    def reset(self):
        """Ends the connection without a word."""
        self.front.abort(self.scope["client"])
        raise ConnectionResetError("a fault that was asked for")


async def _body(receive):
    data = b""
    while True:
        message = await receive()
        data += message.get("body", b"")
        if not message.get("more_body") or len(data) > _MAX_BODY:
            return data


async def respond(send, status, answer, headers=None):
    """A whole answer in JSON; a string is one in HTML."""
    kind = "text/html" if isinstance(answer, str) else "application/json"
    body = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
    fields = {"content-type": kind, "content-length": str(len(body))}
    fields.update(headers or {})
    raw = [(k.lower().encode(), v.encode()) for k, v in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
