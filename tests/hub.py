"""A hub on this machine, which the real client speaks to: repositories, commits, large files.

Paths, statuses and fields are those that huggingface_hub 2.4.0 sends and reads when it uploads.
Large files go by the protocol of Git LFS; xet is not offered.
"""

import base64
import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import yaml
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse

from tests.servers import serve

USER, TOKEN = "someone", "hf_only_this_one_is_known"
LARGE = (".safetensors", ".bin", ".png")  # what a new repository's .gitattributes gives to LFS
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE)
LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "other")  # some that the metadata may name


@dataclass
class Repository:
    is_private: bool
    files: dict[str, bytes]
    messages: list[str]  # of its commits


@dataclass
class Hub:
    run: Callable  # of command lines that speak to it
    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)  # as models/someone/name
    large: dict[str, bytes] = field(default_factory=dict)  # by sha256
    asked: list[str] = field(default_factory=list)  # requests, as "POST /api/repos/create"
    refuses: dict[str, tuple[int, str]] = field(default_factory=dict)  # request -> status, error


def hub_app(hub: Hub) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def check(request: Request, call_next):
        line, token = f"{request.method} {request.url.path}", request.headers.get("Authorization")
        hub.asked.append(line)
        refusals = [refusal for pattern, refusal in hub.refuses.items() if re.match(pattern, line)]
        if not request.url.path.startswith("/put/") and token != f"Bearer {TOKEN}":
            refusals.append((401, "Invalid username or password."))
        if refusals:
            await request.body()
            return JSONResponse({"error": refusals[0][1]}, refusals[0][0])
        return await call_next(request)

    @app.exception_handler(HTTPException)
    def refuse(request: Request, error: HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code)

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

    @app.get("/api/{name:path}")
    def info(name: str):
        repository = hub.repositories.get(name.removesuffix("/revision/main"))
        if not repository:
            raise HTTPException(404, "Sorry, we can't find the page you are looking for.")
        files = [{"rfilename": file} for file in repository.files]
        return {"id": name, "private": repository.is_private, "siblings": files}

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
