"""A Hugging Face hub on 127.0.0.1 that serves a dataset repo and GPT-2's vocabulary, with faults on demand."""

import hashlib
import json
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

CHUNK = 4096  # bytes sent at once
COMMIT = "c" * 40


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one GET of a file."""

    status: int | None = None  # instead of the answer
    cut_after: int | None = None  # bytes; then the connection ends without the rest
    content: bytes | None = None  # instead of the file's


class HubServer(ThreadingHTTPServer):
    """`faults[name]`: the faults of the next GETs of a file, in their order; `always[name]`: of all others.

    `revisions` has the files of each commit, the last one being the present one; `bytes_per_second` slows down each
    file.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, repo: str, files: dict[str, bytes], vocabulary: bytes | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repo = repo
        self.revisions = {COMMIT: files}
        self.vocabulary = vocabulary
        self.faults: dict[str, list[Fault]] = {}
        self.always: dict[str, Fault] = {}
        self.bytes_per_second: float | None = None
        self.requests: list[tuple[str, str]] = []  # method, path
        self.sent = 0  # bytes of files
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def fault(self, name: str) -> Fault:
        with self.lock:
            waiting = self.faults.get(name)
            return waiting.pop(0) if waiting else self.always.get(name, Fault())

    def gets(self, name: str) -> int:
        return sum(method == "GET" and path.endswith(f"/{name}") for method, path in self.requests)

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

    def reply(self, status: int, content: bytes = b"", length: int | None = None, **headers) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": len(content) if length is None else length, **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def answer(self) -> None:
        server, path = self.server, unquote(self.path.split("?")[0])
        server.requests.append((self.command, path))
        api, resolve = f"/api/datasets/{server.repo}", f"/datasets/{server.repo}/resolve"
        if path == "/api/models/openai-community/gpt2":
            return self.reply(200, json.dumps({"id": "openai-community/gpt2"}).encode())
        if path == "/openai-community/gpt2/resolve/main/vocab.json" and server.vocabulary is not None:
            return self.send_file("vocab.json", server.vocabulary)
        present = [*server.revisions][-1]
        path = f"{api}/revision/{present}" if path == api else path.replace("/main", f"/{present}", 1)
        for commit, files in server.revisions.items():
            if path == f"{api}/revision/{commit}":
                siblings = [self.described(name, content) for name, content in files.items()]
                answer = {"id": server.repo, "sha": commit, "siblings": [{"rfilename": "README.md"}, *siblings]}
                return self.reply(200, json.dumps(answer).encode())
            if (name := path.removeprefix(f"{resolve}/{commit}/")) in files:
                return self.send_file(name, files[name])
            folder = path.removeprefix(f"{api}/tree/{commit}/") + "/"
            if inside := [name for name in files if name.startswith(folder)]:
                entries = [{"type": "file", "oid": "0", "size": len(files[name]), "path": name} for name in inside]
                entries.append({"type": "directory", "oid": "1", "path": folder + "more"})
                return self.reply(200, json.dumps(entries[::-1]).encode())
        self.reply(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")

    def described(self, name: str, content: bytes) -> dict:
        lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return {"rfilename": name, "size": len(content), "blobId": "0" * 40, "lfs": lfs}

    def send_file(self, name: str, content: bytes) -> None:
        server = self.server
        headers = {
            "X_Repo_Commit": COMMIT,
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Accept_Ranges": "bytes",
        }
        if self.command == "HEAD":
            return self.reply(200, length=len(content), **headers)
        fault = server.fault(name)
        if fault.status:
            return self.reply(fault.status)
        content = content if fault.content is None else fault.content
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        body = content[int(first) : int(last) + 1 if last else None]
        if "Range" in self.headers:
            headers["Content_Range"] = f"bytes {first}-{int(first) + len(body) - 1}/{len(content)}"
        self.reply(206 if "Range" in self.headers else 200, length=len(body), **headers)
        body = body[: fault.cut_after]
        for start in range(0, len(body), CHUNK):
            chunk = body[start : start + CHUNK]
            self.wfile.write(chunk)
            with server.lock:
                server.sent += len(chunk)
            if server.bytes_per_second:
                time.sleep(len(chunk) / server.bytes_per_second)
        self.close_connection = fault.cut_after is not None
