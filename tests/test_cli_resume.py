"""`cylora train --resume`: a run that was killed, stopped or full ends with the bits of one that never was."""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_cli import COMMAND, ENVIRONMENT

from cylora import LoraTrainer, LoraTrainingConfig, _cli_train
from cylora._cli_run_folder import RunFolder
from cylora.errors import FormatError
from cylora.formats import list_generations, load_checkpoint, load_generation, save_generation
from cylora.tasks.run import TrainingRun

OUTPUTS = ["adapters/latest/adapter_config.json", "adapters/latest/adapter_model.safetensors", "history.jsonl"]

TASK = """
import numpy as np
from cylora import AdapterSet

class Task:
    stop_at = None

    def __init__(self, lora_config, seed):
        self.adapters = AdapterSet({"linear": (8, 4), "other": (4, 4)}, lora_config, seed=seed)
        self.seed = seed

    def loss_and_gradients(self, step, gradients):
        if step == self.stop_at:
            raise RuntimeError("stopped")
        gradients.vector[:] = np.random.default_rng([self.seed, step]).normal(size=gradients.vector.size)
        gradients.vector[:] += self.adapters.flat.vector
        return float(np.square(self.adapters.flat.vector).sum())

    def evaluate(self):
        return {"size": float(np.abs(self.adapters.flat.vector).sum()), "and another": -1e-300}
"""
STEPS = ("--max-steps", "40", "--schedule", "cosine", "--warmup-steps", "5", "--log-every", "0")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder with a task of the user's, and forget it afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "mine.py").write_text(TASK)
    yield tmp_path  # type: ignore[misc]
    sys.modules.pop("mine", None)


@pytest.fixture
def run(run: Callable[..., SimpleNamespace]) -> Callable[..., SimpleNamespace]:
    """Return the function of that name, with the user's module fresh at each call."""

    def run_afresh(*arguments: object) -> SimpleNamespace:
        sys.modules.pop("mine", None)
        return run(*arguments)

    return run_afresh


@pytest.fixture
def whole(run: Callable[..., SimpleNamespace], folder: Path) -> Path:
    """Return the folder of a run that nothing interrupted."""
    assert run("train", "--task", "mine:Task", "--output", "whole", *STEPS).code == 0
    return folder / "whole"


def stop_at(step: int | None) -> None:
    """Let the user's task fail at ``step`` when it is imported next."""
    Path("mine.py").write_text(TASK.replace("stop_at = None", f"stop_at = {step}"))


def assert_same_outputs(one: Path, two: Path, outputs: list[str]) -> None:
    for name in outputs:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("state_dtype", ["float32", "8bit"])
def test_killed_run_goes_on_to_the_same_bits(folder: Path, threads: str, state_dtype: str) -> None:
    """A real process, killed with -9 as soon as its third checkpoint is there."""
    options = ["--max-steps", "600", "--save-every", "50", "--state-dtype", state_dtype, "--quiet"]
    command = [*COMMAND, "train", *options, "--output"]
    subprocess.run([*command, "whole"], check=True, env=ENVIRONMENT, timeout=120, stdout=subprocess.DEVNULL)
    process = subprocess.Popen([*command, "killed"], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    third = folder / "killed" / "checkpoints" / "checkpoint-00000003.safetensors"
    while not third.exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "killed" / "history.jsonl").exists()
    resume = [*COMMAND, "train", "--resume", "killed", "--threads", threads, "--quiet"]
    done = subprocess.run(resume, check=True, env=ENVIRONMENT, timeout=120, capture_output=True)
    assert done.stdout == b"killed\n"
    assert_same_outputs(folder / "whole", folder / "killed", [*OUTPUTS, "measures.jsonl"])
    assert len(list_generations(folder / "killed" / "checkpoints")) == 2


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 17, 39])
def test_failed_run_goes_on_to_the_same_bits(
    run: Callable[..., SimpleNamespace], folder: Path, whole: Path, cut: int
) -> None:
    """Checkpoints come every 4 steps here; whatever was learned before the failure is saved too."""
    stop_at(cut)
    assert run("train", "--task", "mine:Task", "--output", "cut", *STEPS).code == 1
    stop_at(None)
    done = run("train", "--resume", "cut")
    assert (done.code, done.err) == (0, "")
    assert "digits" not in done.out
    assert "mine:Task, seed 0: 40 steps\n" in done.out
    assert_same_outputs(whole, folder / "cut", [*OUTPUTS, "measures.jsonl", "config.toml"])


def test_run_without_a_checkpoint_yet_begins_again(
    run: Callable[..., SimpleNamespace], folder: Path, whole: Path
) -> None:
    stop_at(2)
    run("train", "--task", "mine:Task", "--output", "cut", *STEPS)
    for _, path in list_generations(folder / "cut" / "checkpoints"):
        path.unlink()
    stop_at(None)
    done = run("train", "--resume", "cut")  # it has adapters, so its checkpoints are lost: no reason to begin again
    assert done.code == 2
    assert "cut/checkpoints: must hold a checkpoint-<number>.safetensors, got none" in done.err
    (folder / "cut" / "adapters" / "latest").unlink()
    assert run("train", "--resume", "cut").code == 0
    assert_same_outputs(whole, folder / "cut", [*OUTPUTS, "measures.jsonl"])


def test_a_failed_start_of_a_resumed_run_leaves_its_settings(
    run: Callable[..., SimpleNamespace], folder: Path, whole: Path
) -> None:
    (folder / "cut").mkdir()
    (folder / "cut" / "config.toml").write_bytes((whole / "config.toml").read_bytes())
    stop_at(0)
    assert run("train", "--resume", "cut").code == 1
    assert [path.name for path in (folder / "cut").iterdir()] == ["config.toml"]
    stop_at(None)
    assert run("train", "--resume", "cut").code == 0
    assert_same_outputs(whole, folder / "cut", [*OUTPUTS, "measures.jsonl"])


def test_what_a_killed_run_left_half_written_is_removed(
    run: Callable[..., SimpleNamespace], folder: Path, whole: Path
) -> None:
    half = ".123.0123456789abcdef.tmp"
    left = [whole / f".history.jsonl{half}", whole / "adapters" / f".adapter{half}"]
    left[0].write_bytes(b"half")
    left[1].mkdir()
    (left[1] / "adapter_config.json").write_bytes(b"half")
    assert run("train", "--resume", "whole").code == 0
    assert not any(path.exists() for path in left)


def test_ctrl_c_then_resume(run: Callable[..., SimpleNamespace], folder: Path, whole: Path) -> None:
    source = TASK.replace('raise RuntimeError("stopped")', "import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    Path("mine.py").write_text(source.replace("stop_at = None", "stop_at = 21"))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = run("train", "--task", "mine:Task", "--output", "cut", *STEPS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.code == 130
    assert "22 steps of 40, stopped early" in done.out
    stop_at(None)
    assert run("train", "--resume", "cut").code == 0
    assert_same_outputs(whole, folder / "cut", OUTPUTS)
    measured = [json.loads(line)["step"] for line in (folder / "cut" / "measures.jsonl").read_text().splitlines()]
    assert measured == sorted(measured)
    assert {0, 22, 40} <= set(measured)


def test_complete_run_only_writes_its_outputs_again(
    run: Callable[..., SimpleNamespace], folder: Path, whole: Path
) -> None:
    kept = {name: (whole / name).read_bytes() for name in [*OUTPUTS, "measures.jsonl"]}
    before = list_generations(whole / "checkpoints"), os.readlink(whole / "adapters" / "latest")
    (whole / "history.jsonl").unlink()
    done = run("train", "--resume", "whole", "--quiet")
    assert (done.code, done.out) == (0, "whole\n")
    assert {name: (whole / name).read_bytes() for name in kept} == kept
    assert (list_generations(whole / "checkpoints"), os.readlink(whole / "adapters" / "latest")) == before
    (whole / "adapters" / "latest").unlink()
    assert run("train", "--resume", "whole", "--quiet").code == 0
    assert {name: (whole / name).read_bytes() for name in kept} == kept


def test_adapters_older_than_the_checkpoint_are_published_anew(
    run: Callable[..., SimpleNamespace], folder: Path, whole: Path
) -> None:
    """As after a kill between the last checkpoint and the adapters."""
    stop_at(30)
    run("train", "--task", "mine:Task", "--output", "cut", *STEPS)
    latest = folder / "cut" / "adapters" / "latest"
    older = os.readlink(latest)
    stop_at(None)
    assert run("train", "--resume", "cut").code == 0
    newer = latest.resolve()
    latest.unlink()
    latest.symlink_to(older)
    for path in newer.iterdir():
        path.unlink()
    newer.rmdir()
    assert run("train", "--resume", "cut").code == 0
    assert os.readlink(latest) == newer.name
    assert_same_outputs(whole, folder / "cut", OUTPUTS)


def test_a_run_may_be_made_longer(run: Callable[..., SimpleNamespace], folder: Path) -> None:
    options = ["--task", "mine:Task", "--warmup-steps", 3]
    assert run("train", *options, "--output", "long", "--max-steps", 30).code == 0
    assert run("train", *options, "--output", "short", "--max-steps", 12).code == 0
    done = run("train", "--resume", "short", "--max-steps", 30, "--save-every", 0, "--log-every", 3)
    assert done.code == 0
    assert_same_outputs(folder / "long", folder / "short", OUTPUTS)
    document = tomllib.loads((folder / "short" / "config.toml").read_text())
    assert (document["training"]["max_steps"], document["run"]["save_every"]) == (30, 0)
    assert done.err.splitlines()[0].startswith("step 15/30, ")


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "none"], "--resume none must be the folder of a run, got one without config.toml"),
        (["--resume", "."], "--resume . must be the folder of a run, got one without config.toml"),
        (["--resume", "a\0b"], "--resume a\\\\x00b must be the folder of a run, got one without config.toml"),
        (["--resume", "whole", "--output", "x"], "--resume goes on with a run as it is, got --output too"),
        (["--resume", "whole", "--config", "x"], "--resume goes on with a run as it is, got --config too"),
        (["--fallback"], "--fallback goes with --resume"),
        (
            ["--resume", "whole", "--learning-rate", "1"],
            "a run goes on with its own settings: only --save-every, --max-steps, --log-every, --threads may be given, "
            "got --learning-rate",
        ),
        (
            ["--resume", "whole", "--max-steps", "39"],
            "max_steps must not be below the steps that are done, got 39 for a run that has done 40",
        ),
        (["--resume", "whole", "--rank", "2"], "a run goes on with its own settings: .*, got --rank"),
        (["--resume", "whole", "--threads", "0"], r"threads \(if not None\) must be an integer in \[1, 64\], got 0"),
    ],
)
def test_wrong_arguments_are_refused(
    run: Callable[..., SimpleNamespace], whole: Path, arguments: list[str], message: str
) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    done = run("train", *arguments)
    assert (done.code, done.out) == (2, "")
    expected = message if ".*" in message or "\\" in message else re.escape(message)
    assert re.fullmatch(f"cylora: error: {expected}\n", done.err), done.err
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_folder_that_another_process_trains_in_is_refused(run: Callable[..., SimpleNamespace], whole: Path) -> None:
    descriptor = os.open(whole, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    done = run("train", "--resume", "whole")
    assert done.code == 2
    got = "must be a folder nobody uses, got one that another process, or one it started, is training in"
    assert done.err == f"cylora: error: --resume whole {got}\n"
    os.close(descriptor)
    assert run("train", "--resume", "whole").code == 0


def test_file_system_without_locks_is_no_obstacle(
    run: Callable[..., SimpleNamespace], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("cylora._cli_run_folder.fcntl.flock", none)
    assert run("train", "--resume", "whole").code == 0


def test_checkpoint_of_other_adapters_is_refused(
    run: Callable[..., SimpleNamespace], folder: Path, whole: Path
) -> None:
    (folder / "mine.py").write_text(TASK.replace("(4, 4)}", "(4, 5)}"))
    done = run("train", "--resume", "whole")
    assert done.code == 2
    assert re.search(r"whole/checkpoints: the adapters must be those of task 'mine:Task', got AdapterSet", done.err)


def test_checkpoint_that_is_none_of_a_runs_is_refused(run: Callable[..., SimpleNamespace], whole: Path) -> None:
    checkpoints = whole / "checkpoints"
    saved = load_generation(checkpoints)
    save_generation(checkpoints, saved.trainer, saved.adapters, extra={"mine": 1})
    done = run("train", "--resume", "whole")
    assert done.code == 2
    assert "whole/checkpoints: generation 11: the run's progress must be a mapping with the keys" in done.err


def test_settings_that_no_longer_fit_the_checkpoint_are_refused(
    run: Callable[..., SimpleNamespace], whole: Path
) -> None:
    config = whole / "config.toml"
    config.write_text(config.read_text().replace('state_dtype = "float32"', 'state_dtype = "8bit"'))
    done = run("train", "--resume", "whole")
    assert done.code == 2
    assert "adam dtype must be '8bit', as configured, got 'float32'" in done.err


@pytest.mark.parametrize("all_damaged", [False, True])
def test_older_generation_only_when_asked_for(
    run: Callable[..., SimpleNamespace],
    folder: Path,
    whole: Path,
    all_damaged: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stop_at(30)
    run("train", "--task", "mine:Task", "--output", "cut", *STEPS)
    stop_at(None)
    (_, older), (_, newest) = list_generations(folder / "cut" / "checkpoints")
    for path in (older, newest) if all_damaged else (newest,):
        raw = bytearray(path.read_bytes())
        raw[-40] ^= 1
        path.write_bytes(raw)
    done = run("train", "--resume", "cut")
    assert done.code == 2
    assert f"{newest.name}: 'sha256' must be that of all bytes before it" in done.err
    assert f"an older one is there: {older.name}" in done.err
    done = run("train", "--resume", "cut", "--fallback")
    if all_damaged:
        assert done.code == 2
        assert f"{older.name}: 'sha256' must be" in done.err
    else:
        assert done.code == 0
        assert f"passed over a damaged checkpoint: cut/checkpoints/{newest.name}" in caplog.text
        assert_same_outputs(whole, folder / "cut", OUTPUTS)
        assert newest.with_suffix(".damaged").exists()
        for _, path in list_generations(folder / "cut" / "checkpoints"):  # two, and both good
            assert load_checkpoint(path).trainer.total_steps() > 20


# ---------------------------------------------------------------------- bad days


def full(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_checkpoint_that_cannot_be_written_does_not_end_the_training(
    run: Callable[..., SimpleNamespace], folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cli_train, "save_generation", full)
    done = run("train", "--task", "mine:Task", "--output", "full", *STEPS)
    assert done.code == 1
    lines = done.err.splitlines()
    problem = "full/checkpoints was not written: No space left on device"
    assert lines == [*[f"warning: {problem}; the training goes on"] * 9, f"cylora: error: {problem}"]
    assert_same_outputs(whole, folder / "full", OUTPUTS)


def test_settings_that_cannot_be_written_leave_nothing(
    run: Callable[..., SimpleNamespace], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cli_train, "replace_file", full)
    done = run("train", "--task", "mine:Task", "--output", "new/full")
    assert (done.code, done.out) == (2, "")
    assert done.err == "cylora: error: --output new/full cannot be used: No space left on device\n"
    assert not (folder / "new").exists()


def test_nothing_learned_leaves_an_old_folder_as_it_was(run: Callable[..., SimpleNamespace], folder: Path) -> None:
    (folder / "old").mkdir()
    Path("mine.py").write_text(TASK.replace("def evaluate(self):", "def evaluate(self):\n        raise RuntimeError"))
    assert run("train", "--task", "mine:Task", "--output", "old").code == 1
    assert list((folder / "old").iterdir()) == []


def test_discard_removes_nothing_that_was_there(folder: Path) -> None:
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "adapters").mkdir()
    (folder / "run" / "config.toml").write_text("")
    there = RunFolder.existing(folder / "run")
    there.create()
    there.discard()
    assert sorted(path.name for path in (folder / "run").iterdir()) == ["adapters", "checkpoints", "config.toml"]


# ---------------------------------------------------------------------- parts


def test_progress_of_a_run_comes_back(folder: Path) -> None:
    task: Any = SimpleNamespace(name="t", adapters=None, can_evaluate=True)
    run = TrainingRun(task, LoraTrainer())
    assert TrainingRun(task, LoraTrainer()).progress() == {
        "measure_names": [], "measures": [], "task_seconds": 0.0, "step_seconds": 0.0,
    }  # fmt: skip
    run.measures = [(0, {"b": 0.1, "a": 1e300}), (7, {"b": -1e-300, "a": 0.0})]
    run.task_seconds, run.step_seconds = 1.5, 0.25
    twin = TrainingRun(task, LoraTrainer())
    twin.restore(json.loads(json.dumps(run.progress())))
    assert twin.measures == run.measures
    assert list(twin.measures[0][1]) == ["b", "a"]
    assert (twin.task_seconds, twin.step_seconds) == (1.5, 0.25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measures": [[0, "0.5"]]}, "measures must be .step, a number for each name., got"),
        ({"measures": [["x", "0.5", "1"]]}, "measures must be"),
        ({"measures": [[0, "0.5", "x"]]}, "measures must be"),
        ({"measures": [[]]}, "measures must be"),
        ({"measures": [[0, 1, 10**400]]}, "measures must be"),
        ({"measures": 3}, "measures must be"),
        ({"measure_names": 3}, "measures must be"),
        ({"task_seconds": -1}, "task_seconds must be finite and >= 0, got -1"),
        ({"step_seconds": "1"}, "step_seconds must be finite and >= 0, got '1'"),
        ({"more": 1}, "the run's progress must be a mapping with the keys"),
    ],
)
def test_progress_that_is_none_changes_nothing(change: dict[str, Any], message: str) -> None:
    run = TrainingRun(SimpleNamespace(name="t", adapters=None), LoraTrainer(LoraTrainingConfig()))  # type: ignore[arg-type]
    good = {"measure_names": ["a", "b"], "measures": [[0, "1", "2"]], "task_seconds": 1.0, "step_seconds": 1.0}
    with pytest.raises(FormatError, match=message):
        run.restore(good | change)
    assert run.measures == []
