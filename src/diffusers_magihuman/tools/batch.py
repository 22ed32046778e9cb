# SPDX-License-Identifier: Apache-2.0
"""`magihuman batch`: a clip and a record of each row of a file, in this process or on Ray.

First every text is encoded once, to a file, then the transformer is loaded, so that a GPU holds one of the two. A run
that was killed goes on where it was when the same command is given again.
"""

import io
import json
import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any
from uuid import uuid4

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load, save
from tqdm import tqdm

try:
    import pyarrow
    import pyarrow.parquet
except ImportError:  # of the extra `scale`
    pyarrow = None

from ..checks import show, show_some
from ..files import naming, reading
from ..pipeline_base import DEFAULT_NEGATIVE_PROMPT, MAX_SEQUENCE_LENGTH
from . import requests
from .cli import describe
from .plan import Call, bytes_of, offload_call
from .requests import (
    MAX_DEATHS,
    Load,
    Models,
    Record,
    Request,
    Row,
    Store,
    Texts,
    Worker,
    choose_run,
    free_memory,
    import_ray_pool,
    make_options,
)

MAX_ROW_BYTES = 2**20
MANIFEST = "manifest.jsonl" if pyarrow is None else "manifest.parquet"
COLUMNS = dict.fromkeys(("id", "file", "model", "model_revision", "upscale", "upscale_revision", "hash"), str)
COLUMNS |= dict.fromkeys(("seed", "frames", "height", "width", "audio_sampling_rate", "bytes"), int)
COLUMNS |= {"seconds": float, "sha256": str}


def texts_of(request: Request, context: Record) -> dict[str, Row]:
    """The file of the embeddings, the text and the longest length of both prompts; without guidance the pipeline does
    not use the negative one."""
    texts, length = {}, request.call.get("max_sequence_length", MAX_SEQUENCE_LENGTH)
    for name in ("prompt", "negative_prompt"):
        text = request.call.get(name, DEFAULT_NEGATIVE_PROMPT)
        digest = requests.digest_of(text, length, context["dtype"], context["model_revision"])
        texts[name] = [f".cache/{digest}.safetensors", text, length]
    return texts


def load_encoder(arguments: Namespace, store: Store) -> Callable[[Row], Record]:
    """Loads the text encoder, which then encodes texts to files, see [`texts_of`]."""
    others = dict.fromkeys(("transformer", "scheduler", "vae", "audio_vae"))
    others |= {"dtype": getattr(torch, arguments.dtype), "revision": arguments.context["model_revision"]}
    pipe = DiffusionPipeline.from_pretrained(arguments.model, **others)
    offload = {"model": "none"}.get(arguments.offload, arguments.offload)
    if offload == "auto":
        fits = bytes_of(pipe.text_encoder) < 0.9 * torch.cuda.mem_get_info(arguments.device)[0]
        offload = "none" if fits else "leaf"
    Call(*offload_call(offload, str(arguments.device))).run(pipe)

    @torch.no_grad()
    def encode(row: Row) -> Record:
        name, text, length = row
        if store.size(name) is None:
            embeds, *_ = pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=length)
            store.write(name, save({"embeds": embeds.half().cpu().contiguous()}))  # as the pipeline has rounded them
        return {}

    return encode


def read_texts(arguments: Namespace, store: Store, request: Request) -> Texts:
    texts = {}
    for key, (name, *_) in texts_of(request, arguments.context).items():
        if (data := store.read(name)) is None:
            raise OSError(arguments.failures.get(name, f"{store.path(name)!r} is missing: do all workers see it?"))
        with reading(store.path(name)):
            texts[key] = load(data)["embeds"].float()
    return texts


def load_maker(arguments: Namespace, store: Store) -> Callable[[Row], Record]:
    """Loads the pipelines, which then make the clips of requests."""
    pipes = requests.load_pipes(arguments, arguments.sizes, "tokenizer", "text_encoder")
    worker = uuid4().hex

    def make(row: Row) -> Record:
        request = Request(*row)
        state, record = requests.find_record(store, request)  # as another worker may have died after it
        if state == "done":
            return record
        note = requests.note_of(request)
        others = [each for each in store.read_record(note).get(arguments.run, ()) if each != worker]
        if len(others) >= MAX_DEATHS:
            raise ValueError(f"{len(others)} workers died of it")
        store.write(note, {arguments.run: [*others, worker]})
        texts = read_texts(arguments, store, request)
        return requests.run_request(pipes, request, store, arguments.context, texts)

    return make


def run_here(load: Load, options: Record, rows: list[Row]) -> Iterator[Record]:
    """What a worker makes of rows; Ray has several, and returns what they make as it is done."""
    free_memory()  # of the worker before
    yield from map(Worker(load, options), rows)


def read_jobs(path: str) -> Iterator[tuple[int, Any]]:
    """The rows of a file with their numbers: objects of parquet, or lines."""
    if path.endswith(".parquet"):
        if pyarrow is None:
            raise ValueError("JOBS in parquet need pyarrow, which comes with the extra `scale`; or use JSON lines.")
        with reading(path):
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(1000)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
        return
    with open(path, "rb") as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_ROW_BYTES + 1), b""), 1):
            if len(line) > MAX_ROW_BYTES:
                raise ValueError(f"line {number} of {show(path)} has more than {MAX_ROW_BYTES} bytes.")
            if line.strip():
                yield number, line


def tell(failure: Record) -> None:
    tqdm.write(f"magihuman: id {show(failure['id'])}, {failure['error']}", file=sys.stderr)


def check_jobs(path: str, models: Models) -> tuple[list[Request], list[Record]]:
    """The requests of a file, and what is wrong with its bad rows."""
    good, bad, lines = [], [], {}
    for line, row in tqdm(read_jobs(path), "checking rows", leave=False, disable=None, unit=" rows"):
        try:
            if isinstance(row, bytes):
                with naming("the line", fault="is no JSON", caught=Exception):
                    row = json.loads(row)
            request = requests.check_request(row, models, os.path.dirname(path))
            other = lines.setdefault(request.id.lower(), line)  # some file systems know no case
            if other != line:
                raise ValueError(f"`id`={show(request.id)} must be no other row's, but is that of line {other}.")
            good.append(request)
        except (ValueError, OSError) as error:
            name = row.get("id") if isinstance(row, dict) else None
            bad.append({"id": name if isinstance(name, str) else None, "error": f"line {line}: {describe(error)}"})
            tell(bad[-1])
    if not good and not bad:
        raise ValueError(f"{show(path)} holds no rows.")
    return good, bad


def sort_out(store: Store, asked: list[Request], overwrite: bool) -> tuple[list[Request], dict[str, Record]]:
    """The requests still to be run, and the records of the others; `ValueError` where a clip would be lost."""
    todo: dict[str, list[Request]] = {"new": [], "changed": [], "foreign": []}
    records = {}
    with ThreadPoolExecutor(32) as pool:
        found = pool.map(partial(requests.find_record, store), asked)
        for request, (state, record) in zip(asked, found, strict=True):
            if state == "done":
                records[request.id] = summarise(request.id, record)
            else:
                todo[state].append(request)
    for state, what in (("changed", "have changed since their clips were made"), ("foreign", "have files of others")):
        if todo[state] and not overwrite:
            names = show_some(request.id for request in todo[state])
            raise ValueError(f"Rows {what}, {len(todo[state])} of them: {names}; --overwrite makes them anew.")
    return [*todo["new"], *todo["changed"], *todo["foreign"]], records


def summarise(name: str, record: Record) -> Record:
    """A row of the manifest; what somebody has changed in a record must not keep it from being written."""
    row = record | {"id": name, "file": f"{name}.mp4"}
    return {name: row[name] if type(row.get(name)) is kind else None for name, kind in COLUMNS.items()}


def run_todo(run: Callable, options: Record, todo: list[Request], store: Store) -> Iterator[Record]:
    """Encodes the texts that are not on disk, and makes the clips, whose records, or errors, come as they are done."""
    texts = {text[0]: text for request in todo for text in texts_of(request, options["context"]).values()}
    there = {os.path.basename(path) for path in store.fs.find(store.path(".cache"))}
    missing = [text for name, text in texts.items() if os.path.basename(name) not in there]
    results = run(load_encoder, options, missing) if missing else ()
    results = tqdm(results, "encoding texts", len(missing), leave=False, disable=None, dynamic_ncols=True)
    failures = {result["id"]: result["error"] for result in results if "error" in result}
    # Clips of one size after the other, as what is compiled, or planned by a library, is of a size.
    rows = [list(request) for request in sorted(todo, key=lambda request: request.sizes)]
    yield from run(load_maker, options | {"failures": failures}, rows)


def write_table(store: Store, name: str, rows: list[Record]) -> None:
    """Writes rows as JSON lines, or as parquet; without rows there is no file."""
    if not rows:
        return store.remove(name)
    data = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    if name.endswith(".parquet"):
        kinds, file = {str: "string", int: "int64", float: "float64"}, io.BytesIO()
        schema = pyarrow.schema([(name, kinds[kind]) for name, kind in COLUMNS.items()])
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), file)
        data = file.getvalue()
    store.write(name, data)


def run_batch(arguments: Namespace) -> int:
    begun = time.monotonic()
    choose_run(arguments)
    models = requests.open_models(arguments)
    asked, failed = check_jobs(arguments.jobs, models)
    if failed and not arguments.skip_bad:
        count = f"{len(failed)} of {len(asked) + len(failed)} rows of {show(arguments.jobs)} are bad"
        raise ValueError(f"{count}, so nothing was run; --skip-bad runs the others.")
    store, run, results = Store(arguments.out), run_here, ()
    with store.lock():
        todo, records = sort_out(store, asked, arguments.overwrite)
        num_skipped = len(records)
        with ExitStack() as stack:
            stack.callback(write_table, store, "failed.jsonl", failed)
            if todo:
                if arguments.workers is not None or arguments.address is not None:
                    run = import_ray_pool(arguments).start_ray(stack, arguments)
                sizes = [max(sizes, key=math.prod) for sizes in zip(*(each.sizes for each in todo), strict=True)]
                results = run_todo(run, make_options(arguments, models, sizes), todo, store)
            bar = {"total": len(asked), "initial": num_skipped, "unit": " clips", "disable": None}
            for record in tqdm(results, "clips", dynamic_ncols=True, **bar):
                if "error" in record:
                    failed.append(record)
                    tell(record)
                else:
                    records[record["id"]] = summarise(record["id"], record)
        write_table(store, MANIFEST, [records[request.id] for request in asked if request.id in records])
        for name in (".work", ".cache")[: 1 if failed else 2]:
            store.remove(name)
    made = f"{len(records) - num_skipped} clips made, {num_skipped} were there, {len(failed)} failed"
    print(f"{arguments.out}: {made}, in {time.monotonic() - begun:.0f} s", flush=True)
    return int(bool(failed))
