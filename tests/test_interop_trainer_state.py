"""Against real transformers: its TrainerState loads what we write, and writes the same text."""

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest

from cylora import TrainingHistory
from cylora.formats import save_trainer_state

# What the peers' next versions will change is between them.
pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def state_type() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import TrainerState
    return TrainerState


def test_transformers_loads_the_state_and_writes_the_same_text(state_type: Any, tmp_path: Path) -> None:
    history = TrainingHistory()
    for step in range(40):
        history.append(loss=math.nan if step == 7 else 2 / (step + 1), learning_rate=1e-3, grad_norm=0.5)
    path, again = tmp_path / "trainer_state.json", tmp_path / "again.json"
    measures = [(0, {"accuracy": 0.1}), (40, {"accuracy": 0.9})]
    save_trainer_state(history, path, max_steps=80, logging_steps=4, eval_steps=40, save_steps=8, measures=measures)
    state = state_type.load_from_json(str(path))
    assert (state.global_step, state.max_steps, state.epoch) == (40, 80, 0.5)
    assert (state.logging_steps, state.eval_steps, state.save_steps) == (4, 40, 8)
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    assert len(losses) == 10
    assert losses[1] == pytest.approx((2 / 5 + 2 / 6 + 2 / 7) / 3)
    assert state.log_history[-1] == {"eval_accuracy": 0.9, "epoch": 0.5, "step": 40}
    state.save_to_json(str(again))
    ours, theirs = json.loads(path.read_text()), json.loads(again.read_text())
    assert {key: theirs[key] for key in ours} == ours


def test_every_field_has_the_type_of_theirs(state_type: Any, tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    save_trainer_state(TrainingHistory(), path)
    ours, fields = json.loads(path.read_text()), {field.name for field in dataclasses.fields(state_type)}
    assert set(ours) <= fields
    fresh = dataclasses.asdict(state_type())
    for name, value in ours.items():
        same_kind = type(value) is type(fresh[name]) or isinstance(value, float)
        assert same_kind, f"{name}: {value!r} for {fresh[name]!r}"
