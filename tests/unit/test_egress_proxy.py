"""A sandbox gets through the proxy to what is allowed, and to nothing else, whatever it sends.

Everything here is real but the look-up of names and the check of addresses: the hosts are
servers on 127.0.0.1.
"""

import contextlib
import gc
import hashlib
import http.client
import http.server
import logging
import os
import random
import socket
import struct
import threading
import time
import types
import urllib.error
import urllib.request

import anyio
import anyio.from_thread
import pytest

from metaflow_sandbox.egress.addresses import is_reachable
from metaflow_sandbox.egress.proxy import Limits, proxy, resolve
from metaflow_sandbox.egress.rules import Rules

HOST = "allowed.test"
SECONDS = 20


def until(condition, seconds=SECONDS):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def read_all(sock):
    """What comes until the end; a reset is an end too."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(65536):
            data += piece
    return data


def read_head(sock):
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(1)
        if not piece:
            break
        data += piece
    return data


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Upstream:
    """A host: hands every connection to a function, in a thread."""

    def __init__(self, handle, address="127.0.0.1", port=0):
        self.listener = socket.create_server((address, port), backlog=256)
        self.port = self.listener.getsockname()[1]
        self.handle = handle
        self.connections = 0
        self.received = []
        self.sockets = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            sock.settimeout(SECONDS)
            self.connections += 1
            self.sockets.append(sock)
            threading.Thread(target=self._run, args=(sock,), daemon=True).start()

    def _run(self, sock):
        with contextlib.suppress(OSError), sock:
            self.handle(self, sock)

    def close(self):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for sock in self.sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def echo(upstream, sock):
    while data := sock.recv(65536):
        sock.sendall(data)


def answers(response):
    """A host that reads a request's head, and answers with these bytes."""

    def handle(upstream, sock):
        upstream.received.append(read_head(sock))
        sock.sendall(response)
        sock.shutdown(socket.SHUT_WR)
        upstream.received[-1] += read_all(sock)

    return handle


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Website(http.server.BaseHTTPRequestHandler):
    """Says what it was asked."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.seen.append((self.command, self.path, dict(self.headers)))
        body = f"{self.command} {self.path}".encode()
        self.send_response(404 if self.path == "/missing" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_DELETE = do_GET

    def do_POST(self):
        digest, size = hashlib.sha256(), 0
        for piece in self._body():
            digest.update(piece)
            size += len(piece)
        self.server.seen.append((self.command, self.path, dict(self.headers)))
        body = f"{size} {digest.hexdigest()}".encode()
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for byte in body:
            self.wfile.write(b"1\r\n%c\r\n" % byte)
        self.wfile.write(b"0\r\n\r\n")

    def _body(self):
        if self.headers["Transfer-Encoding"] == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            yield self.rfile.read(int(self.headers["Content-Length"]))

    def log_message(self, *_):
        pass


class Egress:
    """A running proxy, and what a client in a sandbox does with it."""

    def __init__(self, address, looked_up):
        self.address = address
        self.looked_up = looked_up

    @property
    def refusals(self):
        return self.running.refusals

    def connect(self):
        sock = socket.create_connection(self.address, timeout=SECONDS)
        sock.settimeout(SECONDS)
        return sock

    def ask(self, data):
        """Sends bytes and reads the whole answer."""
        with self.connect() as sock:
            sock.sendall(data)
            return read_all(sock)

    def tunnel(self, port, host=HOST):
        sock = self.connect()
        sock.sendall(b"CONNECT %s:%d HTTP/1.1\r\nHost: x\r\n\r\n" % (host.encode(), port))
        head = read_head(sock)
        assert head.startswith(b"HTTP/1.1 200 "), head
        return sock

    def opener(self):
        url = "http://{}:{}".format(*self.address)
        return urllib.request.build_opener(urllib.request.ProxyHandler({"http": url}))


@pytest.fixture
def cleanup():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def upstream(cleanup):
    """Starts hosts."""

    def start(handle=echo, **where):
        made = Upstream(handle, **where)
        cleanup.callback(made.close)
        return made

    return start


@pytest.fixture
def website(cleanup):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Website)
    server.seen = []
    server.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    cleanup.callback(server.server_close)
    cleanup.callback(server.shutdown)
    return server


@pytest.fixture
def egress(cleanup, caplog):
    """Starts proxies, in an event loop in a thread of its own, as the launcher does."""
    portal = cleanup.enter_context(anyio.from_thread.start_blocking_portal())

    def start(*hosts, rules=None, addresses=("127.0.0.1",), listener=None, **options):
        looked_up = []

        async def resolve(host, port):
            looked_up.append((host, port))
            return list(addresses)

        options.setdefault("resolve", resolve)
        options.setdefault("reachable", lambda address: address == "127.0.0.1")
        options["limits"] = Limits(**options.get("limits", {}))
        if rules is None:
            rules = Rules((HOST, "*.wild.test"), ports=tuple(h.port for h in hosts))
        if listener is None:
            listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        cleanup.callback(listener.close)
        made = Egress(listener.getsockname(), looked_up)
        context = portal.wrap_async_context_manager(proxy(listener, rules, **options))
        made.running = cleanup.enter_context(context)
        return made

    yield start
    cleanup.close()
    assert [r.getMessage() for r in caplog.records if r.name.startswith("metaflow_sandbox")] == []


# --- what works ---------------------------------------------------------------------------


def test_a_page_is_fetched(egress, website):
    out = egress(website)
    with out.opener().open(f"http://{HOST}:{website.port}/a?b=c", timeout=SECONDS) as response:
        assert response.read() == b"GET /a?b=c"
    assert out.looked_up == [(HOST, website.port)]
    assert out.refusals == {}


def test_an_error_of_the_host_is_passed_on(egress, website):
    out = egress(website)
    with pytest.raises(urllib.error.HTTPError) as error:
        out.opener().open(f"http://{HOST}:{website.port}/missing", timeout=SECONDS)
    assert error.value.code == 404 and error.value.read() == b"GET /missing"


@pytest.mark.parametrize("method", ["HEAD", "DELETE"])
def test_other_methods_work(egress, website, method):
    out = egress(website)
    client = http.client.HTTPConnection(*out.address, timeout=SECONDS)
    client.request(method, f"http://{HOST}:{website.port}/")
    response = client.getresponse()
    assert response.status == 200
    assert response.read() == (b"" if method == "HEAD" else b"DELETE /")
    client.close()


@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies_arrive_whole(egress, website, chunked):
    out = egress(website)
    body = random.Random(1).randbytes(8 << 20)
    pieces = (body[i : i + 100_000] for i in range(0, len(body), 100_000))
    client = http.client.HTTPConnection(*out.address, timeout=SECONDS)
    client.request(
        "POST",
        f"http://{HOST}:{website.port}/",
        body=pieces if chunked else body,
        encode_chunked=chunked,
        headers={"Transfer-Encoding": "chunked"} if chunked else {},
    )
    expected = f"{len(body)} {hashlib.sha256(body).hexdigest()}".encode()
    assert client.getresponse().read() == expected
    client.close()


@pytest.mark.parametrize(
    "url", ["http://{}:{}", "HTTP://{}:{}/", "http://ALLOWED.test.:{1}/", "http://{}:{}?"]
)
def test_urls_have_many_spellings(egress, website, url):
    out = egress(website)
    answer = out.ask(f"GET {url.format(HOST, website.port)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert website.seen[0][2]["Host"] == f"{HOST}:{website.port}"


def test_a_tunnel_carries_http(egress, website):
    out = egress(website)
    client = http.client.HTTPConnection(*out.address, timeout=SECONDS)
    client.set_tunnel("a.b.wild.test", website.port)
    for path in ("/1", "/2"):  # both on one connection
        client.request("GET", path)
        assert client.getresponse().read() == b"GET " + path.encode()
    client.close()
    assert out.looked_up == [("a.b.wild.test", website.port)]


def test_a_tunnel_carries_any_bytes_both_ways(egress, upstream):
    host = upstream()
    data = random.Random(2).randbytes(4 << 20)
    with egress(host).tunnel(host.port) as sock:
        threading.Thread(target=lambda: (sock.sendall(data), sock.shutdown(1))).start()
        assert read_all(sock) == data


def test_what_a_client_sends_right_after_connect_goes_through(egress, upstream):
    host = upstream()
    with egress(host).connect() as sock:
        sock.sendall(b"CONNECT %s:%d HTTP/1.0\r\n\r\nearly" % (HOST.encode(), host.port))
        sock.shutdown(socket.SHUT_WR)
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"\r\n\r\nearly")


def test_a_tunnel_stays_open_for_answers_when_the_client_ends_first(egress, upstream):
    def handle(_, sock):
        data = read_all(sock)
        time.sleep(0.2)
        sock.sendall(data.upper())

    host = upstream(handle)
    with egress(host).tunnel(host.port) as sock:
        sock.sendall(b"question")
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b"QUESTION"


def test_a_tunnel_stays_open_for_requests_when_the_host_ends_first(egress, upstream):
    def handle(host, sock):
        sock.sendall(b"greeting")
        sock.shutdown(socket.SHUT_WR)
        host.received.append(read_all(sock))

    host = upstream(handle)
    with egress(host).tunnel(host.port) as sock:
        assert read_all(sock) == b"greeting"
        sock.sendall(b"much later")
        sock.shutdown(socket.SHUT_WR)
        until(lambda: host.received == [b"much later"])


def test_a_reset_of_the_host_is_not_taken_for_the_end(egress, upstream):
    def handle(_, sock):
        sock.sendall(b"half")
        sock.recv(1)
        reset(sock)

    host = upstream(handle)
    with egress(host).tunnel(host.port) as sock:
        assert sock.recv(10) == b"half"
        sock.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            sock.recv(10)


def test_it_serves_on_a_unix_socket(egress, website, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # such paths have to be short
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("s")
    listener.listen()
    egress(website, listener=listener)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(SECONDS)
        sock.connect("s")
        request = f"GET http://{HOST}:{website.port}/x HTTP/1.1\r\nHost: {HOST}\r\n\r\n"
        sock.sendall(request.encode())
        assert read_all(sock).endswith(b"GET /x")


# --- HTTP ---------------------------------------------------------------------------------


def get(host, *lines, version="1.1", method="GET", body=b""):
    """A request for http://allowed.test:port/path."""
    head = [f"{method} http://{HOST}:{host.port}/path HTTP/{version}", *lines]
    return "\r\n".join([*head, "", ""]).encode() + body


def test_the_host_header_says_where_the_request_goes(egress, upstream):
    host = upstream(answers(OK))
    egress(host).ask(get(host, "Host: evil.test"))
    assert host.received[0].lower().count(b"\r\nhost:") == 1
    assert f"\r\nHost: {HOST}:{host.port}\r\n".encode() in host.received[0]
    assert host.received[0].startswith(b"GET /path HTTP/1.1\r\n")


def test_headers_for_one_connection_only_stop_at_the_proxy(egress, upstream):
    host = upstream(
        answers(
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: X-Theirs, keep-alive\r\n"
            b"X-Theirs: 1\r\nKeep-Alive: timeout=5\r\nProxy-Authenticate: Basic\r\n"
            b"X-Kept: 2\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n\r\nok"
        )
    )
    answer = egress(host).ask(
        get(
            host,
            "Host: x",
            "Connection: X-Mine, Keep-Alive, Content-Length",
            "connection: x-other",
            "X-Mine: 1",
            "X-Other: 1",
            "Keep-Alive: timeout=5",
            "Proxy-Authorization: Basic c2VjcmV0",
            "Proxy-Connection: keep-alive",
            "TE: trailers",
            "Trailer: X-After",
            "Upgrade: websocket",
            "X-Kept: 2",
            "Content-Length: 3",
            method="POST",
            body=b"abc",
        )
    )
    lines = host.received[0].partition(b"\r\n\r\n")[0].lower().split(b"\r\n")[1:]
    names = sorted(line.split(b":")[0] for line in lines)
    assert names == [b"connection", b"content-length", b"host", b"x-kept"]
    assert b"\r\nConnection: close\r\n" in host.received[0]
    head = answer.lower()
    assert b"x-theirs" not in head and b"keep-alive" not in head and b"proxy-" not in head
    assert b"\r\nconnection: close\r\n" in head
    assert head.count(b"set-cookie") == 2 and b"x-kept: 2" in head
    assert answer.endswith(b"\r\n\r\nok")


def test_a_response_without_a_length_ends_where_it_ends(egress, upstream):
    host = upstream(answers(b"HTTP/1.0 200 OK\r\n\r\nuntil the end"))
    out = egress(host)
    with out.opener().open(f"http://{HOST}:{host.port}/", timeout=SECONDS) as response:
        assert response.read() == b"until the end"
    old = out.ask(get(host, version="1.0"))
    assert old.endswith(b"\r\n\r\nuntil the end") and b"chunked" not in old


def test_a_chunked_response_reaches_an_old_client_without_chunks(egress, upstream):
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n"
    host = upstream(answers(chunks))
    answer = egress(host).ask(get(host, version="1.0"))
    assert answer.endswith(b"\r\n\r\nabc") and b"chunked" not in answer


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
def test_responses_without_a_body_end_at_once(egress, upstream, status):
    host = upstream(answers(b"HTTP/1.1 " + status + b"\r\nContent-Length: 5\r\n\r\n"))
    assert egress(host).ask(get(host, "Host: x")).startswith(b"HTTP/1.1 " + status)


def test_a_client_that_waits_for_100_continue_is_told_by_the_host(egress, upstream):
    def handle(host, sock):
        assert b"100-continue" in read_head(sock)
        sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        host.received.append(sock.recv(3, socket.MSG_WAITALL))
        sock.sendall(OK)

    host = upstream(handle)
    with egress(host).connect() as sock:
        lines = ("Host: x", "Content-Length: 3", "Expect: 100-continue")
        sock.sendall(get(host, *lines, method="PUT"))
        assert read_head(sock).startswith(b"HTTP/1.1 100 ")
        sock.sendall(b"abc")
        assert read_all(sock).startswith(b"HTTP/1.1 200 OK")
    assert host.received == [b"abc"]


def test_early_hints_come_before_the_response_but_not_to_old_clients(egress, upstream):
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    host = upstream(answers(hints * 3 + OK))
    out = egress(host)
    assert out.ask(get(host, "Host: x")).count(b"HTTP/1.1 103") == 3
    assert b"103" not in out.ask(get(host, version="1.0"))


def test_a_host_can_not_switch_protocols(egress, upstream):
    switch = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: evil\r\nConnection: upgrade\r\n\r\nraw"
    host = upstream(answers(switch))
    answer = egress(host).ask(get(host, "Host: x", "Upgrade: evil", "Connection: upgrade"))
    assert answer.startswith(b"HTTP/1.1 502 ") and b"raw" not in answer


def test_an_answer_before_the_end_of_a_request_is_passed_on(egress, upstream):
    refusal = b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig"
    out = egress(host := upstream(answers(refusal)))
    with out.connect() as sock:
        sock.sendall(get(host, "Host: x", "Content-Length: 1000000000", method="POST"))
        answer = read_head(sock)
        assert answer.startswith(b"HTTP/1.1 413 ")


def test_an_answer_reaches_a_client_that_reads_only_after_its_whole_body(egress, upstream):
    def handle(_, sock):
        read_head(sock)
        sock.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        reset(sock)

    out = egress(host := upstream(handle), limits={"linger_seconds": SECONDS})
    client = http.client.HTTPConnection(*out.address, timeout=SECONDS)
    client.request("POST", f"http://{HOST}:{host.port}/", body=bytes(32 << 20))
    # The host's reset may overtake its answer, as it may without a proxy.
    assert client.getresponse().status in (413, 502)
    client.close()


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\npart",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\npart\r\n",
    ],
)
def test_a_response_that_breaks_off_is_not_taken_for_whole(egress, upstream, response):
    out = egress(host := upstream(answers(response)))
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        out.opener().open(f"http://{HOST}:{host.port}/", timeout=SECONDS).read()


def test_a_response_that_is_reset_is_not_taken_for_whole(egress, upstream):
    def handle(_, sock):
        read_head(sock)
        sock.sendall(b"HTTP/1.0 200 OK\r\n\r\npart")
        time.sleep(0.2)
        reset(sock)

    out = egress(host := upstream(handle))
    with out.connect() as sock:
        sock.sendall(get(host, version="1.0"))
        with pytest.raises(ConnectionResetError):
            while sock.recv(100):
                pass


@pytest.mark.parametrize(
    "response",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1, 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 300_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX\0Y: 1\r\n\r\n",
    ],
)
def test_what_is_not_http_is_answered_with_502(egress, upstream, response):
    out = egress(host := upstream(answers(response)))
    assert out.ask(get(host, "Host: x")).startswith(b"HTTP/1.1 502 metaflow-sandbox: ")


# --- smuggling ----------------------------------------------------------------------------


@pytest.mark.parametrize("lines", [("Host: x",), ("Host: x", "Connection: keep-alive")])
def test_a_second_request_on_a_connection_goes_nowhere(egress, upstream, lines):
    host = upstream(answers(OK))
    out = egress(host)
    answer = out.ask(get(host, *lines) + get(host, "Host: x", "X-Second: 1"))
    assert answer.count(b"HTTP/1.1 200") == 1
    assert host.connections == 1 and b"X-Second" not in b"".join(host.received)


def test_a_second_request_after_a_body_goes_nowhere(egress, upstream):
    host = upstream(answers(OK))
    second = b"GET http://169.254.169.254/ HTTP/1.1\r\nHost: x\r\n\r\n"
    for framing, body in (
        ("Content-Length: 3", b"abc"),
        ("Transfer-Encoding: chunked", b"3\r\nabc\r\n0\r\n\r\n"),
    ):
        egress(host).ask(get(host, "Host: x", framing, method="POST", body=body + second))
    assert host.connections == 2 and b"169.254" not in b"".join(host.received)


SMUGGLED = [
    ("Content-Length: 4", "Transfer-Encoding: chunked"),
    ("Transfer-Encoding: chunked", "Content-Length: 4", "Connection: content-length"),
    ("Content-Length: 4", "Content-Length: 5"),
    ("Content-Length: 4, 5",),
    ("Content-Length: +4",),
    ("Content-Length: -1",),
    ("Content-Length: 0x4",),
    ("Content-Length: 4 4",),
    ("Content-Length: " + "9" * 50,),
    ("Transfer-Encoding: gzip, chunked",),
    ("Transfer-Encoding: chunked", "Transfer-Encoding: identity"),
    ("Transfer-Encoding: xchunked",),
    ("Transfer-Encoding : chunked",),
    ("Transfer-Encoding\t: chunked",),
    (" Transfer-Encoding: chunked",),
    ("X: y\0", "Transfer-Encoding: chunked"),
    ("Host: other",),
    ("X: y\rTransfer-Encoding: chunked",),
]


@pytest.mark.parametrize("lines", SMUGGLED)
def test_requests_of_two_meanings_are_refused(egress, upstream, lines):
    host = upstream(answers(OK))
    out = egress(host)
    body = b"0\r\n\r\nGET /admin HTTP/1.1\r\nHost: x\r\n\r\n"
    first = () if lines[0].startswith(" ") else ("Host: x",)
    answer = out.ask(get(host, *first, *lines, method="POST", body=body))
    assert answer.split(b" ")[1] in (b"400", b"501")
    assert host.connections == 0


@pytest.mark.parametrize("body", [b"3\r\nabcdef\r\n0\r\n\r\n", b"zz\r\n", b"3\r\nab", b"-1\r\nab"])
def test_a_body_that_breaks_its_framing_is_cut_off(egress, upstream, body):
    host = upstream(lambda host, sock: host.received.append(read_all(sock)))
    with egress(host).connect() as sock:
        lines = ("Host: x", "Transfer-Encoding: chunked")
        sock.sendall(get(host, *lines, method="POST", body=body))
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 502 "))
    until(lambda: host.received)
    assert not host.received[0].endswith(b"0\r\n\r\n")


# --- what is refused ----------------------------------------------------------------------

REFUSED = [  # host, as CONNECT gives it
    "evil.test",
    "allowed.test.evil.test",
    "notallowed.test",
    "sub.allowed.test",
    "wild.test",
    "localhost",
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0x7f.0x0.0x0.0x1",
    "017700000001",
    "169.254.169.254",
    "1.1.1.1",
    "[::1]",
    "[::ffff:127.0.0.1]",
    "[::1%25lo]",
    "allowed.test..",
    ".allowed.test",
    "allowed.test%00",
    "evil.test#.wild.test",
    "evil.test?.wild.test",
    "evil.test/.wild.test",
    "evil.test\\.wild.test",
    "*.wild.test",
    "-.wild.test",
    "a" * 300 + ".wild.test",
    "a" * 64 + ".wild.test",
]
MALFORMED = [  # targets of CONNECT
    f"{HOST}",
    f"{HOST}:",
    f"{HOST}:0",
    f"{HOST}:65536",
    f"{HOST}:+80",
    f"{HOST}:80:80",
    f"{HOST}:99999999999999999999",
    ":80",
    "::1:80",
    "[::1:80",
    "allowed.test@evil.test:80",
    "user:password@allowed.test:80",
    "http://allowed.test:80",
    "/",
    "*",
]


@pytest.mark.parametrize("host", REFUSED)
def test_hosts_that_are_not_listed_are_refused_before_any_look_up(egress, upstream, host):
    server = upstream()
    out = egress(server)
    answer = out.ask(f"CONNECT {host}:{server.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 403 metaflow-sandbox: ")
    assert len(out.refusals) == 1
    if "/" not in host and "?" not in host and "#" not in host:
        request = f"GET http://{host}:{server.port}/ HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
        assert out.ask(request).startswith(b"HTTP/1.1 403 metaflow-sandbox: ")
    assert out.looked_up == [] and server.connections == 0


@pytest.mark.parametrize("target", MALFORMED)
def test_targets_that_are_not_a_host_and_a_port_are_refused(egress, upstream, target):
    server = upstream()
    out = egress(server)
    answer = out.ask(f"CONNECT {target} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert out.looked_up == [] and server.connections == 0


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/path?u=http://allowed.test/",
        "*",
        "allowed.test",
        "https://allowed.test/",
        "ftp://allowed.test/",
        "file:///etc/passwd",
        "gopher://allowed.test/",
        "http:/allowed.test/",
        "http:///etc",
        "http://",
        "http://?",
        "http://user@allowed.test/",
        "http://user:password@allowed.test/",
        "http://allowed.test@evil.test/",
        "http://allowed.test:80@evil.test/",
        "http://allowed.test/#fragment",
        "http://allowed.test:x/",
        "http://allowed.test:80:80/",
    ],
)
def test_only_plain_http_urls_are_fetched(egress, target):
    out = egress(rules=Rules(None))
    answer = out.ask(f"GET {target} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert out.looked_up == []


@pytest.mark.parametrize(
    "data",
    [
        b"CONNECT allowed.test\0.evil.test:80 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT allowed.test :80 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT b\xc3\xbccher.wild.test:80 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT allowed.test:80\r\n\r\n",
        b"GET http://allowed.test/ HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x05\x01\x00",
        b"\r\n\r\n",
        b"\0" * 100,
    ],
)
def test_what_is_not_http_is_answered_with_400(egress, data):
    out = egress(rules=Rules(("allowed.test", "*.wild.test")))
    assert out.ask(data).startswith(b"HTTP/1.1 400 ")
    assert out.looked_up == []


def test_ports_are_refused_before_any_look_up(egress, upstream):
    out = egress(rules=Rules((HOST,)))
    answer = out.ask(f"CONNECT {HOST}:22 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 403 ") and b"ports 80 and 443" in answer
    assert list(out.refusals) == [f"{HOST}:22"]
    assert out.looked_up == []


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["10.0.0.1", "192.168.0.1"],
        ["169.254.169.254"],
        ["168.63.129.16"],
        ["::1"],
        ["::ffff:127.0.0.1"],
        ["::ffff:1.1.1.1"],
        ["64:ff9b::7f00:1"],
        ["fe80::1%lo"],
        ["0.0.0.0"],
        ["not-an-address"],
    ],
)
def test_a_listed_name_that_leads_inside_is_refused(egress, upstream, addresses):
    server = upstream()
    out = egress(server, addresses=addresses, reachable=is_reachable)
    for request in (
        f"CONNECT {HOST}:{server.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
        get(server, "Host: x"),
    ):
        answer = out.ask(request)
        assert answer.startswith(b"HTTP/1.1 403 ") and b"public internet" in answer
        assert addresses[0].encode() not in answer  # the names inside are not for it to know
    assert server.connections == 0
    assert "public internet" in out.refusals[f"{HOST}:{server.port}"]


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "10.0.0.1"])
def test_addresses_inside_are_refused_where_every_host_is_allowed(egress, upstream, host):
    server = upstream()
    out = egress(rules=Rules(None), reachable=is_reachable)
    answer = out.ask(f"CONNECT {host}:{server.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert out.looked_up == [] and server.connections == 0


def test_an_address_is_connected_to_without_a_look_up(egress, upstream):
    server = upstream()
    out = egress(rules=Rules(None))
    out.tunnel(server.port, "127.0.0.1").close()
    assert out.looked_up == []


def test_of_a_hosts_addresses_only_the_allowed_ones_are_tried(egress, upstream):
    good = upstream()
    bad = upstream(address="127.0.0.2", port=good.port)
    out = egress(good, addresses=["127.0.0.2", "::1", "127.0.0.1"])
    out.tunnel(good.port).close()
    until(lambda: good.connections == 1)
    assert bad.connections == 0


def test_a_name_is_looked_up_once_and_its_checked_address_used(egress, upstream):
    good = upstream()
    bad = upstream(address="127.0.0.2", port=good.port)
    given = iter([["127.0.0.1"], ["127.0.0.2"]])

    async def rebinding(host, port):
        return next(given)

    out = egress(good, resolve=rebinding)
    out.tunnel(good.port).close()
    until(lambda: good.connections == 1)
    answer = out.ask(f"CONNECT {HOST}:{good.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert bad.connections == 0


def test_a_refusal_says_what_to_write_also_where_only_its_reason_is_shown(egress):
    out = egress(rules=Rules(("pypi.org",)))
    with pytest.raises(urllib.error.HTTPError) as error:
        out.opener().open("http://files.example/", timeout=SECONDS)
    body = error.value.read().decode()
    assert body.count("\n") == 1 and 'add "files.example" to network=[...]' in body
    client = http.client.HTTPConnection(*out.address, timeout=SECONDS)
    client.set_tunnel("files.example", 443)
    with pytest.raises(OSError, match=r'add "files.example" to network='):
        client.connect()
    assert out.refusals == {
        "files.example:80": 'it is not listed; to allow it, add "files.example" to network=[...]',
        "files.example:443": 'it is not listed; to allow it, add "files.example" to network=[...]',
    }


def test_a_refused_head_request_gets_no_body(egress):
    answer = egress(rules=Rules(())).ask(b"HEAD http://a.test/ HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 403 ") and answer.endswith(b"\r\n\r\n")


def test_refusals_are_few_short_and_printable(egress):
    out = egress(rules=Rules(("pypi.org",)))
    out.ask(b"CONNECT " + b"a" * 50_000 + b":80 HTTP/1.1\r\nHost: x\r\n\r\n")
    for i in range(120):
        out.ask(b"CONNECT h%d.example:80 HTTP/1.1\r\nHost: x\r\n\r\n" % i)
    assert len(out.refusals) == 100
    assert all(len(k) <= 300 and k.isascii() and k.isprintable() for k in out.refusals)


# --- hosts that can't be reached ----------------------------------------------------------


def test_a_name_without_addresses_is_answered_with_502(egress, upstream):
    async def unknown(host, port):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    server = upstream()
    for out in (egress(server, resolve=unknown), egress(server, addresses=[])):
        answer = out.ask(get(server, "Host: x"))
        assert answer.startswith(b"HTTP/1.1 502 ") and b"has no address" in answer
        assert out.refusals == {}


def test_a_look_up_that_takes_too_long_is_answered_with_504(egress, upstream):
    async def never(host, port):
        await anyio.sleep_forever()

    server = upstream()
    out = egress(server, resolve=never, limits={"connect_seconds": 0.2})
    assert out.ask(get(server, "Host: x")).startswith(b"HTTP/1.1 504 ")


def test_a_host_that_refuses_is_answered_with_502(egress, upstream):
    server = upstream()
    server.close()
    assert egress(server).ask(get(server, "Host: x")).startswith(b"HTTP/1.1 502 ")


@pytest.fixture
def silent(cleanup):
    """A port on 127.0.0.3 that doesn't answer, as its queue is full."""
    listener = socket.socket()
    listener.bind(("127.0.0.3", 0))
    listener.listen(0)
    cleanup.callback(listener.close)
    for _ in range(4):
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(listener.getsockname())
        cleanup.callback(sock.close)
    time.sleep(0.05)
    return types.SimpleNamespace(port=listener.getsockname()[1])


ALL = {"reachable": lambda address: True}


def test_a_host_that_does_not_answer_is_answered_with_504(egress, silent):
    for limits in ({"connect_seconds": 0.3}, {"attempt_seconds": 0.2}):
        out = egress(rules=Rules(None), addresses=["127.0.0.3"] * 2, limits=limits, **ALL)
        assert out.ask(get(silent, "Host: x")).startswith(b"HTTP/1.1 504 ")


def test_the_next_address_is_tried_when_one_does_not_answer(egress, silent, upstream):
    server = upstream(port=silent.port)
    addresses = ["127.0.0.3", "127.0.0.4", "127.0.0.1"]
    limits = {"attempt_seconds": 0.3}
    out = egress(server, addresses=addresses, limits=limits, **ALL)
    out.tunnel(server.port).close()
    until(lambda: server.connections == 1)


# --- limits -------------------------------------------------------------------------------


def test_a_head_that_is_too_large_is_refused(egress):
    out = egress(rules=Rules(None))
    with out.connect() as sock:
        sock.sendall(b"GET http://allowed.test/ HTTP/1.1\r\nHost: x\r\n")
        with contextlib.suppress(OSError):
            for _ in range(64):
                sock.sendall(b"X: " + b"x" * 4000 + b"\r\n")
        assert read_head(sock).startswith(b"HTTP/1.1 431 ")
    assert out.looked_up == []


def test_a_head_that_drips_in_is_refused_in_time(egress):
    out = egress(rules=Rules(None), limits={"head_seconds": 0.5})
    started = time.monotonic()
    with out.connect() as sock:
        stop = threading.Event()

        def drip():
            with contextlib.suppress(OSError):
                for byte in b"GET http://allowed.test/ HTTP/1.1\r\n" + b"X: y\r\n" * 1000:
                    if stop.wait(0.05):
                        return
                    sock.sendall(bytes([byte]))

        thread = threading.Thread(target=drip)
        thread.start()
        assert read_head(sock).startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - started < 5
        stop.set()
        thread.join()


def test_a_connection_that_says_nothing_is_ended(egress):
    out = egress(rules=Rules(None), limits={"head_seconds": 0.2, "linger_seconds": 0.2})
    with out.connect() as sock:
        assert read_all(sock).startswith(b"HTTP/1.1 408 ")


def endless(host, sock, start=b""):
    """Sends for ever, and counts in `received`."""
    sock.sendall(start)
    host.received.append(0)
    while True:
        host.received[0] += sock.send(bytes(65536))


def stalls(count):
    """How far a count gets until it stands still."""
    last, since = -1, time.monotonic()
    while time.monotonic() - since < 0.5:
        if count() != last:
            last, since = count(), time.monotonic()
        assert last < 64 << 20, "it is read without bound"
        time.sleep(0.02)
    return last


def test_a_response_that_nobody_reads_is_not_gathered(egress, upstream):
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    host = upstream(lambda host, sock: (read_head(sock), endless(host, sock, head)))
    with egress(host).connect() as sock:
        sock.sendall(get(host, "Host: x"))
        until(lambda: host.received)
        stalls(lambda: host.received[0])


def test_a_tunnel_that_nobody_reads_is_not_gathered(egress, upstream):
    host = upstream(endless)
    with egress(host).tunnel(host.port):
        until(lambda: host.received)
        stalls(lambda: host.received[0])


def test_what_is_sent_while_a_host_is_looked_up_is_not_gathered(egress):
    async def never(host, port):
        await anyio.sleep_forever()

    out = egress(rules=Rules((HOST,)), resolve=never)
    with out.connect() as sock:
        sock.setblocking(False)
        sent = sock.send(b"CONNECT %s:80 HTTP/1.1\r\nHost: x\r\n\r\n" % HOST.encode())

        def flood():
            nonlocal sent
            with contextlib.suppress(BlockingIOError, ConnectionError):
                while sent < 100 << 20:
                    sent += sock.send(bytes(65536))
            return sent

        stalls(flood)


def memory(kind):
    with open("/proc/self/status") as f:
        (line,) = [line for line in f if line.startswith(kind)]
    return int(line.split()[1]) << 10


def test_a_large_response_streams_through_flat_memory(egress, upstream):
    size = 256 << 20

    def handle(_, sock):
        read_head(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size >> 16):
            sock.sendall(bytes(65536))

    host = upstream(handle)
    out = egress(host)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # forget the peak
    before = memory("VmRSS")
    with out.opener().open(f"http://{HOST}:{host.port}/", timeout=SECONDS) as response:
        read = 0
        while piece := response.read(1 << 16):
            read += len(piece)
    assert read == size
    assert memory("VmHWM") - before < 16 << 20


def test_connections_beyond_the_limit_wait_for_their_turn(egress, upstream):
    host = upstream()
    out = egress(host, limits={"connections": 2})
    first, second = out.tunnel(host.port), out.tunnel(host.port)
    with first, second, out.connect() as third:
        third.sendall(b"CONNECT %s:%d HTTP/1.0\r\n\r\n" % (HOST.encode(), host.port))
        third.settimeout(0.3)
        with pytest.raises(TimeoutError):
            third.recv(1)
        assert host.connections <= 2
        first.close()
        third.settimeout(SECONDS)
        assert read_head(third).startswith(b"HTTP/1.1 200 ")


def test_two_hundred_tunnels_at_once_are_all_served(egress, upstream):
    host = upstream()
    out = egress(host)
    problems = []

    def use(n):
        try:
            with out.tunnel(host.port, f"h{n}.wild.test") as sock:
                data = b"%d " % n * 1000
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                assert read_all(sock) == data
        except BaseException as e:
            problems.append(e)

    threads = [threading.Thread(target=use, args=(n,)) for n in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == [] and host.connections == 200


@pytest.fixture
def mute(cleanup, upstream):
    """A host that reads to the end and says nothing, as long as the test runs."""
    stop = threading.Event()
    cleanup.callback(stop.set)

    def handle(host, sock):
        host.received.append(read_all(sock))
        stop.wait()

    return upstream(handle)


def test_the_other_direction_may_be_silent_only_so_long_once_one_has_ended(egress, mute):
    out = egress(mute, limits={"half_closed_seconds": 0.3, "connections": 1})
    with out.tunnel(mute.port) as sock:
        sock.sendall(b"x")
        time.sleep(0.6)  # while both are open there is no such limit
        sock.sendall(b"y")
    out.tunnel(mute.port).close()  # the only place is free again
    assert mute.received[0] == b"xy"


def test_a_client_that_left_frees_its_place_though_the_host_is_silent(egress, mute):
    out = egress(mute, limits={"half_closed_seconds": 0.2, "connections": 1})
    for n in range(3):
        with out.connect() as sock:
            sock.sendall(get(mute, "Host: x"))
            until(lambda: mute.connections > n)


def test_a_host_may_take_its_time_while_the_client_waits(egress, upstream):
    def handle(_, sock):
        read_head(sock)
        time.sleep(0.6)
        sock.sendall(OK)

    host = upstream(handle)
    limits = dict.fromkeys(("half_closed_seconds", "head_seconds", "connect_seconds"), 0.2)
    out = egress(host, limits={**limits, "attempt_seconds": 0.2, "linger_seconds": 0.2})
    assert out.ask(get(host, "Host: x")).endswith(b"ok")


# --- faults and the end -------------------------------------------------------------------


def test_clients_that_break_off_at_any_point_do_no_harm(egress, upstream, website):
    host = upstream()
    out = egress(host, website)
    tunnel = b"CONNECT %s:%d HTTP/1.1\r\nHost: x\r\n\r\nsome data" % (HOST.encode(), host.port)
    post = get(website, "Host: x", "Content-Length: 5000", method="POST", body=bytes(4000))
    for data in (tunnel, post):
        for end in {0, 1, 10, len(data) // 2, len(data) - 1, len(data)}:
            for leave in (reset, socket.socket.close):
                sock = out.connect()
                sock.sendall(data[:end])
                if end % 2:
                    time.sleep(0.01)
                leave(sock)
    assert out.ask(get(website, "Host: x")).startswith(b"HTTP/1.1 200 ")


def test_noise_does_no_harm(egress, website):
    out = egress(website, limits={"linger_seconds": 0.1})
    rng = random.Random(3)
    good = get(website, "Host: x", "Transfer-Encoding: chunked", "A: b", method="POST")
    good += b"5\r\nhello\r\n0\r\n\r\n"
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(data))
            if rng.random() < 0.5:
                data[at] = rng.randrange(256)
            else:
                data[at:at] = rng.choice([b"\r\n", b"\0", b":", b" ", b"\n", b"HTTP/1.1", b"0"])
        with out.connect() as sock:
            sock.sendall(data)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
            read_all(sock)
    assert all(host == HOST for host, _ in out.looked_up)
    assert out.ask(get(website, "Host: x")).startswith(b"HTTP/1.1 200 ")


def test_a_fault_of_the_proxy_itself_ends_one_connection_only(egress, website, caplog):
    faults = iter([ZeroDivisionError("secret"), RuntimeError("secret"), None])

    async def resolve(host, port):
        if fault := next(faults):
            raise fault
        return ["127.0.0.1"]

    out = egress(website, resolve=resolve)
    assert out.ask(get(website, "Host: x")) == b""
    assert out.ask(get(website, "Host: x")) == b""
    assert out.ask(get(website, "Host: x")).startswith(b"HTTP/1.1 200 ")
    assert "ZeroDivisionError" in caplog.text and "secret" not in caplog.text
    caplog.clear()


def test_it_goes_on_when_descriptors_ran_out_for_a_while(egress, website):
    failing = threading.Event()
    failing.set()
    real = socket.socket.accept

    class Listener(socket.socket):
        def accept(self):
            if failing.is_set():
                raise OSError(24, "Too many open files")
            return real(self)

    listener = Listener()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    out = egress(website, listener=listener)
    with out.connect() as sock:
        sock.sendall(get(website, "Host: x"))
        time.sleep(0.3)
        failing.clear()
        assert read_all(sock).startswith(b"HTTP/1.1 200 ")


def test_nothing_secret_is_logged_or_remembered(egress, website, caplog):
    caplog.set_level(logging.DEBUG)
    out = egress(website, rules=Rules(("pypi.org",)))
    out.ask(get(website, "Host: x", "Authorization: Bearer hunter2", "Cookie: hunter2"))
    out.ask(b"GET http://files.example/hunter2?hunter2 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert "hunter2" not in str(out.refusals)
    assert "hunter2" not in caplog.text


def serve(body, limits=None, reachable=lambda a: a == "127.0.0.1", resolve=None):
    """Runs `body(running, address)` in the context of a proxy, in this thread's event loop."""

    async def main():
        async def here(host, port):
            return ["127.0.0.1"]

        with socket.create_server(("127.0.0.1", 0)) as listener:
            async with proxy(
                listener,
                Rules(None),
                resolve=resolve or here,
                reachable=reachable,
                limits=limits or Limits(),
            ) as running:
                await body(running, listener.getsockname())
            assert listener.fileno() >= 0  # it is the caller's to close

    anyio.run(main)


def test_the_end_cuts_open_tunnels_at_once(upstream, cleanup):
    host = upstream()
    clients = []

    def enter(address):
        for _ in range(20):
            clients.append(cleanup.enter_context(Egress(address, []).tunnel(host.port)))

    async def body(_, address):
        await anyio.to_thread.run_sync(enter, address)

    started = time.monotonic()
    serve(body)
    assert [read_all(client) for client in clients] == [b""] * 20
    until(lambda: all(s.fileno() == -1 for s in host.sockets))  # they saw the end
    assert time.monotonic() - started < 5


def test_the_end_does_not_wait_for_a_look_up(monkeypatch):
    stop = threading.Event()
    asked = threading.Event()

    def hang(*_, **__):
        asked.set()
        stop.wait(SECONDS)
        return []

    async def body(_, address):
        stream = await anyio.connect_tcp(*address)
        await stream.send(b"CONNECT a.test:80 HTTP/1.0\r\n\r\n")
        await anyio.to_thread.run_sync(asked.wait, SECONDS)
        await stream.aclose()

    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda h, *a, **k: (hang if h == b"a.test." else real)(h, *a, **k)
    )
    started = time.monotonic()
    try:
        serve(body, resolve=resolve)
        assert asked.is_set() and time.monotonic() - started < 5
    finally:
        stop.set()


def test_the_resolver_is_asked_for_the_absolute_name(monkeypatch):
    asked = []

    def answer(host, port, **options):
        asked.append((host, port))
        both = [(2, 1, 6, "", ("192.0.2.1", port)), (10, 1, 6, "", ("2001:db8::1", port, 0, 0))]
        return [*both, both[0]]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    assert anyio.run(resolve, "pypi.org", 443) == ["192.0.2.1", "2001:db8::1"]
    assert asked == [(b"pypi.org.", 443)]


def test_an_error_inside_the_context_comes_out_as_it_is():
    async def body(*_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        serve(body)


def test_the_context_can_be_cancelled_from_outside():
    async def main():
        with anyio.move_on_after(0.2) as scope, socket.create_server(("127.0.0.1", 0)) as listener:
            async with proxy(listener, Rules(None)):
                await anyio.sleep_forever()
        assert scope.cancelled_caught

    started = time.monotonic()
    anyio.run(main)
    assert time.monotonic() - started < 5


def test_no_descriptor_is_left(upstream):
    host = upstream(answers(OK))

    async def body(_, address):
        for data in (
            b"CONNECT a.test:%d HTTP/1.0\r\n\r\n",
            b"GET http://a.test:%d/ HTTP/1.0\r\n\r\n",
        ):
            for _ in range(5):
                stream = await anyio.connect_tcp(*address)
                await stream.send(data % host.port)
                await stream.receive()
                await stream.aclose()

    def settled(connections):
        """How many descriptors there are when no host has one any more."""
        until(lambda: host.connections == connections)
        until(lambda: all(s.fileno() == -1 for s in host.sockets))
        return len(os.listdir("/proc/self/fd"))

    serve(body)
    gc.collect()
    before = settled(10)
    serve(body)
    until(lambda: settled(20) <= before)
