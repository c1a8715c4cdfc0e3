"""A Hugging Face hub on 127.0.0.1 that serves the files of one dataset repo, with faults on demand.

It speaks what a download needs: HEAD and GET of /datasets/REPO/resolve/main/FILE answer with the SHA-256 and size and
redirect to a "CDN" of another origin, which knows ranges.
"""

import hashlib
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CHUNK = 4096  # bytes sent at once


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer; by default nothing."""

    status: int | None = None  # instead of the answer
    headers: dict[str, str] = field(default_factory=dict)  # with that status
    cut_after: int | None = None  # bytes; then the connection ends without the rest
    reset: bool = False  # it ends with a TCP reset
    content: bytes | None = None  # instead of the file's
    no_range: bool = False  # the whole file, whatever range was asked for


@dataclass(frozen=True)
class Request:
    method: str
    kind: str  # "hub" or "cdn"
    name: str
    start: int  # of the range asked for
    token: str | None
    at: float  # seconds


class HubServer(ThreadingHTTPServer):
    """`faults[method, name]`: the faults of the next answers, in their order; `always[method, name]`: of all others.

    `bytes_per_second` slows down each file; `token`, if set, is asked for; `xet` adds the headers of a file in Xet
    storage; `direct` serves files without redirect, as a plain mirror may.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, repo: str, files: dict[str, bytes], port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.repo, self.files = repo, dict(files)
        self.hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        self.faults: dict[tuple[str, str], list[Fault]] = {}
        self.always: dict[tuple[str, str], Fault] = {}
        self.bytes_per_second: float | None = None
        self.token: str | None = None
        self.xet = self.direct = False
        self.requests: list[Request] = []
        self.sent = 0  # bytes of files
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self, method: str, name: str) -> Fault:
        with self.lock:
            waiting = self.faults.get((method, name))
            return waiting.pop(0) if waiting else self.always.get((method, name), Fault())

    def gets(self, name: str) -> list[Request]:
        return [
            request
            for request in self.requests
            if (request.method, request.kind) == ("GET", "cdn") and request.name == name
        ]

    def handle_error(self, request, client_address) -> None:
        """Nothing: clients are killed here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer takes 40 ms
    server: HubServer

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def reply(self, status: int, headers: dict[str, str], length: int = 0) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(key, value)
        self.end_headers()

    def answer(self) -> None:
        server, name = self.server, self.path.rsplit("/", 1)[1]
        hub = self.path == f"/datasets/{server.repo}/resolve/main/{name}"
        cdn = self.path == f"/cdn/{name}"
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        kind = "hub" if hub else "cdn" if cdn else self.path
        server.requests.append(Request(self.command, kind, name, start, token, time.monotonic()))
        if hub and server.token not in (None, token):
            return self.reply(401, {"X-Error-Message": "Invalid username or password."})
        if not (hub or cdn) or name not in server.files:
            return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        if hub and not (server.direct and self.command == "GET"):
            return self.redirect(name)
        self.send_file(name, start, server.fault("GET", name))

    def redirect(self, name: str) -> None:
        server = self.server
        fault = server.fault("HEAD", name) if self.command == "HEAD" else Fault()
        if fault.cut_after is not None:
            return self.cut(fault.reset)
        if fault.status:
            return self.reply(fault.status, fault.headers)
        headers = {
            "X-Repo-Commit": "c" * 40,
            "X-Linked-Etag": f'"{server.hashes[name]}"',
            "X-Linked-Size": str(len(server.files[name])),
            "ETag": '"of-the-pointer"',
        }
        if server.xet:
            headers |= {"X-Xet-Hash": "e" * 64}
            headers["Link"] = f'<{server.endpoint}/api/xet-read-token>; rel="xet-auth"'
        # "localhost" is another origin than 127.0.0.1, as the real CDN is than the hub.
        if not server.direct:
            headers["Location"] = f"http://localhost:{server.server_port}/cdn/{name}"
        self.reply(200 if server.direct else 302, headers, 0)

    def send_file(self, name: str, start: int, fault: Fault) -> None:
        server = self.server
        if fault.status:
            return self.reply(fault.status, fault.headers)
        content = server.files[name] if fault.content is None else fault.content
        if start and start >= len(content):
            return self.reply(416, {"Content-Range": f"bytes */{len(content)}"})
        ranged = "Range" in self.headers and not fault.no_range
        body = content[start:] if ranged else content
        span = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if ranged else {}
        self.reply(206 if ranged else 200, span, len(body))
        until = len(body) if fault.cut_after is None else fault.cut_after
        for begin in range(0, until, CHUNK):
            chunk = body[begin : min(begin + CHUNK, until)]
            self.wfile.write(chunk)
            with server.lock:
                server.sent += len(chunk)
            if server.bytes_per_second:
                time.sleep(len(chunk) / server.bytes_per_second)
        if fault.cut_after is not None:
            self.cut(fault.reset)

    def cut(self, reset: bool) -> None:
        self.wfile.flush()
        if reset:
            time.sleep(0.05)  # else the reset would overtake what was sent
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True
