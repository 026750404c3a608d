"""S3 server in this process (moto), which can simulate an overloaded or failing server."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUCKET = "sets"
_BUSY = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.'
    b"</Message><RequestId>1</RequestId></Error>"
)


@dataclass
class S3:
    """State of the server; ``fault`` may be changed between requests."""

    endpoint: str = ""
    """URL of the server."""
    fault: str = ""
    """"" for none, ``slow`` (0.1 s per GET), ``busy`` (503 for every other GET), ``down`` (503) or ``cut`` (half of every other body)."""
    gets: dict[str, list[int]] = field(default_factory=dict)
    """{path: size in bytes of each body requested with GET}."""
    _number: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def options(self) -> dict[str, Any]:
        """Options of fsspec's file system."""
        # The client does not retry, so that a test sees the retries of comtip_shards.
        config = {"retries": {"max_attempts": 1}, "connect_timeout": 5, "read_timeout": 5}
        return {"key": "k", "secret": "s", "endpoint_url": self.endpoint, "config_kwargs": config}

    def upload(self, folder: Path, name: str) -> str:
        """Upload a folder under ``name`` and return its URL."""
        from fsspec.core import url_to_fs

        fs, root = url_to_fs(f"s3://{BUCKET}/{name}", **self.options)
        fs.makedirs(BUCKET, exist_ok=True)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                fs.pipe_file(f"{root}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        self.gets.clear()
        return f"s3://{BUCKET}/{name}"

    def bytes_of(self, ending: str) -> int:
        """Return the total bytes requested from paths that end with ``ending``."""
        return sum(sum(sizes) for path, sizes in self.gets.items() if path.endswith(ending))

    def around(self, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        """Return a WSGI application that applies the fault to the responses of ``app``."""

        def respond(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            if environ["REQUEST_METHOD"] != "GET":
                return app(environ, start)
            with self._lock:
                self._number += 1
                odd = self._number % 2 == 1
            if self.fault == "slow":
                time.sleep(0.1)
            if self.fault == "down" or (self.fault == "busy" and odd):
                start("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(_BUSY)))])
                return [_BUSY]
            body = b"".join(app(environ, start))
            with self._lock:
                self.gets.setdefault(environ["PATH_INFO"], []).append(len(body))
            # The header states the length of the whole body, but the connection ends earlier.
            return [body[: len(body) // 2]] if self.fault == "cut" and odd else [body]

        return respond


@contextmanager
def s3_server() -> Iterator[S3]:
    """Yield a running server."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line per request
    state = S3()
    server = make_server("127.0.0.1", 0, state.around(DomainDispatcherApplication(create_backend_app)), threaded=True)
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
