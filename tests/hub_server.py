"""A server on this machine that speaks enough of the Hub's API to upload and download models."""

import base64
import hashlib
import json
from http.server import ThreadingHTTPServer

from loopback import QuietHandler


class HubServer(ThreadingHTTPServer):
    """Has `models`, the files of each by revision: `{"user/model": {"main": {"a.json": b""}}}`.

    `gated` are models that nobody may read, `requests` the methods and paths of all requests.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(QuietHandler):
    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, content: object) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _, _ = self.path.partition("?")
        self.server.requests.append(f"{self.command} {path}")
        name, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        if name in self.server.gated:
            self.answer(403, X_Error_Code="GatedRepo")
        elif name not in self.server.models:
            self.answer(401, X_Error_Code="RepoNotFound")
        elif (files := self._files(name, revision)) is None:
            self.answer(404, X_Error_Code="RevisionNotFound")
        elif file not in files:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=self._commit(files))
        else:
            etag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
            self.answer(200, files[file], ETag=etag, X_Repo_Commit=self._commit(files))

    def do_POST(self) -> None:
        path, _, _ = self.path.partition("?")
        self.server.requests.append(f"POST {path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/repos/create":
            content = json.loads(body)
            name = f"{content['organization']}/{content['name']}"
            self.server.models.setdefault(name, {"main": {}})
            self.answer_json({"url": f"{self.server.url}/{name}", "name": name})
            return
        if path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
            return
        name, _, rest = path.removeprefix("/api/models/").rpartition("/")
        name, _, what = name.rpartition("/")
        if what == "preupload":
            files = [entry["path"] for entry in json.loads(body)["files"]]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer_json({"files": [{"path": file, **mode} for file in files]})
            return
        files = self.server.models[name].setdefault(rest, {})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = self._commit(files)
        url = f"{self.server.url}/{name}/commit/{commit}"
        self.answer_json({"success": True, "commitOid": commit, "commitUrl": url})

    def _files(self, name: str, revision: str) -> dict[str, bytes] | None:
        revisions = self.server.models[name]
        by_commit = {self._commit(files): files for files in revisions.values()}
        return revisions.get(revision, by_commit.get(revision))

    def _commit(self, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1()
        for name, content in sorted(files.items()):
            digest.update(name.encode() + content)
        return digest.hexdigest()
