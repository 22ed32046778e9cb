"""`magihuman serve`: the contract over HTTP, by plain clients, with workers in this process and on Ray."""

import asyncio
import base64
import hashlib
import http.client
import io
import json
import logging
import os
import re
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from argparse import Namespace
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from urllib.error import HTTPError

import psutil
import pytest
from helpers import LOOPBACK, PROMPT, listened_at
from PIL import Image

from diffusers_magihuman.tools.cli import main
from diffusers_magihuman.tools.requests import Store, Worker, open_models

for name in ("fastapi", "uvicorn", "python_multipart"):
    pytest.importorskip(name)
serve = pytest.importorskip("diffusers_magihuman.tools.serve")

SMALL = {"size": "64x32", "num_frames": 5, "num_inference_steps": 1, "prompt": PROMPT}
OPTIONS = {"upscale": None, "dtype": "float32", "offload": "none", "quantize": None, "compile": False}
OPTIONS |= {
    "attention": None,
    "max_size": (64, 32),
    "max_seconds": 1.0,
    "keep_days": 1e6,
    "keep_gb": 1e9,
    "workers": 1,
}
OPTIONS |= {"max_queue": 50, "token": None, "verbose": False, "device": "cpu", "retries": 0}


class Client:
    """What anybody would write for the contract."""

    def __init__(self, address, token=None):
        self.address, self.headers = address, {} if token is None else {"Authorization": f"Bearer {token}"}

    def call(self, method, path, data=None, **headers):
        """Status, headers and body, which is decoded if it is JSON."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()} | self.headers
        if isinstance(data, dict):
            data, headers = json.dumps(data).encode(), {"Content-Type": "application/json"} | headers
        request = urllib.request.Request(self.address + path, data, headers, method=method)
        try:
            answer = urllib.request.urlopen(request, timeout=60)
        except HTTPError as error:
            answer = error
        with answer:
            body = answer.read()
        is_json = answer.headers.get("Content-Type") == "application/json"
        return answer.status, answer.headers, json.loads(body) if is_json else body

    def create(self, **fields):
        return self.call("POST", "/v1/videos", SMALL | fields)

    def create_form(self, files=(), **fields):
        body = b""
        parts = [(name, "", str(value).encode()) for name, value in fields.items()]
        parts += [(name, f'; filename="{filename}"', data) for name, filename, data in files]
        for name, more, data in parts:
            body += f'--edge\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + data + b"\r\n"
        return self.call(
            "POST", "/v1/videos", body + b"--edge--\r\n", Content_Type="multipart/form-data; boundary=edge"
        )

    def wait(self, name, *statuses):
        end = time.monotonic() + 300
        while time.monotonic() < end:
            status, _, video = self.call("GET", f"/v1/videos/{name}")
            if status != 200 or video["status"] in (statuses or ("completed", "failed")):
                return video
            time.sleep(0.02)
        raise AssertionError(video)

    def download(self, name, **headers):
        return self.call("GET", f"/v1/videos/{name}/content", **headers)


def make_image():
    file = io.BytesIO()
    Image.new("RGB", (64, 32), "red").save(file, "png")
    return file.getvalue()


@contextmanager
def running(folder, model, run=None, **changes):
    """A service on a free port of this machine, in a thread, its worker in another."""
    arguments = Namespace(model=str(model), out=str(folder), **OPTIONS | changes)
    port, begun = socket.socket(), threading.Event()
    port.bind(("127.0.0.1", 0))
    port.listen(9)
    service = loop = task = None

    async def start():
        nonlocal service, loop, task
        service = serve.Service(arguments, open_models(arguments), Store(str(folder)))
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        do = run or Worker(serve.load_maker, serve.make_options(arguments, service.models, service.sizes))

        async def run_there(row):
            return await asyncio.to_thread(do, row)

        begun.set()
        await serve.run_server(service, [run_there], port)

    def run_in_thread():
        with suppress(asyncio.CancelledError):
            asyncio.run(start())

    thread = threading.Thread(target=run_in_thread)
    thread.start()
    try:
        assert begun.wait(60)
        client = Client(f"http://127.0.0.1:{port.getsockname()[1]}", arguments.token)
        client.service, client.loop = service, loop
        yield client
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(30)
        port.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(tiny_pipeline_dir, tmp_path_factory):
    with running(tmp_path_factory.mktemp("served"), tiny_pipeline_dir) as client:
        yield client


def test_a_clip_is_that_of_a_single_run(client, tiny_pipeline_dir, tmp_path):
    status, _, video = client.create(seed=3, model="any-name", seconds=None)
    assert status == 200 and video["object"] == "video" and video["status"] in ("queued", "in_progress")
    done = client.wait(video["id"])
    assert done["status"] == "completed" and done["progress"] == 100 and done["error"] is None, done
    assert (done["size"], done["seconds"], done["seed"], done["model"]) == ("64x32", "0.16", 3, "tiny")
    assert done["created_at"] <= done["completed_at"] <= time.time()
    status, headers, clip = client.download(video["id"])
    assert status == 200 and headers["Content-Type"] == "video/mp4"
    size = ["--height=32", "--width=64", "--num-frames=5", "--steps=1", "--seed=3"]
    assert main(["generate", PROMPT, "--model", str(tiny_pipeline_dir), "-o", str(tmp_path / "x.mp4"), *size]) == 0
    assert clip == (tmp_path / "x.mp4").read_bytes()
    for header, code, expected in (
        ("bytes=0-9", 206, clip[:10]),
        ("bytes=10-", 206, clip[10:]),
        ("bytes=-7", 206, clip[-7:]),
        (f"bytes={len(clip)}-", 416, None),
    ):
        status, headers, part = client.download(video["id"], Range=header)
        assert status == code and (expected is None or part == expected)
        assert headers["Content-Range"].endswith(f"/{len(clip)}")
    assert client.call("HEAD", f"/v1/videos/{video['id']}/content")[2] == b""


def test_files_come_in_a_form_or_in_base64(client):
    image = make_image()
    numbers = {"seconds": "0.16", "num_inference_steps": "1", "seed": "5", "fps": "25"}
    fields = {"prompt": PROMPT, "size": "64x32", "model": "sora-2", **numbers}
    calls = [client.create_form([("input_reference", "../../a.png", image)], **fields)]
    coded = "data:image/png;base64," + base64.b64encode(image).decode()
    calls += [client.call("POST", "/v1/videos", fields | {"image": base64.b64encode(image).decode()})]
    calls += [client.call("POST", "/v1/videos", fields | {"image_reference": {"image_url": coded}})]
    assert [call[0] for call in calls] == [200] * 3, calls
    names = [call[2]["id"] for call in calls]
    assert [client.wait(name)["status"] for name in names] == ["completed"] * 3
    clips = {client.download(name)[2] for name in names}
    assert len(clips) == 1
    _, _, without = client.create(seed=5)
    client.wait(without["id"])
    assert client.download(without["id"])[2] not in clips
    assert not [*client.service.folder("").iterdir()]  # uploads go when they have been used


@pytest.mark.parametrize(
    "fields, message, field",
    [
        ({"prompt": None}, "Exactly one of `prompt`, `description`", "prompt"),
        ({"prompt": 3}, "`prompt`=3", "prompt"),
        ({"promt": "a"}, "'promt' is no field", "promt"),
        ({"id": "a"}, "`id` must not be given", "id"),
        ({"size": "64 x 32"}, "`size`='64 x 32' must be WIDTHxHEIGHT", "size"),
        ({"size": "65x32"}, "`width`=65", "width"),
        ({"size": "640x32"}, "`size` must be at most of the pixels of 64x32", "size"),
        ({"height": 32}, "At most one of `size`, `height`", "size"),
        (
            {"num_frames": None, "seconds": "2"},
            "`seconds` must be at most 1 here, and `num_frames` 26.",
            "seconds",
        ),
        ({"num_frames": None, "seconds": "NaN"}, "`seconds`=nan", "seconds"),
        ({"seconds": "1"}, "At most one of `seconds`, `num_frames`", "seconds"),
        ({"num_inference_steps": 0}, "`num_inference_steps`=0", "num_inference_steps"),
        ({"seed": "one"}, "`seed`='one'", "seed"),
        ({"seed": 1e400}, "`seed`=inf", "seed"),
        ({"fps": 24}, "`fps`=24 must be 25", "fps"),
        ({"image": "/etc/passwd"}, "`image` must be a file of a form, or in base64; no URL is opened", "image"),
        ({"image": "https://example.org/a.png"}, "`image` must be a file of a form", "image"),
        ({"input_reference": {"file_id": "a-b"}}, "`input_reference` must be a file", "input_reference"),
        ({"image": "AAAA"}, "`image`", "image"),
        ({"audio": "AAAA"}, "`audio`", "audio"),
        ({"image": "AAAA", "input_reference": "AAAA"}, "`input_reference` must be given once", "input_reference"),
    ],
)
def test_bad_fields_are_named(fields, message, field, client):
    status, _, answer = client.create(**fields)
    assert status == 400 and message in answer["error"]["message"] and answer["error"]["param"] == field, answer
    assert not re.search(r"served|jobs/|video_|ffmpeg-", answer["error"]["message"])
    assert not [*client.service.folder("").iterdir()]


def test_what_is_no_call_of_the_contract_is_refused(client, monkeypatch):
    json_type = {"Content_Type": "application/json"}
    for body in (b"", b"[1]", b"{", b"\xff", b"[" * 10**5):
        status, _, answer = client.call("POST", "/v1/videos", body, **json_type)
        assert status == 400 and answer["error"]["param"] is None
    assert client.call("POST", "/v1/videos", b"{}", Content_Type="text/plain")[0] == 415
    assert client.create_form([("prompt", "a", b"a")])[0] == 400
    assert client.create_form(prompt="a" * (2**20 + 1))[0] == 400
    for path in ("/", "/docs", "/v1/videos/video_0", "/v1/videos/..%2f..%2fetc%2fpasswd", "/v1/videos/a/content"):
        assert client.call("GET", path)[0] == 404
    assert client.call("PUT", "/v1/videos", b"")[0] == 405
    assert client.call("DELETE", "/v1/videos/a")[0] == 404
    for limit in ("0", "101", "x", "-1", "1e1", "٣"):
        assert client.call("GET", f"/v1/videos?limit={urllib.request.quote(limit)}")[2]["error"]["param"] == "limit"
    assert client.call("GET", "/v1/videos", Origin="https://example.org")[0] == 403  # a page in a browser
    assert client.call("GET", "/v1/videos", Host="example.org")[0] == 403
    monkeypatch.setattr(serve, "MAX_BODY_BYTES", 1000)
    assert client.call("POST", "/v1/videos", b" " * 1001, **json_type)[0] == 413
    connection = http.client.HTTPConnection(client.address.removeprefix("http://"), timeout=60)
    with suppress(ConnectionError):  # answered before all is read
        connection.request("POST", "/v1/videos", iter([b" " * 900] * 9), {"Content-Type": "application/json"})
    assert connection.getresponse().status == 413  # counted, as there is no length
    monkeypatch.setattr(serve, "MAX_BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", int(client.address.rpartition(":")[2])), 60) as slow:
        head = ["POST /v1/videos HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", "Content-Length: 99"]
        slow.sendall("\r\n".join([*head, "", ""]).encode())
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
    assert client.call("GET", "/health")[0] == 200


@pytest.fixture
def log(client, caplog, monkeypatch):
    """What the service logs: Uvicorn writes to what standard error was when it began."""
    assert client.call("GET", "/health")[0] == 200  # it has begun, and has printed its address
    monkeypatch.setattr(logging.getLogger("uvicorn"), "propagate", True)
    return caplog


def test_a_full_disk_is_not_the_fault_of_the_client(client, log):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        status, _, _ = client.create(image=base64.b64encode(make_image()).decode())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 500 and not [*client.service.folder("").iterdir()]
    wait_until(lambda: "File too large" in log.text)  # the service's own fault is logged


def test_a_client_that_goes_away_leaves_a_place_and_no_trace(client, log):
    for kind in ("application/json", "multipart/form-data; boundary=edge"):
        before = client.service.refused[400]
        with socket.create_connection(("127.0.0.1", int(client.address.rpartition(":")[2])), 60) as gone:
            head = ["POST /v1/videos HTTP/1.1", "Host: 127.0.0.1", f"Content-Type: {kind}", "Content-Length: 99"]
            gone.sendall("\r\n".join([*head, "", "{"]).encode())
        wait_until(lambda before=before: client.service.refused[400] == before + 1)
    wait_until(lambda: client.service.num_arriving == 0)
    assert "Traceback" not in log.text


def test_bodies_are_decoded_one_at_a_time(client, monkeypatch):
    """As one of 32 MiB may take a gigabyte; and all of them count as queued, while they wait."""
    at_work, most, read_fields = [], [], serve.read_fields

    def read_slowly(body):
        at_work.append(body)
        most.append(len(at_work))
        time.sleep(0.05)
        at_work.pop()
        return read_fields(body)

    monkeypatch.setattr(serve, "read_fields", read_slowly)
    monkeypatch.setattr(client.service.arguments, "max_queue", 3)
    with ThreadPoolExecutor(6) as pool:
        statuses = Counter(answer[0] for answer in pool.map(lambda _: client.create(size="65x32"), range(6)))
    assert {*most} == {1} and statuses[400] >= 3 and statuses[429] >= 1 and statuses.total() == 6
    assert not client.service.num_arriving


class Held:
    """A worker that does as it is told: `go` lets it do one job, and `error` is what it then raises."""

    def __init__(self):
        self.outcome = {"bytes": 10}
        self.begun, self.error, self.go = [], None, threading.Semaphore(0)

    def __call__(self, row):
        self.begun.append(row[0])
        self.go.acquire()
        if self.error is not None:
            raise self.error
        return self.outcome


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_queue_a_cancel_and_a_restart(tiny_pipeline_dir, tmp_path):
    held = Held()
    with running(tmp_path, tiny_pipeline_dir, held, max_queue=2, token="sesame") as client:
        assert client.call("GET", "/health")[0] == 200
        for token in (None, "", "sesam", "Sésame"):
            headers = {} if token is None else {"Authorization": f"Bearer {token}".encode()}
            other = Client(client.address)
            other.headers = headers
            assert [other.call(*call)[0] for call in (("GET", "/v1/videos"), ("GET", "/metrics"))] == [401] * 2
        names = [client.create()[2]["id"]]
        wait_until(lambda: held.begun)
        names += [client.create()[2]["id"] for _ in range(2)]
        status, headers, answer = client.create()
        assert status == 429 and int(headers["Retry-After"]) >= 1 and "2 jobs" in answer["error"]["message"]
        assert client.call("POST", "/v1/videos", b"{", Content_Type="text/plain")[0] == 429  # before it is read
        assert client.download(names[0])[0] == 404
        assert client.call("DELETE", f"/v1/videos/{names[1]}")[2]["deleted"]  # in the queue
        assert client.call("GET", f"/v1/videos/{names[1]}")[0] == 404
        with ThreadPoolExecutor(9) as pool:  # of many at once one finds room
            answers = sorted(pool.map(lambda _: client.create(), range(9)), key=lambda answer: answer[0])
        assert [answer[0] for answer in answers] == [200, *[429] * 8]
        names[1] = answers[0][2]["id"]
        page = client.call("GET", "/v1/videos?limit=2")[2]
        assert [video["id"] for video in page["data"]] == [names[1], names[2]] and page["has_more"]
        page = client.call("GET", f"/v1/videos?after={page['last_id']}")[2]
        assert [video["id"] for video in page["data"]] == names[:1] and not page["has_more"]
        for _ in range(2):
            assert client.call("DELETE", f"/v1/videos/{names[0]}")[0] == 200  # in progress
        assert client.wait(names[0], "cancelled")["status"] == "cancelled"
        assert (client.service.folder(names[0]) / "cancel").exists()
        held.go.release()
        wait_until(lambda: client.call("GET", f"/v1/videos/{names[0]}")[0] == 404)
        wait_until(lambda: len(held.begun) == 2)
        metrics = client.call("GET", "/metrics")[2].decode()
        for line in ('jobs{status="queued"} 1', 'jobs{status="in_progress"} 1', 'jobs_total{status="cancelled"} 2'):
            assert f"magihuman_{line}\n" in metrics
        assert 'magihuman_refused_total{status="429"} 10\n' in metrics
        # What is in progress or queued when the service ends, is done at its next start.
        held.go.release()
        client.wait(names[2])
        wait_until(lambda: len(held.begun) == 3)
        threading.Timer(0.5, held.go.release).start()
    (tmp_path / "jobs/video_torn").mkdir()
    held = Held()
    held.go.release(9)
    with running(tmp_path, tiny_pipeline_dir, held, token="sesame") as client:
        assert client.wait(names[1])["status"] == client.wait(names[2])["status"] == "completed"
        assert held.begun == names[1:2]
        assert not [*client.service.folder("").iterdir()]
        held.outcome = {"error": f"no {tmp_path}/x here: 1 Command: /bin/y"}
        assert client.wait(client.create()[2]["id"])["error"]["message"] == "no x here: 1"
        held.error = OSError("its machine is gone")
        client.create()
        wait_until(lambda: client.call("GET", "/health")[0] == 503)
    with running(tmp_path, tiny_pipeline_dir, held, dtype="bfloat16", token="sesame") as client:
        video = client.call("GET", "/v1/videos?limit=1")[2]["data"][0]
        assert video["status"] == "failed" and "another model" in video["error"]["message"]


def test_a_locked_table_is_waited_for(tiny_pipeline_dir, tmp_path):
    """By another process; the workers stay, and what one has made is not lost."""
    held = Held()
    with running(tmp_path, tiny_pipeline_dir, held) as client:
        name = client.create()[2]["id"]
        wait_until(lambda: held.begun)
        with sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None) as other:
            other.execute("BEGIN IMMEDIATE")
            held.go.release(2)
            time.sleep(1.5)
            other.execute("ROLLBACK")
        assert client.wait(name)["status"] == "completed"
        assert client.call("GET", "/health")[0] == 200
        assert b"clip_seconds_count 1\n" in client.call("GET", "/metrics")[2]


def test_what_cannot_be_removed_is_removed_later(tiny_pipeline_dir, tmp_path, monkeypatch):
    prune, calls, sleep = serve.Service.prune, [], asyncio.sleep

    def prune_in_vain(service):
        calls.append(0)
        if len(calls) == 1:
            raise PermissionError("not now")
        prune(service)

    monkeypatch.setattr(serve.Service, "prune", prune_in_vain)
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: sleep(min(seconds, 0.05)))
    with running(tmp_path, tiny_pipeline_dir, Held()):
        wait_until(lambda: len(calls) > 2)


def test_old_clips_are_removed(tiny_pipeline_dir, tmp_path):
    held = Held()
    held.go.release(3)
    with running(tmp_path, tiny_pipeline_dir, held, keep_gb=25e-9, keep_days=1) as client:
        names = [client.create()[2]["id"] for _ in range(3)]
        for name in names:
            client.wait(name)
            (tmp_path / f"{name}.mp4").write_bytes(b"0123456789")
        (tmp_path / "mine.mp4").write_bytes(b"0" * 99)
        at_work = client.create()[2]["id"]
        client.wait(at_work, "in_progress")

        def prune():
            asyncio.run_coroutine_threadsafe(call_soon(client.service.prune), client.loop).result(9)

        prune()
        assert sorted(path.stem for path in tmp_path.glob("*.mp4")) == ["mine", *sorted(names[1:])]
        assert client.call("GET", f"/v1/videos/{names[0]}")[0] == 404
        client.service.jobs[names[1]]["completed_at"] -= 86401
        prune()
        assert sorted(path.stem for path in tmp_path.glob("*.mp4")) == ["mine", names[2]]
        held.go.release()
        client.wait(at_work)


async def call_soon(function):
    return function()


def test_a_running_clip_is_cancelled_at_its_next_step(tiny_pipeline_dir, tmp_path):
    with running(tmp_path, tiny_pipeline_dir) as client:
        name = client.create(num_inference_steps=500)[2]["id"]
        seen = []
        wait_until(lambda: seen.append(client.wait(name, "in_progress")) or seen[-1]["progress"] > 2)
        assert {video["stage"] for video in seen} <= {"starting", "denoising"} and seen[-1]["progress"] < 50
        begun = time.monotonic()
        client.call("DELETE", f"/v1/videos/{name}")
        wait_until(lambda: client.call("GET", f"/v1/videos/{name}")[0] == 404)
        assert time.monotonic() - begun < 2
        assert not [*tmp_path.glob("video_*")] and not [*tmp_path.rglob("*.incomplete")]
        after = client.create(seed=1)[2]["id"]
        assert client.wait(after)["status"] == "completed"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached from elsewhere, which needs --token-env"),
        (["--token-env", "NO_SUCH"], "--token-env 'NO_SUCH' names no environment variable"),
        (["--token-env", "NOT_ASCII"], "--token-env 'NOT_ASCII' names no environment variable"),
        (["--max-size", "64"], "must be WIDTHxHEIGHT"),
        (["--max-size", "64x33"], "`height`=33"),
        (["--port", "65536"], "--port"),
        (["--host", "127.0.0.1.invalid", "--token-env", "HOME"], "--host 127.0.0.1.invalid --port 0 cannot be had: "),
        (["--out", "memory://out"], "--out 'memory://out' must be a folder"),
        (["--model", "nowhere"], "--model"),
    ],
)
def test_bad_options_are_named(options, message, tmp_path, capsys, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("HOME", os.environ["HOME"])  # the token is taken out of the environment
    monkeypatch.setenv("NOT_ASCII", "Sésame")  # which clients encode in different ways
    try:
        assert main(["serve", "--out", str(tmp_path / "out"), "--port", "0", *options]) == 2
    except SystemExit as end:
        assert end.code == 2
    assert message in capsys.readouterr().err


RUN = "from diffusers_magihuman.tools.cli import run_process; run_process()"


@contextmanager
def started(folder, model, *options):
    """The command as a process of its own, which is killed with all that it has started."""
    command = [sys.executable, "-c", RUN, "serve", "--out", str(folder), "--model", str(model), "--port", "0"]
    options = ["--workers", "1", "--max-size", "64x32", "--max-queue", "25", *options]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, env=environment)
    family = [psutil.Process(process.pid)]
    try:
        line = process.stdout.readline()
        assert line.startswith("magihuman serve: http://127.0.0.1:"), line
        family += family[0].children(recursive=True)
        client = Client(line.split()[-1].removesuffix("/v1/videos"))
        client.family, client.process = family, process
        yield client
    finally:
        with suppress(psutil.Error):
            family += family[0].children(recursive=True)
        process.kill()
        process.wait()
        for each in psutil.wait_procs(family, timeout=3)[1]:  # Ray's agents may stay for minutes
            each.kill()
        process.stdout.close()


def memory_of(client):
    """Bytes that the service and its worker take."""
    return sum(each.memory_info().rss for each in client.family if each.pid == client.process.pid or is_worker(each))


def is_worker(process):
    with suppress(psutil.Error):
        return "RayWorker" in process.name()


def kill_worker(client):
    (worker,) = filter(is_worker, client.family[0].children(recursive=True))
    client.family.append(worker)
    worker.kill()


needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray")


@pytest.mark.slow
@needs_ray
def test_a_service_under_load(tiny_pipeline_dir, tmp_path):
    """200 requests at 20 at once, of them 40 bad and 20 cancelled: none is lost, none is answered twice."""
    full, memory = [], []

    def ask(index):
        while True:
            status, headers, answer = client.create(**({"size": "65x32"} if index % 5 == 0 else {"seed": index % 3}))
            if status != 429:
                break
            assert int(headers["Retry-After"]) >= 1
            full.append(index)
            time.sleep(0.2)
        if index % 5 == 0:
            return "bad", status, answer["error"]["param"]
        name = answer["id"]
        if index % 10 == 1:
            assert client.call("DELETE", f"/v1/videos/{name}")[0] == 200
            wait_until(lambda: client.call("GET", f"/v1/videos/{name}")[0] == 404, 300)
            return "cancelled", name, None
        video = client.wait(name)
        if index in (62, 199):
            memory.append(memory_of(client))
        return video["status"], name, hashlib.sha256(client.download(name)[2]).hexdigest(), index % 3

    with started(tmp_path, tiny_pipeline_dir, "--max-queue", "8") as client, ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(200)))
        listening = listened_at(client.family)
        page, names = {"has_more": True, "last_id": ""}, []
        while page["has_more"]:
            page = client.call("GET", f"/v1/videos?limit=50{page['last_id'] and '&after=' + page['last_id']}")[2]
            names += [video["id"] for video in page["data"]]
        metrics = client.call("GET", "/metrics")[2].decode()
        client.process.send_signal(signal.SIGTERM)
        assert client.process.wait(60) == 128 + signal.SIGTERM
        assert not psutil.wait_procs(client.family, timeout=20)[1]
    assert full and listening <= LOOPBACK
    kinds = Counter(answer[0] for answer in answers)
    assert kinds == {"bad": 40, "cancelled": 20, "completed": 140}, kinds
    assert all(answer[1:] == (400, "width") for answer in answers if answer[0] == "bad")
    done = [answer for answer in answers if answer[0] == "completed"]
    assert sorted(names) == sorted(answer[1] for answer in done) and len({*names}) == 140
    assert len({answer[2:] for answer in done}) == 3  # a clip for each seed
    assert {path.stem for path in tmp_path.glob("*.mp4")} == {*names}
    for line in ('jobs_total{status="completed"} 140', 'jobs_total{status="cancelled"} 20', "clip_seconds_count 140"):
        assert f"magihuman_{line}\n" in metrics
    assert memory[1] < 1.05 * memory[0], memory


@pytest.mark.slow
@needs_ray
def test_a_service_survives_what_is_killed(tiny_pipeline_dir, tmp_path):
    """A worker, then the service: what was accepted ends, once, and what had ended is not touched."""
    with started(tmp_path, tiny_pipeline_dir) as client:
        names = [client.create(seed=index % 2, num_inference_steps=20)[2]["id"] for index in range(20)]
        client.wait(names[2])
        kill_worker(client)
        client.wait(names[5])
        client.process.kill()
        client.process.wait()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("video_*")}
    assert 12 <= len(before) < 40
    with started(tmp_path, tiny_pipeline_dir) as client:
        videos = [client.wait(name) for name in names]
        assert {video["status"] for video in videos} == {"completed"}
        clips = [client.download(name)[2] for name in names]
        deadly = client.create(num_inference_steps=1000)[2]["id"]
        after = client.create()[2]["id"]
        for _ in range(3):
            wait_until(lambda: client.wait(deadly, "in_progress", "failed")["progress"] > 0, 300)
            kill_worker(client)
            (tmp_path / "jobs" / deadly / "progress").unlink(missing_ok=True)
        assert client.wait(deadly)["error"]["message"] == "3 workers died of it"
        assert client.wait(after)["status"] == "completed"
        assert (
            client.call("DELETE", f"/v1/videos/{after}")[0] == client.call("DELETE", f"/v1/videos/{deadly}")[0] == 200
        )
    assert len({*clips[::2]}) == len({*clips[1::2]}) == 1 and clips[0] != clips[1]
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("video_*")}
    assert len(after) == 40 and all(after[path] == value for path, value in before.items())
    assert not [*tmp_path.glob("jobs/*")] and not [*tmp_path.rglob("*.incomplete")]


@pytest.mark.slow
@needs_ray
def test_a_worker_that_dies_while_it_is_started_anew_is_lost(tmp_path):
    script = """
import asyncio, os, sys
from argparse import Namespace
from contextlib import ExitStack
from diffusers_magihuman.tools import requests
def make_load(flag):
    def die(*_):
        os.kill(os.getpid(), 9)
    return lambda *_: die() if os.path.exists(flag) else open(flag, "w").close() or die
arguments = Namespace(workers=1, gpus_per_worker=None, address=None, device="cpu", verbose=False)
options = {"device": "cpu", "dtype": "float32", "quantize": None, "compile": False, "attention": None}
options |= {"offload": "none", "retries": 0, "out": sys.argv[1]}
with ExitStack() as stack:
    pool = requests.import_ray_pool(arguments)
    (run,) = pool.start_actors(stack, arguments, make_load(sys.argv[1] + "/flag"), options)
    try:
        asyncio.run(run(["row"]))
    except pool.ray.exceptions.ActorDiedError:
        print("lost")
"""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=300, text=True)
    assert "lost" in done.stdout.splitlines(), done.stderr  # Ray may add a line of its own
