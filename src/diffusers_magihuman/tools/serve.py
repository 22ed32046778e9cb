# SPDX-License-Identifier: Apache-2.0
"""`magihuman serve`: clips on request over HTTP, by the `/v1/videos` contract of other video servers.

One process answers, and alone writes the jobs; workers on Ray make the clips. They share a folder for each job, where
a worker says how far it is, and finds that it is to stop.
"""

import asyncio
import base64
import hmac
import json
import math
import os
import re
import secrets
import shutil
import socket
import sqlite3
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI
from fastapi import Request as Call
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from ..checks import check_choice, check_integer, show
from ..constants import FRAME_RATE
from ..pipeline_base import check_forms
from . import requests
from .cli import describe, is_loopback, read_size
from .generate import frames_in
from .requests import Record, Row, Store, choose_run, import_ray_pool, make_options

Run = Callable[[Row], Awaitable[Record]]  # has a worker do a request: its record, or an `error`
Files = dict[str, UploadFile | bytes]
Body = bytes | list[tuple[str, Any]]  # JSON, or the parts of a form

MAX_BODY_BYTES, MAX_TEXT_BYTES, MAX_BODY_SECONDS = 2**25, 2**20, 120  # of a request, of one text of a form
TEXTS = ("prompt", "negative_prompt", "description", "background_sound", "model", "user", "size")
MEDIA = dict.fromkeys(("image", "input_reference", "image_reference"), "image")
MEDIA |= dict.fromkeys(("audio", "audio_reference"), "audio")
PRIVATE = ("request", "context", "bytes")  # of a job


def load_maker(arguments: Namespace, store: Store) -> Callable[[Row], Record]:
    """Loads the pipelines, which then make the clips of requests, and tell how far they are."""
    pipes = requests.load_pipes(arguments, arguments.sizes)

    def make(row: Row) -> Record:
        request, folder = requests.Request(*row), Path(store.path(f"jobs/{row[0]}"))

        def report(*progress: Any) -> None:
            if (folder / "cancel").exists():
                raise InterruptedError
            with suppress(OSError):
                (folder / "new").write_text(json.dumps(progress))
                (folder / "new").replace(folder / "progress")

        state, record = requests.find_record(store, request)  # as another worker may have died after it
        if state == "done":
            return record
        return requests.run_request(pipes, request, store, arguments.context, callback=report)

    return make


class Service:
    """The jobs by their ids, in memory and in a table, and the tasks that have workers do them. All but `check` runs
    in the thread of the event loop."""

    def __init__(self, arguments: Namespace, models: requests.Models, store: Store) -> None:
        self.arguments, self.models, self.store = arguments, models, store
        width, height = arguments.max_size or (models.defaults[name] for name in ("width", "height"))
        size = height, width, frames_in(arguments.max_seconds)
        models.pipe.latent_shapes(1, size[2], height, width)  # checks
        self.sizes = requests.check_sizes(models, size)
        self.context = requests.digest_of(store.root, models.context)
        self.queue: asyncio.Queue[str] = asyncio.Queue()
        self.checking, self.num_workers, self.num_arriving = asyncio.Lock(), 0, 0
        self.ended, self.refused, self.seconds = Counter(), Counter(), 0.0
        self.db = sqlite3.connect(store.path("jobs.sqlite"), timeout=1, isolation_level=None)
        self.db.executescript("PRAGMA journal_mode = WAL; CREATE TABLE IF NOT EXISTS jobs (id TEXT UNIQUE, job TEXT)")
        rows = self.db.execute("SELECT id, job FROM jobs ORDER BY rowid")
        self.jobs: dict[str, Record] = {name: json.loads(job) for name, job in rows}
        os.makedirs(store.path("jobs"), exist_ok=True)
        left = {*os.listdir(store.path("jobs"))} - {name for name, job in self.jobs.items() if not job["completed_at"]}
        for name in left:  # killed before it was accepted, or after it was done
            store.remove(f"jobs/{name}")
        for name, job in [*self.jobs.items()]:
            if job["status"] == "cancelled":
                self.remove(name)
            elif job["completed_at"] is None and job["context"] != self.context:
                self.end(name, "failed", error="The service was started anew with another model, option or folder.")
            elif job["completed_at"] is None:
                self.enqueue(name)

    def folder(self, name: str) -> Path:
        return Path(self.store.path("jobs"), name)

    def hide_paths(self, name: str, error: str) -> str:
        """Leaves out of an error where things are on this machine; that of ffmpeg ends with a command."""
        return error.split(" Command: ")[0].replace(f"{self.store.root}/", "").replace(f"jobs/{name}/", "")

    def save(self, name: str, **changes: Any) -> Record:
        job = self.jobs.get(name, {}) | changes
        on_conflict = "ON CONFLICT (id) DO UPDATE SET job = excluded.job"
        self.db.execute(f"INSERT INTO jobs VALUES (?, ?) {on_conflict}", (name, json.dumps(job)))
        self.jobs[name] = job  # if that is on disk
        return job

    def enqueue(self, name: str, **changes: Any) -> None:
        self.save(name, status="queued", **changes)
        self.queue.put_nowait(name)

    def end(self, name: str, status: str, error: str | None = None, **changes: Any) -> None:
        changes["error"] = error and {"code": "generation_failed", "message": error}
        self.save(name, status=status, completed_at=int(time.time()), request=None, **changes)
        self.ended[status] += 1
        self.store.remove(f"jobs/{name}")

    def remove(self, name: str) -> None:
        """Removes a job that no worker is at, the clip before the row, so that no clip is left without one."""
        self.save(name, status="cancelled")
        for file in (f"{name}.mp4", f"{name}.json", f".work/{name}.json", f"jobs/{name}"):
            self.store.remove(file)
        self.db.execute("DELETE FROM jobs WHERE id = ?", (name,))
        del self.jobs[name]

    def prune(self) -> None:
        """Removes what has ended and is too old, and the oldest where clips take too much."""
        room, oldest = self.arguments.keep_gb * 1e9, time.time() - self.arguments.keep_days * 86400
        for name, job in [*reversed(self.jobs.items())]:
            room -= job["bytes"]
            if job["completed_at"] and (room < 0 or job["completed_at"] < oldest):
                self.remove(name)

    def check_room(self) -> None:
        num_queued = sum(job["status"] == "queued" for job in self.jobs.values())
        if num_queued + self.num_arriving >= self.arguments.max_queue:
            wait = math.ceil(self.seconds / max(1, self.ended["completed"]))  # as long as a clip took
            headers = {"Retry-After": f"{max(1, wait)}"}
            raise HTTPException(429, f"{self.arguments.max_queue} jobs are queued already.", headers)

    def check(self, name: str, body: Body) -> requests.Request:
        """Checks all else before a file is opened, which is then written to the job's folder."""
        fields, files = read_fields(body)
        folder, rows = self.folder(name), [{"id": name} | fields]
        if files:
            rows.append(rows[0] | {kind: kind for kind in files})
        for row in rows:
            if row is not rows[0]:
                for kind, file in files.items():
                    with open(folder / kind, "wb") as target:
                        target.write(file) if isinstance(file, bytes) else shutil.copyfileobj(file.file, target)
                    requests.READERS[kind](str(folder / kind))
            request = requests.check_request(row, self.models, folder)
            for (*size, frames), (*most, most_frames) in zip(request.sizes, self.sizes, strict=True):
                if frames > most_frames:
                    seconds = (most_frames - 1) / FRAME_RATE
                    raise ValueError(f"`seconds` must be at most {seconds:g} here, and `num_frames` {most_frames}.")
                if math.prod(size) > 1.1 * math.prod(most):  # sizes of other aspects are rounded
                    raise ValueError(f"`size` must be at most of the pixels of {most[1]}x{most[0]} here.")
        return request

    async def accept(self, body: Body) -> Record:
        name = f"video_{secrets.token_hex(16)}"
        self.folder(name).mkdir()
        try:
            async with self.checking:  # one at a time, as one may take a gigabyte
                request = await asyncio.to_thread(self.check, name, body)
        except BaseException as error:
            shutil.rmtree(self.folder(name))
            if isinstance(error, ValueError | OSError) and not getattr(error, "errno", None):  # no fault of ours
                raise ValueError(self.hide_paths(name, describe(error))) from error
            raise
        height, width, frames = request.sizes[-1]
        job = {"id": name, "object": "video", "created_at": int(time.time()), "completed_at": None, "error": None}
        job |= {"model": self.models.context["model"], "prompt": request.call["prompt"], "seed": request.seed}
        job |= {"size": f"{width}x{height}", "seconds": f"{(frames - 1) / FRAME_RATE:g}", "inference_time_s": None}
        self.enqueue(name, **job, request=list(request), context=self.context, bytes=0)
        return self.jobs[name]

    def cancel(self, name: str) -> None:
        status = self.jobs[name]["status"]
        self.ended["cancelled"] += status in ("queued", "in_progress")
        if status == "in_progress":
            self.save(name, status="cancelled")
            (self.folder(name) / "cancel").touch()
        elif status != "cancelled":  # else `do` removes it when its worker has stopped
            self.remove(name)

    async def prune_often(self) -> None:
        while True:
            try:
                self.prune()
            except (OSError, sqlite3.Error) as error:  # it is tried again
                print(f"magihuman: what is old cannot be removed: {describe(error)}", file=sys.stderr)
            await asyncio.sleep(60)

    async def work(self, run: Run) -> None:
        """Has a worker do the jobs, until it is lost."""
        while True:
            name = await self.queue.get()
            try:
                await self.do(name, run)
            except Exception as error:
                print(f"magihuman: {name} has to be tried again: {describe(error)}", file=sys.stderr)
                self.queue.put_nowait(name)
                if not isinstance(error, sqlite3.Error):  # another process locks the table, or the disk is full
                    break
                await asyncio.sleep(1)
        print("magihuman: a worker is lost", file=sys.stderr)
        self.num_workers -= 1

    async def do(self, name: str, run: Run) -> None:
        if name not in self.jobs:
            return
        begun, outcome = time.monotonic(), {}
        if self.jobs[name]["status"] != "cancelled":
            outcome = await run(self.save(name, status="in_progress")["request"])
        seconds = round(time.monotonic() - begun, 3)
        if self.jobs[name]["status"] == "cancelled":
            self.remove(name)
        elif "error" in outcome:
            self.end(name, "failed", self.hide_paths(name, outcome["error"]))
        else:
            self.end(name, "completed", inference_time_s=seconds, bytes=outcome["bytes"])
            self.seconds += seconds

    def show(self, job: Record) -> Record:
        """A job as the contract has it."""
        shown = {name: value for name, value in job.items() if name not in PRIVATE}
        shown |= {"progress": 100 * (job["status"] == "completed"), "stage": job["status"]}
        if job["status"] == "in_progress":
            shown["stage"], stages = "starting", ("denoising", *("upscaling",) * (len(self.sizes) - 1), "decoding")
            with suppress(OSError):
                shown["stage"], done, total = json.loads((self.folder(job["id"]) / "progress").read_text())
                part = (stages.index(shown["stage"]) + min(1, done / total)) / len(stages)
                shown["progress"] = min(99, int(100 * part))
        return shown

    def list(self, count: int, after: str | None) -> Record:
        """The newest jobs, or those before one of them."""
        names = [*reversed(self.jobs)]
        names = names[names.index(after) + 1 :] if after else names
        page = {"data": [self.show(self.jobs[name]) for name in names[:count]], "has_more": len(names) > count}
        ends = names[:count] or [None]
        return {"object": "list", "first_id": ends[0], "last_id": ends[-1], **page}

    def metrics(self) -> str:
        """In the text format of Prometheus."""
        jobs = Counter(job["status"] for job in self.jobs.values())
        values = {f'jobs{{status="{name}"}}': jobs[name] for name in ("queued", "in_progress")}
        values |= {f'jobs_total{{status="{name}"}}': self.ended[name] for name in ("completed", "failed", "cancelled")}
        values |= {f'refused_total{{status="{status}"}}': count for status, count in self.refused.items()}
        values |= {"clip_seconds_sum": round(self.seconds, 3), "clip_seconds_count": self.ended["completed"]}
        values["workers"] = self.num_workers
        return "".join(f"magihuman_{name} {value}\n" for name, value in values.items())

    async def guard(self, call: Call) -> None:
        token, given = self.arguments.token, call.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "The token is missing or wrong.", {"WWW-Authenticate": "Bearer"})
        # Any page in a browser on this machine could else call it, and read the answers under a name of its own.
        host = re.sub(r":\d+$", "", call.headers.get("host", "")).strip("[]")
        if token is None and ("origin" in call.headers or not is_loopback(host)):
            raise HTTPException(403, "Without a token the service is for programs on this machine alone.")

    async def refuse(self, _: Call, error: HTTPException) -> Response:
        self.refused[error.status_code] += 1
        field = re.search(r"(?:`|^')(\w+)", error.detail) if error.status_code == 400 else None
        shown = {"message": error.detail, "type": "invalid_request_error", "param": field and field[1]}
        return JSONResponse({"error": shown}, error.status_code, error.headers)


def read_media(name: str, value: Any) -> UploadFile | bytes:
    """A file of a form, or one in base64, which may be in a data URL, or that in an object."""
    if isinstance(value, UploadFile):
        return value
    if isinstance(value, dict) and len(value) == 1:
        (value,) = value.values()
    try:
        return base64.b64decode(re.sub("^data:[^,]{0,99};base64,", "", value), validate=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must be a file of a form, or in base64; no URL is opened.") from error


def read_fields(body: Body) -> tuple[Record, Files]:
    """The fields of a row out of those of the contract, and files; in a form numbers are strings."""
    fields, files = {}, {}
    try:
        body = [*json.loads(body).items()] if isinstance(body, bytes) else body
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"The body must be an object in JSON: {error}") from error
    for name, value in body:
        into = files if name in MEDIA else fields
        if MEDIA.get(name, name) in into:
            raise ValueError(f"`{name}` must be given once.")
        if isinstance(value, str) and name not in TEXTS:
            with suppress(ValueError, RecursionError):
                value = json.loads(value)
        if name in MEDIA and value is not None:
            files[MEDIA[name]] = read_media(name, value)
        elif isinstance(value, UploadFile) or name == "id":
            raise ValueError(f"`{name}` must not be {'given' if name == 'id' else 'a file'}.")
        elif value is not None and name not in ("model", "user"):  # of which there is one
            fields[name] = value
    check_choice("fps", fields.pop("fps", FRAME_RATE), FRAME_RATE)
    if "size" in fields:
        for name in ("height", "width"):
            check_forms({name: None} | fields, "size", name)
        try:
            fields["width"], fields["height"] = read_size(str(fields.pop("size")))
        except ArgumentTypeError as error:
            raise ValueError(f"`size`={error}.") from error
    return fields, files


async def read_call(call: Call) -> Body:
    """JSON or the parts of a form, of which no more is read than allowed."""
    kind, num_bytes = call.headers.get("content-type", "").partition(";")[0].strip().lower(), 0

    async def receive() -> Record:
        nonlocal num_bytes
        if (message := await call.receive())["type"] == "http.disconnect":
            raise HTTPException(400, "The body has ended too early.")
        num_bytes += len(message.get("body", b""))
        if max(num_bytes, int(call.headers.get("content-length", 0))) > MAX_BODY_BYTES:
            raise HTTPException(413, f"A request must have at most {MAX_BODY_BYTES} bytes.", {"Connection": "close"})
        return message

    counted = Call(call.scope, receive)
    if kind == "multipart/form-data":
        form = await counted.form(max_files=2, max_fields=50, max_part_size=MAX_TEXT_BYTES)
        return form.multi_items()
    if kind != "application/json":
        raise HTTPException(415, "The body must be application/json or multipart/form-data.")
    return await counted.body()


def build_app(service: Service) -> FastAPI:
    """The contract over a service that has been started."""

    def find(name: str) -> Record:
        if name not in service.jobs:
            raise HTTPException(404, f"There is no video {show(name)}.")
        return service.jobs[name]

    app = FastAPI(openapi_url=None)  # no pages of its own
    router = APIRouter(dependencies=[Depends(service.guard)])

    @router.post("/v1/videos")
    async def create(call: Call) -> Record:
        service.check_room()  # before the body is read
        service.num_arriving += 1
        try:
            body = await asyncio.wait_for(read_call(call), MAX_BODY_SECONDS)
            return service.show(await service.accept(body))
        except asyncio.TimeoutError as error:
            raise HTTPException(408, f"The body took more than {MAX_BODY_SECONDS} s.") from error
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        finally:
            service.num_arriving -= 1

    @router.get("/v1/videos")
    async def list_jobs(limit: str = "20", after: str | None = None) -> Record:
        try:
            count = check_integer("limit", int(limit) if re.fullmatch("[0-9]{1,3}", limit) else limit, 1, 100)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        return service.list(count, after and find(after)["id"])

    @router.get("/v1/videos/{name}")
    async def retrieve(name: str) -> Record:
        return service.show(find(name))

    @router.delete("/v1/videos/{name}")
    async def delete(name: str) -> Record:
        service.cancel(find(name)["id"])
        return {"id": name, "object": "video.deleted", "deleted": True}

    @router.api_route("/v1/videos/{name}/content", methods=["GET", "HEAD"])
    async def download(name: str) -> FileResponse:
        path = service.store.path(f"{find(name)['id']}.mp4")
        if (status := find(name)["status"]) != "completed" or not os.path.exists(path):
            raise HTTPException(404, f"There is no clip of {name}, which is {status}.")
        return FileResponse(path, media_type="video/mp4", filename=f"{name}.mp4")

    @router.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics(), media_type="text/plain; version=0.0.4")

    @app.get("/health")
    async def health() -> Response:
        return PlainTextResponse(f"{service.num_workers} workers\n", 200 if service.num_workers else 503)

    app.add_exception_handler(HTTPException, service.refuse)
    app.include_router(router)
    return app


async def run_server(service: Service, runs: list[Run], port: socket.socket) -> None:
    service.num_workers, works = len(runs), (*map(service.work, runs), service.prune_often())
    tasks = [asyncio.create_task(work) for work in works]
    host, number, *_ = port.getsockname()
    port.listen(1000)
    print(f"magihuman serve: http://{f'[{host}]' if ':' in host else host}:{number}/v1/videos", flush=True)
    level = "info" if service.arguments.verbose else "error"
    options = {"log_level": level, "timeout_graceful_shutdown": 5, "limit_concurrency": 1000, "lifespan": "off"}
    try:
        await uvicorn.Server(uvicorn.Config(build_app(service), **options)).serve(sockets=[port])
    finally:
        for task in tasks:  # what is in progress stays so in the table, until the next start
            task.cancel()


def run_serve(arguments: Namespace) -> None:
    with ExitStack() as stack:
        port = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in arguments.host else socket.AF_INET))
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:  # before anything is loaded
            port.bind((arguments.host, arguments.port))
        except OSError as error:
            raise OSError(f"--host {arguments.host} --port {arguments.port} cannot be had: {error}") from error
        choose_run(arguments)
        models, store = requests.open_models(arguments), Store(arguments.out)
        stack.enter_context(store.lock())
        service = Service(arguments, models, store)
        options = make_options(arguments, models, service.sizes)
        runs = import_ray_pool(arguments).start_actors(stack, arguments, load_maker, options)
        asyncio.run(run_server(service, runs, port))
