"""Cards are HTML that a sandbox wrote: shown in a frame that has none of the viewer's rights."""

from __future__ import annotations

import html

# The frame has an origin of its own, so its scripts can't read the viewer's page,
# cookies or storage; and no network, so nothing in it can call home.
_PAGE = """<!DOCTYPE html>
<html><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; \
img-src data: blob:; font-src data:; form-action 'none'; base-uri 'none'">
<style>html,body,iframe{margin:0;border:0;width:100%%;height:100%%;display:block}</style>
</head><body><iframe sandbox="allow-scripts" referrerpolicy="no-referrer" srcdoc="%s"></iframe>
</body></html>
"""


def wrap(card: bytes) -> bytes:
    """A page that shows `card` with its own scripts and nothing else of the browser's."""
    return (_PAGE % html.escape(card.decode("utf-8", "replace"), quote=True)).encode()
