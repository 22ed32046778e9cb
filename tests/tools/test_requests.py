"""Rows, and what becomes of clips and records of which a part is there."""

import json
import os
from argparse import Namespace
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import PROMPT
from PIL import Image

from diffusers_magihuman import embedded_model
from diffusers_magihuman.prompts import format_prompt
from diffusers_magihuman.tools import requests
from diffusers_magihuman.tools.generate import check_run
from diffusers_magihuman.tools.plan import Setting
from diffusers_magihuman.tools.requests import (
    Request,
    Store,
    check_request,
    digest_file,
    find_record,
    find_revision,
    open_models,
    run_request,
)

ROW = {"id": "a", "prompt": PROMPT, "height": 32, "width": 64, "num_frames": 5}
ARGUMENTS = {"dtype": "float32", "quantize": None, "compile": False, "attention": None, "upscale": None}


@pytest.fixture(scope="module")
def models(tiny_pipeline_dir):
    return open_models(Namespace(model=str(tiny_pipeline_dir), **ARGUMENTS))


@pytest.fixture
def upscale_models(tiny_pipeline_dir, tiny_upscale_dir):
    return open_models(Namespace(model=str(tiny_pipeline_dir), **ARGUMENTS | {"upscale": str(tiny_upscale_dir)}))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heigth": 32}, "'heigth' is no field; fields are id, prompt"),
        ({"a\x1b[31m\n" * 999: 1}, r"'a\\x1b\[31m\\n.{,150}\\n' is no field"),
        *(({"id": name}, "`id`=") for name in (None, 3, "", "../a", "a/b", ".a", "-a", "a b", "ä", "a\n", "a" * 101)),
        *(({"prompt": prompt}, "`prompt`=") for prompt in ("", " ", 7, [PROMPT], "\ud800")),
        ({"prompt": "a" * 2**18}, "`prompt`="),
        ({"prompt": None}, "Exactly one of `prompt`, `description`"),
        ({"description": "A woman."}, "Exactly one of `prompt`, `description`"),
        ({"dialogue": [["A", "English", "Hi."]]}, "At most one of `prompt`, `dialogue`"),
        ({"prompt": None, "description": "A woman.", "dialogue": ["Hi."]}, r"`dialogue\[0\]`="),
        ({"prompt": None, "description": "A woman.", "background_sound": "<"}, "`background_sound`="),
        ({"negative_prompt": 7}, "`negative_prompt`="),
        *(({"seed": seed}, "`seed`=") for seed in ("0", 0.5, True, 2**63, float("nan"))),
        *(({"num_frames": number}, "`num_frames`=") for number in (0, "5", 5.0, True, 2**20)),
        ({"seconds": 1}, "At most one of `seconds`, `num_frames`"),
        *(({"num_frames": None, "seconds": number}, "`seconds`=") for number in (0, "1", float("nan"), 1e9)),
        *(({"height": number}, "`height`=") for number in (33, 0, -32, 2**14, "32", 1e300)),
        ({"height": 8192, "width": 8192, "num_frames": 16384}, "tokens, but at most"),
        *(({"num_inference_steps": number}, "`num_inference_steps`=") for number in (0, 1001, "8")),
        *(({"guidance_scale": number}, "`guidance_scale`=") for number in ("5", float("nan"), 1e9)),
        ({"max_sequence_length": 641}, "`max_sequence_length`="),
        ({"image": "nowhere.png"}, "`image` is '.*nowhere.png', but there is no such file"),
        ({"image": "."}, "`image`"),
        ({"image": 3}, "`image`"),
        ({"audio": "https://example.org/a.wav"}, "`audio`"),
    ],
)
def test_bad_fields_are_named(change, message, models):
    with pytest.raises((ValueError, OSError), match=message):
        check_request(ROW | change, models)


@pytest.mark.parametrize("row", [None, [], "a", 3])
def test_a_row_is_an_object(row, models):
    with pytest.raises(ValueError, match="must be an object with fields"):
        check_request(row, models)


def test_what_is_upscaled_to_is_checked_too(upscale_models):
    assert check_request(ROW, upscale_models).sizes == [(32, 64, 5), (256, 512, 5)]
    upscale_models.upscale.register_to_config(default_height=8192, default_width=8192)
    with pytest.raises(ValueError, match=r"`height`=5792, `width`=11584 .* tokens, but at most|`width`=11584 must be"):
        check_request(ROW | {"num_frames": 257}, upscale_models)


def test_rows_are_checked_without_a_walk_through_the_models(models, monkeypatch):
    """Which would take longer for each row than all checks."""
    walked = property(lambda _: pytest.fail("The device is looked for."))
    monkeypatch.setattr(type(models.pipe), "_execution_device", walked)
    assert check_request(ROW, models).sizes == [(32, 64, 5)]


def test_a_request_says_what_is_called(models, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    parts = {"description": "A woman.", "dialogue": [["Woman", "English", "Hi."]], "background_sound": "Rain"}
    row = {"id": "a", **parts, "seconds": 1, "guidance_scale": 2, "image": "a.png", "height": None}
    request = check_request(row, models, tmp_path)
    call = {"prompt": format_prompt(*parts.values()), "num_frames": 26, "guidance_scale": 2.0}
    assert request.call == call and request.files == {
        "image": (str(tmp_path / "a.png"), digest_file(tmp_path / "a.png"))
    }
    assert Request(*json.loads(json.dumps(request))).hash == request.hash
    assert check_request(row | {"id": "b"}, models, tmp_path).seed != request.seed
    assert check_request(row, models, tmp_path) == request


def test_the_hash_is_of_all_that_makes_a_clip(models, upscale_models, tmp_path):
    """And of nothing else: where the image lies does not matter, what is in it does."""
    for name, colour in (("a.png", "red"), ("b.png", "red"), ("c.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)

    def hash_of(models=models, **change):
        return check_request(ROW | {"seed": 0, "image": "a.png"} | change, models, tmp_path).hash

    same = {hash_of(), hash_of(image="b.png"), hash_of(id="b"), hash_of(guidance_scale=None)}
    other = models._replace(context=models.context | {"model_revision": "0"})
    changes = {"seed": 1, "prompt": "A man.", "num_frames": 6, "height": 64, "image": "c.png", "guidance_scale": 2}
    others = {hash_of(**{name: value}) for name, value in changes.items()} | {hash_of(other), hash_of(upscale_models)}
    assert len(same) == 1 and len(others) == 8 and not same & others


def test_revision_of_a_folder_is_that_of_its_weights(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    before = find_revision(str(tmp_path / "b"))
    (tmp_path / "b/README.md").write_text("Words.")
    assert find_revision(str(tmp_path / "b")) == before
    file = tmp_path / "b/transformer/diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert find_revision(str(tmp_path / "b")) != before


# What is on disk


@pytest.fixture(params=["folder", "memory://"])
def store(request, tmp_path):
    return Store(str(tmp_path) if request.param == "folder" else f"memory://{tmp_path}")


@pytest.mark.parametrize(
    "clip, record, marker, expected",
    [
        (None, None, None, "new"),
        ("clip", "record", None, "done"),
        ("clip", "record", "begun", "done"),
        ("clip", None, "record", "done"),  # killed before the record
        ("clip", None, "begun", "foreign"),
        ("clip", None, "other", "changed"),  # killed before the record, and then the row was changed
        ("clip", "other", "record", "done"),
        ("torn", None, "record", "new"),
        ("clip", "edited", None, "new"),
        ("clip", "deep", None, "foreign"),
        (None, None, "record", "new"),  # killed before the clip
        ("torn", "record", None, "new"),
        ("damaged", "record", None, "new"),
        (None, "record", None, "new"),
        ("clip", "other", None, "changed"),
        ("clip", None, None, "foreign"),
        (None, "words", None, "foreign"),
        ("clip", "words", None, "foreign"),
    ],
)
def test_what_a_request_has_come_to(clip, record, marker, expected, store, models, tmp_path):
    request = check_request(ROW, models)
    (tmp_path / "whole").write_bytes(b"whole")
    whole = {"hash": request.hash, "bytes": 5, "sha256": digest_file(tmp_path / "whole")}
    contents = {
        "clip": b"whole",
        "torn": b"who",
        "begun": b'{"run": ["worker"]}',
        "words": b"My notes",
        "deep": b"[" * 10**5,
    }
    contents |= {
        "damaged": b"whale",
        "record": json.dumps(whole).encode(),
        "edited": json.dumps({"hash": request.hash, "bytes": "5"}).encode(),
        "other": json.dumps(whole | {"hash": "0"}).encode(),
    }
    for name, content in (("a.mp4", clip), ("a.json", record), (".work/a.json", marker)):
        if content is not None:
            store.write(name, contents[content])
    state, found = find_record(store, request)
    if clip == "damaged" and not store.is_local:  # nothing is downloaded
        expected = "done"
    assert state == expected and (state != "done" or found == whole)
    if state == "done":
        assert json.loads(store.read("a.json")) == whole


def test_a_folder_is_written_by_one_run(tmp_path):
    store = Store(str(tmp_path))
    with store.lock(), pytest.raises(OSError, match="is being written by another run"), Store(str(tmp_path)).lock():
        pass
    with store.lock():
        assert not [*(tmp_path / ".work").iterdir()]


def test_what_gets_its_name_is_on_the_disk(tmp_path, monkeypatch):
    """Else a machine that loses power keeps names of empty files."""
    calls = []
    for name in ("fsync", "replace"):
        spy = partial(lambda name, call, *args: calls.append(name) or call(*args), name, getattr(os, name))
        monkeypatch.setattr(os, name, spy)
    Store(str(tmp_path)).write("a.json", {})
    assert calls == ["fsync", "replace"]


@pytest.mark.parametrize("out", ["nosuch://a/b", "{tmp}/file"])
def test_out_must_be_writable(out, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`out`="):
        Store(out.format(tmp=tmp_path))


class Pipe:
    """A pipeline that records how it is called, and fails if it is told to."""

    def __init__(self, error=None):
        self.calls, self.num_freed, self.error = [], 0, error
        self._execution_device, self.audio_sampling_rate, self.vae = "cpu", 44100, None

    def __call__(self, **inputs):
        self.calls.append(inputs)
        if self.error is not None:
            raise self.error
        frames = np.zeros((1, 1, 2, 2, 3), np.float32) if inputs["output_type"] == "np" else torch.zeros(1, 4, 1, 1, 1)
        return SimpleNamespace(frames=frames, audio=torch.zeros(1, 2, 100))

    def maybe_free_model_hooks(self):
        self.num_freed += 1


def test_a_clip_that_fails_leaves_nothing_on_the_device(models, tmp_path):
    request, pipes = check_request(ROW, models), [Pipe(), Pipe(RuntimeError("out of memory"))]
    with pytest.raises(RuntimeError, match="out of memory"):
        run_request(pipes, request, Store(str(tmp_path)), {})
    assert [pipe.num_freed for pipe in pipes] == [1, 1] and not [*tmp_path.rglob("*.mp4")]


def test_both_pipelines_cut_a_prompt_at_the_same_length(models, tmp_path):
    request, pipes = check_request(ROW | {"max_sequence_length": 7}, models), [Pipe(), Pipe()]
    run_request(pipes, request, Store(str(tmp_path)), {})
    assert [pipe.calls[0]["max_sequence_length"] for pipe in pipes] == [7, 7]
    assert (tmp_path / "a.mp4").is_file() and [pipe.num_freed for pipe in pipes] == [0, 0]


def test_what_both_pipelines_share_is_planned_once(tiny_pipeline_dir, monkeypatch):
    planned = []

    def choose(*given):
        planned.append({part for part in given[2:] if isinstance(part, str)})
        return Setting("none")

    monkeypatch.setattr(requests, "choose_setting", choose)
    arguments = Namespace(**ARGUMENTS | {"model": str(tiny_pipeline_dir), "upscale": embedded_model("upscale")})
    vars(arguments).update(device="cpu", offload="none", at_exit=ExitStack())
    arguments.context = {"model_revision": None, "upscale_revision": None}
    check_run(arguments)
    first, second = requests.load_pipes(arguments, [(32, 64, 5)] * 2)
    assert planned == [set(), {"text_encoder"}] and first.text_encoder is second.text_encoder
