"""A small Hugging Face Hub on this machine, for tests with the real client over real HTTP.

It knows what `push_to_hub`, the Trainer, `upload_folder`, `snapshot_download` and `from_pretrained` ask for, and
answers 501 to all else. Every file is a "regular" one: no LFS, no Xet. The client reads HF_ENDPOINT when it is
imported; so the code under test runs in a process of its own: `run_python(code, hub.environment(home, token))`.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import ModelCard
from yaml import YAMLError


class HubError(Exception):
    """An answer that is an error, in the form that the client reads."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "", **body: Any):
        self.status = status
        self.body = {"error": message, **body}
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.headers = {name: value for name, value in headers.items() if value}


class Request(NamedTuple):
    """What is kept of a request: never the token, only whether it was the right one. Status 0: never answered."""

    method: str
    path: str
    authorized: bool
    status: int


@dataclass
class Commit:
    """All the files as they are after one commit."""

    sha: str
    message: str
    files: dict[str, bytes]


class Repo:
    """A model repository; as on the Hub, it starts with a commit of its own."""

    def __init__(self, private: bool = False):
        self.private = private
        self.branches: dict[str, list[Commit]] = {"main": []}
        self.add("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})

    @property
    def commits(self) -> list[Commit]:
        """The commits of the main branch, the oldest first."""
        return self.branches["main"]

    @property
    def files(self) -> dict[str, bytes]:
        """The files on the main branch."""
        return self.commits[-1].files

    def add(self, branch: str, message: str, files: dict[str, bytes]) -> str:
        """Add a commit; returns its hash."""
        history = self.branches[branch]
        content = [commit.sha for commit in history[-1:]], message, {path: blob_id(files[path]) for path in files}
        sha = hashlib.sha1(repr(content).encode()).hexdigest()
        history.append(Commit(sha, message, files))
        return sha

    def find(self, revision: str) -> Commit:
        """The commit that a branch's name or a hash stands for."""
        commits = {commit.sha: commit for history in self.branches.values() for commit in history}
        commits |= {branch: history[-1] for branch, history in self.branches.items()}
        if revision not in commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commits[revision]


def blob_id(content: bytes) -> str:
    """Git's hash of a file, which the client computes too."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def apply_commit(body: bytes, parent: Commit) -> tuple[str, dict[str, bytes]]:
    """The message and the files that a commit's lines give."""
    message, files = None, dict(parent.files)
    for line in body.splitlines():
        operation = json.loads(line)
        key, value = operation["key"], operation["value"]
        if key == "header":
            message = value["summary"]
            if value.get("parentCommit", parent.sha) != parent.sha:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
        elif key == "file":
            files[value["path"]] = base64.b64decode(value["content"], validate=True)
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        else:
            raise HubError(501, f"hub_server.py knows no operation {key}")
    if message is None:
        raise HubError(400, "A commit needs a header")
    return message, files


class Handler(BaseHTTPRequestHandler):
    """The end points, a method each: its arguments are the pattern's groups; it returns JSON, or bytes and headers."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave in one piece; otherwise each answer waits for a delayed acknowledgement
    server: "Http"

    ID, PART = r"([^/]+(?:/[^/]+)?)", r"([^/]+)"
    ROUTES = [
        ("GET", "/api/whoami-v2", "whoami"),
        ("POST", "/api/validate-yaml", "validate_yaml"),
        ("POST", "/api/repos/create", "create"),
        ("POST", f"/api/models/{ID}/branch/{PART}", "create_branch"),
        ("POST", f"/api/models/{ID}/preupload/{PART}", "preupload"),
        ("POST", f"/api/models/{ID}/commit/{PART}", "commit"),
        ("GET", f"/api/models/{ID}/tree/{PART}(?:/(.+))?", "tree"),
        ("GET", f"/api/models/{ID}(?:/revision/{PART})?", "info"),
        ("GET|HEAD", f"/{ID}/resolve/{PART}/(.+)", "resolve"),
    ]
    FREE = ("validate_yaml", "tree", "info", "resolve")  # the others need the token

    def answer(self) -> None:
        """Read the whole request, and only then look at it; a request that breaks off changes nothing."""
        self.hub = self.server.hub
        self.url = urlsplit(self.path)
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.authorized = self.token == self.hub.token
        size = int(self.headers.get("Content-Length", 0))
        with self.hub.lock:
            broken = self.hub.fail_commits > 0 and "/commit/" in self.url.path
            self.hub.fail_commits -= broken
        self.body = self.rfile.read(size // 2 if broken else size)
        with self.hub.lock:
            status, content, headers = self.dispatch() if len(self.body) == size else (0, b"", {})
            self.hub.requests.append(Request(self.command, unquote(self.url.path), self.authorized, status))
        if status:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else content)
        else:
            # Zero seconds to linger: what has not been read is thrown away, and the client sees a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

    do_GET = do_HEAD = do_POST = answer

    def log_message(self, *args) -> None:
        """Print nothing: `HubServer.requests` is the log."""

    def dispatch(self) -> tuple[int, bytes, dict[str, str]]:
        """Status, content and headers of the answer."""
        try:
            result = self.result()
        except HubError as error:
            return error.status, json.dumps(error.body).encode(), error.headers
        content, headers = result if isinstance(result, tuple) else (json.dumps(result).encode(), {})
        return 200, content, headers

    def result(self) -> Any:
        if self.hub.status is not None:
            raise HubError(self.hub.status, "The status that the test asked for")
        if self.token and not self.authorized:
            raise HubError(401, "Invalid credentials in Authorization header")  # also for what is public
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, self.url.path)
            if match and self.command in method.split("|"):
                if name not in self.FREE and not self.authorized:
                    raise HubError(401, "Invalid username or password.")
                try:
                    return getattr(self, name)(*[group and unquote(group) for group in match.groups()])
                except (ValueError, KeyError) as error:
                    raise HubError(400, f"Bad request: {error}") from error
        raise HubError(501, "hub_server.py does not know this end point")

    def repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.authorized):
            # The Hub does not tell strangers whether there is a private one
            answer = (404, "Repository not found") if self.authorized else (401, "Invalid username or password.")
            raise HubError(*answer, "RepoNotFound")
        return repo

    def whoami(self) -> dict:
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return {"type": "user", "id": "0", "name": self.hub.user, "fullname": "A user", "orgs": [], "auth": access}

    def validate_yaml(self) -> dict:
        try:
            data = ModelCard(json.loads(self.body)["content"]).data.to_dict()
        except (ValueError, YAMLError) as error:
            raise HubError(400, "Invalid metadata", errors=[{"message": str(error)}]) from error
        return {"errors": [], "warnings": [] if data else [{"message": "empty or missing yaml metadata in repo card"}]}

    def create(self) -> dict:
        payload = json.loads(self.body)
        if payload.get("type", "model") != "model":
            raise HubError(501, "hub_server.py has models only")
        repo_id = f"{payload.get('organization') or self.hub.user}/{payload['name']}"
        address = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            raise HubError(409, "You already created this model repo", **address)
        self.hub.repos[repo_id] = Repo(private=payload.get("visibility") == "private")
        return address

    def create_branch(self, repo_id: str, branch: str) -> dict:
        repo = self.repo(repo_id)
        if branch in repo.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        repo.branches[branch] = [repo.find(json.loads(self.body).get("startingPoint", "main"))]
        return {}

    def preupload(self, repo_id: str, revision: str) -> dict:
        """What the client shall send; it leaves a file out if the `oid` here is its own."""
        old = {path: {"oid": blob_id(content)} for path, content in self.repo(repo_id).find(revision).files.items()}
        new = [file["path"] for file in json.loads(self.body)["files"]]
        regular = {"uploadMode": "regular", "shouldIgnore": False}
        return {"files": [{"path": path, **regular, **old.get(path, {})} for path in new]}

    def commit(self, repo_id: str, branch: str) -> dict:
        if "create_pr" in self.url.query:
            raise HubError(501, "hub_server.py has no pull requests")
        repo = self.repo(repo_id)
        sha = repo.add(branch, *apply_commit(self.body, repo.find(branch)))
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"}

    def tree(self, repo_id: str, revision: str, folder: str | None) -> list[dict]:
        """The files of a folder; the folders inside it are left out."""
        files = self.repo(repo_id).find(revision).files
        start = f"{folder}/" if folder else ""
        paths = [path for path in sorted(files) if path.startswith(start)]
        if folder and not paths:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        if "recursive=true" not in self.url.query.lower():
            paths = [path for path in paths if "/" not in path.removeprefix(start)]
        sizes = {path: {"oid": blob_id(files[path]), "size": len(files[path])} for path in paths}
        return [{"type": "file", "path": path, **sizes[path]} for path in paths]

    def info(self, repo_id: str, revision: str | None) -> dict:
        repo = self.repo(repo_id)
        commit = repo.find(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        about = {"author": repo_id.split("/")[0], "private": repo.private, "tags": []}
        return {"id": repo_id, "modelId": repo_id, "sha": commit.sha, "siblings": siblings, **about}

    def resolve(self, repo_id: str, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
        commit = self.repo(repo_id).find(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", commit.sha)
        return commit.files[path], {"ETag": f'"{blob_id(commit.files[path])}"', "X-Repo-Commit": commit.sha}


class Http(ThreadingHTTPServer):
    """The server's sockets and threads."""

    request_queue_size = 32  # a download opens several connections at once
    hub: "HubServer"


class HubServer:
    """The Hub: `with HubServer() as hub` serves at `hub.url`.

    A test reads `hub.repos` and `hub.requests`, and sets `hub.fail_commits` and `hub.status`. The holder of the token
    is called "user" and may write to every namespace.
    """

    user = "user"

    def __init__(self, token: str = "hf_test"):
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.fail_commits = 0  # the connection breaks in the middle of so many commits from now on
        self.status: int | None = None  # every request is answered with this error
        self.lock = threading.Lock()
        self._http = Http(("127.0.0.1", 0), Handler)
        self._http.hub = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._http.shutdown()
        self._http.server_close()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """All variables of a process that uses this Hub: this process's own, without what would lead it elsewhere."""
        elsewhere = ("HF_", "HUGGING", "TRANSFORMERS_")
        variables = {name: value for name, value in os.environ.items() if not name.startswith(elsewhere)}
        variables |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        variables |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return variables if token is None else {**variables, "HF_TOKEN": token}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def run_python(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Run `code` in a new process, in its HF_HOME, so that it finds and leaves nothing in the checkout."""
    home = Path(environment["HF_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=300)
