"""A small internet in two network namespaces of its own, and what can be reached from where.

Run under `unshare`, so that nothing leaves these namespaces:

    unshare --net --mount [--user --map-root-user] python internet.py

The inner machine has the address OWN and a service on its loopback; beyond it lies a
machine that is at once a public server, a resolver, a private server and a cloud's
metadata address. Prints a JSON object: {from where: {what: outcome}}, where "bare" is
this machine without a sandbox, the control of all others. With arguments it runs them
as a command on the inner machine.
"""

import contextlib
import http.server
import json
import os
import socket
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading

OWN, PUBLIC = "93.184.216.1", "93.184.216.34"
BEYOND = ("10.0.0.5", "192.168.1.1", "169.254.169.254", "100.100.100.200", "168.63.129.16")
NAMES = {
    "api.example.com": PUBLIC,
    "other.example.com": PUBLIC,
    "private.example.com": "10.0.0.5",
    "metadata.example.com": "169.254.169.254",
    "loopback.example.com": "127.0.0.1",
    "own.example.com": OWN,
}
PROBE = """
import json, socket, sys, urllib.request
found = {}
for name, url in json.loads(sys.argv[1]).items():
    try:
        found[name] = urllib.request.urlopen(url, timeout=3).read().decode()
    except Exception as e:
        found[name] = type(e).__name__ + ": " + str(e)[:80]
for name, (host, port) in json.loads(sys.argv[2]).items():
    try:
        with socket.create_connection((host, port), timeout=3) as s:
            s.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
            found[name] = s.makefile("rb").read().rpartition(b"\\n")[2].decode()
    except Exception as e:
        found[name] = type(e).__name__ + ": " + str(e)[:80]
if len(sys.argv) > 3:  # bound to the device, which skips some routing rules
    for name, (host, port) in json.loads(sys.argv[2]).items():
        s = socket.socket()
        s.settimeout(2)
        try:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, sys.argv[3].encode())
            s.connect((host, port))
            found["bound " + name] = "reached"
        except Exception as e:
            found["bound " + name] = type(e).__name__
        s.close()
print(json.dumps(found))
"""
URLS = {name: f"http://{name}/" for name in NAMES} | {
    ip: f"http://{ip}/" for ip in (PUBLIC, *BEYOND)
}
RAW = {f"raw {ip}": (ip, 80) for ip in (PUBLIC, OWN, *BEYOND)} | {
    "raw 127.0.0.1": ("127.0.0.1", 80),
    "raw gateway": ("10.0.2.2", 80),
    "raw resolver's web": ("10.0.2.3", 80),
    "raw port 8080": (PUBLIC, 8080),
}


def run(*command):
    subprocess.run(command, check=True)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"hello from {self.server.label}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def serve(address, port, label):
    server = http.server.ThreadingHTTPServer((address, port), Handler)
    server.label = label
    threading.Thread(target=server.serve_forever, daemon=True).start()


class Resolver(socketserver.BaseRequestHandler):
    """Answers A questions from NAMES."""

    def handle(self):
        data, sock = self.request
        labels, at = [], 12
        while data[at]:
            labels.append(data[at + 1 : at + 1 + data[at]].decode())
            at += data[at] + 1
        kind = struct.unpack("!H", data[at + 1 : at + 3])[0]
        address = NAMES.get(".".join(labels).lower()) if kind == 1 else None
        count = 1 if address else 0
        code = 0x8180 if ".".join(labels).lower() in NAMES else 0x8183
        reply = data[:2] + struct.pack("!HHHHH", code, 1, count, 0, 0) + data[12 : at + 5]
        if address:
            reply += b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 60, 4) + socket.inet_aton(address)
        sock.sendto(reply, self.client_address)


def beyond():
    """The other machine: everything that isn't this one."""
    run("ip", "link", "set", "lo", "up")
    for address in BEYOND:
        run("ip", "addr", "add", f"{address}/32", "dev", "lo")
    print("waiting", flush=True)
    sys.stdin.readline()
    run("ip", "addr", "add", f"{PUBLIC}/24", "dev", "beyond")
    run("ip", "link", "set", "beyond", "up")
    for address in (PUBLIC, *BEYOND):
        serve(address, 80, address)
    serve(PUBLIC, 8080, PUBLIC)
    resolver = socketserver.ThreadingUDPServer((PUBLIC, 53), Resolver)
    threading.Thread(target=resolver.serve_forever, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.readline()


def replace(path, content):
    """Another content for a file, in this mount namespace alone."""
    with tempfile.NamedTemporaryFile("w", delete=False) as file:
        file.write(content)
    os.chmod(file.name, 0o644)
    run("mount", "--bind", file.name, os.path.realpath(path))
    os.unlink(file.name)


@contextlib.contextmanager
def world():
    command = ["unshare", "--net", sys.executable, __file__, "beyond"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "waiting\n"
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "here", "type", "veth", "peer", "name", "beyond")
        run("ip", "link", "set", "beyond", "netns", str(other.pid))
        run("ip", "addr", "add", f"{OWN}/24", "dev", "here")
        run("ip", "link", "set", "here", "up")
        run("ip", "route", "add", "default", "via", PUBLIC)
        other.stdin.write("go\n")
        other.stdin.flush()
        assert other.stdout.readline() == "ready\n"
        serve("127.0.0.1", 80, "127.0.0.1")
        serve(OWN, 80, OWN)
        replace("/etc/resolv.conf", f"nameserver {PUBLIC}\n")
        try:
            yield
        finally:
            other.stdin.write("end\n")


def arguments(*more):
    return ["-c", PROBE, json.dumps(URLS), json.dumps(RAW), *more]


async def measure():
    from metaflow_sandbox.backends.base import SandboxSpec
    from metaflow_sandbox.backends.bubblewrap import Bubblewrap

    bare = subprocess.run(
        [sys.executable, *arguments()], capture_output=True, text=True, check=True
    )
    found = {"bare": json.loads(bare.stdout)}
    for where, route, network in (
        ("route", True, True),
        ("proxy", False, True),
        ("hosts", True, ["api.example.com", "private.example.com", "own.example.com"]),
        ("none", True, False),
    ):
        backend = Bubblewrap()
        backend.has_route = route and backend.has_route
        sandbox = await backend.create(SandboxSpec(network=network, disk=64))
        try:
            device = ["tap0"] if sandbox.way.route else []
            assert sandbox.way.route == (where == "route"), (sandbox.way, sandbox.routeless)
            done = await sandbox.run([backend.python, *arguments(*device)])
            assert done.exit_code == 0, done.stderr
            found[where] = json.loads(done.stdout)
            found[where]["remarks"] = sandbox.remarks()
        finally:
            await sandbox.destroy()
    return found


if __name__ == "__main__":
    if sys.argv[1:] == ["beyond"]:
        beyond()
    elif sys.argv[1:]:
        with world():
            sys.exit(subprocess.run(sys.argv[1:]).returncode)
    else:
        import anyio

        with world():
            print(json.dumps(anyio.run(measure)))
