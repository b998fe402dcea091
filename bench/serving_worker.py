"""The server of docs/examples/server and a learner that never pauses, for serving.py, which starts this file.

thread     the learner is a thread of the server and publishes every step, as the example does
process    the server alone; it follows the directories that a learner publishes
learner    that learner, which publishes four times a second

``work`` is "whole" (gradients by the model's forward and backward pass, then the step), "steps" (gradients that were
computed once) or "large" (the same for adapters of a million parameters, which a language model would have).
"""

import argparse
import asyncio
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from mmap import mmap
from pathlib import Path
from types import SimpleNamespace

os.environ["OPENBLAS_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "examples" / "server"))

import learner as learning
import numpy as np
import uvicorn
from app import Service, application, be_prompt
from client import digits
from learner import Learner, adapters_of
from model import DigitReader
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cylora import AdapterSet, Gradients, LoraConfig
from cylora.formats import load_peft, peft_files, publish_directory

SERVED = "tenant0"
TENANTS = {
    "whole": [f"tenant{number}" for number in range(64)],
    "steps": [f"tenant{number}" for number in range(64)],
    "large": [f"large{number}" for number in range(4)],
}
LARGE = {f"layers.{number}.q_proj": (2048, 2048) for number in range(32)}  # 1,048,576 parameters with rank 8
BUDGET = 2**28
PUBLISH_SECONDS, LOOK_SECONDS = 0.25, 0.02
COUNT_EVERY = 32

Job = tuple[str, float, Gradients]


class Reader(DigitReader):
    """The example's model, which also has large adapters; nobody is read to by those."""

    def new_adapters(self, tenant: str) -> AdapterSet:
        """Return what this tenant begins with."""
        is_large = tenant in TENANTS["large"]
        return AdapterSet(LARGE, LoraConfig(rank=8), seed=0) if is_large else super().new_adapters(tenant)


def jobs(learner: Learner, work: str) -> Iterator[Job]:
    """Yield one job after the other, for one tenant after the other."""
    _, turned, labels = digits()
    rng = np.random.default_rng(0)

    def computed(tenant: str) -> Job:
        adapters = adapters_of(learner.restored(tenant))
        if work == "large":
            gradients = Gradients(adapters)
            rng.standard_normal(dtype=np.float32, out=gradients.vector)
            return tenant, 1.0, gradients
        batch = rng.integers(len(labels), size=16)
        return tenant, *learner.reader.loss_and_gradients(adapters, turned[batch], labels[batch].tolist())

    if work != "whole":
        yield from cycle([computed(tenant) for tenant in TENANTS[work]])
    for tenant in cycle(TENANTS[work]):
        yield computed(tenant)


def opened(folder: Path, work: str, cpu: int) -> Learner:
    """Return a learner with all tenants in memory."""
    learning.DigitReader = Reader  # type: ignore[misc]
    learner = Learner(folder, BUDGET, queue_size=64, cpus=[cpu])
    for tenant in {SERVED, *TENANTS[work]}:
        learner.create(tenant)
    return learner


def serve(app: Starlette, cpu: int, realtime: bool) -> None:
    """Serve on one CPU until a signal."""
    os.sched_setaffinity(0, {cpu})
    if realtime:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    be_prompt()
    uvicorn.run(app, port=0, access_log=False, ws="none")


def with_thread(folder: Path, work: str, serving: int, its_cpu: int, realtime: bool) -> None:
    """Serve, and learn in a thread while ``POST /learning?on=1`` was the last of its kind."""
    learner = opened(folder / "tenants", work, its_cpu)
    may_learn = threading.Event()

    def feed() -> None:
        learner.give_way()
        for job in jobs(learner, work):
            may_learn.wait()
            learner.online.submit(*job)

    async def switch(request: Request) -> Response:
        if request.query_params["on"] == "1":
            may_learn.set()
        else:
            may_learn.clear()
            await asyncio.to_thread(learner.online.flush)
        return JSONResponse(learner.metrics.values()["steps"])

    app = application(learner, save_seconds=1e6)
    app.router.routes.append(Route("/learning", switch, methods=["POST"]))
    threading.Thread(target=feed, daemon=True).start()
    serve(app, serving, realtime)


class Following(Service):
    """Serves what is ``latest`` among published directories."""

    def __init__(self, root: Path) -> None:
        reader = DigitReader()
        super().__init__(SimpleNamespace(reader=reader, give_way=None, close=lambda: None))  # type: ignore[arg-type]
        self._root, self._place = root, ""
        self._snapshot = SimpleNamespace(adapters=reader.new_adapters(SERVED), version=0)
        threading.Thread(target=self._follow, daemon=True).start()

    async def _served(self, request: Request) -> SimpleNamespace:  # type: ignore[override]
        return self._snapshot

    def _follow(self) -> None:
        for version in iter(lambda: self._snapshot.version + 1, None):
            while (place := self._latest()) == self._place:
                time.sleep(LOOK_SECONDS)
            self._place, self._snapshot = (
                place,
                SimpleNamespace(adapters=load_peft(self._root / place), version=version),
            )

    def _latest(self) -> str:
        try:
            return os.readlink(self._root / "latest")
        except FileNotFoundError:
            return self._place


def with_process(folder: Path, work: str, serving: int, its_cpu: int, realtime: bool) -> None:
    """Serve what `beside` publishes."""
    serve(Starlette(routes=Following(folder / "published").routes()), serving, realtime)


def beside(folder: Path, work: str, serving: int, its_cpu: int, realtime: bool) -> None:
    """Learn without a pause; steps so far stand in the file ``steps``."""
    if serving == its_cpu and hasattr(os, "SCHED_IDLE"):  # what nobody else wants of that CPU
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    learner = opened(folder / "tenants", work, its_cpu)
    learner.give_way()
    with (folder / "steps").open("w+b") as file:
        file.write(bytes(8))
        file.flush()
        counter = mmap(file.fileno(), 8)
    (folder / "published").mkdir()
    due = time.monotonic()
    for number, job in enumerate(jobs(learner, work)):
        learner.online.submit(*job)
        if number % COUNT_EVERY == 0:
            struct.pack_into("q", counter, 0, int(learner.metrics.values()["steps"]))
        if time.monotonic() > due:
            snapshot = learner.restored(SERVED)
            publish_directory(folder / "published", SERVED, snapshot.version, peft_files(snapshot.adapters), keep=3)
            due = time.monotonic() + PUBLISH_SECONDS


ROLES: dict[str, Callable[[Path, str, int, int, bool], None]] = {
    "thread": with_thread,
    "process": with_process,
    "learner": beside,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=ROLES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("work", choices=TENANTS)
    parser.add_argument("serving", type=int, help="CPU")
    parser.add_argument("its_cpu", type=int, help="the learner's CPU")
    parser.add_argument("--realtime", action="store_true")
    options = vars(parser.parse_args())
    os.sched_setaffinity(0, {options["serving"], options["its_cpu"]})
    ROLES[options.pop("role")](**options)
