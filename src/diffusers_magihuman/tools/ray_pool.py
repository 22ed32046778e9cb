# SPDX-License-Identifier: Apache-2.0
"""Rows on the workers of a Ray cluster, or of one that is started here; the extra `scale`."""

import json
import logging
import os
import signal
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from functools import partial

import ray
import ray.data
import torch

from .requests import MAX_DEATHS, Load, Record, Row, Worker

MAX_FAILED_STARTS = 3  # of workers in a row, as when one is out of memory beside another that is ending


class RayWorker(Worker):
    """A worker that ends its process when its GPU no longer answers, so that Ray starts another."""

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        try:
            return {"row": json.dumps(super().__call__(json.loads(row["row"])))}
        except torch.AcceleratorError:
            os._exit(1)


def connect(stack: ExitStack, arguments: Namespace) -> tuple[int, Record]:
    """Connects to a cluster, or starts one on this machine, until the stack ends; returns the number of workers, by
    default what there are GPUs for, and what each needs."""
    if ":" in arguments.device:
        raise ValueError(f"--device {arguments.device} must be a kind, such as cuda: Ray gives each worker its GPUs.")
    num_workers, num_gpus, is_own = arguments.workers, arguments.gpus_per_worker, arguments.address is None
    num_gpus = float(arguments.device == "cuda") if num_gpus is None else num_gpus
    num_cpus = os.cpu_count() or 1
    options = {"log_to_driver": arguments.verbose, "logging_level": "INFO" if arguments.verbose else "ERROR"}
    if is_own:  # one processor more than workers have, for what Ray Data runs; blocks hold rows of text
        options |= {"num_cpus": max(num_cpus, num_workers or 1) + 1, "object_store_memory": 2**28}
        options["include_dashboard"] = False
    if not arguments.verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(arguments.address or "local", **options)
    signal.signal(signal.SIGTERM, handler)  # which Ray has put its own in place of
    stack.callback(ray.shutdown)
    found = ray.cluster_resources().get("GPU", 0)
    if num_workers is None:
        num_workers = max(1, int(found // num_gpus)) if num_gpus else 1
    if (needed := num_gpus * (num_workers if is_own else 1)) > found:  # a cluster may grow
        raise ValueError(f"Workers need {needed:g} GPUs, see --gpus-per-worker, but there are {found:g}.")
    return num_workers, {"num_cpus": max(1, num_cpus // num_workers) if is_own else 1, "num_gpus": num_gpus}


def start_ray(stack: ExitStack, arguments: Namespace) -> Callable[..., Iterator[Record]]:
    """See [`connect`]; returns what runs rows on the cluster."""
    num_workers, needs = connect(stack, arguments)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = arguments.verbose
    context.max_consecutive_actor_init_deaths = MAX_FAILED_STARTS
    context.execution_no_progress_timeout_s = -1  # a clip may take an hour

    def run(load: Load, options: Record, rows: list[Row]) -> Iterator[Record]:
        size = min(num_workers, len(rows))
        # A row that waits at a busy worker saves its pauses, but no other can take it, which counts if there are few.
        pool = ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1 + (len(rows) > 20 * size))
        # A row a block, as a block is what is made again.
        blocks = ray.data.from_items([{"row": json.dumps(row)} for row in rows], override_num_blocks=len(rows))
        for row in blocks.map(RayWorker, fn_constructor_args=(load, options), compute=pool, **needs).iter_rows():
            yield json.loads(row["row"])

    return run


def start_actors(
    stack: ExitStack, arguments: Namespace, load: Load, options: Record
) -> list[Callable[[Row], Awaitable[Record]]]:
    """See [`connect`]; waits until workers have started, and returns what runs a row on each, with an `error` where
    `MAX_DEATHS` of them have died of it."""
    num_workers, needs = connect(stack, arguments)
    remote = ray.remote(**needs)(RayWorker)
    actors = [remote.remote(load, options) for _ in range(num_workers)]
    ray.get([actor.__ray_ready__.remote() for actor in actors])

    async def run(number: int, row: Row) -> Record:
        for _ in range(MAX_DEATHS):
            try:
                return json.loads((await actors[number].__call__.remote({"row": json.dumps(row)}))["row"])
            except ray.exceptions.RayError:
                # Not by `max_restarts`: Ray would restart for ever what then dies while it loads.
                actors[number] = remote.remote(load, options)
                await actors[number].__ray_ready__.remote()  # raises then
        return {"error": f"{MAX_DEATHS} workers died of it"}

    return [partial(run, number) for number in range(num_workers)]
