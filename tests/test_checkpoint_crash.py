"""kill -9 at random times in a training that saves: every save that was acknowledged loads, to the bit."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("worker_generations.py")


def killed(folder: Path, rounds: int, seed: int) -> dict[str, Any]:
    command = [sys.executable, str(WORKER), str(folder), str(rounds), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def check(result: dict[str, Any], rounds: int, figures: Callable[..., None]) -> None:
    figures(kills=rounds, acknowledged=result["acknowledged"], interrupted=result["interrupted"])
    assert not result["violations"], result["violations"][:5]
    assert result["acknowledged"] > rounds / 2  # a kill waits for 0.8 saves on average
    assert result["interrupted"] > rounds / 100  # in the middle of one


def test_every_acknowledged_save_survives_500_kills(tmp_path: Path, figures: Callable[..., None]) -> None:
    check(killed(tmp_path, 500, seed=1), 500, figures)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(4))
def test_every_acknowledged_save_survives_10_000_kills(tmp_path: Path, seed: int, figures: Callable[..., None]) -> None:
    check(killed(tmp_path, 2_500, seed + 10), 2_500, figures)
