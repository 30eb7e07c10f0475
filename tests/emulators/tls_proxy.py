"""A proxy as companies have it, in front of an emulator: it opens up the TLS that goes through.

Whatever host a client asks it for, it answers for that host with a certificate of its own
authority, as such proxies do, and leads to the one address that it was given. Used as

    with Proxy(directory, port_of_the_emulator) as proxy:
        environment |= proxy.environment
    proxy.hosts      those that were asked for, as "api.example.com:443"
"""

import asyncio
import ssl
import subprocess
import threading

_LINE = 1 << 16


def authority(directory, names):
    """Makes a certificate for names, and the authority that signs it. Returns the paths."""

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    key = ("-newkey", "rsa:2048", "-nodes", "-days", "2")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=a company")
    openssl("req", *key[:3], "-keyout", "own.key", "-out", "own.csr", "-subj", "/CN=proxy")
    (directory / "names").write_text("subjectAltName=" + ",".join(f"DNS:{n}" for n in names))
    openssl(
        "x509", "-req", "-in", "own.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
        "-days", "2", "-extfile", "names", "-out", "own.pem",
    )  # fmt: skip
    return directory / "ca.pem", directory / "own.pem", directory / "own.key"


class Proxy:
    """Attributes:
    environment: the variables that lead a client to it, and have it trusted.
    hosts: host:port of each connection that was asked for.
    """

    def __init__(self, directory, target, names):
        self.target, self.hosts = target, []
        self._ca, certificate, key = authority(directory, names)
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(certificate, key)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self):
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_LINE)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self.environment = {
            "HTTPS_PROXY": url, "NO_PROXY": "", "no_proxy": "", "SSL_CERT_FILE": str(self._ca),
        }  # fmt: skip
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _serve(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        method, where, _ = head.split(b"\r\n", 1)[0].split(b" ")
        if method != b"CONNECT":
            writer.close()
            return
        self.hosts.append(where.decode())
        ours, theirs = await asyncio.open_connection("127.0.0.1", self.target)
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await writer.start_tls(self._tls)  # Python 3.11, as the SDK
        await asyncio.gather(_pass(reader, theirs), _pass(ours, writer), return_exceptions=True)
        writer.close()
        theirs.close()


async def _pass(reader, writer):
    while data := await reader.read(_LINE):
        writer.write(data)
        await writer.drain()
    writer.close()  # TLS has no half-closed connections
