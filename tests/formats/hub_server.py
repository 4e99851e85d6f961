"""A loopback stand-in for the hub: model info, file list, and files, of repositories made up here;
and pushes, in the protocol that huggingface-hub speaks: create, validate, preupload, large files by
their hash, commit.

Run as a script it serves on a free port, prints it, and ends when its standard input closes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

WRITER, READER = "hf_" + "writer" * 5, "hf_" + "reader" * 5
PUSHED = "fedcba9876543210fedcba9876543210fedcba98"
STALL_S = 1.5
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TAGGED = "89abcdef0123456789abcdef0123456789abcdef"


class Traffic:
    """What was pushed. repos: name -> whether it is private; files: of all repositories, by path;
    large: bytes by their sha256. And what is to go wrong: faults, of a file's next downloads;
    resumed: where downloads that were cut went on.
    """

    def __init__(self) -> None:
        self.repos: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.faults: dict[str, list[str]] = {}
        self.resumed: list[int] = []


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of `/api/models/ORG/NAME/revision/REV` and `/ORG/NAME/resolve/REV/FILE`."""

    folder: Path
    traffic: Traffic
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.split("?")[0]
        if path == "/api/validate-yaml":
            answer: dict = {"errors": [], "warnings": []}
        elif refusal := self._refusal():
            self._send(refusal, b'{"error": "no"}', {}, True)
            return
        elif path == "/api/repos/create":
            self._create(json.loads(body))
            return
        elif "/preupload/" in path:
            answer = {"files": [_upload_mode(file) for file in json.loads(body)["files"]]}
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [self._where_to(one) for one in json.loads(body)["objects"]]
            answer = {"transfer": "basic", "objects": objects}
        else:
            answer = self._commit(path, [json.loads(line) for line in body.splitlines()])
        self._send(200, json.dumps(answer).encode(), {}, True)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        oid = hashlib.sha256(body).hexdigest()
        assert self.path == f"/large/{oid}", "the bytes are not those of the name"
        self.traffic.large[oid] = body
        self._send(200, b"", {}, True)

    def _refusal(self) -> int | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return None if token == WRITER else 403 if token == READER else 401

    def _create(self, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        status = 409 if name in self.traffic.repos else 200
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.traffic.repos.setdefault(name, private)
        url = f"http://{self.headers['Host']}/{name}"
        self._send(status, json.dumps({"url": url}).encode(), {}, True)

    def _where_to(self, one: dict) -> dict:
        href = f"http://{self.headers['Host']}/large/{one['oid']}"
        return {**one, "actions": {"upload": {"href": href}}}

    def _commit(self, path: str, lines: list[dict]) -> dict:
        """Files by name, large ones by the hash under which they came before."""
        name = "/".join(path.split("/")[3:5])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.traffic.messages.append(value["summary"])
            elif line["key"] == "file":
                self.traffic.files[f"{name}/{value['path']}"] = base64.b64decode(value["content"])
            else:
                self.traffic.files[f"{name}/{value['path']}"] = self.traffic.large[value["oid"]]
        url = f"http://{self.headers['Host']}/{name}/commit/{PUSHED}"
        return {"success": True, "commitOid": PUSHED, "commitUrl": url, "hookOutput": ""}

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
        if "/".join(parts) in self.traffic.repos:
            found = "/".join(parts)
            body = {"id": found, "private": self.traffic.repos[found], "siblings": []}
            self._send(200, json.dumps(body).encode(), {}, with_body)
        elif name == "gated":
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
        if with_body and self.traffic.faults.get(name):
            self._faulty(self.traffic.faults[name].pop(0), file.read_bytes(), headers)
            return
        content, status = file.read_bytes(), 200
        if asked := self.headers.get("Range"):
            first, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            content = content[first:]
            self.traffic.resumed.append(first)
        self._send(status, content, headers, with_body)

    def _faulty(self, fault: str, content: bytes, headers: dict[str, str]) -> None:
        """One GET that goes wrong: a server error, half of the file, or other bytes."""
        if fault == "500":
            self._send(500, b"", {}, True)
        elif fault == "corrupt":
            self._send(200, bytes([*content[:-1], content[-1] ^ 1]), headers, True)
        else:
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            if fault == "stall":
                time.sleep(STALL_S)
            self.close_connection = True

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


def _upload_mode(file: dict) -> dict:
    mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


def serve(folder: Path, traffic: Traffic | None = None) -> ThreadingHTTPServer:
    """Start serving in a thread; `.server_address` tells the port."""
    own = {"folder": folder, "traffic": traffic or Traffic()}
    handler = type("FolderHandler", (Handler,), own)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


if __name__ == "__main__":
    running = serve(Path(sys.argv[1]))
    print(running.server_address[1], flush=True)
    sys.stdin.read()
