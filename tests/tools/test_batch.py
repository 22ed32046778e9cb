"""`magihuman batch`: the same bytes as single runs, whatever ends it and wherever it runs."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pytest
import soundfile
import torch
from helpers import LOOPBACK, PROMPT, listened_at
from PIL import Image
from transformers import T5GemmaEncoderModel

from diffusers_magihuman.tools import batch, requests
from diffusers_magihuman.tools.cli import main

HAS_RAY = find_spec("ray") is not None
SMALL = {"height": 32, "width": 64, "num_frames": 5, "num_inference_steps": 1}


def write_jobs(folder, rows):
    (folder / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "jobs.jsonl")


def make_rows(count=3, **changes):
    return [{"id": f"clip-{i}", "prompt": f"{PROMPT} {i % 2}", "seed": i, **SMALL, **changes} for i in range(count)]


def run_batch(folder, rows, *options, model, out=None):
    jobs = write_jobs(folder, rows)
    return main(["batch", jobs, "--out", str(out or folder / "out"), "--model", str(model), *map(str, options)])


def files_of(folder):
    """Bytes and time of each file, hidden ones too, but for the lock, which older filelocks write anew."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def generate(row, path, *options, folder=Path()):
    """The bytes that `magihuman generate` writes for a row."""
    names = {"num_inference_steps": "steps", "description": None, "dialogue": None, "id": None, "prompt": None}
    arguments = [row.get("prompt") or row["description"], "-o", str(path), *map(str, options)]
    for who, language, line in row.get("dialogue", []):
        arguments += ["--dialogue", f"{who}, {language}: {line}"]
    for name, value in row.items():
        if (name := names.get(name, name)) is not None:
            value = folder / value if name in ("image", "audio") else value
            arguments += [f"--{name.replace('_', '-')}={value}"]
    assert main(["generate", *arguments]) == 0
    return path.read_bytes()


def read_manifest(out):
    if batch.pyarrow is None:
        return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    return batch.pyarrow.parquet.read_table(out / "manifest.parquet").to_pylist()


@pytest.fixture(scope="module")
def finished(tiny_pipeline_dir, tmp_path_factory):
    """A folder with what a batch has left."""
    folder = tmp_path_factory.mktemp("finished")
    assert run_batch(folder, make_rows(), model=tiny_pipeline_dir) == 0
    return folder


def copy_finished(finished, folder):
    for path in (finished / "out").iterdir():
        (folder / "out").mkdir(exist_ok=True)
        (folder / "out" / path.name).write_bytes(path.read_bytes())
    return folder / "out"


def test_clips_are_those_of_single_runs(tiny_pipeline_dir, tmp_path, capsys, monkeypatch):
    encode, encoded = T5GemmaEncoderModel.forward, []

    def count(self, *args, **kwargs):
        encoded.append(1)
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(T5GemmaEncoderModel, "forward", count)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(tmp_path / "a.png")
    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(4000), 16000)
    size = {name: SMALL[name] for name in ("height", "width", "num_inference_steps")}
    parts = {"description": "A woman.", "dialogue": [["Woman", "English", "Hi."]], "background_sound": "Rain"}
    rows = [
        *make_rows(2),
        {"id": "same-text", **make_rows()[0], "seed": 7} | {"id": "same-text"},
        {"id": "guided", "prompt": PROMPT, "negative_prompt": "Grain.", "guidance_scale": 2.0, "seed": 1, **SMALL},
        {"id": "parts", **parts, "seed": 2, "seconds": 0.2, **size},
        {"id": "driven", "prompt": PROMPT, "image": "a.png", "audio": "a.wav", "seed": 3, **size},
    ]
    assert run_batch(tmp_path, rows, model=tiny_pipeline_dir) == 0
    assert "6 clips made, 0 were there, 0 failed" in capsys.readouterr().out
    assert len(encoded) == 6  # four prompts, a negative one and that by default
    out = tmp_path / "out"
    manifest = {"manifest.jsonl" if batch.pyarrow is None else "manifest.parquet"}
    names = {f"{row['id']}.{suffix}" for row in rows for suffix in ("mp4", "json")} | manifest
    assert {".lock"} | names == {path.name for path in out.iterdir()}
    for row in rows[3:]:
        options = ["--model", tiny_pipeline_dir]
        assert (out / f"{row['id']}.mp4").read_bytes() == generate(row, tmp_path / "x.mp4", *options, folder=tmp_path)
    record = json.loads((out / "driven.json").read_text())
    assert record["seed"] == 3 and record["frames"] == 5 and record["audio_sampling_rate"] == 44100
    assert len(record["request"]["image"]) == 64
    assert record["model"] == tiny_pipeline_dir.name and record["versions"]["torch"] == torch.__version__


def test_clips_that_are_upscaled_are_those_of_single_runs(tiny_pipeline_dir, tiny_upscale_dir, tmp_path):
    upscale = shutil.copytree(tiny_upscale_dir, tmp_path / "upscale")
    index = json.loads((upscale / "model_index.json").read_text()) | {"default_height": 64, "default_width": 128}
    (upscale / "model_index.json").write_text(json.dumps(index))
    options = ["--upscale", upscale]
    rows = make_rows(1)
    assert run_batch(tmp_path, rows, *options, model=tiny_pipeline_dir) == 0
    expected = generate(rows[0], tmp_path / "x.mp4", *options, "--model", tiny_pipeline_dir)
    assert (tmp_path / "out/clip-0.mp4").read_bytes() == expected


def test_what_is_done_is_not_touched_and_what_is_torn_is_made_again(finished, tiny_pipeline_dir, tmp_path, capsys):
    out = copy_finished(finished, tmp_path)
    before = files_of(out)
    # As a kill leaves them: after the clip, before the record; before both; and a file that lost its end.
    (out / ".work").mkdir()
    (out / "clip-0.json").rename(out / ".work/clip-0.json")
    (out / "clip-1.json").unlink()
    (out / "clip-1.mp4").unlink()
    (out / ".work/clip-1.json").write_text('{"other-run": ["worker"]}')
    (out / "clip-2.mp4").write_bytes(before["clip-2.mp4"][0][:-1])
    # And as somebody has edited it.
    record = json.loads((out / ".work/clip-0.json").read_text())
    (out / ".work/clip-0.json").write_text(json.dumps(record | {"seconds": "long", "id": 3, "seed": None}))
    assert run_batch(tmp_path, make_rows(), model=tiny_pipeline_dir) == 0
    assert "2 clips made, 1 were there, 0 failed" in capsys.readouterr().out
    after = files_of(out)
    row = read_manifest(out)[0]
    assert row["id"] == "clip-0" and row["seconds"] is row["seed"] is None and row["frames"] == 5
    assert before.keys() == after.keys() and before["clip-0.mp4"] == after["clip-0.mp4"]
    assert all(before[f"clip-{i}.mp4"][0] == after[f"clip-{i}.mp4"][0] for i in range(3))


@pytest.mark.parametrize("case", ["changed", pytest.param("foreign", marks=pytest.mark.slow)])
def test_no_clip_is_lost_unless_told(case, finished, tiny_pipeline_dir, tmp_path, capsys):
    out = copy_finished(finished, tmp_path)
    rows = make_rows()
    if case == "changed":
        rows[1]["seed"] = 99
    else:
        (out / "clip-1.json").unlink()
    before = files_of(out)
    assert run_batch(tmp_path, rows, model=tiny_pipeline_dir) == 2
    assert ", 1 of them: clip-1; --overwrite" in capsys.readouterr().err
    after = files_of(out)
    assert before == {name: after[name] for name in before}
    assert run_batch(tmp_path, rows, "--overwrite", model=tiny_pipeline_dir) == 0
    after = files_of(out)
    assert after["clip-0.mp4"] == before["clip-0.mp4"]
    assert (after["clip-1.mp4"][0] == before["clip-1.mp4"][0]) == (case == "foreign")


def test_bad_rows_are_reported_at_once_before_anything_is_loaded(tiny_pipeline_dir, tmp_path, capsys, monkeypatch):
    """And with `--skip-bad`, they and an image that no one can read fail alone."""
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    rows = [*make_rows(2), {"id": "bad", "prompt": PROMPT, "height": 33}, {"id": "CLIP-0", "prompt": PROMPT}]
    rows += [{"id": "image", "prompt": PROMPT, "image": "broken.png", **SMALL}, {"prompt": PROMPT}]
    with monkeypatch.context() as patch:
        patch.setattr(batch, "run_todo", None)
        assert run_batch(tmp_path, rows, model=tiny_pipeline_dir) == 2
    *lines, last = capsys.readouterr().err.splitlines()
    wanted = [
        "id 'bad', line 3: `height`=33",
        "id 'CLIP-0', line 4: `id`='CLIP-0' must be",
        "id None, line 6: `id`=None",
    ]
    assert len(lines) == 3 and all(want in line for want, line in zip(wanted, lines, strict=True))
    assert "3 of 6 rows" in last and not (tmp_path / "out").exists()

    assert run_batch(tmp_path, rows, "--skip-bad", "--retries", 0, model=tiny_pipeline_dir) == 1
    assert "2 clips made, 0 were there, 4 failed" in capsys.readouterr().out
    failed = [json.loads(line) for line in (tmp_path / "out/failed.jsonl").read_text().splitlines()]
    assert [each["id"] for each in failed] == ["bad", "CLIP-0", None, "image"]
    assert failed[-1]["attempts"] == 1 and "`image` is" in failed[-1]["error"]
    assert len([*(tmp_path / "out").glob("*.mp4")]) == 2
    assert run_batch(tmp_path, rows[:2], model=tiny_pipeline_dir) == 0
    assert not (tmp_path / "out/failed.jsonl").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "holds no rows"),
        (b"{\n", "id None, line 1: 'the line' is no JSON"),
        (b"\xff\n", "id None, line 1: 'the line' is no JSON"),
        (b"[" * 100_000 + b"\n", "id None, line 1: 'the line' is no JSON"),
        (b" " * (2**20 + 1), "line 1 of .* has more than"),
    ],
    ids=["empty", "half", "binary", "deep", "long"],
)
def test_bad_files_of_rows(content, message, tiny_pipeline_dir, tmp_path, capsys):
    (tmp_path / "jobs.jsonl").write_bytes(content)
    command = [
        "batch",
        str(tmp_path / "jobs.jsonl"),
        "--out",
        str(tmp_path / "out"),
        "--model",
        str(tiny_pipeline_dir),
    ]
    assert main(command) == 2
    assert message.split(".*")[0] in capsys.readouterr().err


def test_a_row_is_tried_again_and_given_up(tiny_pipeline_dir, tmp_path, monkeypatch):
    run, attempts = requests.run_request, []

    def fail_at_first(pipes, request, *args):
        attempts.append(request.id)
        if attempts.count(request.id) <= int(request.id[-1]):
            raise RuntimeError("the disk was busy")
        return run(pipes, request, *args)

    monkeypatch.setattr(requests, "run_request", fail_at_first)
    assert run_batch(tmp_path, make_rows(), model=tiny_pipeline_dir) == 1
    failed = json.loads((tmp_path / "out/failed.jsonl").read_text())
    assert failed == {"id": "clip-2", "error": "RuntimeError: the disk was busy", "attempts": 2}
    assert sorted(attempts) == ["clip-0", "clip-1", "clip-1", "clip-2", "clip-2"]


def test_rows_whose_text_is_not_encoded_fail_with_the_reason(tiny_pipeline_dir, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.cache").write_text("")  # where no folder can be
    assert run_batch(tmp_path, make_rows(2), "--retries", 0, model=tiny_pipeline_dir) == 1
    failed = [json.loads(line) for line in (tmp_path / "out/failed.jsonl").read_text().splitlines()]
    assert [each["id"] for each in failed] == ["clip-0", "clip-1"] and "File exists" in failed[0]["error"]


def test_a_row_that_kills_its_workers_is_given_up(tiny_pipeline_dir, tmp_path, monkeypatch):
    """Deaths are counted on disk, as nothing else outlives a worker, and from 0 in each run."""
    make_options = batch.make_options

    def die_thrice(*args):
        options, note = make_options(*args), tmp_path / "out/.work/clip-0.json"
        note.write_text(json.dumps({options["run"]: ["a", "b", "c"]}))
        note.with_name("clip-1.json").write_text(json.dumps({options["run"]: ["a", "b"], "other": [*"abc"]}))
        return options

    monkeypatch.setattr(batch, "make_options", die_thrice)
    assert run_batch(tmp_path, make_rows(2), model=tiny_pipeline_dir) == 1
    failed = json.loads((tmp_path / "out/failed.jsonl").read_text())
    assert failed == {"id": "clip-0", "error": "3 workers died of it", "attempts": 1}
    assert (tmp_path / "out/clip-1.mp4").exists()


def test_a_signal_leaves_nothing_half(finished, tiny_pipeline_dir, tmp_path):
    out = tmp_path / "out"

    def interrupt():
        while not (out / "clip-0.json").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert run_batch(tmp_path, make_rows(30), model=tiny_pipeline_dir) == 128 + signal.SIGTERM
    thread.join()
    left = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    clips = {name for name in left if name.endswith(".mp4")}
    assert 0 < len(clips) < 30 and len(left) == 2 * len(clips)
    assert (out / "clip-0.mp4").read_bytes() == (finished / "out/clip-0.mp4").read_bytes()


def test_out_may_be_a_url(finished, tiny_pipeline_dir, tmp_path, capsys):
    url = f"memory://{tmp_path}"
    for made in (1, 0):
        assert run_batch(tmp_path, make_rows(1), model=tiny_pipeline_dir, out=url) == 0
        assert f"{made} clips made, {1 - made} were there" in capsys.readouterr().out
    fs, root = fsspec.url_to_fs(url)
    assert {Path(name).name for name in fs.find(root)} == {"clip-0.mp4", "clip-0.json", batch.MANIFEST}
    assert fs.cat_file(f"{root}/clip-0.mp4") == (finished / "out/clip-0.mp4").read_bytes()


def test_rows_may_be_in_parquet(finished, tiny_pipeline_dir, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = make_rows()
    rows[0] |= {"dialogue": [["A", "English", "Hi."]], "description": "A woman.", "prompt": None}
    table = parquet.core.pa.Table.from_pylist([dict.fromkeys(rows[0]) | row for row in rows])
    parquet.write_table(table, tmp_path / "jobs.parquet")
    copy_finished(finished, tmp_path)
    (tmp_path / "out/clip-0.mp4").unlink()
    (tmp_path / "out/clip-0.json").unlink()
    command = ["batch", str(tmp_path / "jobs.parquet"), "--out", str(tmp_path / "out"), "--model", tiny_pipeline_dir]
    assert main(list(map(str, command))) == 0
    assert "1 clips made, 2 were there" in capsys.readouterr().out
    assert [row["file"] for row in read_manifest(tmp_path / "out")] == ["clip-0.mp4", "clip-1.mp4", "clip-2.mp4"]
    (tmp_path / "jobs.parquet").write_bytes(b"PAR1")
    assert main(list(map(str, command))) == 2 and "jobs.parquet" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--gpus-per-worker", "1"], "--gpus-per-worker must come with"),
        (["--out", ""], "--out is empty"),
        (["--workers", "0"], "--workers"),
        (["--device", "cuda:9"], "--device"),
        pytest.param(["--workers", "2"], "extra `scale`", marks=pytest.mark.skipif(HAS_RAY, reason="has Ray")),
    ],
)
def test_bad_options(options, message, tiny_pipeline_dir, tmp_path, capsys):
    try:
        status = run_batch(tmp_path, make_rows(1), *options, model=tiny_pipeline_dir)
    except SystemExit as error:
        status = error.code
    assert status == 2 and message in capsys.readouterr().err


@pytest.mark.skipif(not HAS_RAY, reason="needs Ray")
def test_ray_chooses_the_gpus_of_its_workers():
    from diffusers_magihuman.tools.ray_pool import connect

    arguments = Namespace(workers=8, gpus_per_worker=None, address=None, device="cuda:1")
    with ExitStack() as stack, pytest.raises(ValueError, match="--device cuda:1 must be a kind, such as cuda"):
        connect(stack, arguments)


# Killed, on Ray and here


def start(folder, *options):
    command = "from diffusers_magihuman.tools.cli import run_process; run_process()"
    arguments = ["batch", str(folder / "jobs.jsonl"), "--out", str(folder / "out"), *options]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for(folder, count, process):
    while len([*folder.glob("*.json")]) < count:
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.05)


def kill_worker(process):
    """Ends a process of Ray that makes clips, in the middle of one."""
    while True:
        for child in psutil.Process(process.pid).children(recursive=True):
            if "MapWorker" in " ".join(child.cmdline()):
                return child.kill()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.skipif(not HAS_RAY, reason="needs Ray"))])
def test_a_batch_survives_what_is_killed(workers, tiny_pipeline_dir, tmp_path):
    """24 rows, a bad one and a bad image: each id once, finished files untouched, all equal to a run in one go."""
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    rows = make_rows(24)
    expected = tmp_path / "expected"
    expected.mkdir()
    write_jobs(expected, rows)
    process = start(expected, "--model", str(tiny_pipeline_dir))  # with as many threads, which decide about roundings
    printed = process.communicate()[0].decode()
    assert process.returncode == 0, printed
    rows.insert(3, {"id": "image", "prompt": PROMPT, "image": "broken.png", **SMALL})
    rows.insert(5, {"id": "row", "prompt": PROMPT, "height": 33})
    write_jobs(tmp_path, rows)
    out, rng = tmp_path / "out", random.Random(0)
    options = ["--model", str(tiny_pipeline_dir), "--skip-bad", *(["--workers", str(workers)] if workers else [])]
    before, made = {}, 0
    for killed in ("driver", "machine"):
        process = start(tmp_path, *options)
        made += rng.randint(1, 4)
        wait_for(out, made, process)
        if workers:
            kill_worker(process)
            made += rng.randint(3, 5)
            wait_for(out, made, process)
        time.sleep(0.3 * rng.random())
        others = psutil.Process(process.pid).children(recursive=True)
        workers_of_ray = [each for each in others if "MapWorker" in each.name()]
        assert ("127.0.0.1" in (listening := listened_at(others))) == bool(workers) and listening <= LOOPBACK
        process.kill()
        process.wait()
        if killed == "driver":
            assert not psutil.wait_procs(workers_of_ray, timeout=60)[1]  # they end when they miss it
        for each in psutil.wait_procs(others, timeout=0)[1]:  # Ray's agents may stay for minutes
            each.kill()
        made = len([*out.glob("*.json")])
        assert 0 < made < 24
        finished = {name: value for name, value in files_of(out).items() if f"{name[:-4]}.json" in os.listdir(out)}
        assert all(finished[name] == value for name, value in before.items())
        before = finished
    process = start(tmp_path, *options)
    printed = process.communicate()[0].decode()
    assert process.returncode == 1, printed
    assert f"{24 - made} clips made, {made} were there, 2 failed" in printed
    after, wanted = files_of(out), files_of(expected / "out")
    assert all(after[name] == value for name, value in before.items())
    assert {name for name in after if name.endswith(".mp4")} == {f"clip-{i}.mp4" for i in range(24)}
    assert all(after[f"clip-{i}.mp4"][0] == wanted[f"clip-{i}.mp4"][0] for i in range(24))
    failed = [json.loads(line)["id"] for line in (out / "failed.jsonl").read_text().splitlines()]
    assert sorted(failed) == ["image", "row"] and not [*out.rglob("*.incomplete")]
