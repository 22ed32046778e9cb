"""A model hub on 127.0.0.1 that serves the folders `root/owner/name` as repositories, as far as its clients ask."""

import base64
import hashlib
import json
import os
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit


class HubServer:
    """
    `endpoint` is what `HF_ENDPOINT` must be; `gated` holds repositories to which nobody has access; `downloads`
    records the `owner/name/path` of every file that was fetched.
    """

    def __init__(self, root):
        self.root = Path(root)
        self.gated = set()
        self.downloads = []
        handler = type("Handler", (HubHandler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache):
        """Environment of a process whose hub this is, with a cache of its own and no token."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        settings = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**kept, **settings, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


class HubHandler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/[^/]+(/.*)?)?", path):
            self.describe(*match.groups())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self.send_repository_file(*match.groups())
        elif path == "/api/whoami-v2":
            self.send_json({"name": "someone", "orgs": []})
        else:
            self.send_failure(404, "EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if path == "/api/repos/create":
            content = json.loads(body)
            repo = f"{content.get('organization', 'someone')}/{content['name']}"
            (self.hub.root / repo).mkdir(parents=True, exist_ok=True)
            self.send_json({"url": f"{self.hub.endpoint}/{repo}", "name": repo, "id": repo})
        elif re.search(r"/preupload/[^/]+$", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.send_json({"files": files})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            self.commit(match[1], body)
        elif path == "/api/validate-yaml":
            self.send_json({"errors": [], "warnings": []})
        else:
            self.send_failure(404, "EntryNotFound")

    def commit(self, repo, body):
        folder = self.hub.root / repo
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                path = folder / entry["value"]["path"]
                if ".." in path.parts:
                    return self.send_failure(400, "BadRequest")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(entry["value"]["content"]))
        sha = commit_of(folder)
        return self.send_json(
            {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}"}
        )

    def describe(self, repo, kind, under):
        folder = self.hub.root / repo
        if not folder.is_dir():
            return self.send_failure(404, "RepoNotFound")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if kind == "tree":
            prefix = (under or "/")[1:]
            entries = [
                {"type": "file", "path": p.relative_to(folder).as_posix(), "size": p.stat().st_size} for p in files
            ]
            entries = [{**entry, "oid": "0" * 40} for entry in entries if entry["path"].startswith(prefix)]
            return self.send_json(entries)
        siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in files]
        return self.send_json(
            {"_id": repo, "id": repo, "modelId": repo, "sha": commit_of(folder), "siblings": siblings}
        )

    def send_repository_file(self, repo, name):
        folder = self.hub.root / repo
        path = folder / name
        if not folder.is_dir():
            return self.send_failure(404, "RepoNotFound")
        if repo in self.hub.gated:
            return self.send_failure(403, "GatedRepo")
        if ".." in path.parts or not path.is_file():
            return self.send_failure(404, "EntryNotFound", commit_of(folder))
        content = path.read_bytes()
        if self.command == "GET":
            self.hub.downloads.append(f"{repo}/{name}")
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit_of(folder)}
        return self.send(200, content, {**headers, "Content-Type": "application/octet-stream"})

    def send_json(self, content):
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send_failure(self, status, code, commit=None):
        headers = {"X-Error-Code": code, "X-Error-Message": code} | ({"X-Repo-Commit": commit} if commit else {})
        self.send(status, b"", headers)

    def send(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def commit_of(folder):
    """Forty hexadecimal digits that stand for a repository's content."""
    digest = hashlib.sha1()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()
