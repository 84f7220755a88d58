"""A Hub on loopback: the real `huggingface_hub` creates, pushes, lists and pulls there, and nothing goes further.

    with HubServer({"hf_mine": "me"}) as hub:
        HfApi(hub.endpoint, "hf_mine").upload_folder(repo_id="me/thing", folder_path="build/thing")
        assert "config.json" in hub.files("me/thing")

A process that is to use it gets `hub.environment(home, token)`; a test's own process, `hub.use(monkeypatch, …)`.
Models, data sets and Spaces; small files in commits, large and binary ones by LFS, whose bytes are sent and fetched at
another host name, as on the real Hub, where a token is refused.  All in memory.  Xet has to be switched off, for
otherwise the bytes never come here: the client does not ask whether it is wanted.  With `xet` they go into that
folder, in a form that only hf-xet reads, so that such files can be listed and not fetched.  Not there: pull requests,
discussions, multipart uploads, gated repositories.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import constants, hf_api
from transformers.utils import hub as transformers_hub

LARGEST_REGULAR = 10_000_000
DATE = "2026-01-01T00:00:00.000Z"
WRONG_TOKEN = "Invalid credentials in Authorization header"  # the client tells this from a missing repository
REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
FILE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<name>[^/]+/[^/]+)"
UPLOAD = re.compile(rf"PUT /objects/.*|POST {REPO}/commit/.*")


class Refusal(Exception):
    """An answer other than success.  code: the X-Error-Code from which the client makes its exception."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Blob:
    data: bytes
    lfs: bool = False
    elsewhere: tuple[str, int] | None = None  # SHA-256 and size of a file whose bytes Xet keeps

    @property
    def sha256(self) -> str:
        return self.elsewhere[0] if self.elsewhere else hashlib.sha256(self.data).hexdigest()

    @property
    def size(self) -> int:
        return self.elsewhere[1] if self.elsewhere else len(self.data)

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def git_id(self) -> str:
        stored = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_id

    def entry(self, path: str) -> dict:
        """As in trees (`oid`) and in a repository's list of files (`blobId`)."""
        sizes = {"size": self.size, "pointerSize": len(self.pointer)}
        lfs = {"lfs": {"oid": self.sha256, "sha256": self.sha256, **sizes}} if self.lfs else {}
        ids = {"oid": self.git_id, "blobId": self.git_id}
        return {"type": "file", "path": path, "size": self.size, **ids, **lfs}


@dataclass
class Commit:
    title: str
    message: str
    parent: str | None
    files: dict[str, Blob]

    @property
    def id(self) -> str:
        content = [self.title, self.message, self.parent, [(p, b.git_id) for p, b in sorted(self.files.items())]]
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()


@dataclass
class Repository:
    kind: str  # models, datasets or spaces
    id: str
    private: bool = False
    settings: dict = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.add("main", Commit("initial commit", "", None, {}))

    def add(self, branch: str, commit: Commit) -> Commit:
        self.commits[commit.id] = commit
        self.branches[branch] = commit.id
        return commit

    def at(self, revision: str) -> Commit:
        found = self.branches.get(revision) or self.tags.get(revision) or revision
        if found not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[found]

    @property
    def path(self) -> str:
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"


class HubServer:
    """tokens: those that are accepted, and whose they are; everybody may read what is not private.

    requests: ("PUT /objects/…", 200) and so on, of all requests so far.  objects: the bytes sent by LFS, by their
    SHA-256, whether or not a commit named them afterwards.
    """

    def __init__(self, tokens: dict[str, str], xet: str | os.PathLike | None = None):
        self.tokens, self.xet = dict(tokens), xet
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, int | str]] = []
        self.lock = threading.RLock()
        self.fail_uploads(times=0)

    def __enter__(self) -> "HubServer":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def storage(self) -> str:
        """Where the bytes of large files are: a host of its own, as the client sees it."""
        return f"http://localhost:{self._server.server_port}/objects"

    def environment(self, home: str | os.PathLike, token: str | None = None) -> dict[str, str]:
        """For a process that knows this Hub alone, with its cache below `home`."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE_"))}
        ours |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        ours |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*"}
        return ours | ({"HF_TOKEN": token} if token else {})

    def use(self, monkeypatch, home: str | os.PathLike, token: str | None = None) -> None:
        """In this process, which has read its environment already."""
        for name, value in (
            ("ENDPOINT", self.endpoint),
            ("HUGGINGFACE_CO_URL_TEMPLATE", self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_CACHE", str(Path(home) / "hub")),
            ("HF_TOKEN_PATH", str(Path(home) / "token")),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_XET", True),
        ):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.endpoint)
        monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)  # made when first used, and kept
        monkeypatch.setenv("HF_TOKEN", token or "")
        monkeypatch.setenv("NO_PROXY", "*")

    def fail_uploads(self, first: int = 1, times: int = 1, how: int | str = "reset") -> None:
        """From the `first` upload after this call on, fail so many: a connection cut halfway, or a status like 500.

        An upload is the sending of one LFS object, or a commit.  The client tries an object again, but not a commit.
        """
        self._uploads, self._failing, self._how = 0, range(first, first + times), how

    def failure_of(self, request: str) -> int | str | None:
        if not UPLOAD.fullmatch(request):
            return None
        with self.lock:
            self._uploads += 1
            return self._how if self._uploads in self._failing else None

    def files(self, name: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.repositories[kind, name].at(revision).files.items()}

    def everything(self) -> dict[str, bytes]:
        """Whatever was ever sent here and taken, by a name that says where it is."""
        found = {f"objects/{sha}": data for sha, data in self.objects.items()}
        for repository in self.repositories.values():
            for commit in repository.commits.values():
                where = f"{repository.path}@{commit.id[:7]}"
                found |= {f"{where}/{path}": blob.data for path, blob in commit.files.items()}
                found[f"{where} message"] = f"{commit.title}\n{commit.message}".encode()
        return found


ROUTES = []


def route(pattern: str):
    """For the method that answers requests like `pattern`: with content, or with content, status and headers."""

    def note(method):
        ROUTES.append((re.compile(pattern), method))
        return method

    return note


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        """The requests are kept in `HubServer.requests`."""

    def _handle(self) -> None:
        request = f"{self.command} {urlsplit(self.path).path}"
        self.query = parse_qs(urlsplit(self.path).query)
        how, size = self.hub.failure_of(request), int(self.headers.get("Content-Length") or 0)
        if how == "reset":
            self.rfile.read(size // 2)
            self.hub.requests.append((request, how))
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return self.connection.close()
        self.body = self.rfile.read(size)
        try:
            if how is not None:
                raise Refusal(how, "told to fail")
            if self.headers.get("Transfer-Encoding"):
                self.close_connection = True
                raise Refusal(411, "expected a Content-Length")
            for pattern, method in ROUTES:
                if match := pattern.fullmatch(request):
                    with self.hub.lock:
                        answer = method(self, **{k: v and unquote(v) for k, v in match.groupdict().items()})
                    return self._send(request, *answer) if isinstance(answer, tuple) else self._send(request, answer)
            raise Refusal(404, f"no such route: {request}")
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self._send(request, {"error": str(refusal)}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _send(
        self, request: str, content: dict | list | bytes, status: int = 200, headers: dict | None = None
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Type": "application/octet-stream" if data is content else "application/json"} | (
            headers or {}
        )
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part and status == 200:
            start, end = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[start : end + 1], 206 if start <= end else 416
        self.hub.requests.append((request, status))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data)), "Accept-Ranges": "bytes"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Who may do what

    def _user(self) -> str | None:
        given = self.headers.get("Authorization")
        user = self.hub.tokens.get(given.removeprefix("Bearer ")) if given else None
        if given and user is None:
            raise Refusal(401, WRONG_TOKEN)
        return user

    def _owner(self, name: str) -> None:
        user = self._user()
        if user is None:
            raise Refusal(401, WRONG_TOKEN)
        if name.split("/")[0] != user:
            raise Refusal(403, f"You don't have the rights to write to {name}")

    def _repository(self, kind: str | None, name: str, write: bool = False) -> Repository:
        user, found = self._user(), self.hub.repositories.get((kind or "models", name))
        if found is None or (found.private and name.split("/")[0] != user):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write:
            self._owner(name)
        return found

    def _json(self) -> dict:
        return json.loads(self.body or b"{}")

    # Repositories

    @route(r"GET /api/whoami-v2")
    def whoami(self):
        if (user := self._user()) is None:
            raise Refusal(401, WRONG_TOKEN)
        return {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    @route(r"POST /api/validate-yaml")
    def validate_card(self):
        return {"errors": [], "warnings": []}

    def _named(self) -> tuple[str, str]:
        asked = self._json()
        name = f"{asked.get('organization') or self._user()}/{asked['name']}"
        self._owner(name)
        return f"{asked.get('type') or 'model'}s", name

    @route(r"POST /api/repos/create")
    def create(self):
        key, asked = self._named(), self._json()
        existing = self.hub.repositories.get(key)
        if existing is None:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            kept = {name: asked[name] for name in ("sdk", "hardware", "variables") if name in asked}
            self.hub.repositories[key] = Repository(*key, private=private, settings=kept)
        answer = {"url": f"{self.hub.endpoint}/{self.hub.repositories[key].path}"}
        if existing is not None:
            return {**answer, "error": "You already created this repo"}, 409
        return answer

    @route(r"DELETE /api/repos/delete")
    def delete(self):
        if self.hub.repositories.pop(self._named(), None) is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return {}

    @route(rf"PUT {REPO}/settings")
    def change_settings(self, kind, name):
        repository, asked = self._repository(kind, name, write=True), self._json()
        repository.private = asked.get("visibility") == "private" or bool(asked.get("private"))
        return {}

    @route(rf"GET {REPO}")
    @route(rf"GET {REPO}/revision/(?P<revision>[^/]+)")
    def info(self, kind, name, revision=None):
        repository = self._repository(kind, name)
        commit = repository.at(revision or "main")
        about = {"id": name, "author": name.split("/")[0], "sha": commit.id, "private": repository.private, "tags": []}
        about |= {"lastModified": DATE, "createdAt": DATE, "gated": False, "disabled": False, **repository.settings}
        detailed = "blobs" in self.query
        siblings = [
            {"rfilename": path} | (blob.entry(path) if detailed else {}) for path, blob in sorted(commit.files.items())
        ]
        return {**about, "downloads": 0, "likes": 0, "siblings": siblings}

    @route(rf"GET {REPO}/refs")
    def refs(self, kind, name):
        repository = self._repository(kind, name)
        branches, tags = (
            [{"name": n, "ref": f"refs/{where}/{n}", "targetCommit": commit} for n, commit in names.items()]
            for where, names in (("heads", repository.branches), ("tags", repository.tags))
        )
        return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}

    @route(rf"GET {REPO}/commits/(?P<revision>[^/]+)")
    def history(self, kind, name, revision):
        repository, found = self._repository(kind, name), []
        commit = repository.at(revision)
        while commit is not None:
            found.append({"id": commit.id, "title": commit.title, "message": commit.message, "date": DATE,
                          "authors": [{"user": name.split("/")[0]}]})  # fmt: skip
            commit = repository.commits.get(commit.parent)
        return found

    @route(rf"POST {REPO}/branch/(?P<ref>[^/]+)")
    def make_branch(self, kind, name, ref):
        repository = self._repository(kind, name, write=True)
        return self._point(repository.branches, ref, repository.at(self._json().get("startingPoint") or "main").id)

    @route(rf"POST {REPO}/tag/(?P<ref>[^/]+)")
    def make_tag(self, kind, name, ref):
        repository = self._repository(kind, name, write=True)
        return self._point(repository.tags, self._json()["tag"], repository.at(ref).id)

    @staticmethod
    def _point(names: dict[str, str], ref: str, commit: str):
        if ref in names:
            raise Refusal(409, f"Reference already exists: {ref}")
        names[ref] = commit
        return {}

    @route(rf"DELETE {REPO}/(?P<what>branch|tag)/(?P<ref>[^/]+)")
    def remove_ref(self, kind, name, what, ref):
        repository = self._repository(kind, name, write=True)
        names = repository.branches if what == "branch" else repository.tags
        if names.pop(ref, None) is None:
            raise Refusal(404, f"Invalid rev id: {ref}", "RevisionNotFound")
        return {}

    # Files out

    @route(rf"GET {REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
    def tree(self, kind, name, revision, folder=None):
        commit, start = self._repository(kind, name).at(revision), f"{folder}/" if folder else ""
        inside = {path: blob for path, blob in sorted(commit.files.items()) if path.startswith(start)}
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        folders = {start + "/".join(parts[:depth]) for path in inside
                   for parts in [path[len(start) :].split("/")] for depth in range(1, len(parts))}  # fmt: skip
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = [self._folder(path) for path in sorted(folders)] + [blob.entry(p) for p, blob in inside.items()]
        return [entry for entry in entries if deep or "/" not in entry["path"][len(start) :]]

    @staticmethod
    def _folder(path: str) -> dict:
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}

    @route(rf"POST {REPO}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, kind, name, revision):
        commit = self._repository(kind, name).at(revision)
        asked = self._json() if self.body.startswith(b"{") else parse_qs(self.body.decode())
        found = []
        for path in asked["paths"]:
            if path in commit.files:
                found.append(commit.files[path].entry(path))
            elif any(other.startswith(f"{path}/") for other in commit.files):
                found.append(self._folder(path))
        return found

    @route(rf"(?:GET|HEAD) {FILE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, kind, name, revision, path):
        commit = self._repository(kind, name).at(revision)
        if path not in commit.files:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.id, "ETag": f'"{blob.etag}"'}
        if not blob.lfs:
            return blob.data, 200, headers
        linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        return b"", 302, {**headers, **linked, "Location": f"{self.hub.storage}/{blob.sha256}"}

    @route(r"(?:GET|HEAD) /objects/(?P<sha>[0-9a-f]{64})")
    def fetch_object(self, sha):
        if self.headers.get("Authorization"):
            raise Refusal(400, "a token was sent to the storage, which is not the Hub")
        if sha not in self.hub.objects:
            raise Refusal(404, "no such object")
        return self.hub.objects[sha], 200, {"ETag": f'"{sha}"'}

    # Files in

    @route(rf"POST {REPO}/preupload/(?P<revision>[^/]+)")
    def preupload(self, kind, name, revision):
        repository, answers = self._repository(kind, name, write=True), []
        for file in self._json()["files"]:
            sample = base64.b64decode(file["sample"])
            large = b"\0" in sample or file["path"].endswith(".safetensors") or file["size"] > LARGEST_REGULAR
            present = repository.at(revision).files.get(file["path"])
            answers.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False,
                            "oid": present and present.etag})  # fmt: skip
        return {"files": answers}

    @route(rf"GET {REPO}/xet-write-token/(?P<revision>[^/]+)")
    def xet_token(self, kind, name, revision):
        self._repository(kind, name, write=True)
        if self.hub.xet is None:
            raise Refusal(404, "no Xet here")
        return {"casUrl": f"local://{self.hub.xet}", "accessToken": "xet", "exp": 4102444800}

    @route(rf"POST {FILE}\.git/info/lfs/objects/batch")
    def lfs_batch(self, kind, name):
        self._repository(kind, name, write=True)
        answers = []
        for wanted in self._json()["objects"]:
            upload = {"upload": {"href": f"{self.hub.storage}/{wanted['oid']}"}}
            answers.append(dict(wanted) if wanted["oid"] in self.hub.objects else {**wanted, "actions": upload})
        return {"transfer": "basic", "objects": answers}

    @route(r"PUT /objects/(?P<sha>[0-9a-f]{64})")
    def store_object(self, sha):
        if hashlib.sha256(self.body).hexdigest() != sha:
            raise Refusal(400, "the bytes have another SHA-256 than their name")
        self.hub.objects[sha] = self.body
        return {}

    @route(rf"POST {REPO}/commit/(?P<revision>[^/]+)")
    def commit(self, kind, name, revision):
        repository = self._repository(kind, name, write=True)
        if revision not in repository.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        before = repository.at(revision)
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, before.id):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(before.files)
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] in self.hub.objects:
                    files[value["path"]] = Blob(self.hub.objects[value["oid"]], lfs=True)
                elif self.hub.xet is None:
                    raise Refusal(400, f"{value['path']}: its object {value['oid']} was never sent")
                else:
                    files[value["path"]] = Blob(b"", lfs=True, elsewhere=(value["oid"], value["size"]))
            elif key in ("deletedFile", "deletedFolder"):
                start = value["path"].rstrip("/") + "/" * (key == "deletedFolder")
                gone = [p for p in files if p == start or (start.endswith("/") and p.startswith(start))]
                if not gone:
                    raise Refusal(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
                files = {p: blob for p, blob in files.items() if p not in gone}
        made = repository.add(revision, Commit(header["summary"], header.get("description", ""), before.id, files))
        address = f"{self.hub.endpoint}/{repository.path}/commit/{made.id}"
        return {"success": True, "commitOid": made.id, "commitUrl": address}
