"""A model hub on 127.0.0.1 that speaks what the libraries of the Hugging Face Hub and ModelScope ask."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubStandIn:
    """Serves `files` as the model `name`; `seen` are the requests for files as (method, file, Range header).

    `refusal` is (status, X-Error-Code) for every request. `broken` lists, for each coming GET of
    safetensors, how many bytes are sent before the connection is closed.
    """

    def __init__(self, name: str, files: dict[str, bytes]) -> None:
        self.name, self.files = name, files
        self.refusal: tuple[int, str] | None = None
        self.broken: list[int] = []
        self.seen: list[tuple[str, str, str | None]] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))

    def __enter__(self) -> HubStandIn:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(unquote(self.path))
        query = parse_qs(url.query)
        name, path = self.hub.name, url.path
        if self.hub.refusal:
            status, code = self.hub.refusal
            self._json({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})
        elif path.startswith(f"/{name}/resolve/"):
            self._file(path.split("/", 5)[5])
        elif path == f"/api/v1/models/{name}/repo":
            self._file(query["FilePath"][0])
        elif path == f"/api/v1/models/{name}/repo/files":
            self._json(
                {
                    "Code": 200,
                    "Success": True,
                    "Data": {"Files": [*map(self._modelscope_row, self.hub.files)]},
                }
            )
        elif path.startswith(f"/api/models/{name}/tree/"):
            self._json([self._tree_row(file) for file in self.hub.files])
        elif path == f"/api/models/{name}" or path.startswith(f"/api/models/{name}/revision/"):
            rows = [{"rfilename": file} for file in self.hub.files]
            self._json({"id": name, "sha": COMMIT, "siblings": rows})
        else:
            self._json({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def _tree_row(self, file: str) -> dict[str, object]:
        data = self.hub.files[file]
        return {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _modelscope_row(self, file: str) -> dict[str, object]:
        data = self.hub.files[file]
        digest = hashlib.sha256(data).hexdigest()
        return {"Name": file, "Path": file, "Type": "blob", "Size": len(data), "Sha256": digest}

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self._send(status, data, {"Content-Type": "application/json", **(headers or {})})

    def _file(self, file: str) -> None:
        wanted, data = self.headers.get("Range"), self.hub.files[file]
        self.hub.seen.append((self.command, file, wanted))
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        status, whole = 200, len(data)
        if wanted:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            last = min(int(end), whole - 1) if end else whole - 1
            data, status = data[int(start) : last + 1], 206
            headers["Content-Range"] = f"bytes {start}-{last}/{whole}"
        breaks = self.command == "GET" and file.endswith(".safetensors") and self.hub.broken
        self._send(status, data, headers, sent=self.hub.broken.pop(0) if breaks else None)

    def _send(self, status: int, data: bytes, headers: dict[str, str], sent: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:sent])
        self.close_connection = self.close_connection or sent is not None
