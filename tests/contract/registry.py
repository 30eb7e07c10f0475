"""A registry of images with Basic authentication, on this machine: Debian's docker-registry."""

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

USER, PASSWORD = "tester", "a password"
HASH = "$2b$04$rkh7NSdzoH9QrWoKgE9HheR9054la4pXFps7GkW7dRBX7/XISBOX2"  # bcrypt


@dataclass
class Registry:
    """Attributes: `config`, the directory of a client that is logged in."""

    address: str
    config: Path

    @property
    def client(self):
        return ["--config", str(self.config)]

    def login(self, docker):
        key = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        self.config.mkdir(exist_ok=True)
        (self.config / "config.json").write_text(
            json.dumps({"auths": {self.address: {"auth": key}}})
        )


@contextlib.contextmanager
def serving(directory):
    if shutil.which("docker-registry") is None:
        pytest.fail("there is no docker-registry: apt-get install -y docker-registry")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (directory / "htpasswd").write_text(f"{USER}:{HASH}\n")
    (directory / "registry.yml").write_text(
        f"""
version: 0.1
storage:
  filesystem:
    rootdirectory: {directory}/registry
http:
  addr: 127.0.0.1:{port}
auth:
  htpasswd:
    realm: tests
    path: {directory}/htpasswd
"""
    )
    log = open(directory / "registry.log", "wb")
    process = subprocess.Popen(
        ["docker-registry", "serve", str(directory / "registry.yml")], stdout=log, stderr=log
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
        yield Registry(f"127.0.0.1:{port}", directory / "client")
    finally:
        process.terminate()
        process.wait()
