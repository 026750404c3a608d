"""Slow, wrong, truncated and missing remotes raise an error that names the URL; never wrong bytes, never a hang."""

from __future__ import annotations

import hashlib
import os
import pickle
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from comtip_shards import ShardError
from comtip_shards.storage.cache import FileCache
from comtip_shards.storage.remote import Remote, RetryPolicy, is_url

DATA = bytes(range(256)) * 40
SHA = hashlib.sha256(DATA).hexdigest()
QUICK = RetryPolicy(attempts=3, stall=0.4, total=5, backoff=0.01)


class Handler(BaseHTTPRequestHandler):
    """Respond according to the first part of the path; ``server.asked`` counts requests."""

    def do_GET(self) -> None:
        behaviour = self.path.split("/")[1]
        count = self.server.asked[self.path] = self.server.asked.get(self.path, 0) + 1
        if behaviour == "flaky" and count < 3:
            return self.send_error(500)
        if behaviour in ("500", "404", "403"):
            return self.send_error(int(behaviour))
        self.send_response(200)
        self.send_header("Content-Length", str(len(DATA)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if behaviour == "cut":
            self.wfile.write(DATA[:5000])
        elif behaviour == "silent":
            self.wfile.write(DATA[:5000])
            self.wfile.flush()
            self.server.closing.wait(20)
        elif behaviour == "wrong":
            self.wfile.write(DATA[:-1] + b"x")
        else:
            self.wfile.write(DATA)
        return None

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.closing = {}, threading.Event()
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


def remote(server: ThreadingHTTPServer, behaviour: str, cache: Path, **more: object) -> Remote:
    return Remote(f"http://127.0.0.1:{server.server_port}/{behaviour}", cache, **{"retry": QUICK, **more})


@pytest.mark.parametrize("behaviour", ["good", "flaky"])
def test_a_file_is_fetched_once(server: ThreadingHTTPServer, tmp_path: Path, behaviour: str):
    one = remote(server, behaviour, tmp_path)
    path = one.fetch("a/x.bin", sha256=SHA, size=len(DATA))
    assert path.read_bytes() == DATA
    assert path.name == "x.bin"
    asked = dict(server.asked)
    # Another process and another URL: the same bytes are not downloaded again.
    assert pickle.loads(pickle.dumps(one)).fetch("b/x.bin", sha256=SHA, size=len(DATA)) == path
    assert server.asked == asked
    assert not list((tmp_path / "fetching").iterdir())


@pytest.mark.parametrize(
    ("behaviour", "kind", "message"),
    [
        ("500", "remote", r"not fetched \(attempts: 3;.*check the network"),
        ("cut", "remote", r"not fetched \(attempts: 3;"),
        ("silent", "remote", r"no data for 0\.4 s.*check the network"),
        (
            "wrong",
            "checksum",
            r"does not match its SHA-256 in the manifest \(attempts: 3\).*upload it again, or report it to its owner",
        ),
        ("404", "vanished", r"no such file"),
        ("403", "remote", r"\(attempts: 1;.*credentials"),
    ],
)
def test_failures_are_reported_and_leave_nothing(
    server: ThreadingHTTPServer, tmp_path: Path, behaviour: str, kind: str, message: str
):
    start = time.monotonic()
    with pytest.raises(ShardError, match=rf"http://127.*/{behaviour}/a/x\.bin.*{message}") as error:
        remote(server, behaviour, tmp_path).fetch("a/x.bin", sha256=SHA, size=len(DATA))
    assert error.value.kind == kind
    assert time.monotonic() - start < 30
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.parent.name != "locks"]


def test_the_total_time_is_a_limit(server: ThreadingHTTPServer, tmp_path: Path):
    retry = RetryPolicy(attempts=100, stall=0.3, total=1.0, backoff=0.01)
    start = time.monotonic()
    with pytest.raises(ShardError, match="check the network"):
        remote(server, "silent", tmp_path, retry=retry).fetch("x", sha256=SHA)
    assert time.monotonic() - start < 15


def test_no_server_at_all(tmp_path: Path):
    with pytest.raises(ShardError, match=r"http://127\.0\.0\.1:9/set/manifest\.json: not fetched"):
        Remote("http://127.0.0.1:9/set", tmp_path, retry=QUICK).read("manifest.json")


def test_a_file_larger_than_its_limit_is_refused(server: ThreadingHTTPServer, tmp_path: Path):
    with pytest.raises(ShardError, match="larger than"):
        remote(server, "good", tmp_path).read("x", limit=1000)
    with pytest.raises(ShardError, match="larger than"):
        remote(server, "good", tmp_path, max_bytes=1000).fetch("x", sha256=SHA)
    assert server.asked == {"/good/x": 2}, "a file over the limit is not fetched again"


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    fs = fsspec.filesystem("memory")
    fs.pipe("/box/a.txt", b"a")
    fs.pipe("/box/deep/b.txt", b"bb")
    yield fs
    fs.rm("/box", recursive=True)


def test_memory_lists_and_notices_another_version(memory: fsspec.AbstractFileSystem, tmp_path: Path):
    box = Remote("memory://box", tmp_path, retry=QUICK)
    assert box.names() == ["a.txt", "deep/b.txt"]
    assert box.names("deep/*.txt") == ["deep/b.txt"]
    assert box.fetch("deep/b.txt").read_bytes() == b"bb"
    memory.pipe("/box/deep/b.txt", b"changed")
    assert box.fetch("deep/b.txt").read_bytes() == b"changed"
    with pytest.raises(ShardError, match="memory://box/none: no such file"):
        box.fetch("none")


def test_the_cache_keeps_its_size_and_what_was_used_last(memory: fsspec.AbstractFileSystem, tmp_path: Path):
    blobs = {f"{i}.bin": bytes([i]) * 1000 for i in range(6)}
    for name, data in blobs.items():
        memory.pipe(f"/box/{name}", data)
    box = Remote("memory://box", tmp_path, max_bytes=3500, retry=QUICK)
    paths = {}
    for number, (name, data) in enumerate(blobs.items()):
        paths[name] = box.fetch(name, sha256=hashlib.sha256(data).hexdigest())
        os.utime(paths[name], (number + 100, number + 100))
        if number == 3:
            os.utime(paths["1.bin"], (900, 900))  # used since
    assert [n for n, p in paths.items() if p.exists()] == ["1.bin", "4.bin", "5.bin"]
    assert box.fetch("0.bin", sha256=hashlib.sha256(blobs["0.bin"]).hexdigest()).read_bytes() == blobs["0.bin"]


def test_many_threads_fetch_one_file_once(server: ThreadingHTTPServer, tmp_path: Path):
    one, got = remote(server, "good", tmp_path), []
    threads = [threading.Thread(target=lambda: got.append(one.fetch("x", sha256=SHA))) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(10)
    assert len(set(got)) == 1
    assert server.asked == {"/good/x": 1}


def test_a_cache_that_cannot_be_written_is_reported(memory: fsspec.AbstractFileSystem, tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(
        ShardError,
        match=r"cannot write to the cache.*; make the folder writable, or use another folder \(`cache`, or COMTIP_CACHE",
    ):
        Remote("memory://box", tmp_path / "file", retry=QUICK).fetch("a.txt", sha256="0" * 64)


def test_unknown_protocols_say_what_to_install(tmp_path: Path):
    with pytest.raises(ShardError, match=r"nosuch://x: cannot open"):
        Remote("nosuch://x", tmp_path).read("manifest.json")


def test_urls_are_distinguished_from_paths():
    assert is_url("s3://bucket/set")
    assert is_url("file:///tmp/set")
    assert not is_url("runs/demo/shards:t1")
    assert not is_url(Path("/tmp/x"))


def test_the_cost_of_a_cached_file_is_constant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Regression test: every file listed the complete folder, 455 ms for each at 20,000 files."""
    listed, real = [], FileCache._evict
    monkeypatch.setattr(FileCache, "_evict", lambda self, keep: listed.append(keep) or real(self, keep))
    n, size = 1500, 100
    for i in range(n):
        cache = FileCache(tmp_path, 1000 * size)  # a new object for each file, as in Remote
        key = f"{i:064x}"
        with cache.tmp_path() as temporary:
            temporary.write_bytes(bytes(size))
            path = cache.path(key, "x.tar")
            cache.put(temporary, path)
        assert path.is_file()
    kept = sorted(int(p.parent.name, 16) for p in tmp_path.glob("??/*/*"))
    assert len(listed) <= 2 + n * 64 // 1000
    assert 1000 - 2 * 1000 // 64 <= len(kept) <= 1000
    assert kept == list(range(n - len(kept), n)), "the oldest files are evicted"
