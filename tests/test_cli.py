"""The `cylora` command as its user meets it: what it prints, what it writes, and its exit codes."""

import builtins
import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load
from screen import Screen, on_terminal
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cylora
from cylora import LoraTrainingConfig, _cli_info, _cli_run_folder, _cli_train, cli, optimizer
from cylora.formats import durable, load_generation, load_peft
from cylora.tasks.digits import DigitsTask
from cylora.tasks.settings import FIELDS
from cylora.trackers import EVENT_WRITER, TensorBoardLogger

WEIGHTS = "adapters/latest/adapter_model.safetensors"
CHECKPOINTS = ["checkpoints", "checkpoints/checkpoint-*.safetensors"]
ADAPTERS = [
    "adapters", "adapters/adapter@*", "adapters/adapter@*/adapter_config.json",
    "adapters/adapter@*/adapter_model.safetensors", "adapters/latest",
]  # fmt: skip
LOGS = ["history.jsonl", "measures.jsonl", "picture.png", "trainer_state.json"]
FILES = sorted([*ADAPTERS, *CHECKPOINTS, "config.toml", *LOGS])
COMMAND = [sys.executable, "-c", "import sys; from cylora.cli import main; sys.exit(main())"]
# Where the package under test is imported from, for the processes that tests start elsewhere.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(cylora.__file__).parent.parent), "OPENBLAS_NUM_THREADS": "1"}

USERS_TASK = """
import os, signal, sys
import numpy as np
from cylora import AdapterSet

class Task:
    def __init__(self, lora_config, seed):
        self.adapters = AdapterSet({"linear": (8, 4)}, lora_config, seed=seed)

    def loss_and_gradients(self, step, gradients):
        gradients.vector[:] = self.adapters.flat.vector
        return float(np.square(self.adapters.flat.vector).sum())
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder; forget what a task of the user's left in sys.path and sys.modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path  # type: ignore[misc]
    sys.modules.pop("mine", None)


@pytest.fixture
def task(folder: Path) -> Callable[[str], None]:
    """Return a function that adds to the user's task module, mine.py; without a call it holds a good task."""
    (folder / "mine.py").write_text(USERS_TASK)

    def add(source: str) -> None:
        (folder / "mine.py").write_text(f"{USERS_TASK}\n{source}")

    return add


def contents(folder: Path) -> list[str]:
    """Return what is in a folder, once for all numbers and hashes in a name; links are not followed."""
    paths = [Path(parent, name) for parent, dirs, files in os.walk(folder) for name in dirs + files]
    shown = [str(path.relative_to(folder)) for path in paths if "__pycache__" not in path.parts]
    return sorted({re.sub(r"(checkpoint-|adapter@)[^/]*?(?=/|\.safetensors$|$)", r"\1*", name) for name in shown})


# ---------------------------------------------------------------------- the main job


def test_train_without_options_recovers_the_turned_digits(folder: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "train"], check=False, capture_output=True, text=True, env=ENVIRONMENT, cwd=folder, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (made,) = (folder / "runs").iterdir()
    assert re.fullmatch(r"digits-\d{8}-\d{6}", made.name)
    assert contents(made) == FILES

    upright, turned = (
        [float(value) for value in re.search(rf"^{name} accuracy +(\S+) +(\S+)$", done.stdout, re.M).groups()]  # type: ignore[union-attr]
        for name in ("upright", "turned")
    )
    assert turned[0] < 0.25
    assert turned[1] >= upright[0] - 0.02
    assert re.search(r"^trained +4,688 of 30,810 parameters \(15.2 %\)$", done.stdout, re.M)
    assert re.search(r"^speed +[\d,]+ steps per second, [\d.]+ % of the time in cylora's step$", done.stdout, re.M)
    assert f"written  runs/{made.name}: checkpoints, adapters, history.jsonl, measures.jsonl, trainer" in done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 20
    assert all(re.fullmatch(r"step \d+/1000, loss \S+, rate \S+, grad norm \S+", line) for line in lines)

    history = [json.loads(line) for line in (made / "history.jsonl").read_text().splitlines()]
    assert [record["step"] for record in history] == list(range(1000))
    measures = [json.loads(line) for line in (made / "measures.jsonl").read_text().splitlines()]
    assert [record["step"] for record in measures] == list(range(0, 1001, 50))
    assert measures[-1]["turned accuracy"] == pytest.approx(turned[1], abs=1e-4)
    assert (made / "picture.png").read_bytes().startswith(b"\x89PNG")
    state = json.loads((made / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"], state["epoch"]) == (1000, 1000, 1.0)
    assert (state["logging_steps"], state["eval_steps"], state["save_steps"]) == (50, 50, 100)
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == list(range(50, 1001, 50))
    evaluations = [entry for entry in state["log_history"] if "eval_turned accuracy" in entry]
    assert [entry["step"] for entry in evaluations] == list(range(0, 1001, 50))
    assert evaluations[-1]["eval_turned accuracy"] == measures[-1]["turned accuracy"]

    # The saved adapters are the ones that were measured.
    task = DigitsTask(LoraTrainingConfig.from_dict(DigitsTask.training_defaults).lora_config, 0)
    for name, adapter in load_peft(made / "adapters" / "latest").items():
        task.adapters[name].flat.vector[:] = adapter.flat.vector
    assert task.evaluate()["turned accuracy"] == pytest.approx(measures[-1]["turned accuracy"])


def test_written_config_repeats_the_run_to_the_bit(run: Callable[..., SimpleNamespace], folder: Path) -> None:
    assert run("train", "--output", "one", "--max-steps", 20, "--rank", 3, "--dropout", 0.1, "--seed", 4).code == 0
    assert run("train", "--output", "two", "--config", "one/config.toml", "--decay-steps", "none").code == 0
    for name in (WEIGHTS, "history.jsonl", "config.toml", "measures.jsonl"):
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes(), name
    document = tomllib.loads((folder / "one" / "config.toml").read_text())
    assert sorted((table, key) for table in document for key in document[table]) == sorted(
        (field.table, field.name) for field in FIELDS
    )
    assert document["run"] == {"task": "digits", "seed": 4, "eval_every": 1, "save_every": 2}
    assert document["training"]["max_steps"] == 20
    assert document["lora"]["rank"] == 3


OPTIONS = {
    "task": ("mine:Task", "mine:Task"),
    "seed": ("7", 7),
    "eval_every": ("3", 3),
    "save_every": ("4", 4),
    "learning_rate": ("0.5", 0.5),
    "weight_decay": ("0.25", 0.25),
    "max_grad_norm": ("inf", float("inf")),
    "warmup_steps": ("1", 1),
    "max_steps": ("2", 2),
    "log_every": ("0", 0),
    "beta1": ("0.5", 0.5),
    "beta2": ("0.75", 0.75),
    "eps": ("1e-6", 1e-6),
    "weight_decay_mode": ("l2", "l2"),
    "schedule": ("warmup_stable_decay", "warmup_stable_decay"),
    "min_learning_rate": ("1e-5", 1e-5),
    "decay_steps": ("1", 1),
    "nonfinite": ("skip", "skip"),
    "history_limit": ("5", 5),
    "state_dtype": ("8bit", "8bit"),
    "threads": ("2", 2),
    "lora_plus_ratio": ("4", 4.0),
    "rate_pattern": ("linear=0.5", {"linear": 0.5}),
    "weight_decay_pattern": ("linear=0", {"linear": 0.0}),
    "ema_decay": ("0.5", 0.5),
    "divergence": ("rollback", "rollback"),
    "divergence_factor": ("7", 7.0),
    "divergence_window": ("3", 3),
    "rollback_every": ("2", 2),
    "early_stopping_patience": ("9", 9),
    "early_stopping_min_delta": ("0.25", 0.25),
    "rank": ("2", 2),
    "alpha": ("3", 3.0),
    "dropout": ("0.125", 0.125),
    "target_modules": ("a, b", ["a", "b"]),
    "rank_pattern": ("linear=3,", {"linear": 3}),
    "alpha_pattern": (" linear = 0.5", {"linear": 0.5}),
}
SWITCHES = {"train_a": ("--no-train-a", False), "use_rslora": ("--use-rslora", True)}


def test_every_field_has_an_option(
    run: Callable[..., SimpleNamespace], folder: Path, task: Callable[[str], None]
) -> None:
    assert list(OPTIONS) == [field.name for field in FIELDS if field.name not in SWITCHES]
    assert list(SWITCHES) == [field.name for field in FIELDS if field.kind is bool]
    assert list(cli.HELP) == [field.name for field in FIELDS]
    flags = [part for name, (text, _) in OPTIONS.items() for part in (f"--{name.replace('_', '-')}", text)]
    assert run("train", *flags, *(flag for flag, _ in SWITCHES.values()), "--output", "out").code == 0
    document = tomllib.loads((folder / "out" / "config.toml").read_text())
    written = {key: value for table in document.values() for key, value in table.items()}
    assert written == {name: value for name, (_, value) in (OPTIONS | SWITCHES).items()}


def test_patterns_go_through_the_config_file_in_their_order(
    run: Callable[..., SimpleNamespace], folder: Path, task: Callable[[str], None]
) -> None:
    options = ("--rate-pattern", "linear=2", "--rank-pattern", "none", "--max-steps", 3, "--task", "mine:Task")
    assert run("train", *options, "--output", "one").code == 0
    assert run("train", "--config", "one/config.toml", "--output", "two").code == 0
    assert run("train", *options, "--rate-pattern", "none", "--output", "three").code == 0
    weights = [(folder / name / WEIGHTS).read_bytes() for name in ("one", "two", "three")]
    assert weights[0] == weights[1] != weights[2]
    document = tomllib.loads((folder / "one" / "config.toml").read_text())
    assert (document["training"]["rate_pattern"], document["lora"]["rank_pattern"]) == ({"linear": 2.0}, {})


def test_a_run_that_is_out_of_patience_is_done(
    run: Callable[..., SimpleNamespace], folder: Path, task: Callable[[str], None]
) -> None:
    task("Task.loss_and_gradients = lambda self, step, gradients: max(5.0 - step, 2.0)")
    done = run("train", "--task", "mine:Task", "--max-steps", 50, "--early-stopping-patience", 4, "--output", "out")
    assert done.code == 0
    assert done.out.startswith("mine:Task, seed 0: 8 steps of 50, stopped early\n")
    again = run("train", "--resume", "out")
    assert (again.code, again.out.splitlines()[0]) == (0, "mine:Task, seed 0: 8 steps of 50, stopped early")


def test_an_average_is_what_is_evaluated_published_and_exported(
    run: Callable[..., SimpleNamespace], folder: Path, task: Callable[[str], None]
) -> None:
    task("Task.evaluate = lambda self: {'sum': float(self.adapters.flat.vector.astype(float).sum())}")
    options = ("--task", "mine:Task", "--max-steps", 20, "--learning-rate", 0.1, "--warmup-steps", 0)
    assert run("train", *options, "--ema-decay", 0.9, "--output", "out").code == 0
    assert run("train", *options, "--output", "last").code == 0
    checkpoint = load_generation(folder / "out" / "checkpoints")
    average = checkpoint.trainer.ema_adapters(checkpoint.adapters).flat.vector
    published = load_peft(folder / "out" / "adapters" / "latest").flat.vector
    assert published.tobytes() == average.tobytes() != checkpoint.adapters.flat.vector.tobytes()
    last = load_peft(folder / "last" / "adapters" / "latest").flat.vector
    assert last.tobytes() == checkpoint.adapters.flat.vector.tobytes()
    assert run("export", "out", "--format", "peft", "--output", "exported").code == 0
    assert load_peft(folder / "exported").flat.vector.tobytes() == average.tobytes()
    measures = [json.loads(line) for line in (folder / "out" / "measures.jsonl").read_text().splitlines()]
    assert (measures[-1]["step"], measures[-1]["sum"]) == (20, float(average.astype(float).sum()))
    assert "of the weights, with ema_decay 0.9" in run("inspect", "out").out


def test_options_go_before_the_file_and_the_file_before_the_task(
    run: Callable[..., SimpleNamespace], folder: Path, task: Callable[[str], None]
) -> None:
    task("Task.training_defaults = {'max_steps': 1, 'beta1': 0.1, 'decay_steps': 9, 'lora_config': {'rank': 1}}")
    (folder / "a.toml").write_text(
        '[run]\ntask = "mine:Task"\n[training]\nmax_steps = 2\nbeta1 = 0.2\ndecay_steps = "none"\n'
    )
    assert run("train", "--config", "a.toml", "--max-steps", 3, "--output", "out").code == 0
    document = tomllib.loads((folder / "out" / "config.toml").read_text())
    assert document["training"]["max_steps"] == 3
    assert document["training"]["beta1"] == 0.2
    assert document["training"]["decay_steps"] == "none"
    assert document["lora"]["rank"] == 1
    assert contents(folder / "out") == [name for name in FILES if name != "measures.jsonl"]  # it does not evaluate


def test_task_is_found_in_the_users_folder_by_the_installed_command(folder: Path, task: Callable[[str], None]) -> None:
    done = subprocess.run(
        [sys.executable, "-P", *COMMAND[1:], "train", "--task", "mine:Task", "--max-steps", "2", "--quiet"],
        check=False, capture_output=True, text=True, env=ENVIRONMENT, cwd=folder, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"runs/mine-Task-\d{8}-\d{6}\n", done.stdout)


def test_summary_of_a_task_that_says_little(run: Callable[..., SimpleNamespace], task: Callable[[str], None]) -> None:
    done = run("train", "--task", "mine:Task", "--max-steps", 2)
    assert done.out.startswith("mine:Task, seed 0: 2 steps\n\ntrained  96 parameters\nspeed ")
    assert "accuracy" not in done.out


def test_no_steps_are_a_run_too(run: Callable[..., SimpleNamespace], folder: Path) -> None:
    done = run("train", "--max-steps", 0, "--output", "out")
    assert done.code == 0
    assert done.out.startswith("digits, seed 0: 0 steps\n")
    assert "speed" not in done.out
    assert contents(folder / "out") == FILES


def test_quiet_prints_the_folder_and_nothing_else(
    run: Callable[..., SimpleNamespace], folder: Path, task: Callable[[str], None]
) -> None:
    (folder / "out").mkdir()  # an empty folder is as good as a new one
    done = run("train", "--task", "mine:Task", "--max-steps", 2, "--quiet", "--output", "out")
    assert (done.code, done.out, done.err) == (0, "out\n", "")


def test_folders_of_one_second_are_told_apart(
    run: Callable[..., SimpleNamespace], folder: Path, task: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cli_run_folder.time, "strftime", lambda form: "20260101-120000")
    outs = [run("train", "--task", "mine:Task", "--max-steps", 1, "--quiet").out for _ in range(3)]
    assert outs == [f"runs/mine-Task-20260101-120000{number}\n" for number in ("", "-2", "-3")]


def test_large_and_small_measures_stay_readable(
    run: Callable[..., SimpleNamespace], task: Callable[[str], None]
) -> None:
    task("Task.evaluate = lambda self: {'a': 1e9, 'b': 1e-7, 'c': 0.0, 'd': -12.5}")
    done = run("train", "--task", "mine:Task", "--max-steps", 1)
    rows = [line.split() for line in done.out.splitlines()[3:7]]
    assert rows == [["a", *["1e+09"] * 2], ["b", *["1e-07"] * 2], ["c", *["0.0000"] * 2], ["d", *["-12.5000"] * 2]]


# ---------------------------------------------------------------------- wrong inputs

WRONG = [
    ([], "the following arguments are required: COMMAND (cylora --help shows what there is)"),
    (["trian"], "COMMAND invalid choice: 'trian'"),
    (["info", "now"], "unrecognized arguments: now (cylora info --help shows what there is)"),
    (["train", "--rnk", "8"], "unrecognized arguments: --rnk 8 (cylora train --help shows what there is)"),
    (["train", "--ran", "8"], "unrecognized arguments: --ran 8"),
    (["train", "extra"], "unrecognized arguments: extra"),
    (["train", "--max-steps"], "--max-steps expected one argument"),
    (["train", "--rank", "x"], "--rank must be an integer, got 'x'"),
    (["train", "--rank", "1.5"], "--rank must be an integer, got '1.5'"),
    (["train", "--alpha", "x"], "--alpha must be a number, got 'x'"),
    (["train", "--decay-steps", "nil"], "--decay-steps must be an integer or none, got 'nil'"),
    (["train", "--rank", "0"], "rank must be an integer >= 1, got 0"),
    (["train", "--rank", "none"], "--rank must be an integer, got 'none'"),
    (["train", "--rank-pattern", "hidden1=x"], "--rank-pattern must be NAME=INTEGER,..., got 'hidden1=x'"),
    (["train", "--rate-pattern", "hidden1"], "--rate-pattern must be NAME=NUMBER,..., got 'hidden1'"),
    (["train", "--rate-pattern", "a=1,a=2"], "--rate-pattern must not repeat a name, got 'a' twice"),
    (["train", "--rate-pattern", "q_proj=2"], "each key of rate_pattern must count for a module, got 'q_proj'"),
    (["train", "--rank-pattern", "q_proj=2"], "each key of rank_pattern must count for a module, got 'q_proj'"),
    (["train", "--lora-plus-ratio", "0"], "lora_plus_ratio must be in (0, 1e6], got 0.0"),
    (["train", "--rank", "200"], "rank must be at most 128, the digits network's width, got 200"),
    (["train", "--alpha", "-1"], "alpha must be in (0, 1e6], got -1.0"),
    (["train", "--dropout", "1"], "dropout must be in [0, 1), got 1.0"),
    (["train", "--target-modules", "q_proj"], "target_modules must be layers of the digits network"),
    (["train", "--target-modules", ""], "target_modules must be a non-empty sequence of non-empty names"),
    (["train", "--target-modules", "output,output"], "target_modules must not repeat a name"),
    (["train", "--learning-rate", "-1"], "learning_rate must be in [0, 1e6], got -1.0"),
    (["train", "--learning-rate", "nan"], "learning_rate must be in [0, 1e6], got nan"),
    (["train", "--weight-decay", "inf"], "weight_decay must be "),
    (["train", "--max-grad-norm", "0"], "max_grad_norm must be > 0"),
    (["train", "--warmup-steps", "-1"], "warmup_steps must be an integer >= 0, got -1"),
    (["train", "--max-steps", "-1"], "max_steps must be an integer >= 0, got -1"),
    (["train", "--beta1", "1"], "beta1 must be in [0, 1), got 1.0"),
    (["train", "--eps", "0"], "eps must be finite and >= 1e-30, got 0.0"),
    (["train", "--schedule", "foo"], "schedule must be one of 'constant', 'linear', 'cosine'"),
    (["train", "--weight-decay-mode", "foo"], "weight_decay_mode must be one of 'decoupled', 'l2', got 'foo'"),
    (["train", "--nonfinite", "foo"], "nonfinite must be one of 'raise', 'skip', got 'foo'"),
    (["train", "--history-limit", "0"], "history_limit must be an integer >= 1, got 0"),
    (["train", "--state-dtype", "float16"], "state_dtype must be one of 'float32', 'bfloat16', '8bit', got 'float16'"),
    (["train", "--threads", "0"], "threads (if not None) must be an integer in [1, 64], got 0"),
    (["train", "--threads", "65"], "threads (if not None) must be an integer in [1, 64], got 65"),
    (["train", "--threads", "all"], "--threads must be an integer or none, got 'all'"),
    (["train", "--seed", "-1"], "seed must be an integer in [0, 4294967295], got -1"),
    (["train", "--eval-every", "-1"], "eval_every must be an integer >= 0, got -1"),
    (["train", "--task", "nope"], "task must be 'digits' or 'module:factory', got 'nope'"),
    (["train", "--task", "nope:f"], "task 'nope:f': module 'nope' cannot be imported: ModuleNotFoundError"),
    (["train", "--task", "mine:nope"], "task 'mine:nope': module 'mine' has no 'nope'"),
    (["train", "--task", "mine:np"], "task 'mine:np': 'np' must be callable, got module"),
    (["train", "--task", "mine:list"], "task 'mine:list': module 'mine' has no 'list'"),
    (["train", "--config", "nope.toml"], "--config nope.toml cannot be read: No such file or directory"),
    (["train", "--config", "full"], "--config full cannot be read: Is a directory"),
    (["train", "--config", "a\0b"], "--config a\\x00b cannot be read: embedded null byte"),
    (["train", "--config", "mine.py"], "mine.py must be a TOML file: "),
    (["train", "--config", "table.toml"], "table.toml: unknown key 'optimizer'; the tables are run, training, lora"),
    (["train", "--config", "key.toml"], "key.toml: unknown key 'rnk' in [lora]; its keys are rank, alpha,"),
    (["train", "--config", "value.toml"], "value.toml: rank must be an integer, got '8'"),
    (["train", "--output", "full"], "--output full must be a new or empty folder, got one with files in it"),
    (["train", "--output", "mine.py"], "--output mine.py must be a new or empty folder, got a file"),
    (["train", "--output", "mine.py/x"], "--output mine.py/x cannot be used: Not a directory"),
    (["train", "--output", "broken"], "--output broken must be a new or empty folder, got a broken link"),
    (["train", "--output", "a\0b"], "--output a\\x00b cannot be used: "),
    (["train", "--output", "x" * 300], "cannot be used: File name too long"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(arguments)[:40] for arguments, _ in WRONG])
def test_wrong_input_is_one_line_and_exit_code_2(
    run: Callable[..., SimpleNamespace],
    folder: Path,
    task: Callable[[str], None],
    arguments: list[str],
    message: str,
) -> None:
    (folder / "full").mkdir()
    (folder / "full" / "kept").write_text("kept")
    (folder / "broken").symlink_to("nowhere")
    (folder / "table.toml").write_text("[optimizer]\n")
    (folder / "key.toml").write_text("[lora]\nrnk = 8\n")
    (folder / "value.toml").write_text('[lora]\nrank = "8"\n')
    before = contents(folder)
    done = run(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("cylora: error: ")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert "Traceback" not in done.err
    assert contents(folder) == before


def test_wrong_input_to_the_process_is_one_line_too(folder: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "train", "--rank", "0"], check=False, capture_output=True, text=True, env=ENVIRONMENT, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "cylora: error: rank must be an integer >= 1, got 0\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("Task.loss_and_gradients = 3", "loss_and_gradients must be a method, got int"),
        ("Task.loss_and_gradients = lambda self, step, gradients: None", "must return a number at step 0, got None"),
        ("Task.evaluate = lambda self: 3", "evaluate must return a mapping of names to numbers, got int"),
        ("Task.total_parameters = 3", "total_parameters must count the 96 of the adapters too, got 3"),
        ("Task = lambda lora_config, seed: None", "adapters must be an AdapterSet, got NoneType"),
        ("Task.training_defaults = {'beta1': 7}", "task 'mine:Task': training_defaults: beta1 must be in [0, 1)"),
        ("Task.training_defaults = {'x': 7}", "task 'mine:Task': training_defaults has unknown key 'x'"),
        ("1 / 0", "module 'mine' cannot be imported: ZeroDivisionError: division by zero ("),
    ],
)
def test_task_that_breaks_the_protocol_is_exit_code_2_and_leaves_nothing(
    run: Callable[..., SimpleNamespace], folder: Path, task: Callable[[str], None], source: str, message: str
) -> None:
    task(source)
    done = run("train", "--task", "mine:Task", "--output", "new/out")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("cylora: error: task 'mine:Task': ")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert contents(folder) == ["mine.py"]


@pytest.mark.parametrize("module", ["tqdm", "matplotlib", "tomli_w"])
def test_missing_extra_is_said_before_training_and_spares_info(
    run: Callable[..., SimpleNamespace], folder: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    done = run("train")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "cylora train needs more packages" in done.err
    assert module in done.err
    assert done.err.endswith("pip install 'cylora[train]'\n")
    assert contents(folder) == []
    assert run("info").code == 0


def test_missing_tensorboard_is_said_before_training_where_it_was_asked_for(
    run: Callable[..., SimpleNamespace], folder: Path, monkeypatch: pytest.MonkeyPatch, task: Callable[[str], None]
) -> None:
    monkeypatch.setitem(sys.modules, EVENT_WRITER, None)
    done = run("train", "--task", "mine:Task", "--tensorboard")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "cylora train needs more packages" in done.err
    assert done.err.endswith("pip install 'cylora[tensorboard]'\n")
    assert contents(folder) == ["mine.py"]
    assert run("train", "--task", "mine:Task", "--max-steps", 1).code == 0


def test_folder_that_is_not_writable_is_refused(
    run: Callable[..., SimpleNamespace], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "out").mkdir()
    monkeypatch.setattr(_cli_run_folder.os, "access", lambda path, mode: False)  # root may write anywhere
    done = run("train", "--output", "out")
    assert done.code == 2
    assert done.err == "cylora: error: --output out must be writable, got a folder that is not\n"


# ---------------------------------------------------------------------- failures while it runs

FAILS_AT_3 = """
good = Task.loss_and_gradients
def loss_and_gradients(self, step, gradients):
    if step == 3:
        {}
    return good(self, step, gradients)
Task.loss_and_gradients = loss_and_gradients
Task.evaluate = lambda self: {{"size": 1.0}}
"""


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (
            "raise ValueError('no more data')",
            1,
            r"task 'mine:Task' failed in loss_and_gradients at step 3: ValueError: no more data \(.*mine.py:\d+\)",
        ),
        ("sys.exit(9)", 1, r"failed in loss_and_gradients at step 3: SystemExit: 9 \(.*mine.py:\d+\)"),
        (
            "gradients.vector[5] = np.nan; return 1.0",
            1,
            "task 'mine:Task' cannot be trained on from step 3: gradient of linear.A must be finite, got nan",
        ),
        ("return 'x'", 2, "task 'mine:Task': loss_and_gradients must return a number at step 3, got 'x'"),
    ],
    ids=["raises", "exits", "NaN gradient", "breaks the protocol"],
)
def test_what_was_learned_before_a_failure_is_saved(
    run: Callable[..., SimpleNamespace],
    folder: Path,
    task: Callable[[str], None],
    failure: str,
    code: int,
    message: str,
) -> None:
    task(FAILS_AT_3.format(failure))
    done = run("train", "--task", "mine:Task", "--output", "out", "--max-steps", 8, "--eval-every", 2)
    assert done.code == code
    assert re.fullmatch(f"cylora: error: .*{message}.*\n", done.err), done.err
    assert "3 steps of 8, stopped early" in done.out
    assert "at step 2" in done.out
    assert contents(folder / "out") == FILES
    assert len((folder / "out" / "history.jsonl").read_text().splitlines()) == 3


def test_failure_before_the_first_step_leaves_nothing(
    run: Callable[..., SimpleNamespace], folder: Path, task: Callable[[str], None]
) -> None:
    task("Task.evaluate = lambda self: 1 / 0")
    done = run("train", "--task", "mine:Task")
    assert (done.code, done.out) == (1, "")
    assert "task 'mine:Task' failed in evaluate: ZeroDivisionError: division by zero (" in done.err
    assert contents(folder) == ["mine.py"]


def test_failure_of_the_last_evaluation_loses_nothing(
    run: Callable[..., SimpleNamespace], folder: Path, task: Callable[[str], None]
) -> None:
    task("calls = []\nTask.evaluate = lambda self: calls.append(1) or {'one': 1 / (2 - len(calls))}")
    done = run("train", "--task", "mine:Task", "--output", "out", "--max-steps", 2, "--eval-every", 0)
    assert done.code == 1
    assert "failed in evaluate: ZeroDivisionError" in done.err
    assert contents(folder / "out") == FILES


def test_file_that_cannot_be_written_does_not_keep_the_others_from_it(
    run: Callable[..., SimpleNamespace], folder: Path, task: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_file = durable.replace_file

    def full(path: Path, content: bytes) -> None:
        if path.name == "history.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(path, content)

    monkeypatch.setattr(_cli_train, "replace_file", full)
    done = run("train", "--task", "mine:Task", "--output", "out", "--max-steps", 2, "--log-every", 0)
    assert done.code == 1
    assert done.err == "cylora: error: out/history.jsonl was not written: No space left on device\n"
    assert contents(folder / "out") == sorted(
        [*ADAPTERS, *CHECKPOINTS, "config.toml", "picture.png", "trainer_state.json"]
    )


def test_weights_that_are_not_finite_are_not_saved(
    run: Callable[..., SimpleNamespace], folder: Path, task: Callable[[str], None]
) -> None:
    task(FAILS_AT_3.format("self.adapters.flat.vector[0] = np.inf; raise ValueError"))
    done = run("train", "--task", "mine:Task", "--output", "out", "--max-steps", 8)
    assert done.code == 1
    left = ["adapters", *CHECKPOINTS, "config.toml", *LOGS]
    assert contents(folder / "out") == left
    assert load_generation(folder / "out" / "checkpoints").trainer.total_steps() == 3  # from before it went wrong


def test_full_disk_under_stdout_is_one_line(
    run: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*values: object, file: Any = None, **options: object) -> None:
        if file is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_print(*values, file=file, **options)  # type: ignore[call-overload]

    real_print = print
    monkeypatch.setattr(builtins, "print", full)
    done = run("info")
    assert (done.code, done.err) == (1, "cylora: error: [Errno 28] No space left on device\n")


# ---------------------------------------------------------------------- Ctrl-C

INTERRUPTS_ITSELF = FAILS_AT_3.format("os.kill(os.getpid(), signal.SIGINT)")


def test_ctrl_c_stops_after_the_step_and_saves(
    run: Callable[..., SimpleNamespace], folder: Path, task: Callable[[str], None]
) -> None:
    task(INTERRUPTS_ITSELF)
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = run("train", "--task", "mine:Task", "--output", "out", "--max-steps", 8)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.code == 130
    assert "stopping after this step and saving; Ctrl-C again aborts" in done.err
    assert "4 steps of 8, stopped early" in done.out
    assert contents(folder / "out") == FILES
    assert len((folder / "out" / "history.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("when", "save_every"), [("the task", 0), ("a second Ctrl-C", 0), ("a second Ctrl-C, after a checkpoint", 2)]
)
def test_ctrl_c_that_aborts_is_one_line_and_130(
    run: Callable[..., SimpleNamespace], folder: Path, task: Callable[[str], None], when: str, save_every: int
) -> None:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt = "os.kill(os.getpid(), signal.SIGINT)"
    if when == "the task":
        task(f"Task = lambda lora_config, seed: {interrupt}")  # while the task is made there is nothing to save
    else:
        task(FAILS_AT_3.format(f"{interrupt}; {interrupt}"))
    try:
        done = run("train", "--task", "mine:Task", "--output", "out", "--log-every", 0, "--save-every", save_every)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.code, done.out) == (130, "")
    assert done.err.endswith("cylora: error: interrupted\n")
    if save_every:
        assert contents(folder / "out") == ["adapters", *CHECKPOINTS, "config.toml"]
        task("")
        sys.modules.pop("mine")
        assert run("train", "--resume", "out", "--max-steps", 5).code == 0
    else:
        assert not (folder / "out").exists()


def test_ctrl_c_that_is_ignored_stays_ignored(
    run: Callable[..., SimpleNamespace], folder: Path, task: Callable[[str], None]
) -> None:
    task(INTERRUPTS_ITSELF)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        done = run("train", "--task", "mine:Task", "--output", "out", "--max-steps", 8)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.code == 0
    assert "8 steps\n" in done.out


def test_command_runs_in_another_thread(
    run: Callable[..., SimpleNamespace], folder: Path, task: Callable[[str], None]
) -> None:
    done: list[SimpleNamespace] = []
    thread = threading.Thread(
        target=lambda: done.append(run("train", "--task", "mine:Task", "--output", "out", "--max-steps", 2))
    )
    thread.start()
    thread.join()
    assert done[0].code == 0


def test_sigint_to_a_real_process_saves_what_was_learned(folder: Path, task: Callable[[str], None]) -> None:
    # What started the tests may ignore SIGINT, and a child inherits that.
    listening = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {COMMAND[2]}"
    process = subprocess.Popen(
        [sys.executable, "-c", listening, "train", "--max-steps", "1000000", "--eval-every", "0", "--output", "out"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stderr is not None
    line = process.stderr.readline()  # the first progress: fifty steps are done
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert line.startswith("step 50/1000000, ")
    assert process.returncode == 130
    assert "stopping after this step and saving" in err
    assert "Traceback" not in err
    assert "steps of 1,000,000, stopped early" in out
    assert contents(folder / "out") == FILES
    steps = len((folder / "out" / "history.jsonl").read_text().splitlines())
    assert 50 <= steps < 1_000_000
    assert len(load((folder / "out" / WEIGHTS).read_bytes())) == 6


# ---------------------------------------------------------------------- TensorBoard


def test_tensorboard_gets_steps_and_evaluations_and_changes_no_bit(
    run: Callable[..., SimpleNamespace], folder: Path
) -> None:
    common = ("train", "--max-steps", 20, "--log-every", 5, "--eval-every", 15)
    assert run(*common, "--output", "plain").code == 0
    done = run(*common, "--output", "board", "--tensorboard")
    assert done.code == 0
    assert "written  board: tensorboard, checkpoints" in done.out
    for name in (WEIGHTS, "history.jsonl", "config.toml", "measures.jsonl", "trainer_state.json"):
        assert (folder / "plain" / name).read_bytes() == (folder / "board" / name).read_bytes(), name
    events = EventAccumulator(str(folder / "board" / "tensorboard"))
    events.Reload()
    steps = {name: [event.step for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert steps == {
        **{f"train/{name}": [5, 10, 15, 20] for name in ("loss", "grad_norm", "learning_rate")},
        **{f"eval/{name} accuracy": [0, 15, 20] for name in ("upright", "turned")},
    }
    history = [json.loads(line) for line in (folder / "board" / "history.jsonl").read_text().splitlines()]
    assert [event.value for event in events.Scalars("train/loss")] == [
        np.float32(history[step - 1]["loss"]) for step in (5, 10, 15, 20)
    ]
    assert run("train", "--resume", "board", "--max-steps", 20, "--tensorboard").code == 0


def test_tensorboard_that_fails_ends_itself_not_the_training(
    run: Callable[..., SimpleNamespace], folder: Path, task: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorBoardLogger, "log", full)
    monkeypatch.setattr(TensorBoardLogger, "close", full)
    done = run("train", "--task", "mine:Task", "--max-steps", 4, "--log-every", 1, "--output", "out", "--tensorboard")
    assert done.code == 0
    problem = "out/tensorboard was not written: No space left on device; the training goes on without it"
    assert done.err.splitlines().count(f"warning: {problem}") == 1
    assert load_generation(folder / "out" / "checkpoints").trainer.total_steps() == 4


def test_run_that_fails_at_once_leaves_no_events(
    run: Callable[..., SimpleNamespace], folder: Path, task: Callable[[str], None]
) -> None:
    task("Task.loss_and_gradients = lambda self, step, gradients: 1 / 0\nTask.evaluate = lambda self: {'a': 1.0}")
    assert run("train", "--task", "mine:Task", "--output", "out", "--tensorboard").code == 1
    assert contents(folder) == ["mine.py"]


# ---------------------------------------------------------------------- terminals and pipes


def in_terminal(arguments: list[str], environment: dict[str, str], columns: int = 100) -> str:
    """Run the command with its stderr on a terminal and return what was written there."""
    return on_terminal([*COMMAND, *arguments], environment, columns=columns)


@pytest.mark.parametrize("columns", [100, 0])
def test_terminal_shows_a_live_view_and_is_left_below_it(folder: Path, columns: int) -> None:
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "NO_COLOR"} | {"TERM": "xterm"}
    shown = in_terminal(["train", "--max-steps", "200"], environment, columns)
    assert "\x1b[32m" in shown
    screen = Screen(columns or 80, 24)
    screen.write(shown)
    bar, loss, norm, rate, evaluation, below = screen.lines
    assert re.fullmatch(r"digits 100%\|█+\| 200/200 \[[\d,]+ steps/s, 00:00 left\]", bar)
    assert re.fullmatch(r"loss +\S+ +[▁▂▃▄▅▆▇█]+", loss)
    assert re.fullmatch(r"norm +\S+ +[▁▂▃▄▅▆▇█]+", norm)
    assert re.fullmatch(r"rate +\S+ +[▁▂▃▄▅▆▇█]+", rate)
    assert re.fullmatch(r"eval +upright accuracy [\d.]+, turned accuracy [\d.]+ \(step 200\)", evaluation)
    assert (below, screen.row, screen.column) == ("", 5, 0)
    assert "step 50/200" not in shown


def test_no_color_is_respected_on_a_terminal(folder: Path) -> None:
    shown = in_terminal(["train", "--max-steps", "20"], {**ENVIRONMENT, "TERM": "xterm", "NO_COLOR": "1"})
    screen = Screen(100, 24)
    screen.write(shown)
    assert "20/20" in screen.lines[0]
    assert screen.colours == set()


def test_dumb_terminal_gets_lines(folder: Path) -> None:
    shown = in_terminal(["train", "--max-steps", "100"], {**ENVIRONMENT, "TERM": "dumb"})
    assert [line.split(",")[0] for line in shown.splitlines()] == ["step 50/100", "step 100/100"]
    assert "\x1b" not in shown


def test_quiet_terminal_shows_nothing(folder: Path) -> None:
    assert in_terminal(["train", "--max-steps", "20", "--quiet"], ENVIRONMENT) == ""


@pytest.mark.parametrize("arguments", [["info"], ["train", "--max-steps", "20"], ["train", "--help"]])
def test_reader_that_has_gone_is_no_traceback(folder: Path, arguments: list[str]) -> None:
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    # argparse itself ignores a failed write of its help, which depends on how Python buffers it.
    assert process.wait(timeout=60) in ((0, 141) if "--help" in arguments else (141,))
    assert b"Error" not in errors
    assert b"Traceback" not in errors
    if "20" in arguments:
        assert any(name.endswith("adapter_model.safetensors") for name in contents(folder))


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_closed_streams_do_not_lose_the_training(folder: Path, closed: str) -> None:
    redirect = {"stdout": ">&-", "stderr": "2>&-"}[closed]
    script = f'exec "$@" train --max-steps 20 --output out {redirect}'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *COMMAND], check=False, capture_output=True, env=ENVIRONMENT, timeout=60
    )
    assert done.returncode == 0
    assert contents(folder / "out") == FILES


def test_stdout_may_be_anything_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(text: str) -> int:
        raise BrokenPipeError

    redirected: list[int] = []
    monkeypatch.setattr(cli.os, "dup2", lambda source, target: redirected.append(target))
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", SimpleNamespace(write=gone, fileno=lambda: 77))
        assert cli.main(["info"]) == 141
    assert redirected == [77]
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["info"]) == 0


def test_error_without_stderr_is_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["train", "--rank", "0"]) == 2


def test_ctrl_c_without_stderr_only_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    interrupt = _cli_train._Interrupt()
    interrupt._handle(signal.SIGINT, None)
    assert interrupt.requested


def test_folder_whose_name_is_not_text_can_be_printed(folder: Path, task: Callable[[str], None]) -> None:
    done = subprocess.run(
        [*COMMAND, "train", "--task", "mine:Task", "--max-steps", "1", "--quiet", "--output", b"\xff"],
        check=False, capture_output=True, env=ENVIRONMENT, cwd=folder, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, b"\\udcff\n")


# ---------------------------------------------------------------------- help, version, info


def test_help_shows_every_option_with_its_default(run: Callable[..., SimpleNamespace]) -> None:
    done = run("train", "--help")
    assert (done.code, done.err) == (0, "")
    text = " ".join(done.out.split())
    for field in FIELDS:
        assert f"--{field.name.replace('_', '-')}" in done.out
    assert "peak learning rate (default: 0.0003; digits: 0.01)" in text
    assert "scaling is alpha / sqrt(rank) (default: no)" in text
    assert max(map(len, done.out.splitlines())) <= int(os.environ.get("COLUMNS", "80"))


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--help"], "train adapters and write"), (["info", "--help"], "Describe")]
)
def test_help_of_the_commands(run: Callable[..., SimpleNamespace], arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert done.code == 0
    assert words in done.out


def test_version(run: Callable[..., SimpleNamespace]) -> None:
    assert run("--version").out == f"cylora {cylora.__version__}\n"


def test_info_says_what_a_bug_report_needs(
    run: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CYLORA_NUM_THREADS", raising=False)
    done = run("info")
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in done.out.splitlines())
    assert facts["cylora"] == cylora.__version__
    assert facts["instruction set"] == f"{optimizer.isa} (built: {', '.join(optimizer.variants)})"
    assert re.fullmatch(r"1 unless a config says otherwise \(\d+ CPUs usable\)", facts["threads"])
    assert facts["Python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert facts["NumPy"].startswith(np.__version__)
    assert facts["extra 'train'"].startswith("tqdm ")
    assert facts["CPU"]
    assert facts["platform"]


def test_info_and_runs_go_by_the_environments_threads(
    run: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch, folder: Path, task: Callable[[str], None]
) -> None:
    train = ("train", "--task", "mine:Task", "--max-steps", 2)
    monkeypatch.setenv("CYLORA_NUM_THREADS", "3")
    assert re.search(r"^threads +3 unless a config says otherwise \(", run("info").out, re.MULTILINE)
    assert run(*train, "--output", "three").code == 0
    monkeypatch.setenv("CYLORA_NUM_THREADS", "many")
    for arguments in (("info",), (*train, "--output", "many")):
        done = run(*arguments)
        assert (done.code, done.out) == (2, "")
        assert done.err == "cylora: error: CYLORA_NUM_THREADS must be an integer in 1..64, got 'many'\n"
    assert run(*train, "--output", "one", "--threads", 1).code == 0
    assert tomllib.loads((folder / "three" / "config.toml").read_text())["training"]["threads"] == "none"
    assert tomllib.loads((folder / "one" / "config.toml").read_text())["training"]["threads"] == 1
    for name in (WEIGHTS, "history.jsonl"):
        assert (folder / "one" / name).read_bytes() == (folder / "three" / name).read_bytes()


@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
def test_digits_are_learned_with_compact_state_too(
    run: Callable[..., SimpleNamespace], folder: Path, state_dtype: str
) -> None:
    """And its bits do not depend on the threads, nor on who wrote the option down: the command line or a file."""
    assert run("train", "--state-dtype", state_dtype, "--threads", 1, "--output", "one").code == 0
    assert run("train", "--config", "one/config.toml", "--threads", 2, "--output", "two").code == 0
    for name in (WEIGHTS, "history.jsonl", "measures.jsonl"):
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()
    assert tomllib.loads((folder / "two" / "config.toml").read_text())["training"]["state_dtype"] == state_dtype
    measures = [json.loads(line) for line in (folder / "one" / "measures.jsonl").read_text().splitlines()]
    assert measures[0]["turned accuracy"] < 0.5
    assert measures[-1]["turned accuracy"] > 0.9


def test_info_where_the_system_says_little(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.delattr(_cli_info.os, "sched_getaffinity")
    monkeypatch.setattr(_cli_info.os, "cpu_count", lambda: None)
    assert _cli_info._usable_cpus() == 1
    assert _cli_info._version("no-such-distribution") == "missing"
    monkeypatch.setattr(_cli_info.platform, "processor", lambda: "")
    monkeypatch.setattr(_cli_info.platform, "machine", lambda: "riscv64")
    assert _cli_info._cpu_model(folder / "none") == "riscv64"
    (folder / "cpuinfo").write_text("processor : 0\nmodel name\t: A CPU\n")
    assert _cli_info._cpu_model(folder / "cpuinfo") == "A CPU"
    (folder / "cpuinfo").write_text("processor : 0\n")
    assert _cli_info._cpu_model(folder / "cpuinfo") == "riscv64"


# ---------------------------------------------------------------------- tasks that are wrong in less common ways


def test_interrupt_inside_the_task_saves_what_was_learned(run: Any, task: Callable[[str], None], folder: Path) -> None:
    """A library in the task may have its own handler, so that Ctrl-C surfaces there as KeyboardInterrupt."""
    task(
        "first = Task.loss_and_gradients\n"
        "def interrupted(self, step, gradients):\n"
        "    if step == 3: raise KeyboardInterrupt\n"
        "    return first(self, step, gradients)\n"
        "Task.loss_and_gradients = interrupted\n"
    )
    done = run("train", "--task", "mine:Task", "--output", "out", "--max-steps", 8)
    assert done.code == 130
    assert "3 steps of 8, stopped early" in done.out
    assert (folder / "out" / WEIGHTS).exists()


def test_interrupt_before_the_first_step_leaves_nothing(run: Any, task: Callable[[str], None], folder: Path) -> None:
    task("def evaluate(self): raise KeyboardInterrupt\nTask.evaluate = evaluate\n")
    assert run("train", "--task", "mine:Task", "--output", "new/out").code == 130
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("Task = lambda config: None", "the factory must take (lora_config, seed), got too many positional arguments"),
        (
            "def swapped(self, step, gradients):\n"
            "    self.adapters = AdapterSet({'linear': (8, 4)}, seed=1)\n"
            "    return 0.0\n"
            "Task.loss_and_gradients = swapped",
            "adapters must be the same object at every access, got another after step 0",
        ),
    ],
)
def test_task_that_breaks_the_protocol_in_silence_is_refused(
    run: Any, task: Callable[[str], None], folder: Path, source: str, message: str
) -> None:
    task(source)
    done = run("train", "--task", "mine:Task", "--output", "new/out")
    assert (done.code, done.err) == (2, f"cylora: error: task 'mine:Task': {message}\n")
    assert not (folder / "new").exists()


def test_task_factory_without_a_signature_is_called_all_the_same(run: Any, task: Callable[[str], None]) -> None:
    """Some built-ins do not tell what they take; what they return is checked as ever."""
    task("Task = dict")
    done = run("train", "--task", "mine:Task", "--output", "new/out")
    assert done.code == 1
    assert "task 'mine:Task' failed in the factory: TypeError: dict expected at most 1 argument, got 2" in done.err
