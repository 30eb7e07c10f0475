"""Cards are HTML that a sandbox wrote: shown in a frame that has none of the viewer's rights.

The frame has an origin of its own, so its scripts can't read the viewer's page, cookies or
storage, nor take it elsewhere; and a policy by which nothing in it loads or sends anything.
Browsers have two ways to the network that no policy holds:

    WebRTC        taken away by a guard, which begins each script. No other script runs: the
                  policy names each by its hash, and what a frame in the frame runs, too
    preconnect    a hint in HTML to open a connection, without a request. It can't be held
                  here, and lets a card say a few words by the names of hosts
"""

from __future__ import annotations

import base64
import hashlib
import re

from ..errors import Rejected

#: Scripts of one card, each of which gets a guard and a hash, and bytes of a wrapped one.
SCRIPTS, WRAPPED = 1000, 64 << 20
# The global object by what no declaration of a card's can take the place of, as a module's own
# `function window(){}` does.
_GUARD = (
    '{const all=(function(){}).constructor("return this")();'
    'for(const name of ["RTCPeerConnection","webkitRTCPeerConnection","mozRTCPeerConnection"])'
    "delete all[name];}"
)
_STRICT = re.compile(r"""\s*(["'])use strict\1""")
_SCRIPT = re.compile(r"<script(?=[\s/>])", re.IGNORECASE)
_SCRIPT_END = re.compile(r"</script(?=[\s/>])", re.IGNORECASE)
_DATA = re.compile(
    r"""\stype\s*=\s*["']?(?!["'\s>]|module\b|text/javascript\b|application/javascript\b)""",
    re.IGNORECASE,
)
_PAGE = """<!DOCTYPE html>
<html><head><meta charset="utf-8">
<meta http-equiv="x-dns-prefetch-control" content="off">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
script-src 'unsafe-eval'%s; style-src 'unsafe-inline'; \
img-src data: blob:; font-src data:; form-action 'none'; base-uri 'none'; webrtc 'block'">
<style>html,body,iframe{margin:0;border:0;width:100%%;height:100%%;display:block}</style>
</head><body><iframe sandbox="allow-scripts" referrerpolicy="no-referrer" srcdoc="%s"></iframe>
</body></html>
"""


def wrap(card: bytes) -> bytes:
    """A page that shows `card` with its own inline scripts and nothing else of the browser's.

    Raises:
        Rejected: that would be many times as large as the card.
    """
    text = card.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
    guarded, hashes = _guard(text.replace("\0", "\ufffd"))
    allowed = "".join(f" 'sha256-{value}'" for value in hashes)
    more = 5 * guarded.count('"') + 4 * guarded.count("&") + 3 * guarded.count("<")
    if len(guarded) + more > WRAPPED:
        raise Rejected(f"a card is larger than {WRAPPED >> 20} MB when it is wrapped")
    shown = guarded.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return (_PAGE % (allowed, shown)).encode()


def _guard(text: str) -> tuple[str, list[str]]:
    """The same HTML with the guard in each inline script, and the hashes of these.

    What a browser takes for a script and this doesn't has no hash, so it doesn't run.
    """
    parts: list[str] = []
    hashes: dict[str, None] = {}
    done = 0
    while start := _SCRIPT.search(text, done):
        opened = text.find(">", start.end()) + 1
        end = _SCRIPT_END.search(text, opened) if opened else None
        if end is None:
            break
        if len(parts) >= 2 * SCRIPTS:
            raise Rejected(f"a card has more than {SCRIPTS} scripts")
        parts.append(text[done:opened])
        script = text[opened : end.start()]
        if not _DATA.search(text, start.end(), opened):
            strict = '"use strict";' if _STRICT.match(script) else ""
            script = f"{strict}{_GUARD}{script}"
            digest = hashlib.sha256(script.encode("utf-8", "surrogatepass")).digest()
            hashes[base64.b64encode(digest).decode()] = None
        parts.append(script)
        done = end.start()
    return "".join([*parts, text[done:]]), list(hashes)
