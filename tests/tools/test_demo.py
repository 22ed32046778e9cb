"""The demo page: what stands behind it, and, slow, a user in a real browser."""

import os
import re
import shutil
import subprocess
import sys
import threading
import weakref
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import soundfile
from helpers import read_header

from diffusers_magihuman import embedded_model
from diffusers_magihuman.tools.cli import main

try:
    from diffusers_magihuman.tools import demo
except ImportError as error:
    demo, reason = None, str(error)
needs_gradio = pytest.mark.skipif(demo is None, reason="needs the extra `demo`")

PAGE = {"model": "tiny", "description": "A speaker.", "dialogue": "Anna, syllables: ma mi", "background_sound": ""}
PAGE |= {"image": None, "audio": None, "size": "32 x 64", "seconds": "0.32", "steps": 2, "seed": "7", "upscale": False}


def make_arguments(**changes):
    names = ("model", "seed", "upscale", "device", "dtype", "quantize", "attention")
    arguments = {"offload": "none", "compile": False, "device": "cpu", "at_exit": ExitStack()}
    return Namespace(**dict.fromkeys(names) | arguments | {"upscale": embedded_model("upscale")} | changes)


@pytest.fixture(scope="module")
def studio():
    return demo.Studio(make_arguments())


@pytest.fixture
def files(tmp_path):
    """A portrait, a voice of 13 frames, and what is neither."""
    pixels = np.linspace(0, 255, 96 * 64 * 3).reshape(96, 64, 3)
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "portrait.png")
    soundfile.write(tmp_path / "voice.wav", np.sin(np.arange(11000) / 20) / 2, 22050)
    soundfile.write(tmp_path / "long.wav", np.zeros(121 * 400), 400)
    (tmp_path / "bad.png").write_text("no image")
    (tmp_path / "bad.wav").write_text("no audio")
    return tmp_path


def test_a_command_without_gradio_says_what_installs_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "diffusers_magihuman.tools.demo", raising=False)
    assert main(["demo"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "The demo page needs Gradio; in the clone" in line


@needs_gradio
def test_values_of_a_page_become_a_call():
    ask = demo.read_ask(**PAGE | {"image": "face.png", "size": "448 x 256", "seconds": " 5 "})
    assert ask.numbers == {"height": 256, "width": 448, "num_frames": 126, "num_inference_steps": 2}
    assert "num_inference_steps" not in demo.read_ask(**PAGE | {"steps": None}).numbers  # the model's
    assert ask.files == {"image": "face.png"} and ask.seed == 7
    assert ask.prompt == ("A speaker.", [("Anna", "syllables", "ma mi")], None)
    assert len({demo.read_ask(**PAGE | {"seed": " "}).seed for _ in range(3)}) > 1
    assert "num_frames" not in demo.read_ask(**PAGE | {"seconds": ""}).numbers


@needs_gradio
def test_a_file_that_was_not_uploaded_is_not_read(files, monkeypatch, tmp_path):
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "link.png").symlink_to(files / "portrait.png")
    shutil.copy(files / "portrait.png", tmp_path / "uploads" / "own.png")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    uploads = str(tmp_path / "uploads")
    assert demo.find_upload({"path": f"{uploads}/own.png"}) == f"{uploads}/own.png" and demo.find_upload(None) is None
    paths = f"{uploads}/../portrait.png", f"{uploads}/link.png", uploads, f"{uploads}-2/a.png", "", None
    for file in (*({"path": path} for path in paths), {}, f"{uploads}/own.png"):
        cleared, status = demo.check_upload("image", file)
        assert cleared is None and "is no upload" in status


@needs_gradio
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"description": " "}, "`description`"),
        ({"description": "A\nDialogue:\nB"}, "`description`.*'Dialogue:'"),
        ({"dialogue": "ma mi"}, "`dialogue`='ma mi' must be 'WHO, LANGUAGE: LINE'"),
        ({"dialogue": "Anna, <b>: ma"}, "`dialogue.0.`"),
        ({"background_sound": "<rain>"}, "`background_sound`"),
        ({"size": None}, "`size`=None must be width x height"),
        ({"size": "448"}, "`size`='448' must be width x height"),
        ({"size": "448 x wide"}, "`height`='wide' must be an integer in 1 to 8192"),
        ({"size": "99999 x 1"}, "`width`='99999' must be"),
        ({"seconds": "long"}, "`seconds`='long' must be a number in 0.04 to 120"),
        ({"seconds": "nan"}, "`seconds`"),
        ({"seconds": "121"}, "`seconds`"),
        ({"steps": 0}, "`steps`=0 must be an integer in 1 to 1000"),
        ({"seed": "1.5"}, "`seed`='1.5' must be an integer"),
        ({"seed": "9" * 30}, "`seed`"),
    ],
)
def test_bad_values_are_met_with_words(changes, message):
    with pytest.raises(ValueError, match=message):
        demo.read_ask(**PAGE | changes)


@needs_gradio
@pytest.mark.parametrize(
    "changes",
    [
        {"audio": "voice.wav", "image": "portrait.png", "seconds": "", "dialogue": "Anna, English: ma hi"},
        {"model": "tiny-base", "steps": 1, "background_sound": "Rain", "dialogue": ""},
        pytest.param({"upscale": True}, marks=pytest.mark.slow),
    ],
    ids=["portrait and voice", "base", "upscaled"],
)
def test_python_of_a_clip_makes_its_bytes_again(changes, studio, files, monkeypatch):
    monkeypatch.chdir(files)
    paths = {name: str(files / changes[name]) for name in ("image", "audio") if name in changes}
    ask = demo.read_ask(**PAGE | changes | paths)
    told = list(studio.follow(ask, str(files / "made.mp4"), threading.Event()))
    previews = [news.preview for news in told if news.preview is not None]
    assert previews and previews[0].size == (32, 64) and np.ptp(previews[0]) > 20
    assert [news.done for news in told if news.text.startswith("Step ")][-1] == 1
    words = " Of the line, the tiny model knows ma, and passes over hi." if "audio" in changes else ""
    assert told[-1].text == f"Seed 7.{words}"
    assert "Duration: 00:00:00.36" in read_header("made.mp4")
    exec(told[-1].code, {})
    assert Path("clip.mp4").read_bytes() == Path("made.mp4").read_bytes()


@needs_gradio
def test_a_pipeline_is_gone_where_the_next_needs_its_room(studio, tmp_path, monkeypatch):
    first, gone = weakref.WeakSet(), []

    def load(model, size):
        if model == studio.upscale:
            studio.drop(*studio.loaded)
            gone.append(not first)
            raise demo.Cancelled
        setting, pipe = type(studio).load(studio, model, size)
        first.add(pipe.transformer)
        return setting, pipe

    monkeypatch.setattr(studio, "loaded", {})
    monkeypatch.setattr(studio, "load", load)
    ask = demo.read_ask(**PAGE | {"upscale": True, "steps": 1})
    with pytest.raises(demo.Cancelled):
        list(studio.follow(ask, str(tmp_path / "clip.mp4"), threading.Event()))
    assert gone == [True]


@needs_gradio
def test_a_model_of_the_users_goes_before_a_tiny_one_of_its_name(tmp_path, monkeypatch):
    path = shutil.copytree(embedded_model("base"), tmp_path / "tiny")
    monkeypatch.chdir(path)
    for model in (str(path), "."):
        models = demo.Studio(make_arguments(model=model)).models
        assert [*models] == ["tiny", "tiny-base"] and models["tiny"] == model


@needs_gradio
def test_uploads_are_read_by_the_package_alone(studio):
    page = demo.build_page(studio)
    ours = [block for block in page.blocks.values() if "upload" in (getattr(block, "elem_classes", None) or [])]
    readers = [function for function in page.fns.values() if {*ours} & {*function.inputs}]
    assert len(ours) == 2 and len(readers) == 3 and not any(function.preprocess for function in readers)


@needs_gradio
@pytest.mark.parametrize("copied", [False, True], ids=["tiny", "own"])
def test_the_page_of_a_tiny_model_begins_with_an_example(copied, tmp_path):
    model = str(shutil.copytree(embedded_model("base"), tmp_path / "own")) if copied else None
    page = demo.build_page(demo.Studio(make_arguments(model=model)))
    values = {getattr(block, "label", None): block.value for block in page.blocks.values() if hasattr(block, "value")}
    expected = ("", "") if copied else demo.EXAMPLES["Example: deep voice"]
    assert (values["Description"], values["Dialogue"]) == expected
    set_model = next(function.fn for function in page.fns.values() if function.name == "set_model")
    known = {name: set_model(name)[-1]["info"] for name in ["own"] * copied + ["tiny", "tiny-base"]}
    assert known == {name: None if name == "own" else demo.KNOWN for name in known}


@needs_gradio
def test_the_late_end_of_a_cancel_leaves_a_newer_status(studio):
    (finish,) = (function for function in demo.build_page(studio).fns.values() if function.name == "finish")
    assert [block.value for block in finish.outputs] == ["Generate"]


@needs_gradio
def test_cancelling_ends_at_the_next_step(studio, tmp_path):
    stop, output = threading.Event(), tmp_path / "clip.mp4"
    news = studio.follow(demo.read_ask(**PAGE | {"steps": 500}), str(output), stop)
    while not next(news).text.startswith("Step 1 "):
        pass
    stop.set()
    with pytest.raises(demo.Cancelled):
        list(news)
    assert studio.lock.acquire(timeout=10)  # held until the call has ended
    studio.lock.release()
    assert not output.exists()
    assert not studio.loaded[studio.models["tiny"]][1].transformer._forward_hooks


@needs_gradio
def test_a_page_that_is_left_cancels(studio, tmp_path):
    stop = threading.Event()
    news = studio.follow(demo.read_ask(**PAGE | {"steps": 500}), str(tmp_path / "clip.mp4"), stop)
    next(news)
    news.close()
    assert stop.is_set() and studio.lock.acquire(timeout=10)
    studio.lock.release()


@needs_gradio
@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {},
            "No setting makes 64x32, 9 frames, fit into .* GiB: .* for distilled. A smaller or shorter",
        ),
        ({"size": "60 x 64"}, "`width`=60 must be a multiple of 16"),
        ({"image": "bad.png"}, "^`image` is 'bad.png', which cannot be read"),
        ({"audio": "long.wav", "seconds": ""}, "^`audio` lasts more than 120 seconds; `seconds` may cut it"),
        ({"audio": "bad.wav"}, "^`audio` is 'bad.wav', which holds no readable audio$"),
        ({"model": "../.."}, "`model`='../..' must be"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_loaded(changes, message, studio, files, monkeypatch):
    monkeypatch.setattr(demo, "load_pipeline", None)
    monkeypatch.setattr(demo, "UNPLANNED_PIXELS", 0)
    monkeypatch.setattr(demo.psutil, "virtual_memory", lambda: Namespace(available=demo.GIB))
    monkeypatch.setattr(studio, "loaded", {})
    changes = changes | {name: str(files / changes[name]) for name in ("image", "audio") if name in changes}
    with pytest.raises(ValueError, match=message) as caught:
        list(studio.follow(demo.read_ask(**PAGE | changes), "clip.mp4", threading.Event()))
    assert str(files) not in str(caught.value)


@needs_gradio
@pytest.mark.parametrize("gib", [64, None], ids=["much memory", "little"])
def test_pipelines_make_room_for_others_only_where_they_must(gib, studio, monkeypatch):
    tiny, base, size = studio.models["tiny"], studio.models["tiny-base"], (64, 32, 9)
    monkeypatch.setattr(demo, "UNPLANNED_PIXELS", 0)
    monkeypatch.setattr(studio, "loaded", {base: studio.load(base, (32, 32, 1))})
    own = studio.measure_room(base)[0] - studio.measure_room()[0]
    plan = demo.plan_of(tiny, "float32", demo.Speed(), *size)
    needed = max(plan.needs[demo.Setting("none")].values()) / demo.GIB + 1

    def memory():  # without the base it is enough, beside it not
        free = needed + own / 2 - own * (base in studio.loaded)
        return Namespace(available=(free if gib is None else gib) * demo.GIB)

    monkeypatch.setattr(demo.psutil, "virtual_memory", memory)
    loaded = studio.load(tiny, size)
    assert [*studio.loaded] == ([tiny] if gib is None else [base, tiny])
    assert studio.load(tiny, size) is loaded


@needs_gradio
@pytest.mark.parametrize("changes", [{"model": "no/such/model"}, {"upscale": "UPSCALE"}, {"attention": "flash_9"}])
def test_bad_arguments_are_found_before_the_page_opens(changes):
    changes = {name: demo.TINY["tiny"] if value == "UPSCALE" else value for name, value in changes.items()}
    with pytest.raises((OSError, ValueError), match=r"model|flash_9"):
        demo.Studio(make_arguments(**changes))


@needs_gradio
def test_status_shows_no_markup_of_users():
    status = demo.show_status("`size`='<b>' must be", is_error=True)
    assert status == '<div role="alert"><p><code>size</code>=&#x27;&lt;b&gt;&#x27; must be</p></div>'


@pytest.fixture
def address(tmp_path):
    """Of a page that a process of its own serves; it leaves no file behind."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    code = "from diffusers_magihuman.tools.cli import run_process; run_process()"
    command = [sys.executable, "-c", code, "demo", "--device", "cpu", "--port", "0", "--upscale", "tiny"]
    variables = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path)}
    server = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    line = server.stdout.readline()
    try:
        assert line.startswith("magihuman demo: http://127.0.0.1:")
        yield line.split()[-1]
    finally:
        server.terminate()
        assert server.wait(30) == 0
    assert not [*temporary.glob("tmp*")] and not [path for path in temporary.rglob("*") if path.is_file()]


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
    if (path := shutil.which("chromium") or shutil.which("google-chrome")) is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


NAMELESS = """[...document.querySelectorAll('button, input, textarea')].filter(each => each.getClientRects().length &&
    !(each.ariaLabel || each.title || each.labels?.length || each.innerText.trim())).map(each => each.outerHTML)"""
LOOK = """async () => {
    const video = document.querySelector('video'), canvas = document.createElement('canvas')
    await video.play()
    await new Promise(resolve => setTimeout(resolve, 500))
    canvas.width = canvas.height = 32
    const context = canvas.getContext('2d')
    context.drawImage(video, 0, 0, 32, 32)
    const pixels = context.getImageData(0, 0, 32, 32).data.filter((_, index) => index % 4 < 3)
    const range = Math.max(...pixels) - Math.min(...pixels)
    return [video.readyState, video.duration, video.webkitAudioDecodedByteCount, range]
}"""


ASK_OUTSIDE = """() => new Promise(resolve => {
    document.addEventListener('securitypolicyviolation', event => resolve(event.blockedURI))
    fetch('https://example.com/').catch(() => {})
})"""


def open_page(browser, address, width, asked):
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.set_default_timeout(30_000)
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: asked.append(f"error: {error}"))
    page.goto(address)
    page.wait_for_function("[...document.querySelectorAll('input')].some(each => each.value === '128 x 128')")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(NAMELESS) == []
    return page


def press(page, name):
    """By the keyboard alone, from where the focus is."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.innerText") == name:
            return page.keyboard.press("Enter")
    raise AssertionError(f"{name} is not reached by the keyboard")


def see_clip(page, height, seconds):
    page.wait_for_function(f"document.querySelector('video')?.videoHeight === {height}")
    state, duration, audio_bytes, colours = page.evaluate(LOOK)
    assert state >= 2 and abs(duration - seconds) < 0.1 and audio_bytes > 0 and colours > 100
    assert page.get_by_text("Seed ").count() and "export_to_mp4" in page.locator(".cm-content").inner_text()


@needs_gradio
@pytest.mark.slow
def test_a_user_makes_clips_in_a_browser(browser, address, files):
    asked = []
    page, other = (open_page(browser, address, width, asked) for width in (1280, 360))
    status = page.locator("#status")

    other.get_by_text("nine words of each of seven").wait_for()
    page.get_by_label("Description").fill("A speaker with pale skin and short red hair, in a blue shirt.")
    page.get_by_label("Steps").fill("24")
    page.get_by_label("Description").focus()
    press(page, "Generate")
    page.get_by_text(re.compile(r"Step \d+ of 24, about \d+ s left")).wait_for()
    page.locator("#preview img").wait_for()
    see_clip(page, 128, 1.96)

    # Bad files are met with words that tell no path of the server.
    uploads = page.locator("input[type=file]")
    for index, name in enumerate(("bad.png", "bad.wav")):
        uploads.nth(index).set_input_files(files / name)
        page.get_by_role("alert").filter(has_text=f"is '{name}', which").wait_for()
        assert "/" not in status.inner_text()
    uploads.nth(0).set_input_files(files / "portrait.png")
    page.get_by_role("button", name="Remove").or_(page.locator("img[src*='portrait']")).first.wait_for()
    uploads.last.set_input_files(files / "voice.wav")
    page.wait_for_function("!document.querySelector('#status [role=alert]')")
    page.get_by_label("Upscale").check()
    page.get_by_label("Steps").fill("2")
    page.get_by_role("button", name="Generate").click()
    see_clip(page, 256, 0.36)

    # A long one is cancelled, and one that waits for it.
    page.get_by_label("Steps").fill("500")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text(re.compile(r"Step \d+ of 500")).wait_for()
    other.get_by_role("button", name="Example: high voice").click()
    other.get_by_role("button", name="Generate").click()
    other.get_by_text("queue: 1/1").wait_for()
    for each in (other, page):
        each.get_by_role("button", name="Cancel").click()
        each.get_by_text("Cancelled").wait_for(timeout=5000)
        each.locator("button:enabled", has_text="Generate").wait_for(timeout=5000)

    # What is refused is said, and nothing else of the machine is told.
    other.get_by_label("Seconds").fill("long")
    other.get_by_role("button", name="Generate").click()
    other.get_by_role("alert").filter(has_text="seconds='long' must be a number").wait_for()
    for path in (__file__, "/etc/hostname", str(files / "bad.png")):
        assert page.request.get(f"{address}gradio_api/file={path}").status == 403
    # Nor does a request reach a file of the server's as an upload.
    config = page.request.get(f"{address}config").json()
    labels = {part["id"]: part["props"].get("label") for part in config["components"]}
    (portrait,) = (each["id"] for each in config["dependencies"] if [*map(labels.get, each["inputs"])] == ["Portrait"])
    for meta in ({}, {"meta": {"_type": "gradio.FileData"}}):
        sent = {"data": [{"path": str(files / "portrait.png")} | meta], "fn_index": portrait, "session_hash": "abc"}
        answer = page.request.post(f"{address}gradio_api/run/predict", data=sent)
        assert not answer.ok or "is no upload" in answer.text()
    count = len(asked)
    assert page.evaluate(ASK_OUTSIDE) == "https://example.com/"
    # Gradio forgets what components are made of when it updates them.
    page.locator("img[src*='portrait']").first.hover()
    page.get_by_role("button", name="Remove").first.click()
    uploads.nth(0).set_input_files(files / "bad.png")
    page.get_by_role("alert").filter(has_text="is 'bad.png', which").wait_for()
    # The server ends in the middle of a long one.
    page.get_by_role("button", name="Generate").click()
    page.get_by_text(re.compile(r"Step \d+ of 500")).wait_for()
    outside = [url for url in asked[:count] if not url.startswith((address, "data:", "blob:"))]
    assert not outside
