"""A hub on this machine, which the real client speaks to: repositories, commits, large files.

Paths, statuses and headers are those that huggingface_hub 2.4.0 sends and reads. Large files go by
the protocol of Git LFS, to and from an address of their own, which must not be given the token; xet
is not offered.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

USER, TOKEN = "someone", "hf_only_this_one_is_known"
LARGE = (".safetensors", ".bin", ".png")  # what a new repository's .gitattributes gives to LFS
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE)
LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "other")  # some that the metadata may name


@dataclass
class Repository:
    is_private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # all files, by sha
    messages: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        return [*self.commits][-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def commit(self, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha] = files
        self.messages.append(message)
        return sha


@dataclass
class Hub:
    url: str = ""
    storage: str = ""  # another origin, where large files lie
    repositories: dict[str, Repository] = field(default_factory=dict)  # as models/someone/name
    large: dict[str, bytes] = field(default_factory=dict)  # by sha256
    verified: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)  # requests, as "POST /api/repos/create"
    refuses: dict[str, tuple[int, str]] = field(default_factory=dict)  # request -> status, error


class Refusal(Exception):
    """An answer that is no success: status, error, and headers."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.asked.append(request)
        body = self.read_body()
        try:
            for pattern, refusal in self.hub.refuses.items():
                if re.fullmatch(pattern, request):
                    raise Refusal(*refusal)
            for pattern, function in ROUTES.items():
                if match := re.fullmatch(pattern, request):
                    if function not in OF_STORAGE:
                        self.check_token()
                    elif self.headers.get("Authorization"):
                        raise Refusal(400, "the token is not for the storage")
                    function(self, body, *match.groups())
                    return
            raise Refusal(404, "Sorry, we can't find the page you are looking for.")
        except Refusal as refusal:
            status, error, *headers = refusal.args
            self.reply(status, {"error": error}, dict(headers))

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def reply(self, status: int, content: object, headers: dict | None = None) -> None:
        """content: bytes, or what becomes JSON."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "octet-stream" if isinstance(content, bytes) else "json"
        for name, value in {"Content-Type": f"application/{kind}", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def check_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401, "Invalid username or password.")

    def repository(self, name: str) -> Repository:
        if name not in self.hub.repositories:
            raise Refusal(404, "Repository not found", ("X-Error-Code", "RepoNotFound"))
        return self.hub.repositories[name]

    # --- repositories --------------------------------------------------------------------------

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        kind, owner = asked.get("type", "model"), asked["organization"]
        if owner != USER:
            raise Refusal(
                403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"'
            )
        name = f"{kind}s/{owner}/{asked['name']}"
        url = f"{self.hub.url}/{name.removeprefix('models/')}"
        if name in self.hub.repositories:
            self.reply(409, {"error": f"You already created this {kind} repo", "url": url})
            return
        repository = Repository(asked.get("visibility") == "private")
        repository.commit({".gitattributes": ATTRIBUTES.encode()}, "initial commit")
        self.hub.repositories[name] = repository
        self.reply(200, {"url": url, "name": f"{owner}/{asked['name']}"})

    def info(self, _: bytes, name: str) -> None:
        repository = self.repository(name)
        about = {"id": name.partition("/")[2], "sha": repository.head}
        files = [{"rfilename": file} for file in repository.files]
        self.reply(200, about | {"private": repository.is_private, "siblings": files})

    def tree(self, _: bytes, name: str, revision: str) -> None:
        repository = self.repository(name)
        files = repository.commits[repository.head if revision == "main" else revision]
        entries = []
        for path, content in files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self.reply(200, entries)

    # --- uploads -------------------------------------------------------------------------------

    def validate(self, body: bytes) -> None:
        asked = json.loads(body)
        match = re.match(r"---\n(.*?)\n---\n", asked["content"], re.DOTALL)
        data = yaml.safe_load(match[1]) if match else {}
        errors = []
        if "license" in data and data["license"] not in LICENSES:
            errors.append({"message": f'"license" must be one of [{", ".join(LICENSES)}]'})
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, body: bytes, name: str) -> None:
        files = self.repository(name).files
        modes = []
        for file in json.loads(body)["files"]:
            path, is_large = file["path"], file["path"].endswith(LARGE)
            there = files.get(path)
            oid = there and (sha256(there) if is_large else git_oid(there))
            mode = {"uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            modes.append({"path": path, "oid": oid, **mode})
        self.reply(200, {"files": modes})

    def batch(self, body: bytes, name: str) -> None:
        prefix = "" if name.startswith("datasets/") else "models/"
        self.repository(prefix + name)
        objects = []
        for one in json.loads(body)["objects"]:
            oid, to = one["oid"], {"href": f"{self.hub.storage}/put/{one['oid']}"}
            verify = {"href": f"{self.hub.url}/{name}.git/info/lfs/objects/verify"}
            actions = {} if oid in self.hub.large else {"upload": to, "verify": verify}
            objects.append(one | ({"actions": actions} if actions else {}))
        self.reply(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        if sha256(body) != oid:
            raise Refusal(400, "XAmzContentSHA256Mismatch")
        self.hub.large[oid] = body
        self.reply(200, b"")

    def verify(self, body: bytes, _: str) -> None:
        asked = json.loads(body)
        if len(self.hub.large.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "the file is not there")
        self.hub.verified.add(asked["oid"])
        self.reply(200, {})

    def commit(self, body: bytes, name: str) -> None:
        repository = self.repository(name)
        lines = [json.loads(line) for line in body.splitlines()]
        files, message = dict(repository.files), lines[0]["value"]["summary"]
        assert lines[0]["key"] == "header"
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.hub.verified:
                        raise Refusal(400, f"{value['path']} was not uploaded")
                    files[value["path"]] = self.hub.large[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        sha = repository.commit(files, message)
        url = f"{self.hub.url}/{name.removeprefix('models/')}/commit/{sha}"
        self.reply(200, {"success": True, "commitOid": sha, "commitUrl": url})

    # --- downloads -----------------------------------------------------------------------------

    def resolve(self, _: bytes, name: str, revision: str, path: str) -> None:
        prefix = "" if name.startswith("datasets/") else "models/"
        repository = self.repository(prefix + name)
        sha = repository.head if revision == "main" else revision
        content, headers = repository.commits[sha][path], {"X-Repo-Commit": sha}
        if not path.endswith(LARGE):
            self.reply(200, content, headers | {"ETag": f'"{git_oid(content)}"'})
            return
        oid = sha256(content)
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        self.reply(302, b"", headers | {"Location": f"{self.hub.storage}/get/{oid}"})

    def get(self, _: bytes, oid: str) -> None:
        self.reply(200, self.hub.large[oid], {"ETag": f'"{oid}"'})


ROUTES = {
    r"POST /api/repos/create": Handler.create,
    r"POST /api/validate-yaml": Handler.validate,
    r"GET /api/((?:models|datasets)/[^/]+/[^/]+)(?:/revision/main)?": Handler.info,
    r"GET /api/((?:models|datasets)/[^/]+/[^/]+)/tree/([^/]+)": Handler.tree,
    r"POST /api/((?:models|datasets)/[^/]+/[^/]+)/preupload/main": Handler.preupload,
    r"POST /api/((?:models|datasets)/[^/]+/[^/]+)/commit/main": Handler.commit,
    r"POST /((?:datasets/)?[^/]+/[^/]+)\.git/info/lfs/objects/batch": Handler.batch,
    r"POST /((?:datasets/)?[^/]+/[^/]+)\.git/info/lfs/objects/verify": Handler.verify,
    r"PUT /put/(\w+)": Handler.put,
    r"GET /get/(\w+)": Handler.get,
    r"(?:GET|HEAD) /((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)": Handler.resolve,
}
OF_STORAGE = (Handler.put, Handler.get)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def serve_hub() -> Iterator[Hub]:
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        port = server.server_address[1]
        # one server by two names: to the client they are two origins
        hub.url, hub.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
