"""trainer_state.json: what it says of a history, and that it is strict JSON whatever the numbers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cylora import ConfigError, InputError, TrainingHistory
from cylora.formats import save_trainer_state, trainer_state


def history(losses: list[float], limit: int | None = None, norm: float = 2.0) -> TrainingHistory:
    made = TrainingHistory(limit)
    for step, loss in enumerate(losses):
        made.append(loss=loss, learning_rate=step / 8, grad_norm=norm + step)
    return made


def entry(step: int, loss: float, of: int) -> dict[str, float]:
    return {"loss": loss, "grad_norm": 1.0 + step, "learning_rate": (step - 1) / 8, "epoch": step / of, "step": step}


def test_every_step_is_an_entry_with_the_names_of_hugging_face() -> None:
    state = trainer_state(history([4.0, 3.0, 2.0]))
    assert state["log_history"] == [entry(1, 4.0, 3), entry(2, 3.0, 3), entry(3, 2.0, 3)]
    assert {key: value for key, value in state.items() if key != "log_history"} == {
        "epoch": 1.0, "global_step": 3, "max_steps": 3, "logging_steps": 1, "eval_steps": 0, "save_steps": 0,
        "train_batch_size": None, "num_train_epochs": 1, "num_input_tokens_seen": 0, "total_flos": 0,
        "best_metric": None, "best_global_step": None, "best_model_checkpoint": None, "is_local_process_zero": True,
        "is_world_process_zero": True, "is_hyper_param_search": False, "trial_name": None, "trial_params": None,
        "stateful_callbacks": {},
    }  # fmt: skip


def test_entry_of_several_steps_has_the_mean_of_their_losses() -> None:
    state = trainer_state(history([4.0, 2.0, 1.0, 0.5, 9.0]), logging_steps=2, max_steps=10)
    assert state["log_history"] == [entry(2, 3.0, 10), entry(4, 0.75, 10)]
    assert (state["logging_steps"], state["epoch"], state["num_train_epochs"]) == (2, 0.5, 1)


def test_epochs_are_as_long_as_is_said() -> None:
    state = trainer_state(history([1.0] * 5), steps_per_epoch=2, max_steps=7)
    assert (state["epoch"], state["num_train_epochs"]) == (2.5, 4)
    assert [row["epoch"] for row in state["log_history"]] == [0.5, 1.0, 1.5, 2.0, 2.5]


def test_evaluations_stand_behind_the_step_they_follow() -> None:
    measures = [(0, {"accuracy": 0.25}), (2, {"accuracy": 0.5, "eval_loss": 1})]
    state = trainer_state(history([4.0, 3.0, 2.0]), measures=measures, eval_steps=2, save_steps=1)
    assert state["log_history"] == [
        {"eval_accuracy": 0.25, "epoch": 0.0, "step": 0},
        entry(1, 4.0, 3),
        entry(2, 3.0, 3),
        {"eval_accuracy": 0.5, "eval_loss": 1.0, "epoch": 2 / 3, "step": 2},
        entry(3, 2.0, 3),
    ]
    assert (state["eval_steps"], state["save_steps"]) == (2, 1)


def test_evaluations_whose_names_would_clash_all_get_the_prefix() -> None:
    state = trainer_state(TrainingHistory(), measures=[(0, {"a": 1.0, "eval_a": 2.0})])
    assert state["log_history"] == [{"eval_a": 1.0, "eval_eval_a": 2.0, "epoch": 0.0, "step": 0}]


def test_what_is_no_history_is_refused() -> None:
    with pytest.raises(InputError, match="history must be a TrainingHistory, got list"):
        trainer_state([])  # type: ignore[arg-type]


def test_history_that_dropped_steps_tells_of_those_it_has() -> None:
    state = trainer_state(history([4.0, 3.0, 2.0, 1.0], limit=3), logging_steps=2)
    assert state["global_step"] == 4
    assert state["log_history"] == [entry(2, 3.0, 4), entry(4, 1.5, 4)]


def test_no_steps_are_a_state_too() -> None:
    state = trainer_state(TrainingHistory(), max_steps=0)
    assert (state["epoch"], state["global_step"], state["num_train_epochs"]) == (0.0, 0, 0)
    assert state["log_history"] == []


def test_numbers_that_are_not_finite_are_left_out_and_the_file_is_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    odd = history([math.nan, 4.0, math.inf, -math.inf, 2.0, 1.7e308, 1.7e308], norm=math.nan)
    save_trainer_state(odd, path, logging_steps=2, measures=[(4, {"a": math.nan, "b": 1.0})])

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    state = json.loads(path.read_text(), parse_constant=refuse)
    assert state["log_history"] == [
        {"loss": 4.0, "learning_rate": 1 / 8, "epoch": 2 / 7, "step": 2},
        {"learning_rate": 3 / 8, "epoch": 4 / 7, "step": 4},
        {"eval_b": 1.0, "epoch": 4 / 7, "step": 4},
        {"loss": 0.85e308, "learning_rate": 5 / 8, "epoch": 6 / 7, "step": 6},
    ]


def test_file_is_sorted_indented_and_ends_in_a_line_feed(tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    save_trainer_state(history([1.0]), path)
    text = path.read_text()
    assert text == json.dumps(trainer_state(history([1.0])), indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_steps": -1}, ConfigError, r"max_steps \(if not None\) must be an integer >= 0, got -1"),
        ({"logging_steps": 0}, ConfigError, "logging_steps must be an integer >= 1, got 0"),
        ({"eval_steps": 0.5}, ConfigError, "eval_steps must be an integer, got 0.5"),
        ({"save_steps": -1}, ConfigError, "save_steps must be an integer >= 0, got -1"),
        ({"steps_per_epoch": 0}, ConfigError, r"steps_per_epoch \(if not None\) must be an integer >= 1, got 0"),
        ({"measures": [(1, {"a": "x"})]}, InputError, "measure 'a' must be a real number, got 'x'"),
        ({"measures": [(-1, {})]}, InputError, "a measure's step must be an integer >= 0, got -1"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        save_trainer_state(history([1.0]), tmp_path / "trainer_state.json", **arguments)
    assert list(tmp_path.iterdir()) == []
