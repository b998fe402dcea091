"""Trackers: any object with a log, several callbacks, and TensorBoard's own reader over what its writer wrote."""

import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from training import make_adapter, make_pair

import cylora
from cylora import ConfigError, InputError, LoraTrainer, LoraTrainingConfig, TrainingStep
from cylora.trackers import TensorBoardLogger, all_of, log_to, scalars

RECORD = TrainingStep(step=4, loss=0.5, learning_rate=1e-3, grad_norm=2.0, perplexity=math.exp(0.5))


class Run:
    """What wandb and trackio call a run."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, Any]]] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))


def train(on_step: Any, steps: int = 4, log_every: int = 2) -> LoraTrainer:
    trainer = LoraTrainer(LoraTrainingConfig(log_every=log_every, learning_rate=0.01), on_step=on_step)
    adapter = make_adapter()
    for step in range(steps):
        trainer.step(1.0 / (step + 1), adapter, *make_pair())
    return trainer


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard itself finds in a folder: steps and values by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


# ---------------------------------------------------------------- any tracker


def test_tracker_gets_the_steps_under_the_names_of_hugging_face() -> None:
    run = Run()
    history = train(log_to(run)).training_history
    assert [step for step, _ in run.logged] == [2, 4]
    for step, values in run.logged:
        record = history[step - 1]
        assert values == {
            "train/loss": record.loss,
            "train/grad_norm": record.grad_norm,
            "train/learning_rate": record.learning_rate,
        }


def test_tracker_is_one_line_away() -> None:
    run = Run()
    LoraTrainer(LoraTrainingConfig(), on_step=cylora.trackers.log_to(run))
    assert cylora.trackers.log_to is log_to


@pytest.mark.parametrize("tracker", [None, 3, SimpleNamespace(log=3)])
def test_tracker_without_log_is_refused(tracker: Any) -> None:
    message = r"tracker must have a method log\(values, step=\.\.\.\), got (NoneType|int|SimpleNamespace)"
    with pytest.raises(ConfigError, match=message):
        log_to(tracker)


def test_tracker_that_raises_reaches_the_caller_and_the_step_is_done() -> None:
    def fail(values: object, step: int) -> None:
        raise ConnectionError("no network")

    trainer, adapter = (
        LoraTrainer(LoraTrainingConfig(log_every=1), on_step=log_to(SimpleNamespace(log=fail))),
        make_adapter(),
    )
    with pytest.raises(ConnectionError, match="no network"):
        trainer.step(1.0, adapter, *make_pair())
    assert trainer.total_steps() == 1


# ---------------------------------------------------------------- several callbacks


def test_all_of_calls_everyone_in_order() -> None:
    calls: list[tuple[str, int]] = []
    train(all_of(lambda record: calls.append(("a", record.step)), lambda record: calls.append(("b", record.step))))
    assert calls == [("a", 1), ("b", 1), ("a", 3), ("b", 3)]
    all_of()(RECORD)  # nobody


def test_one_that_raises_does_not_keep_the_others_from_their_turn() -> None:
    seen: list[TrainingStep] = []

    def fail(name: str) -> Any:
        def on_step(record: TrainingStep) -> None:
            raise ConnectionError(name)

        return on_step

    with pytest.raises(ConnectionError, match="first"):
        all_of(fail("first"), seen.append, fail("second"))(RECORD)
    assert seen == [RECORD]


def test_ctrl_c_in_a_callback_is_not_held_back() -> None:
    seen: list[TrainingStep] = []

    def interrupted(record: TrainingStep) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        all_of(interrupted, seen.append)(RECORD)
    assert seen == []


def test_callback_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(ConfigError, match="callback 1 must be callable, got int"):
        all_of(print, 3)  # type: ignore[arg-type]


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    with TensorBoardLogger(tmp_path / "new" / "folder") as board:
        history = train(board).training_history
        board.log({"eval/accuracy": 0.75, "eval/count": np.int64(3)}, step=4)
    found = read(tmp_path / "new" / "folder")
    columns = {"train/loss": "loss", "train/grad_norm": "grad_norm", "train/learning_rate": "learning_rate"}
    for name, column in columns.items():
        values = history.column(column).astype(np.float32)  # what TensorBoard keeps
        assert found.pop(name) == [(2, values[1]), (4, values[3])]
    assert found == {"eval/accuracy": [(4, 0.75)], "eval/count": [(4, 3.0)]}


def test_tensorboard_takes_numbers_that_are_not_finite(tmp_path: Path) -> None:
    with TensorBoardLogger(tmp_path) as board:
        board(RECORD._replace(loss=math.nan, grad_norm=math.inf, skipped=True))
    found = read(tmp_path)
    assert math.isnan(found["train/loss"][0][1])
    assert found["train/grad_norm"] == [(5, math.inf)]


def test_flush_puts_everything_into_the_file(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, flush_seconds=1e6)
    board(RECORD)
    board.flush()
    assert read(tmp_path)["train/loss"] == [(5, 0.5)]
    board.close()


def test_logger_is_a_tracker_itself(tmp_path: Path) -> None:
    with TensorBoardLogger(tmp_path) as board:
        log_to(board)(RECORD)
    assert read(tmp_path)["train/grad_norm"] == [(5, 2.0)]


def test_closed_logger_refuses_and_closes_twice(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path)
    board.close()
    board.close()
    board.flush()
    with pytest.raises(InputError, match="a TensorBoardLogger must be open to log, got one that is closed"):
        board(RECORD)
    assert read(tmp_path) == {}


@pytest.mark.parametrize(
    ("values", "step", "message"),
    [
        ({"a": 1.0, "b": "x"}, 1, "value 'b' must be a real number, got 'x'"),
        ({"a": 1.0}, -1, "step must be an integer >= 0, got -1"),
        ({"a": 1.0}, 1.5, "step must be an integer, got 1.5"),
    ],
)
def test_values_are_checked_before_anything_is_written(
    tmp_path: Path, values: dict[str, Any], step: Any, message: str
) -> None:
    with TensorBoardLogger(tmp_path) as board, pytest.raises(InputError, match=message):
        board.log(values, step=step)
    assert read(tmp_path) == {}


@pytest.mark.parametrize("folder", ["", None, 3])
def test_folder_must_be_a_path(folder: Any) -> None:
    with pytest.raises(ConfigError, match="folder must be a path, got "):
        TensorBoardLogger(folder)


@pytest.mark.parametrize("seconds", [0, -1.0, math.inf, math.nan, "1"])
def test_flush_seconds_is_checked_before_the_folder_is_made(tmp_path: Path, seconds: Any) -> None:
    with pytest.raises(ConfigError, match="flush_seconds must be a number of seconds > 0, got "):
        TensorBoardLogger(tmp_path / "new", flush_seconds=seconds)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="file"):
        TensorBoardLogger(tmp_path / "file" / "x")


def test_missing_tensorboard_is_said_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    message = r"TensorBoardLogger needs tensorboard \(.*\): pip install 'cylora\[tensorboard\]'"
    with pytest.raises(InputError, match=message):
        TensorBoardLogger(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_forked_child_writes_nothing_and_does_not_hang(tmp_path: Path) -> None:
    with TensorBoardLogger(tmp_path) as board:
        board(RECORD)
        board.flush()
        child = os.fork()
        if not child:
            for _ in range(100):  # more than the queue takes, whose thread the child has not
                board(RECORD)
            board.flush()
            board.close()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        board(RECORD._replace(step=5))
    assert read(tmp_path)["train/loss"] == [(5, 0.5), (6, 0.5)]


def test_another_process_is_known_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = TensorBoardLogger(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: -1)
        board(RECORD)
        board.flush()
    board.close()
    assert read(tmp_path) == {}


def test_scalars_are_plain_numbers_by_name() -> None:
    assert scalars(RECORD) == {"train/loss": 0.5, "train/grad_norm": 2.0, "train/learning_rate": 1e-3}
