"""End this process while its online trainers work, in the way named: worker_exit.py WAY SEED."""

import asyncio
import itertools
import random
import sys
import threading
import time
from typing import Any, NoReturn

from tenants import Tenants
from training import make_pair

from cylora import AdapterSet, Gradients, LoraConfig, StateError
from cylora.serving import OnlineTrainer, ServingMetrics
from cylora.serving import online as online_module


def main(way: str, seed: int) -> None:
    """Keep workers busy, with small steps under the GIL or large ones without it, and end in the middle."""
    chance = random.Random(seed)
    size = chance.choice([8, 64, 512, 2048])
    adapters = {f"t{i}": AdapterSet({"x": (size, size)}, LoraConfig(rank=8), seed=i) for i in range(4)}
    gradients = Gradients(adapters["t0"])
    gradients.vector.fill(0.01)
    target = Tenants(adapters=dict(adapters))
    policy = "block" if way == "blocked" else "drop_oldest"
    online = OnlineTrainer(target, workers=2, queue_size=16, policy=policy, metrics=ServingMetrics())

    def flood() -> None:
        for i in itertools.count():
            try:
                online.submit(f"t{i % 4}", 0.5, gradients)
            except StateError:  # this process is ending
                return

    threading.Thread(target=flood, daemon=True).start()
    while not target.calls:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.02))
    if way == "exit":
        sys.exit(3)
    if way == "raise":
        raise RuntimeError("on purpose")
    if way == "waiter":  # no daemon: the interpreter waits for it, and it for a step
        threading.Thread(target=wait_for, args=(online, gradients)).start()
    if way == "asyncio":
        asyncio.run(ask(online, gradients))
    if way == "hung":
        hang(target, online)
    if way == "last":
        leave_last_jobs()


def wait_for(online: OnlineTrainer, gradients: Gradients) -> None:
    """Print that a ticket was fulfilled, one that no newer job has driven out."""
    while True:
        error = online.submit("t0", 0.5, gradients).exception(30)
        if error is None:
            print("got a record", flush=True)
            return


async def ask(online: OnlineTrainer, gradients: Gradients) -> None:
    """Leave futures behind that nobody awaits."""
    for _ in range(20):
        (await online.asubmit("t1", 0.5, gradients)).cancel()


def hang(target: Tenants, online: OnlineTrainer) -> None:
    """Let the target never come back: the process ends all the same."""
    online_module.EXIT_SECONDS = 0.2
    entered = threading.Event()

    def step_many(jobs: Any) -> NoReturn:
        entered.set()
        while True:
            time.sleep(3600)

    online._stepper._target.step_many = step_many  # type: ignore[method-assign]
    entered.wait()
    print("left behind", flush=True)


def leave_last_jobs() -> None:
    """End during a step, with a job that waits: the step is done and reported, the job is dropped."""
    target = Tenants("plug", "a")
    online = OnlineTrainer(target, on_result=lambda tenant, record: print(tenant, record.step, flush=True))
    target.gate.clear()
    online.submit("plug", 0.5, *make_pair())
    assert target.entered.wait(30)
    waiting = online.submit("a", 0.5, *make_pair())
    waiting.add_done_callback(lambda ticket: print(type(ticket.exception()).__name__, flush=True))
    waiting.add_done_callback(lambda _: target.gate.set())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
