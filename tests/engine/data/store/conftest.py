"""An S3 server on loopback behind a proxy that can be told to fail, and datasets in it."""

from __future__ import annotations

import hashlib
import http.client
import http.server
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import boto3
import polars as pl
import pytest
from moto.server import ThreadedMotoServer

from engine.data.store import StoreOptions

KEY_ID = "tester"
Fault = int | Literal["stall", "stall in the body", "cut"]
_CODES = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}


@dataclass
class FaultyStore:
    """The proxy: what it was asked for, and how it fails.

    fault(key, number) -> a fault or None, for request number `number` (from 0) for object `key`; an int is a status.
    """

    client: Any
    bucket: str
    port: int = 0
    fault: Callable[[str, int], Fault | None] = lambda key, number: None
    requests: list[tuple[str, str]] = field(default_factory=list)  # (key, range), HEAD and GET
    released: threading.Event = field(default_factory=threading.Event)  # ends stalls
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def options(self, **changed: Any) -> StoreOptions:
        """Options for tests: impatient ones."""
        return StoreOptions(**{"timeout_s": 10.0, "patience_s": 20.0, "connections": 4} | changed)

    def put(self, path: Path, name: str) -> str:
        """Upload a folder; return its URL."""
        for file in sorted(path.rglob("*")):
            if file.is_file():
                key = f"{name}/{file.relative_to(path)}"
                self.client.put_object(Bucket=self.bucket, Key=key, Body=file.read_bytes(), ACL="public-read")
        return f"s3://{self.bucket}/{name}"

    def replace(self, key: str, change: Callable[[bytes], bytes]) -> None:
        data = self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        self.client.put_object(Bucket=self.bucket, Key=key, Body=change(data))

    def remove(self, key: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=key)

    def asked(self, part: str = "") -> list[tuple[str, str]]:
        """The requests so far for keys that contain `part`."""
        with self.lock:
            return [each for each in self.requests if part in each[0]]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: FaultyStore
    upstream: tuple[str, int]

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_PUT(self) -> None:  # a token of the service for credentials
        self._send(403, {}, b"", 0)

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        store = self.store
        key = self.path.split("?")[0].removeprefix(f"/{store.bucket}/")
        with store.lock:
            number = sum(1 for asked, _ in store.requests if asked == key)
            store.requests.append((key, self.headers.get("Range", "")))
        fault: Any = store.fault(key, number)
        if f"Credential={KEY_ID}/" not in self.headers.get("Authorization", ""):
            fault = 403
        if fault == "stall":
            store.released.wait(60)
            self.close_connection = True
        elif isinstance(fault, int):
            body = f"<Error><Code>{_CODES[fault]}</Code><Message>as told</Message></Error>".encode()
            self._send(fault, {}, b"" if self.command == "HEAD" else body, len(body))
        else:
            upstream = http.client.HTTPConnection(*self.upstream, timeout=60)
            upstream.request(self.command, self.path, headers=dict(self.headers))
            answer = upstream.getresponse()
            body = answer.read()
            kept = re.compile("^(content-(type|range)|etag|last-modified|accept-ranges)$", re.IGNORECASE)
            headers = {name: value for name, value in answer.getheaders() if kept.match(name)}
            length = int(answer.headers.get("Content-Length", len(body)))
            upstream.close()
            self._send(answer.status, headers, body[: len(body) // 2] if fault else body, length)
            if fault:
                self.wfile.flush()
                if fault == "stall in the body":
                    store.released.wait(60)
                self.close_connection = True

    def _send(self, status: int, headers: dict[str, str], body: bytes, length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that gave up


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Any]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture
def store(s3_server: tuple[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultyStore]:
    """An empty bucket that behaves; the environment points to it, and to a cache of the test's own."""
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{s3_server[0]}:{s3_server[1]}",
        region_name="us-east-1",
        aws_access_key_id=KEY_ID,
        aws_secret_access_key="secret",
    )
    bucket = "b" + hashlib.sha256(str(tmp_path).encode()).hexdigest()[:16]
    client.create_bucket(Bucket=bucket)
    store = FaultyStore(client, bucket)
    handler = type("Handler", (_Handler,), {"store": store, "upstream": s3_server})
    server = _Server(("127.0.0.1", 0), handler)
    store.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    for name, value in {
        "AWS_ENDPOINT_URL": store.endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": "secret",
        "XDG_CACHE_HOME": str(tmp_path / "cache-home"),
    }.items():
        monkeypatch.setenv(name, value)
    yield store
    store.released.set()
    server.shutdown()
    thread.join()
    server.server_close()
    client.close()


def complete(path: Path) -> None:
    """Add to a dataset of the loader's tests what a finished dataset has: tables, and the digests of its files."""
    meta = json.loads((path / "dataset.json").read_text())
    num_rows = meta["counts"]["patches"]
    rows = {"slide_id": [f"s{row % 2}" for row in range(num_rows)], "row_number": list(range(num_rows))}
    pl.DataFrame(rows).write_parquet(path / "index.parquet")
    pl.DataFrame({"slide_id": ["s0", "s1"], "split": ["train", "val"]}).write_parquet(path / "slides.parquet")
    names = ("index.parquet", "rows.bin", "slides.parquet")
    meta["files"] = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}
    (path / "dataset.json").write_text(json.dumps(meta))


@pytest.fixture
def remote(store: FaultyStore, make_dataset: Any) -> tuple[Any, str]:
    """A dataset of 12 patches in 4 shards (as written on disk), and its URL."""
    made = make_dataset(rows_per_shard=3)
    complete(made.path)
    return made, store.put(made.path, "sets/a")
