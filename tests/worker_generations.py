"""A training that saves after each step and says so, until it is killed: forked from a process that has imported all.

``worker_generations.py FOLDER ROUNDS SEED`` forks a child for each round. It goes on from the newest checkpoint in
FOLDER, and after each `save_generation` that returned writes number and fingerprint to a pipe. Some saves and a random
time later the parent kills it and loads what the folder holds. It prints the outcome as JSON.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
from training import fill, fingerprint, make_set, make_trainer

from cylora import AdapterSet, Gradients, LoraTrainer
from cylora.formats.checkpoint import load_checkpoint
from cylora.formats.generations import list_generations, load_generation, save_generation

LONGEST = 0.02  # seconds


def describe(trainer: LoraTrainer, adapters: AdapterSet, rng: np.random.Generator) -> str:
    """Return what must be found again: all of the state, however it came to be."""
    return fingerprint(trainer.state_dict(), adapters, rng)


def start(folder: Path) -> tuple[LoraTrainer, AdapterSet, np.random.Generator]:
    """Return the training that the folder holds, or a new one."""
    if list_generations(folder):
        checkpoint = load_generation(folder)
        assert isinstance(checkpoint.adapters, AdapterSet)
        assert checkpoint.rng is not None
        return checkpoint.trainer, checkpoint.adapters, checkpoint.rng
    return make_trainer(history_limit=50), make_set(), np.random.default_rng(0)


def train(folder: Path, pipe: int) -> None:
    """Step and save for ever."""
    trainer, adapters, rng = start(folder)
    gradients = Gradients(adapters)
    while True:
        fill(gradients, int(rng.integers(1000)))
        trainer.accumulate(rng.random(), adapters, gradients)
        if rng.random() < 0.7:
            trainer.step_accumulated(adapters)
        path = save_generation(folder, trainer, adapters, rng=rng)
        line = f"{int(path.stem.partition('-')[2])} {describe(trainer, adapters, rng)}\n".encode()
        assert os.write(pipe, line) == len(line)  # shorter than PIPE_BUF: whole or not at all


def held(folder: Path) -> dict[int, str]:
    """Return number and fingerprint of every checkpoint in the folder, all of which must load."""
    found = {}
    for number, path in list_generations(folder):
        checkpoint = load_checkpoint(path)
        assert checkpoint.generation == number
        found[number] = describe(checkpoint.trainer, checkpoint.adapters, checkpoint.rng)
    return found


def run_and_kill(folder: Path, saves: int, seconds: float) -> tuple[list[str], int]:
    """Train in a child, killed so many seconds after so many saves; return what it said and how it ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            train(folder, writing)
        except BaseException as error:
            os.write(writing, f"error {type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os.close(writing)
    said = b""
    while said.count(b"\n") < saves and (chunk := os.read(reading, 4096)):
        said += chunk
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    while chunk := os.read(reading, 4096):
        said += chunk
    os.close(reading)
    _, status = os.waitpid(child, 0)
    return said.decode().splitlines(), os.waitstatus_to_exitcode(status)


def main(folder: Path, rounds: int, seed: int) -> None:
    """Print how many saves were acknowledged, how many kills hit one in the middle, and every violation."""
    rng = random.Random(seed)
    acknowledged, interrupted, violations, last, expected = 0, 0, [], 0, ""
    for round_ in range(rounds):
        said, code = run_and_kill(folder, rng.choice((0, 0, 1, 1, 2)), rng.uniform(0, LONGEST))
        if code != -signal.SIGKILL or any(line.startswith("error") for line in said):
            violations.append(f"round {round_}: the training ended by itself with {code}: {said[-1:]}")
            break
        acknowledged += len(said)
        for line in said:
            number, expected = int(line.split()[0]), line.split()[1]
            if number != last + 1:
                violations.append(f"round {round_}: generation {number} after {last}")
            last = number
        leftovers = sum(name.endswith(".tmp") for name in os.listdir(folder))
        interrupted += leftovers
        if leftovers > 1:
            violations.append(f"round {round_}: {leftovers} leftovers, but at most one save was under way")
        try:
            found = held(folder)
        except Exception as error:
            violations.append(f"round {round_}: {type(error).__name__}: {error}")
            break
        if last and found.get(last) != expected:
            violations.append(f"round {round_}: acknowledged {last} {expected}, found {found}")
        newest = max(found, default=0)  # it may be one further: saved, but killed before it was said
        if newest not in (last, last + 1):
            violations.append(f"round {round_}: generation {newest} though {last} was the last acknowledged")
        last, expected = newest, found.get(newest, "")
    print(json.dumps({"acknowledged": acknowledged, "interrupted": interrupted, "violations": violations}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
