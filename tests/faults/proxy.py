"""A proxy in front of a server that can fail in every way a network and a server can."""

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Fault = Literal["none", "down", "slow", "error", "too_many", "silent", "answer_lost", "at_random"]
HOP = ("transfer-encoding", "connection", "content-length", "date", "server")


class FaultyProxy:
    """Forwards to `target` (host, port) unless told otherwise.

    down: the port is closed. slow: two seconds a request. error, too_many: 500, 429. silent: takes the request, never
    answers. answer_lost: the server carries the request out, the connection is cut before its answer. at_random: some
    of these, by turns.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.target, self.fault, self.requests = target, "none", 0
        self._server: ThreadingHTTPServer | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def set(self, fault: Fault) -> None:
        self.released.set()  # what hung is cut
        if fault == "down":
            self.close()
        else:
            self.released = threading.Event()
            self._open()
        self.fault = fault

    def _open(self) -> None:
        if self._server is None:
            handler = type("Handler", (_Handler,), {"proxy": self})
            self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
            self._server.daemon_threads = True
            threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.released.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def fault_now(self) -> str:
        self.requests += 1
        if self.fault != "at_random":
            return self.fault
        return ("none", "error", "none", "answer_lost", "too_many", "none", "none")[self.requests % 7]


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultyProxy
    protocol_version = "HTTP/1.0"  # a connection a request, so that a fault begins at once

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        released, fault = self.proxy.released, self.proxy.fault_now()
        match fault:
            case "silent":
                released.wait()
                return
            case "error" | "too_many":
                self.send_error(500 if fault == "error" else 429)
                return
            case "slow":
                time.sleep(2.0)
        answer, content = self._forward(body)
        if fault == "answer_lost":
            return
        with contextlib.suppress(OSError):
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def _forward(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection(*self.proxy.target, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
        connection.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer, content

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def proxy_to(host: str, port: int) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy((host, port))
    proxy.set("none")
    try:
        yield proxy
    finally:
        proxy.close()
