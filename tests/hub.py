"""A hub on this machine, which the real client speaks to: repositories, commits, large files.

Paths, statuses and fields are those that huggingface_hub 2.4.0 sends and reads when it uploads and
downloads. Large files go up by the protocol of Git LFS; xet is not offered.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from tests.servers import serve

USER, TOKEN = "someone", "hf_only_this_one_is_known"
LARGE = (".safetensors", ".bin", ".png")  # what a new repository's .gitattributes gives to LFS
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE)
LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "other")  # some that the metadata may name

NOT_THERE = {"X-Error-Code": "RepoNotFound"}


@dataclass
class Repository:
    is_private: bool
    files: dict[str, bytes]
    messages: list[str]  # of its commits
    gated: bool = False  # its files are for those with the token only

    @property
    def commit(self) -> str:
        return f"{len(self.messages):040x}"


@dataclass
class Hub:
    run: Callable  # of command lines that speak to it
    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)  # as models/someone/name
    large: dict[str, bytes] = field(default_factory=dict)  # by sha256
    sent: list[tuple] = field(default_factory=list)  # of files: (file, first byte, bytes)
    asked: list[str] = field(default_factory=list)  # requests, as "POST /api/repos/create"
    faults: list[int] = field(
        default_factory=list
    )  # of the next large files; 200 breaks off midway
    pretended: dict[str, int] = field(default_factory=dict)  # sizes it tells of files, if others
    refuses: dict[str, tuple[int, str]] = field(default_factory=dict)  # request -> status, error


def hub_app(hub: Hub) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def check(request: Request, call_next):
        line, token = f"{request.method} {request.url.path}", request.headers.get("Authorization")
        hub.asked.append(line)
        refusals = [refusal for pattern, refusal in hub.refuses.items() if re.match(pattern, line)]
        may_read = request.method in ("GET", "HEAD")
        if not may_read and not request.url.path.startswith("/put/") and token != f"Bearer {TOKEN}":
            refusals.append((401, "Invalid username or password."))
        if refusals:
            await request.body()
            return JSONResponse({"error": refusals[0][1]}, refusals[0][0])
        return await call_next(request)

    @app.exception_handler(HTTPException)
    def refuse(request: Request, error: HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.post("/api/repos/create")
    def create(asked: dict):
        kind, owner = asked.get("type", "model"), asked["organization"]
        name = f"{kind}s/{owner}/{asked['name']}"
        if owner != USER:
            raise HTTPException(403, "You don't have the rights to create a repository there")
        content = {"url": f"{hub.url}/{name.removeprefix('models/')}"}
        if name in hub.repositories:
            return JSONResponse(content | {"error": "You already created this repo"}, 409)
        files = {".gitattributes": ATTRIBUTES.encode()}
        is_private = asked.get("visibility") == "private"
        hub.repositories[name] = Repository(is_private, files, ["initial commit"])
        return content

    @app.post("/api/validate-yaml")
    def validate(asked: dict):
        match = re.match(r"---\n(.*?)\n---\n", asked["content"], re.DOTALL)
        known = yaml.safe_load(match[1]).get("license", "mit") in LICENSES if match else True
        errors = [] if known else [{"message": '"license" must be one of those'}]
        return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)

    def find(name: str) -> Repository:
        if repository := hub.repositories.get(name):
            return repository
        raise HTTPException(404, "Sorry, we can't find the page you are looking for.", NOT_THERE)

    def check_access(repository: Repository, request: Request):
        if repository.gated and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise HTTPException(401, "Access is restricted", {"X-Error-Code": "GatedRepo"})

    def size(repository: Repository, file: str) -> int:
        return hub.pretended.get(file, len(repository.files[file]))

    @app.get("/api/{name:path}/auth-check")
    def auth_check(name: str, request: Request):
        check_access(find(name), request)

    @app.get("/api/{name:path}/tree/{commit}")
    def tree(name: str, commit: str):
        files = find(name).files.items()
        return [{"type": "file", "path": f, "oid": "0", "size": len(c)} for f, c in files]

    @app.get("/api/{name:path}")
    def info(name: str):
        name = name.removesuffix("/revision/main")
        repository = find(name)
        files = [{"rfilename": f, "size": size(repository, f)} for f in repository.files]
        card = re.match(rb"---\n(.*?)\n---\n", repository.files.get("README.md", b""), re.DOTALL)
        return {
            "id": name.partition("/")[2],
            "sha": repository.commit,
            "private": repository.is_private,
            "gated": "manual" if repository.gated else False,
            "siblings": files,
            "cardData": yaml.safe_load(card[1]) if card else None,
        }

    @app.api_route("/{name:path}/resolve/{commit}/{file:path}", methods=["GET", "HEAD"])
    def resolve(name: str, commit: str, file: str, request: Request):
        repository = find(name if name.startswith("datasets/") else f"models/{name}")
        check_access(repository, request)
        content = repository.files[file]
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        begin = int(re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "bytes=0-"))[1])
        headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        headers["Content-Length"] = str(len(content) - begin)
        if request.method == "HEAD":
            return Response(None, 200, headers)
        sent, status = content[begin:], 206 if begin else 200
        if file.endswith(LARGE) and hub.faults:
            if (fault := hub.faults.pop(0)) != 200:
                raise HTTPException(fault, "It is broken")
            sent = sent[: len(sent) // 2]
        hub.sent.append((file, begin, len(sent)))
        return StreamingResponse(iter([sent]), status, headers)

    @app.post("/api/{name:path}/preupload/main")
    def preupload(name: str, asked: dict):
        modes = []
        for file in asked["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        return {"files": modes}

    @app.post("/{name:path}.git/info/lfs/objects/batch")
    def batch(name: str, asked: dict):
        objects = []
        for large in asked["objects"]:
            upload = {"href": f"{hub.url}/put/{large['oid']}"}
            objects.append(large | {"actions": {"upload": upload}})
        return {"transfer": "basic", "objects": objects}

    @app.put("/put/{oid}")
    async def put(oid: str, request: Request):
        content = await request.body()
        assert hashlib.sha256(content).hexdigest() == oid
        hub.large[oid] = content
        return PlainTextResponse("")

    @app.post("/api/{name:path}/commit/main")
    async def commit(name: str, request: Request):
        repository = hub.repositories[name]
        head, *lines = [json.loads(line) for line in (await request.body()).splitlines()]
        assert head["key"] == "header"
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    repository.files[value["path"]] = hub.large[value["oid"]]
                case "deletedFile":
                    del repository.files[value["path"]]
        repository.messages.append(head["value"]["summary"])
        url = f"{hub.url}/{name.removeprefix('models/')}/commit/0"
        return {"success": True, "commitOid": "0", "commitUrl": url}

    return app


@contextlib.contextmanager
def serve_hub(run: Callable) -> Iterator[Hub]:
    hub = Hub(run)
    with serve(hub_app(hub)) as hub.url:
        yield hub


@contextlib.contextmanager
def logged_in(home: Path, run_ready: Callable) -> Iterator[Hub]:
    """A hub that the client of other processes takes for the only one, and is logged in to."""
    with serve_hub(run_ready) as hub, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
            patch.delenv(name)
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("HF_HOME", str(home))
        for what in ("XET", "TELEMETRY", "PROGRESS_BARS", "UPDATE_CHECK"):
            patch.setenv(f"HF_HUB_DISABLE_{what}", "1")
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield hub
