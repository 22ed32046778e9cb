# SPDX-License-Identifier: Apache-2.0
"""The README, the pages of `docs/` and the model cards: their code runs, their links lead somewhere, and what they say
of options and messages is so.

A block runs as it stands, after those before it on its page. One whose first line says that it needs the published
weights does too, with tiny repositories of their layout on a loopback hub. One that needs a GPU runs on the CPU, by
the substitutions below; so do the cards, whose repositories are tiny ones as well.
"""

import ast
import importlib.util
import json
import re
import subprocess
import sys

import PIL.Image
import pytest
import soundfile
import torch
from helpers import PROMPT, ROOT
from hub_server import HubServer
from layouts import write_external_repositories, write_repositories

from diffusers_magihuman.tools.cli import COMMANDS, main
from diffusers_magihuman.tools.hub import write_repository_code

README, CARDS = ROOT / "README.md", sorted((ROOT / "model_cards").glob("*.md"))
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
# Pages whose blocks run by default, the quick ones; the cards are those that others are like, but for names.
QUICK = ("distill", "turbo-vae.md")
GPU = {  # what a CPU cannot: the GPU and its kernels, bfloat16 and compilation in little time
    '"cuda"': '"cpu"',
    "torch.bfloat16": "torch.float32",
    '"_flash_3_hub"': '"native"',
    "fullgraph=True, dynamic=True": 'fullgraph=True, dynamic=True, backend="eager"',
    '"use_stream": True': '"use_stream": False',
}
CARD = GPU | {  # and full sizes
    ".enable_model_cpu_offload()": '.to("cpu")',
    "height=1088, width=1920": "height=64, width=96",
    "pipe(prompt, ": "pipe(prompt, height=32, width=32, num_frames=5, num_inference_steps=1, ",
}
# Runs pages one by one, each with names of its own, and prints what each block raised.
RUNNER = """
import json, sys, traceback
failures = {}
for page in json.load(sys.stdin):
    names = {}
    for name, block in page:
        try:
            exec(compile(block, name, "exec"), names)
        except Exception:
            failures[name] = traceback.format_exc()
print(json.dumps(failures))
"""


def find_blocks(path, language):
    """Code by the number of its first line."""
    text = path.read_text(encoding="utf-8")
    matches = re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return {text.count("\n", 0, match.start(1)) + 1: match[1] for match in matches}


def adapt(path, block):
    substitutions = CARD if path in CARDS else GPU if re.match("# needs a GPU\n", block) else {}
    for old, new in substitutions.items():
        block = block.replace(old, new)
    return block


BLOCKS = {
    f"{path.name}:{line}": (path, adapt(path, block))
    for path in (*PAGES, *CARDS)
    for line, block in find_blocks(path, "py").items()
}
FIRST = next(iter(BLOCKS))


@pytest.fixture(scope="module")
def hub(tiny_distilled_pipeline, tiny_upscale_pipeline, tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    write_repositories(root)
    write_external_repositories(root)
    for card in CARDS:
        for name in re.findall(r"owner/(magihuman-[\w-]+)", card.read_text(encoding="utf-8")):
            pipe = tiny_upscale_pipeline if "-sr-" in name else tiny_distilled_pipeline
            if name == "magihuman-turbo-vae":
                pipe.vae.save_pretrained(root / "owner" / name)
            elif not (root / "owner" / name).is_dir():
                pipe.save_pretrained(root / "owner" / name)
                write_repository_code(root / "owner" / name)
    with HubServer(root) as server:
        yield server


@pytest.fixture(scope="module")
def failures(request, hub, tmp_path_factory):
    """What the blocks of the selected tests raise, and those before them on their pages, all in one process."""
    folder = tmp_path_factory.mktemp("documents")
    # The files of a reader, as the pages name them.
    (folder / "prompt.txt").write_text(PROMPT)
    PIL.Image.new("RGB", (40, 60), "teal").save(folder / "portrait.png")
    soundfile.write(folder / "speech.wav", torch.randn(8000).numpy() * 0.1, 16000)
    selected = {item.callspec.params["name"] for item in request.session.items if "failures" in item.fixturenames}
    pages = {}
    for name, (path, block) in BLOCKS.items():
        pages.setdefault(path if path in PAGES else name, []).append((name, block))
    pages = [
        page[: 1 + max(i for i, (name, _) in enumerate(page) if name in selected)]
        for page in pages.values()
        if selected & {name for name, _ in page}
    ]
    result = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(pages),
        env=hub.environment(folder / "cache"),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (not name.startswith((FIRST, *QUICK)))) for name in BLOCKS]
)
def test_block_runs(name, failures):
    assert name not in failures, failures[name]


def test_first_block_is_two_lines_for_any_shell():
    lines = next(iter(find_blocks(README, "bash").values())).splitlines()
    assert len(lines) == 2 and not any(re.search(r"&&|\\|\$|`", line) for line in lines), lines


def test_readme_is_short():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert 100 <= len(lines) <= 130
    assert not [line for line in lines if len(line) > 120]


def prose(path):
    """A page without its code."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def slug(heading):
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading)).strip().lower())


@pytest.mark.parametrize("path", [*PAGES, *CARDS], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if not re.match(r"https?://", target):
            file, _, anchor = target.partition("#")
            page = (path.parent / file) if file else path
            assert page.exists(), target
            assert not anchor or anchor in map(slug, re.findall(r"^#+ (.*)", prose(page), re.MULTILINE)), target


def test_no_sentence_stands_twice():
    seen = {}
    for path in PAGES:
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", prose(path))
        pieces = re.split(r"\n\s*\n|\n[#*-]|\n\d\.|\||(?<=[.:;?])\s", text)
        for sentence in (" ".join(re.findall(r"\w+", piece)).lower() for piece in pieces):
            if len(sentence.split()) >= 8:
                assert sentence not in seen, f"{path.name} and {seen[sentence]}: {sentence}"
                seen[sentence] = path.name


def test_images_are_small():
    images = list((ROOT / "docs" / "images").iterdir())
    assert images and sum(image.stat().st_size for image in images) <= 2 * 2**20


def test_documented_options_exist(capsys):
    """Of each command in code, the options that follow it are in its help."""
    options = {}
    for path in PAGES:
        for line in re.findall(r"(?:^|`|; )magihuman ([a-z]+)\b([^`\n]*)", path.read_text("utf-8"), re.MULTILINE):
            options.setdefault(line[0], set()).update(re.findall(r"--[a-z-]+", line[1]))
    known = {name for name, *_ in COMMANDS}
    assert known - {"card"} <= options.keys() <= known | {"demo"}
    for command in options.keys() & known:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert options[command] <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out)), command


def literals():
    """The texts in the sources, of an f-string what stands between its fields."""
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_explained_messages_are_in_the_sources():
    """But for those of PyTorch."""
    text = "\n".join(literals())
    rows = re.findall(r"^\| `(.*?)` \|", (ROOT / "docs" / "troubleshooting.md").read_text("utf-8"), re.MULTILINE)
    pieces = [piece.strip() for row in rows for piece in row.split("...")]
    assert len(rows) > 30
    assert [piece for piece in pieces if piece not in text] == ["CUDA out of memory"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra `docs`")
def test_site_builds(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    # What the docstrings name is a link, and no mark of theirs is left.
    assert not re.search(r"\[(<code>|`)", (tmp_path / "api.html").read_text(encoding="utf-8"))
