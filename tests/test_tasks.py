"""The task protocol, the settings' layers, the run and its picture."""

import re
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cylora import AdapterSet, Gradients, LoraConfig, LoraTrainer, LoraTrainingConfig, TrainingStep
from cylora.errors import ConfigError, FormatError, InputError, TaskError
from cylora.tasks import picture, protocol
from cylora.tasks.digits import DigitsTask
from cylora.tasks.protocol import CheckedTask, RunFailure, load_factory, training_defaults
from cylora.tasks.run import TrainingRun
from cylora.tasks.settings import FIELDS, TABLES, RunSettings, read_tables, resolve, task_tables


def adapters() -> AdapterSet:
    return AdapterSet({"linear": (4, 3)}, LoraConfig(rank=2), seed=0)


def pull_to_zero(task: Any) -> Callable[[int, Gradients], float]:
    """Return the loss |p|^2 / 2 over all parameters p, whose gradient is p."""

    def loss_and_gradients(step: int, gradients: Gradients) -> float:
        gradients.vector[:] = task.adapters.flat.vector
        return 0.5 * float((task.adapters.flat.vector.astype(float) ** 2).sum())

    return loss_and_gradients


def factory_of(**members: Any) -> Callable[[LoraConfig, int], Any]:
    """Return a factory of good tasks but for ``members``; None takes a member away."""

    def factory(lora_config: LoraConfig, seed: int) -> Any:
        task = SimpleNamespace(adapters=adapters())
        task.loss_and_gradients = pull_to_zero(task)
        for name, member in members.items():
            setattr(task, name, member)
        return task

    return factory


def checked(**members: Any) -> CheckedTask:
    return CheckedTask("my:task", factory_of(**members), LoraConfig(), 0)


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that writes the user's module ``users_task``, importable in this test only."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "users_task", raising=False)

    def write(source: str) -> None:
        (tmp_path / "users_task.py").write_text(source)
        monkeypatch.delitem(sys.modules, "users_task", raising=False)

    return write


# ---------------------------------------------------------------------- finding a factory


def test_factory_is_found_by_name_and_by_module() -> None:
    assert load_factory("digits") is DigitsTask
    assert load_factory("cylora.tasks.digits:DigitsTask") is DigitsTask


@pytest.mark.parametrize("name", ["", "nope", "digits:", ":f", "a:b:c", "a.:b", "a b:c", "a:b.c", "/x/y.py:f", "a:1"])
def test_name_that_does_not_parse_is_refused(name: str) -> None:
    with pytest.raises(TaskError, match=f"task must be 'digits' or 'module:factory', got {re.escape(repr(name))}"):
        load_factory(name)


def test_missing_module_is_refused() -> None:
    message = "task 'no_such.thing:f': module 'no_such.thing' cannot be imported: ModuleNotFoundError: No module"
    with pytest.raises(TaskError, match=message) as caught:
        load_factory("no_such.thing:f")
    assert ".py" not in str(caught.value)  # no line of the user's is to blame


@pytest.mark.parametrize(
    ("source", "described"),
    [
        ("\n1 / 0\n", r"ZeroDivisionError: division by zero \(.*users_task.py:2\)"),
        ("raise SystemExit(3)", r"SystemExit: 3 \(.*users_task.py:1\)"),
        ("x = (\n", r"SyntaxError: '\(' was never closed \(.*users_task.py:1\)"),
        ("import no_such_thing", r"ModuleNotFoundError: No module named 'no_such_thing' \(.*users_task.py:1\)"),
        ("raise ValueError('one\\ntwo')", r"ValueError: one \(.*users_task.py:1\)"),
        ("raise KeyError", r"KeyError \(.*users_task.py:1\)"),
    ],
)
def test_module_that_does_not_import_is_described(
    user_module: Callable[[str], None], source: str, described: str
) -> None:
    user_module(source)
    with pytest.raises(TaskError, match=f"module 'users_task' cannot be imported: {described}$"):
        load_factory("users_task:f")


def test_missing_and_uncallable_factories_are_refused(user_module: Callable[[str], None]) -> None:
    user_module("f = 3")
    with pytest.raises(TaskError, match="task 'users_task:g': module 'users_task' has no 'g'"):
        load_factory("users_task:g")
    with pytest.raises(TaskError, match="task 'users_task:f': 'f' must be callable, got int"):
        load_factory("users_task:f")


def test_example_in_the_protocol_is_a_task(user_module: Callable[[str], None]) -> None:
    assert protocol.__doc__ is not None
    lines = protocol.__doc__.splitlines()
    example = [line[4:] for line in lines if line.startswith("    ") or not line]
    user_module("\n".join(example))
    task = CheckedTask("nudge", load_factory("users_task:Nudge"), LoraConfig(), 0)
    run = TrainingRun(task, LoraTrainer(LoraTrainingConfig(learning_rate=0.01, max_steps=400, warmup_steps=10)))
    losses = [record.loss for record in run.steps()]
    assert losses[-1] < 0.01 * losses[0]


# ---------------------------------------------------------------------- checking a task


def test_good_task_passes_and_optional_members_are_optional() -> None:
    task = checked()
    assert not task.can_evaluate
    assert task.evaluate() == {}
    assert task.total_parameters is None
    task = checked(evaluate=lambda: {"share": np.float32(0.5), "count": Fraction(3)}, total_parameters=np.int64(100))
    assert task.can_evaluate
    assert task.evaluate() == {"share": 0.5, "count": 3.0}
    assert task.total_parameters == 100


def test_gradients_arrive_zeroed() -> None:
    seen = []
    task = checked(loss_and_gradients=lambda step, gradients: seen.append(gradients.vector.copy()) or 1)
    gradients = Gradients(task.adapters)
    gradients.vector[:] = 5
    assert task.loss_and_gradients(0, gradients) == 1.0
    assert not seen[0].any()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"adapters": None}, "adapters must be an AdapterSet, got NoneType"),
        ({"adapters": {}}, "adapters must be an AdapterSet, got dict"),
        ({"loss_and_gradients": None}, "loss_and_gradients must be a method, got NoneType"),
        ({"loss_and_gradients": 3}, "loss_and_gradients must be a method, got int"),
        ({"evaluate": 3}, "evaluate must be a method, got int"),
        ({"total_parameters": 3.5}, "total_parameters must be an integer, got 3.5"),
        ({"total_parameters": True}, "total_parameters must be an integer, got True"),
        ({"total_parameters": 13}, "total_parameters must count the 14 of the adapters too, got 13"),
    ],
)
def test_task_with_wrong_members_is_refused(members: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=f"task 'my:task': {message}"):
        checked(**members)


@pytest.mark.parametrize("loss", [None, "1", True, 1j, [1.0], np.zeros(1), 10**400])
def test_loss_that_is_not_a_number_is_refused(loss: object) -> None:
    task = checked(loss_and_gradients=lambda step, gradients: loss)
    message = f"loss_and_gradients must return a number at step 3, got {re.escape(repr(loss))}"
    with pytest.raises(TaskError, match=message):
        task.loss_and_gradients(3, Gradients(task.adapters))


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        (None, "evaluate must return a mapping of names to numbers, got NoneType"),
        ([("a", 1.0)], "evaluate must return a mapping of names to numbers, got list"),
        ({1: 1.0}, "evaluate must name its measures by printable strings, got 1"),
        ({"": 1.0}, "evaluate must name its measures by printable strings, got ''"),
        ({"step": 1.0}, "evaluate must not name a measure like the count of steps beside it, got 'step'"),
        ({"a\n": 1.0}, r"evaluate must name its measures by printable strings, got 'a\\n'"),
        ({"a": "1"}, "evaluate must return finite numbers, 'a' too, got '1'"),
        ({"a": float("nan")}, "evaluate must return finite numbers, 'a' too, got nan"),
    ],
)
def test_measures_that_are_not_named_numbers_are_refused(measures: object, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        checked(evaluate=lambda: measures).evaluate()


def test_measures_that_change_their_names_are_refused() -> None:
    answers = iter([{"a": 1.0}, {"b": 1.0}])
    task = checked(evaluate=lambda: next(answers))
    task.evaluate()
    with pytest.raises(TaskError, match=r"evaluate must always return the measures \['a'\], got \['b'\]"):
        task.evaluate()


def test_what_the_tasks_own_code_raises_is_a_run_failure_with_its_line() -> None:
    def explode(*arguments: object) -> float:
        adapters()["linear"].apply(np.zeros(5, np.float32))  # raised inside cylora, caused here
        return 0.0

    task = checked(loss_and_gradients=explode, evaluate=explode)
    line = explode.__code__.co_firstlineno + 1
    with pytest.raises(RunFailure, match=rf"task 'my:task' failed in loss_and_gradients at step 2: \w+: .*:{line}\)$"):
        task.loss_and_gradients(2, Gradients(task.adapters))
    with pytest.raises(RunFailure, match=r"task 'my:task' failed in evaluate: InputError: .*test_tasks.py:"):
        task.evaluate()
    with pytest.raises(RunFailure, match="task 'x' failed in the factory: "):
        CheckedTask("x", explode, LoraConfig(), 0)  # type: ignore[arg-type]


def test_failure_without_a_line_of_the_users_names_the_exception_alone() -> None:
    task = checked(loss_and_gradients=len)
    with pytest.raises(
        RunFailure, match=r"failed in loss_and_gradients at step 0: TypeError: len\(\) takes .* given\)$"
    ):
        task.loss_and_gradients(0, Gradients(task.adapters))


def test_factory_may_refuse_its_config() -> None:
    def refuse(lora_config: LoraConfig, seed: int) -> Any:
        raise ConfigError("rank must be odd, got 8")

    with pytest.raises(ConfigError, match=r"^rank must be odd, got 8$"):
        CheckedTask("x", refuse, LoraConfig(), 0)


# ---------------------------------------------------------------------- settings


def test_every_field_of_the_configs_is_a_setting() -> None:
    defaults = LoraTrainingConfig().to_dict()
    lora = defaults.pop("lora_config")
    assert TABLES["run"] == ["task", "seed", "eval_every", "save_every"]
    assert TABLES["training"] == list(defaults)
    assert TABLES["lora"] == list(lora)
    kinds = {field.name: (field.kind, field.optional) for field in FIELDS}
    assert kinds["rank"] == (int, False)
    assert kinds["decay_steps"] == (int, True)
    assert kinds["schedule"] == (str, False)
    assert kinds["target_modules"] == (tuple, False)
    assert kinds["use_rslora"] == (bool, False)


def test_later_layers_go_before_earlier_ones() -> None:
    settings = resolve(
        [
            ("task: ", {"training": {"max_steps": 1, "beta1": 0.1, "eps": 1e-6}, "lora": {"rank": 1}}),
            ("file: ", {"training": {"max_steps": 2, "beta1": 0.2}, "run": {"seed": 2}}),
            ("", {"training": {"max_steps": 3}, "run": {"task": "t"}}),
        ]
    )
    config = LoraTrainingConfig(max_steps=3, beta1=0.2, eps=1e-6, lora_config=LoraConfig(rank=1))
    assert settings == RunSettings(task="t", seed=2, eval_every=1, save_every=1, config=config)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (0, "^task: beta1 must be in"),
        (1, "^file: beta1 must be in"),
        (2, "^beta1 must be in"),
    ],
)
def test_error_names_the_layer_that_brought_it_in(layer: int, message: str) -> None:
    places = ["task: ", "file: ", ""]
    layers = [(place, {"training": {"beta1": 7}} if number == layer else {}) for number, place in enumerate(places)]
    with pytest.raises(ConfigError, match=message):
        resolve(layers)


def test_error_that_a_later_layer_mends_is_none() -> None:
    layers = [("file: ", {"training": {"beta1": 7}}), ("", {"training": {"beta1": 0.5}})]
    assert resolve(layers).config.beta1 == 0.5


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"seed": -1}, r"seed must be an integer in \[0, 4294967295\], got -1"),
        ({"seed": True}, "seed must be an integer, got True"),
        ({"eval_every": 0.5}, "eval_every must be an integer, got 0.5"),
        ({"task": 3}, "task must be a name, got 3"),
    ],
)
def test_wrong_run_settings_are_refused(run: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve([("", {"run": run})])


def test_settings_survive_the_file(tmp_path: Path) -> None:
    import tomli_w

    config = LoraTrainingConfig(
        max_grad_norm=float("inf"), decay_steps=None, history_limit=7, eps=1e-9, lora_config=LoraConfig(rank=3)
    )
    settings = RunSettings(task="digits", seed=5, eval_every=0, save_every=7, config=config)
    (tmp_path / "config.toml").write_text(tomli_w.dumps(settings.to_tables()))
    defaults = task_tables("digits", DigitsTask.training_defaults)
    assert resolve([("", defaults), ("", read_tables(tmp_path / "config.toml"))]) == settings


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("x = ", FormatError, "config.toml must be a TOML file: Invalid value"),
        ("\ufeff", FormatError, "config.toml must be a TOML file: "),
        ("x = 1", ConfigError, "config.toml: unknown key 'x'; the tables are run, training, lora"),
        ("lora = 1", ConfigError, "config.toml: lora must be a table, got 1"),
        ("[lora]\nr = 8", ConfigError, r"config.toml: unknown key 'r' in \[lora\]; its keys are rank, alpha, dropout,"),
        ("[training]\nlora_config = {}", ConfigError, r"config.toml: unknown key 'lora_config' in \[training\]"),
        ("[run]\noutput = 'x'", ConfigError, r"unknown key 'output' in \[run\]; its keys are task, seed, eval_every, "),
    ],
)
def test_wrong_file_is_refused(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(error, match=message):
        read_tables(tmp_path / "config.toml")


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="must be a TOML file: 'utf-8' codec can't decode byte 0xff"):
        read_tables(tmp_path / "config.toml")


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        (3, "task 'x': training_defaults must be a mapping, got int"),
        ({"lora_config": 3}, r"task 'x': training_defaults\['lora_config'\] must be a mapping, got int"),
        ({"lr": 3}, "task 'x': training_defaults has unknown key 'lr'"),
        ({"lora_config": {"r": 3}}, "task 'x': training_defaults has unknown key 'r'"),
        ({"schedule": abs}, r"training_defaults\['schedule'\] must be a plain value, got <built-in function abs>"),
    ],
)
def test_wrong_defaults_of_a_task_are_refused(defaults: object, message: str) -> None:
    factory = factory_of()
    factory.training_defaults = defaults  # type: ignore[attr-defined]
    with pytest.raises(TaskError, match=message):
        task_tables("x", training_defaults("x", factory))


def test_task_without_defaults_has_none() -> None:
    assert task_tables("x", training_defaults("x", factory_of())) == {"training": {}, "lora": {}}


# ---------------------------------------------------------------------- the run


def test_run_trains_evaluates_and_keeps_the_time() -> None:
    task = checked(evaluate=lambda: {"size": float(np.abs(task.adapters.flat.vector).sum())})
    seen: list[TrainingStep] = []
    config = LoraTrainingConfig(max_steps=10, log_every=4, learning_rate=0.01, warmup_steps=1)
    run = TrainingRun(task, LoraTrainer(config, on_step=seen.append), eval_every=3)
    run.evaluate()
    records = list(run.steps())
    run.evaluate()
    run.evaluate()  # the adapters are as they were: not measured again
    assert [record.step for record in records] == list(range(10)) == run.history.column("step").tolist()
    assert [step for step, _ in run.measures] == [0, 3, 6, 9, 10]
    assert run.measures[-1][1]["size"] < run.measures[0][1]["size"]
    assert [record.step for record in seen] == [3, 7]
    assert run.steps_done == 10
    assert run.task_seconds > 0 < run.step_seconds


def test_run_without_evaluation_measures_nothing() -> None:
    run = TrainingRun(checked(), LoraTrainer(LoraTrainingConfig(max_steps=3)), eval_every=1)
    assert len(list(run.steps())) == 3
    assert run.measures == []


def test_refused_gradients_end_the_run_with_the_steps_before_kept() -> None:
    def loss_and_gradients(step: int, gradients: Gradients) -> float:
        gradients.vector[:] = np.nan if step == 2 else 1
        return 1.0

    run = TrainingRun(checked(loss_and_gradients=loss_and_gradients), LoraTrainer(LoraTrainingConfig(max_steps=9)))
    message = "task 'my:task' cannot be trained on from step 2: gradient of linear.A must be finite, got nan"
    with pytest.raises(RunFailure, match=message) as caught:
        list(run.steps())
    assert isinstance(caught.value.__cause__, InputError)
    assert run.steps_done == 2
    assert np.isfinite(run.task.adapters.flat.vector).all()


def test_skipped_steps_do_not_keep_a_run_from_ending() -> None:
    def loss_and_gradients(step: int, gradients: Gradients) -> float:
        gradients.vector[:] = np.nan
        return float("nan")

    trainer = LoraTrainer(LoraTrainingConfig(max_steps=5, nonfinite="skip"))
    run = TrainingRun(checked(loss_and_gradients=loss_and_gradients), trainer)
    assert [record.skipped for record in run.steps()] == [True] * 5


# ---------------------------------------------------------------------- the picture


def finished_run(
    steps: int, *, losses: Callable[[int], float] = float, measured: bool = True, **options: Any
) -> TrainingRun:
    def loss_and_gradients(step: int, gradients: Gradients) -> float:
        gradients.vector[:] = 1
        return losses(step)

    members: dict[str, Any] = {"loss_and_gradients": loss_and_gradients}
    if measured:
        members["evaluate"] = lambda: {"_share of $": 0.5, "准确率": 0.25}
    run = TrainingRun(checked(**members), LoraTrainer(LoraTrainingConfig(max_steps=steps, **options)), eval_every=2)
    run.evaluate()
    list(run.steps())
    return run


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"steps": 1},
        {"steps": 200, "losses": lambda step: 1 / (step + 1)},
        {"steps": 200, "losses": lambda step: float("nan")},
        {"steps": 200, "losses": lambda step: -1.0, "measured": False},
        {"steps": 200, "history_limit": 50},
    ],
    ids=["no step", "one step", "usual", "NaN losses", "negative losses, no evaluation", "short history"],
)
@pytest.mark.parametrize("max_grad_norm", [1.0, float("inf")])
def test_picture_is_a_png_whatever_the_run(options: dict[str, Any], max_grad_norm: float) -> None:
    drawn = picture.draw(finished_run(**options), "a title", max_grad_norm)
    assert drawn.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(drawn[16:20]) == 1200


def test_picture_chooses_no_backend() -> None:
    import matplotlib as mpl

    before = dict.get(mpl.rcParams, "backend")
    picture.draw(finished_run(3), "a title", 1.0)
    assert dict.get(mpl.rcParams, "backend") is before
    assert "matplotlib.pyplot" not in sys.modules
