"""The digits task: real data, right gradients, and the claim that adapters recover the turned domain."""

import importlib.resources

import numpy as np
import pytest

from cylora import Gradients, LoraConfig, LoraTrainer, LoraTrainingConfig
from cylora.errors import ConfigError, FormatError
from cylora.tasks import digits
from cylora.tasks.digits import DigitsTask, parse_digits

DEFAULTS = LoraTrainingConfig.from_dict(DigitsTask.training_defaults)
SMALL = LoraConfig(rank=2, alpha=4.0, target_modules=("hidden1", "hidden2", "output"))


@pytest.fixture(scope="module")
def text() -> str:
    return importlib.resources.files("cylora.tasks").joinpath("data", "digits.txt").read_text(encoding="ascii")


def data_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("#")]


def bytes_of(task: DigitsTask) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in task.base.items()}


# ---------------------------------------------------------------------- data


def test_data_are_the_1797_images(text: str) -> None:
    images, labels = parse_digits(text)
    assert images.shape == (1797, 8, 8)
    assert images.dtype == np.float32
    # Facts of the published set: the images of each digit, and the sum of all its ink.
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert int((images.astype(np.float64) * 16).sum()) == 561718
    assert (images[0, 0] * 16).astype(int).tolist() == [0, 0, 5, 13, 9, 1, 0, 0]


def test_data_name_source_and_licence(text: str) -> None:
    header = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    for words in ("Alpaydin", "Kaynak", "10.24432/C50P49", "load_digits", "CC BY 4.0"):
        assert words in header


def break_line(text: str, replacement: str) -> str:
    return text.replace(data_lines(text)[0], replacement, 1)


@pytest.mark.parametrize(
    ("replacement", "message"),
    [
        ("h" * 64 + " 0", "digits line 10 must begin with 64 characters of 0123456789abcdefg, got 'hhh"),
        ("0" * 63, "digits line 10 must begin with 64 characters"),
        ("", "digits line 10 must begin with 64 characters of 0123456789abcdefg, got ''"),
        ("0" * 64 + " a", "digits line 10 must end with a space and a digit from 0 to 9, got ' a'"),
        ("0" * 64 + "x1", "digits line 10 must end with a space and a digit from 0 to 9, got 'x1'"),
        ("0" * 64 + " 12", "digits line 10 must end with a space and a digit from 0 to 9, got ' 12'"),
        ("0" * 64, "digits line 10 must end with a space and a digit from 0 to 9, got ''"),
    ],
)
def test_damaged_line_is_refused_by_number(text: str, replacement: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_digits(break_line(text, replacement))


def test_missing_and_extra_images_are_refused(text: str) -> None:
    lines = data_lines(text)
    with pytest.raises(FormatError, match="digits must hold 1797 images, got 1796"):
        parse_digits("\n".join(lines[:-1]))
    with pytest.raises(FormatError, match="digits must hold 1797 images, got 1798"):
        parse_digits("\n".join([*lines, lines[0]]))


# ---------------------------------------------------------------------- the task


def test_equal_seeds_make_equal_tasks_and_others_do_not() -> None:
    one, two, other = DigitsTask(SMALL, 3), DigitsTask(SMALL, 3), DigitsTask(SMALL, 4)
    assert bytes_of(one) == bytes_of(two)
    assert bytes_of(one) != bytes_of(other)
    assert one.adapters.flat.vector.tobytes() == two.adapters.flat.vector.tobytes()
    assert one.evaluate() == two.evaluate()


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    task = DigitsTask(SMALL, 0)
    gradients = Gradients(task.adapters)
    losses = [task.loss_and_gradients(step, gradients) for step in (5, 6, 5)]
    assert losses[0] == losses[2] != losses[1]


def test_held_out_images_are_never_trained_on() -> None:
    task = DigitsTask(SMALL, 0)
    turned = {row.tobytes() for row in task._held_out["turned"]}
    assert len(task._held_out_labels) == 449
    assert len(task._labels) == 1797 - 449
    assert not turned & {row.tobytes() for row in task._images}


def test_turned_images_are_the_upright_ones_turned() -> None:
    task = DigitsTask(SMALL, 0)
    for upright, turned in zip(task._held_out["upright"], task._held_out["turned"], strict=True):
        np.testing.assert_array_equal(np.rot90(upright.reshape(8, 8)).ravel(), turned)


def test_total_parameters_count_network_and_adapters() -> None:
    task = DigitsTask(SMALL, 0)
    network = 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10
    assert task.total_parameters == network + 2 * (64 + 128 + 128 + 128 + 128 + 10)
    assert task.adapters.param_count() == 2 * (64 + 128 + 128 + 128 + 128 + 10)


@pytest.mark.parametrize(
    ("modules", "dropout"),
    [
        (("hidden1", "hidden2", "output"), 0.0),
        (("hidden1", "hidden2", "output"), 0.5),
        (("output",), 0.0),
        (("hidden1",), 0.25),
        (("output", "hidden1"), 0.0),
    ],
)
def test_gradients_are_the_slopes_of_the_loss(modules: tuple[str, ...], dropout: float) -> None:
    task = DigitsTask(LoraConfig(rank=2, alpha=4.0, dropout=dropout, target_modules=modules), 0)
    assert set(task.adapters) == set(modules)
    rng = np.random.default_rng(0)
    vector = task.adapters.flat.vector
    vector += 0.05 * rng.standard_normal(vector.size).astype(np.float32)
    gradients = Gradients(task.adapters)
    task.loss_and_gradients(1, gradients)
    slope = gradients.vector.astype(np.float64)
    # Along the gradient itself the slope is its norm; along a random direction it is their product.
    for direction in (slope / np.linalg.norm(slope), rng.standard_normal(slope.size) / np.sqrt(slope.size)):
        kept, losses = vector.copy(), []
        for sign in (-1, 1):
            vector[:] = kept + sign * 1e-3 * direction
            losses.append(task.loss_and_gradients(1, Gradients(task.adapters)))
        vector[:] = kept
        # float32 losses of about 17 leave 2e-6 / 2e-3 of noise; the curvature adds less.
        assert (losses[1] - losses[0]) / 2e-3 == pytest.approx(slope @ direction, rel=0.02, abs=0.01)


def test_dropout_applies_in_training_and_not_in_evaluation() -> None:
    plain = DigitsTask(SMALL, 0)
    dropped = DigitsTask(LoraConfig(rank=2, alpha=4.0, dropout=0.5, target_modules=SMALL.target_modules), 0)
    for task in (plain, dropped):
        task.adapters.flat.vector[:] = 0.05
    assert plain.evaluate() == dropped.evaluate()
    losses = [task.loss_and_gradients(0, Gradients(task.adapters)) for task in (plain, dropped)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LoraConfig(),
            r"target_modules must be layers of the digits network \(hidden1, hidden2, output\), got 'q_proj'",
        ),
        (LoraConfig(target_modules=("hidden1", "hidden3")), "got 'hidden3'"),
        (
            LoraConfig(rank=129, target_modules=("hidden1",)),
            "rank must be at most 128, the digits network's width, got 129",
        ),
    ],
)
def test_wrong_config_is_refused(config: LoraConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DigitsTask(config, 0)


def test_a_diverged_network_gives_non_finite_loss_without_warnings() -> None:
    task = DigitsTask(SMALL, 0)
    task.adapters.flat.vector[:] = 1e30
    assert not np.isfinite(task.loss_and_gradients(0, Gradients(task.adapters)))


def test_products_in_parts_are_the_product() -> None:
    rng = np.random.default_rng(0)
    for rows in (1, 15, 16, 17, 449):
        left, right = rng.standard_normal((rows, 64), np.float32), rng.standard_normal((64, 10), np.float32)
        np.testing.assert_allclose(digits._product(left, right), left @ right, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- the claim


@pytest.mark.parametrize("seed", range(5))
def test_adapters_recover_the_turned_digits_and_the_base_never_changes(seed: int) -> None:
    task = DigitsTask(DEFAULTS.lora_config, seed)
    before, base = task.evaluate(), bytes_of(task)
    assert before["upright accuracy"] > 0.94
    assert before["turned accuracy"] < 0.25
    trainer, gradients = LoraTrainer(DEFAULTS), Gradients(task.adapters)
    for step in range(1000):
        gradients.zero_()
        trainer.step(task.loss_and_gradients(step, gradients), task.adapters, gradients)
    after = task.evaluate()
    assert after["turned accuracy"] >= before["upright accuracy"] - 0.02
    assert bytes_of(task) == base
    assert not any(array.flags.writeable for array in task.base.values())
    task.adapters.flat.vector[:] = 0  # without the adapters the upright reader is back
    assert task.evaluate() == before
