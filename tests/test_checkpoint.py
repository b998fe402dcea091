"""save_checkpoint and load_checkpoint: everything that training needs, to the bit, and nothing copied on the way."""

import base64
import gc
import hashlib
import json
import math
import os
import stat
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from checkpoints import do_one, taken_apart
from training import fingerprint, make_adapter, make_pair, make_set, make_trainer

from cylora import (
    AdapterSet,
    ConfigError,
    Gradients,
    InputError,
    LoraAdapter,
    LoraConfig,
    LoraTrainer,
    StateError,
    TrainerBusyError,
    __version__,
)  # fmt: skip
from cylora.formats import checkpoint as module
from cylora.formats import weights
from cylora.formats.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from cylora.formats.generators import KINDS

VARIETIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "ring": {"history_limit": 4},
    "ring that is not full": {"history_limit": 400},
    "l2, cosine, warm-up": {"weight_decay_mode": "l2", "schedule": "cosine", "warmup_steps": 3, "max_steps": 15},
    "no clipping, no decay": {"max_grad_norm": math.inf, "weight_decay": 0.0},
    "skip": {"nonfinite": "skip"},
    "bfloat16": {"state_dtype": "bfloat16", "schedule": "warmup_stable_decay", "decay_steps": 4},
    "8 bits, skip": {"state_dtype": "8bit", "nonfinite": "skip", "history_limit": 4, "threads": 2},
    "LoRA+, average, patience": {
        "lora_plus_ratio": 8.0, "ema_decay": 0.75, "early_stopping_patience": 3, "early_stopping_min_delta": 0.125
    },
    "LoRA-FA, rollback": {
        "train_a": False, "state_dtype": "8bit", "divergence": "rollback", "divergence_window": 2, "ema_decay": 0.5,
        "divergence_factor": 1.25, "rollback_every": 2, "history_limit": 3,
    },
}  # fmt: skip
MAKERS: dict[str, Callable[[], LoraAdapter | AdapterSet]] = {"lone": make_adapter, "set": make_set}


def everything(trainer: LoraTrainer, adapters: LoraAdapter | AdapterSet) -> str:
    """Return a fingerprint that does not depend on whether the trainer is bound yet."""
    members = adapters.values() if isinstance(adapters, AdapterSet) else [adapters]
    configs = [trainer.config.to_dict(), *(one.config.to_dict() for one in members)]
    return fingerprint(trainer.state_dict(), configs, adapters, list(trainer.training_history))


def run(trainer: LoraTrainer, adapters: LoraAdapter | AdapterSet, start: int, stop: int) -> None:
    for index in range(start, stop):
        do_one(trainer, adapters, index)


# ------------------------------------------------------------------ there and back


@pytest.mark.parametrize("variety", VARIETIES)
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("done", [0, 1, 3, 4, 8, 12], ids=lambda done: f"after {done}")
def test_a_loaded_training_is_the_saved_one_and_goes_on_like_it(
    tmp_path: Path, variety: str, kind: str, done: int
) -> None:
    """After 3 and 8 actions micro-batches are pending; after 0 nothing has happened yet."""
    trainer, adapters = make_trainer(**VARIETIES[variety]), MAKERS[kind]()
    run(trainer, adapters, 0, done)
    before = everything(trainer, adapters)
    save_checkpoint(trainer, adapters, tmp_path / "file", generation=7)
    assert everything(trainer, adapters) == before
    loaded = load_checkpoint(tmp_path / "file")
    assert everything(loaded.trainer, loaded.adapters) == before
    assert loaded.trainer.config == trainer.config
    assert type(loaded.adapters) is type(adapters)
    assert (loaded.generation, loaded.rng, loaded.extra) == (7, None, {})
    run(trainer, adapters, done, done + 12)
    run(loaded.trainer, loaded.adapters, done, done + 12)
    assert fingerprint(loaded.trainer, loaded.adapters) == fingerprint(trainer, adapters)


def test_mixed_configs_names_and_origin_come_back(tmp_path: Path) -> None:
    members = {
        "a": LoraAdapter(3, 4, LoraConfig(rank=2, alpha=5.0), seed=0),
        'ünï\x00 \n"\\': LoraAdapter(5, 2, LoraConfig(rank=1, use_rslora=True, dropout=0.25), seed=1),
        "c" * 3000: LoraAdapter(1, 1, LoraConfig(rank=2, alpha=5.0, target_modules=("x",)), seed=2),
    }
    adapters = AdapterSet.from_adapters(members)
    adapters.origin = {"base_model_name_or_path": "a/b", "more": [1, None, {"x": 0.5}]}
    save_checkpoint(make_trainer(), adapters, tmp_path / "file")
    loaded = load_checkpoint(tmp_path / "file").adapters
    assert isinstance(loaded, AdapterSet)
    assert list(loaded) == list(members)
    assert [one.config for one in loaded.values()] == [one.config for one in members.values()]
    assert [(one.d_in, one.d_out) for one in loaded.values()] == [(3, 4), (5, 2), (1, 1)]
    assert loaded.origin == adapters.origin
    assert fingerprint(loaded) == fingerprint(adapters)


SCHEMA_1 = Path(__file__).with_name("data") / "schema_1"


@pytest.mark.parametrize("name", ["lone", "set"])
def test_a_file_of_the_first_schema_is_read_and_goes_on(tmp_path: Path, name: str) -> None:
    """Files as an earlier cylora wrote them: what it did not know is what it did, and the next save says so."""
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(base64.b64decode((SCHEMA_1 / f"{name}.base64").read_text()))
    metadata, tensors = taken_apart(path)
    assert json.loads(metadata["cylora.checkpoint"])["schema"] == 1
    trainer, adapters, generation, rng, extra = load_checkpoint(path)
    assert (generation, extra, rng is None) == (3, {"epoch": 2}, name == "lone")
    assert np.array_equal(adapters.flat.vector, tensors["parameters"])
    state = trainer.state_dict()
    for key in ("m", "v") if name == "lone" else ("m", "v", "m_exponents", "v_exponents"):
        assert np.array_equal(state["adam"][key], tensors[f"adam.{key}"])
    assert np.array_equal(state["history"]["loss"], tensors["history.loss"])
    assert (state["ema"], state["watch"], state["good"]) == (None, None, None)
    config = trainer.config
    assert (config.lora_plus_ratio, config.train_a, config.ema_decay, config.divergence) == (1.0, True, None, "ignore")
    assert all(not one.config.rank_pattern for one in (adapters.values() if name == "set" else [adapters]))
    save_checkpoint(trainer, adapters, tmp_path / "again", generation=3, rng=rng, extra=extra)
    assert json.loads(taken_apart(tmp_path / "again")[0]["cylora.checkpoint"])["schema"] == 2
    again = load_checkpoint(tmp_path / "again")
    assert everything(again.trainer, again.adapters) == everything(trainer, adapters)
    with_average = load_checkpoint(path, ema_decay=0.5)  # an average may begin at any time
    for one in ((trainer, adapters), (again.trainer, again.adapters), (with_average.trainer, with_average.adapters)):
        if one[0].accumulated:
            one[0].step_accumulated(one[1])
        gradient = np.random.default_rng(4).normal(size=one[1].param_count()).astype(np.float32)
        one[0].step(1.0, one[1], gradient)
    assert fingerprint(again.trainer, again.adapters) == fingerprint(trainer, adapters)
    assert np.array_equal(with_average.adapters.flat.vector, adapters.flat.vector)


def test_the_order_of_a_patterns_keys_comes_back(tmp_path: Path) -> None:
    patterns = {"rate_pattern": {"q": 2.0, "k": 1.0, "out.proj": 4.0}, "weight_decay_pattern": {"k": 0.5, "a": 0.25}}
    lora = LoraConfig(rank_pattern={"z": 3, "a": 2}, alpha_pattern={"z": 0.5, "b": 2.0})
    adapters, trainer = make_set(), make_trainer(lora_config=lora, **patterns | {"weight_decay_pattern": {"k": 0.5}})
    trainer.step(1.0, adapters, Gradients(adapters))
    save_checkpoint(trainer, adapters, tmp_path / "file")
    config = load_checkpoint(tmp_path / "file").trainer.config
    assert config == trainer.config
    assert list(config.rate_pattern) == ["q", "k", "out.proj"]
    assert list(config.lora_config.rank_pattern) == ["z", "a"]


def test_what_a_config_no_longer_trains_does_not_load(tmp_path: Path) -> None:
    adapters, trainer = make_set(), make_trainer(train_a=False)
    trainer.step(1.0, adapters, Gradients(adapters))
    save_checkpoint(trainer, adapters, tmp_path / "file")
    with pytest.raises(StateError, match="adam sizes must be those that the config trains"):
        load_checkpoint(tmp_path / "file", train_a=True)


def test_moments_of_one_matrix_do_not_become_those_of_another_of_its_size(tmp_path: Path) -> None:
    adapters = AdapterSet({"a": (8, 8), "b": (8, 8)}, seed=0)
    trainer = make_trainer(rate_pattern={"a": 0})
    trainer.step(1.0, adapters, Gradients(adapters))
    save_checkpoint(trainer, adapters, tmp_path / "file")
    with pytest.raises(StateError, match=r"what the config trains must be what the saved one did, \[\(128, 128\)\]"):
        load_checkpoint(tmp_path / "file", rate_pattern={"b": 0})
    load_checkpoint(tmp_path / "file", rate_pattern={"a": 0, "b": 0.5})


def test_one_adapter_of_a_set_is_saved_alone(tmp_path: Path) -> None:
    adapters = make_set()
    save_checkpoint(make_trainer(), adapters["k"], tmp_path / "file")
    assert fingerprint(load_checkpoint(tmp_path / "file").adapters) == fingerprint(adapters["k"])


def test_the_same_training_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        trainer, adapters = make_trainer(state_dtype="8bit"), make_set()
        run(trainer, adapters, 0, 8)
        save_checkpoint(trainer, adapters, tmp_path / name, rng=np.random.default_rng(0), extra={"b": 1, "a": 2})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, -0.0, 5e-324])
def test_losses_of_every_kind_stay_what_they_are(tmp_path: Path, loss: float) -> None:
    trainer, adapter = make_trainer(), make_adapter()
    for value in (loss, 1.0, loss):
        trainer.step(value, adapter, *make_pair())
    trainer.accumulate(loss, adapter, *make_pair())
    save_checkpoint(trainer, adapter, tmp_path / "file")
    loaded = load_checkpoint(tmp_path / "file")
    assert everything(loaded.trainer, loaded.adapters) == everything(trainer, adapter)


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_comes_back_in_its_state(tmp_path: Path, kind: str) -> None:
    rng = np.random.Generator(KINDS[kind](1))
    rng.integers(3, size=5, dtype=np.uint32)
    save_checkpoint(make_trainer(), make_adapter(), tmp_path / "file", rng=rng)
    loaded = load_checkpoint(tmp_path / "file").rng
    assert fingerprint(loaded) == fingerprint(rng)
    assert np.array_equal(loaded.random(700), rng.random(700))


@pytest.mark.parametrize(
    "extra",
    [{}, {"epoch": 3, "seen": [1, 2.5, None, True, "é"], "deep": {"er": {"est": {}}}}, {"n": 2**63 - 1, "x": -0.0}],
)
def test_extra_comes_back_as_it_was(tmp_path: Path, extra: dict[str, Any]) -> None:
    save_checkpoint(make_trainer(), make_adapter(), tmp_path / "file", extra=extra)
    assert load_checkpoint(tmp_path / "file").extra == extra


# ------------------------------------------------------------------ trainers in every condition


def test_a_loaded_trainer_is_saved_again_before_it_has_stepped(tmp_path: Path) -> None:
    trainer, adapters = make_trainer(), make_set()
    run(trainer, adapters, 0, 8)
    save_checkpoint(trainer, adapters, tmp_path / "one")
    loaded = load_checkpoint(tmp_path / "one")
    save_checkpoint(loaded.trainer, loaded.adapters, tmp_path / "two")
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()


def test_adapters_of_another_training_are_refused(tmp_path: Path) -> None:
    trainer, adapter = make_trainer(), make_adapter()
    run(trainer, adapter, 0, 2)
    with pytest.raises(StateError, match="adapters must be the trainer's"):
        save_checkpoint(trainer, make_adapter(), tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_on_step_may_save(tmp_path: Path) -> None:
    prints: list[str] = []
    adapter = make_adapter()

    def save(record: Any) -> None:
        save_checkpoint(trainer, adapter, tmp_path / f"{record.step}")
        prints.append(everything(trainer, adapter))

    trainer = LoraTrainer(make_trainer(log_every=1).config, on_step=save)
    run(trainer, adapter, 0, 2)
    for step, expected in enumerate(prints):
        loaded = load_checkpoint(tmp_path / f"{step}")
        assert everything(loaded.trainer, loaded.adapters) == expected
        assert loaded.trainer.total_steps() == step + 1
    assert len(prints) == 2


def refusal(function: Callable[[], object]) -> Exception | None:
    """Return what ``function`` raises in another thread."""
    raised: list[Exception | None] = []

    def call() -> None:
        try:
            function()
            raised.append(None)
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(60)
    return raised[0]


def test_a_save_while_another_thread_steps_is_refused(tmp_path: Path) -> None:
    refused: list[Exception | None] = []

    def schedule(step: int) -> float:
        if step == 1:
            refused.append(refusal(lambda: save_checkpoint(trainer, adapter, tmp_path / "file")))
        return 1e-3

    trainer, adapter = make_trainer(schedule=schedule), make_adapter()
    run(trainer, adapter, 0, 2)
    assert [type(error) for error in refused] == [TrainerBusyError]
    assert not list(tmp_path.iterdir())


def test_a_step_tried_while_a_save_writes_is_refused_and_the_file_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, adapter = make_trainer(), make_adapter()
    run(trainer, adapter, 0, 2)
    before, refused, replace = everything(trainer, adapter), [], module.replace_file

    def slow(path: Any, parts: Any) -> None:
        refused.append(refusal(lambda: trainer.step(1.0, adapter, *make_pair(5))))
        replace(path, parts)

    monkeypatch.setattr(module, "replace_file", slow)
    save_checkpoint(trainer, adapter, tmp_path / "file")
    assert [type(error) for error in refused] == [TrainerBusyError]
    assert everything(trainer, adapter) == before
    loaded = load_checkpoint(tmp_path / "file")
    assert everything(loaded.trainer, loaded.adapters) == before
    trainer.step(1.0, adapter, *make_pair(5))


def test_a_save_that_fails_leaves_file_and_trainer_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, adapter = make_trainer(), make_adapter()
    run(trainer, adapter, 0, 3)
    save_checkpoint(trainer, adapter, tmp_path / "file")
    old, before = (tmp_path / "file").read_bytes(), fingerprint(trainer, adapter)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(trainer, adapter, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == old
    assert fingerprint(trainer, adapter) == before
    run(trainer, adapter, 3, 5)
    save_checkpoint(trainer, adapter, tmp_path / "file")
    assert load_checkpoint(tmp_path / "file").trainer.total_steps() == 3


# ------------------------------------------------------------------ changes at loading


def saved(tmp_path: Path, **config: Any) -> Path:
    trainer, adapter = make_trainer(**config), make_adapter()
    run(trainer, adapter, 0, 2)
    save_checkpoint(trainer, adapter, tmp_path / "file")
    return tmp_path / "file"


def test_what_may_change_changes(tmp_path: Path) -> None:
    loaded = load_checkpoint(saved(tmp_path), threads=4, max_steps=5, learning_rate=0.5, schedule="linear")
    config = loaded.trainer.config
    assert (config.threads, config.max_steps, config.learning_rate, config.schedule) == (4, 5, 0.5, "linear")
    assert loaded.trainer.current_lr() == pytest.approx(0.5 * 3 / 5)


def test_on_step_is_called_again(tmp_path: Path) -> None:
    seen: list[Any] = []
    loaded = load_checkpoint(saved(tmp_path, log_every=1), on_step=seen.append)
    loaded.trainer.step(1.0, loaded.adapters, *make_pair())
    assert [record.step for record in seen] == [2]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train_a": False}, StateError, "adam sizes must be those that the config trains"),
        ({"history_limit": 5}, StateError, "history limit must be 5, as configured, got None"),
        ({"state_dtype": "8bit"}, StateError, "adam dtype must be '8bit', as configured, got 'float32'"),
        ({"learning_rate": -1}, ConfigError, "learning_rate must be in"),
        ({"unknown": 1}, ConfigError, "LoraTrainingConfig has no field 'unknown'"),
        ({"schedule": None}, ConfigError, "schedule must be one of"),
        ({"on_step": 3}, ConfigError, "on_step must be callable or None, got int"),
    ],
)
def test_changes_that_do_not_go_are_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_checkpoint(saved(tmp_path), **changes)


def test_another_state_dtype_goes_before_the_first_step(tmp_path: Path) -> None:
    save_checkpoint(make_trainer(), make_adapter(), tmp_path / "file")
    loaded = load_checkpoint(tmp_path / "file", state_dtype="8bit")
    loaded.trainer.step(1.0, loaded.adapters, *make_pair())


def test_a_schedule_that_was_a_function_must_be_given_again(tmp_path: Path) -> None:
    def schedule(step: int) -> float:
        return 1e-2 / (1 + step)

    trainer, adapter = make_trainer(schedule=schedule), make_adapter()
    run(trainer, adapter, 0, 5)
    save_checkpoint(trainer, adapter, tmp_path / "file")
    with pytest.raises(ConfigError, match=r"schedule must be given again, since .*file does not hold the function"):
        load_checkpoint(tmp_path / "file")
    assert read_checkpoint(tmp_path / "file").facts.training["schedule"] is None
    loaded = load_checkpoint(tmp_path / "file", schedule=schedule)
    assert loaded.trainer.config == trainer.config
    run(trainer, adapter, 5, 9)
    run(loaded.trainer, loaded.adapters, 5, 9)
    assert fingerprint(loaded.trainer, loaded.adapters) == fingerprint(trainer, adapter)


# ------------------------------------------------------------------ arguments that break a rule


def deep(levels: int) -> dict[str, Any]:
    return {"deeper": deep(levels - 1)} if levels else {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"generation": -1}, "generation must be an integer >= 0, got -1"),
        ({"generation": 1.0}, "generation must be an integer, got 1.0"),
        ({"rng": 3}, "rng must be a numpy.random.Generator over one of"),
        ({"extra": {"x": math.nan}}, "extra must be a mapping of JSON values, at most four levels deep"),
        ({"extra": {"x": 2**63}}, "extra must be .*integers must fit 64 bits"),
        ({"extra": {"x": {1}}}, "extra must be .*not JSON serializable"),
        ({"extra": {"x": (1, 2)}}, "extra must be .*it would be read back as something else"),
        ({"extra": {1: 2}}, "extra must be .*it would be read back as something else"),
        ({"extra": [("x", 1)]}, "extra must be .*it would be read back as something else"),
        ({"extra": 5}, "extra must be a mapping of JSON values"),
        ({"extra": deep(4)}, "extra must be .*at most 4 levels"),
        ({"extra": {"x": "\ud800"}}, "extra must be .*half of a surrogate pair"),
        ({"extra": {"x": "y" * 2**23}}, "extra must be .*at most 8388608 bytes"),
    ],
)  # fmt: skip
def test_an_argument_that_breaks_a_rule_writes_nothing(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        save_checkpoint(make_trainer(), make_adapter(), tmp_path / "file", **arguments)
    assert not list(tmp_path.iterdir())


def test_extra_without_an_end_is_refused(tmp_path: Path) -> None:
    endless: dict[str, Any] = {}
    endless["again"] = endless
    with pytest.raises(InputError, match="extra must be a mapping of JSON values"):
        save_checkpoint(make_trainer(), make_adapter(), tmp_path / "file", extra=endless)
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(InputError, match="extra must be a mapping of JSON values"):
        save_checkpoint(make_trainer(), make_adapter(), tmp_path / "file", extra={"x": nested})
    while nested:  # taken apart in a loop: some versions free nested lists by recursion
        nested = nested.pop()


def test_trainer_and_adapters_must_be_such(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="trainer must be a LoraTrainer, got LoraAdapter"):
        save_checkpoint(make_adapter(), make_trainer(), tmp_path / "file")
    with pytest.raises(InputError, match="adapters must be a LoraAdapter or an AdapterSet, got Gradients"):
        save_checkpoint(make_trainer(), Gradients(make_adapter()), tmp_path / "file")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_not_saved(tmp_path: Path, value: float) -> None:
    adapters = make_set()
    adapters["k"].b_matrix[2, 1] = value
    with pytest.raises(InputError, match=rf"k\.B must be finite, got {value} at \[2, 1\]"):
        save_checkpoint(make_trainer(), adapters, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_origin_must_be_json(tmp_path: Path) -> None:
    adapters = make_set()
    adapters.origin = {"x": math.inf}
    with pytest.raises(InputError, match=r"adapters\.origin must be a mapping of JSON values"):
        save_checkpoint(make_trainer(), adapters, tmp_path / "file")


def test_more_adapters_than_a_file_of_its_size_may_list_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "MAX_OBJECTS", 0)
    with pytest.raises(InputError, match=r"adapters must be at most [0-9]+ in a checkpoint of [0-9]+ bytes, got 30"):
        save_checkpoint(make_trainer(), AdapterSet({f"{i}": (1, 1) for i in range(30)}, seed=0), tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    """Else a training would find out when it needs the file."""
    adapters = AdapterSet({"half \ud800": (2, 2)}, seed=0)
    with pytest.raises(InputError, match=r"names and configs must fit a checkpoint .*half of a surrogate pair"):
        save_checkpoint(make_trainer(), adapters, tmp_path / "file")
    one = ["x"] * 350_000  # each of the two goes alone
    adapters = make_set()
    adapters.origin = {"one": one}
    save_checkpoint(make_trainer(), adapters, tmp_path / "file")
    load_checkpoint(tmp_path / "file")
    (tmp_path / "file").unlink()
    with pytest.raises(InputError, match=r"names, shapes and metadata must not need more than [0-9]+ bytes of memory"):
        save_checkpoint(make_trainer(), adapters, tmp_path / "file", extra={"two": one})
    with pytest.raises(InputError, match="names, shapes and metadata must fit 8388608 bytes, got"):
        save_checkpoint(make_trainer(), make_adapter(), tmp_path / "file", extra={"x": "y" * (2**23 - 100)})
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ the file


def test_the_library_reads_the_file(tmp_path: Path) -> None:
    for state_dtype in ("float32", "bfloat16", "8bit"):
        trainer, adapters = make_trainer(state_dtype=state_dtype), make_set()
        run(trainer, adapters, 0, 3)
        save_checkpoint(trainer, adapters, tmp_path / "file", rng=np.random.default_rng(0))
        theirs = safetensors.numpy.load_file(tmp_path / "file")
        metadata, ours = taken_apart(tmp_path / "file")
        assert set(theirs) == {*ours, "sha256"}
        assert all(np.array_equal(theirs[name], ours[name], equal_nan=True) for name in ours)
        assert np.array_equal(theirs["parameters"], adapters.flat.vector)
        with safetensors.safe_open(tmp_path / "file", "np") as file:
            assert file.metadata() == metadata
    save_checkpoint(make_trainer(), make_adapter(), tmp_path / "file")  # with tensors of no elements
    assert len(safetensors.numpy.load_file(tmp_path / "file")) == 7


def test_the_hash_is_that_of_all_bytes_before_it(tmp_path: Path) -> None:
    raw = saved(tmp_path).read_bytes()
    assert raw[-32:] == hashlib.sha256(raw[:-32]).digest()


def test_the_header_says_what_a_reader_needs_first(tmp_path: Path) -> None:
    path = saved(tmp_path)
    facts = json.loads(taken_apart(path)[0]["cylora.checkpoint"])
    assert (facts["schema"], facts["version"]) == (2, __version__)
    found = read_checkpoint(path).facts
    assert (found.version, found.is_set, found.size, found.kept_steps) == (__version__, False, 33, 2)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_mode_follows_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        path = saved(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


# ------------------------------------------------------------------ memory


@contextmanager
def traced() -> Iterator[list[int]]:
    """Give a list that afterwards holds the peak of what was allocated meanwhile."""
    peak: list[int] = []
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        yield peak
        peak.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
def test_neither_saving_nor_loading_copies_the_state(tmp_path: Path, state_dtype: str) -> None:
    """Beside what it holds in the end, loading needs a part of it at a time; saving needs that part only."""
    adapters = AdapterSet({"one": (2**18, 2**18)}, LoraConfig(rank=16), seed=0)
    trainer, gradients = make_trainer(state_dtype=state_dtype), Gradients(adapters)
    gradients.vector.fill(1e-3)
    trainer.step(1.0, adapters, gradients)
    trainer.accumulate(1.0, adapters, gradients)
    with traced() as saving:
        save_checkpoint(trainer, adapters, tmp_path / "file")
    assert saving[0] < 3 * 2**20 < adapters.memory_bytes() / 4
    size = (tmp_path / "file").stat().st_size
    with traced() as loading:
        loaded = load_checkpoint(tmp_path / "file")
    assert size <= loading[0] < size + 12 * 2**20
    assert everything(loaded.trainer, loaded.adapters) == everything(trainer, adapters)


def test_a_long_history_is_held_twice_at_most_while_it_is_read(tmp_path: Path) -> None:
    trainer, adapter, steps = make_trainer(), make_adapter(), 400_000
    state = trainer.state_dict()
    columns = {name: np.arange(steps, dtype=np.float64) for name in ("loss", "learning_rate", "grad_norm")}
    state["history"] |= {"total_steps": steps, "skipped": np.arange(steps) % 2 == 1, **columns}
    trainer.load_state_dict(state)
    save_checkpoint(trainer, adapter, tmp_path / "file")
    size = (tmp_path / "file").stat().st_size
    assert 25 * steps < size < 26 * steps
    with traced() as loading:
        loaded = load_checkpoint(tmp_path / "file")
    assert loading[0] < 2 * size + 2**20
    assert loaded.trainer.training_history == trainer.training_history
