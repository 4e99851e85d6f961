"""A loopback stand-in for the hub: model info, file list, and files, of repositories made up here.

Run as a script it serves on a free port, prints it, and ends when its standard input closes.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TAGGED = "89abcdef0123456789abcdef0123456789abcdef"


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of `/api/models/ORG/NAME/revision/REV` and `/ORG/NAME/resolve/REV/FILE`."""

    folder: Path
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._api(parts[2:], with_body)
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._file(parts[1], "/".join(parts[4:]), parts[3], with_body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)

    def _api(self, parts: list[str], with_body: bool) -> None:
        name, revision = parts[1], parts[3] if len(parts) > 3 else "main"
        if name == "gated":
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, with_body)
        elif name != "tiny":
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
        elif revision not in ("main", "v2", COMMIT, TAGGED):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body)
        elif "tree" in parts:
            files = [
                {
                    "type": "file",
                    "path": file.name,
                    "size": file.stat().st_size,
                    "oid": self._etag(file),
                }
                for file in sorted(self.folder.iterdir())
            ]
            self._send(200, json.dumps(files).encode(), {}, with_body)
        else:
            siblings = [{"rfilename": file.name} for file in sorted(self.folder.iterdir())]
            sha = TAGGED if revision in ("v2", TAGGED) else COMMIT
            body = {"id": "org/tiny", "modelId": "org/tiny", "sha": sha, "siblings": siblings}
            self._send(200, json.dumps(body).encode(), {}, with_body)

    def _file(self, repo: str, name: str, revision: str, with_body: bool) -> None:
        file = self.folder / name
        if repo != "tiny" or not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
            return
        headers = {"X-Repo-Commit": revision, "ETag": f'"{self._etag(file)}"'}
        self._send(200, file.read_bytes(), headers, with_body)

    @staticmethod
    def _etag(file: Path) -> str:
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def serve(folder: Path) -> ThreadingHTTPServer:
    """Start serving in a thread; `.server_address` tells the port."""
    handler = type("FolderHandler", (Handler,), {"folder": folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


if __name__ == "__main__":
    running = serve(Path(sys.argv[1]))
    print(running.server_address[1], flush=True)
    sys.stdin.read()
