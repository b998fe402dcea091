"""`cylora plot`: which runs and files it draws, what it draws of them, and what it refuses in one line."""

import io
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from training import make_adapter, make_pair, make_trainer, same_bits

from cylora import TrainingHistory, _cli_plot, plotting
from cylora.formats import save_generation

PNG = b"\x89PNG\r\n\x1a\n"
Drawn = list[plotting.Curves]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """Return the list of what is drawn, which is not drawn: a picture takes half a second."""
    seen: Drawn = []
    monkeypatch.setattr(plotting, "draw", lambda runs, **options: seen.extend(runs))
    monkeypatch.setattr(plotting, "rendered", lambda figure, path: PNG)
    return seen


def history(steps: int, limit: int | None = None) -> TrainingHistory:
    made = TrainingHistory(limit)
    for step in range(steps):
        made.append(loss=1 / (step + 1), learning_rate=step / 1000, grad_norm=2.0, skipped=step == 1)
    return made


def text(made: TrainingHistory, form: str = "jsonl") -> str:
    stream = io.StringIO(newline="")
    getattr(made, f"write_{form}")(stream)
    return stream.getvalue()


def write_run(path: Path, made: TrainingHistory, measures: str = "") -> Path:
    path.mkdir(parents=True)
    (path / "history.jsonl").write_text(text(made))
    if measures:
        (path / "measures.jsonl").write_text(measures)
    return path


def write_checkpoint(path: Path, steps: int) -> TrainingHistory:
    (path / "checkpoints").mkdir(parents=True)
    trainer, adapter = make_trainer(), make_adapter()
    for step in range(steps):
        trainer.step(step + 1.0, adapter, *make_pair())
    save_generation(path / "checkpoints", trainer, adapter)
    return trainer.training_history


def same(curves: plotting.Curves, made: TrainingHistory) -> bool:
    return all(
        same_bits(np.ascontiguousarray(getattr(curves, name)), np.ascontiguousarray(column))
        for name, column in [
            ("steps", made.column("step") + 1),
            *((name, made.column(name)) for name in ("loss", "grad_norm", "learning_rate", "skipped")),
        ]
    )


# ---------------------------------------------------------------------- what is drawn


def test_two_runs_make_one_picture(run: Callable[..., SimpleNamespace], folder: Path) -> None:
    write_run(folder / "a", history(5), '{"step": 0, "accuracy": 0.5}\n{"step": 5, "accuracy": 1}\n')
    write_run(folder / "b", history(300))
    done = run("plot", "a", "b")
    assert (done.code, done.out, done.err) == (0, "plot.png\n", "")
    picture = (folder / "plot.png").read_bytes()
    assert picture.startswith(PNG)
    assert [int.from_bytes(picture[start : start + 4]) for start in (16, 20)] == [1200, 780]


def test_picture_is_replaced_and_the_ending_decides(run: Callable[..., SimpleNamespace], folder: Path) -> None:
    write_run(folder / "a", history(5))
    for name, start in (("x.svg", b"<?xml"), ("x.pdf", b"%PDF"), ("x.png", PNG)):
        (folder / name).write_text("old")
        assert run("plot", "a", "--output", name, "--smooth", 0, "--no-log").code == 0
        assert (folder / name).read_bytes().startswith(start)


def test_options_reach_the_picture(run: Callable[..., SimpleNamespace], folder: Path, monkeypatch: Any) -> None:
    write_run(folder / "a", history(5))
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(plotting, "draw", lambda runs, **options: seen.append(options))
    monkeypatch.setattr(plotting, "rendered", lambda figure, path: PNG)
    for arguments in ([], ["--smooth", 7, "--log"], ["--no-log"]):
        assert run("plot", "a", *arguments).code == 0
    assert seen == [
        {"title": "a", "smooth": None, "log": None},
        {"title": "a", "smooth": 7, "log": True},
        {"title": "a", "smooth": None, "log": False},
    ]


def test_run_is_drawn_with_its_evaluations(run: Callable[..., SimpleNamespace], folder: Path, drawn: Drawn) -> None:
    write_run(folder / "a", history(5), '{"step": 0, "b c": 0.5, "x\\u001b": 1e999}\n{"step": 5, "b c": 1}\n')
    assert run("plot", "a").code == 0
    (curves,) = drawn
    assert same(curves, history(5))
    assert curves.label == "a"
    (_, first), (step, second) = curves.measures
    assert first.pop("b c") == 0.5
    assert list(first) == ["x\\x1b"]
    assert math.isnan(first["x\\x1b"])
    assert (step, second) == (5, {"b c": 1.0})


@pytest.mark.parametrize("form", ["jsonl", "csv"])
@pytest.mark.parametrize("limit", [None, 3])
def test_files_are_told_by_what_is_in_them(
    run: Callable[..., SimpleNamespace], folder: Path, drawn: Drawn, form: str, limit: int | None
) -> None:
    """A history that dropped its first steps too, which `read_jsonl` refuses since its totals are lost."""
    (folder / "steps.txt").write_text(text(history(9, limit), form), newline="")
    assert run("plot", "steps.txt").code == 0
    assert same(drawn[0], history(9, limit))
    assert drawn[0].label == "steps.txt"


def test_blank_lines_before_json_are_no_csv(run: Callable[..., SimpleNamespace], folder: Path, drawn: Drawn) -> None:
    (folder / "x").write_text("\n \n" + text(history(2)))
    assert run("plot", "x").code == 0
    assert same(drawn[0], history(2))


def test_numbers_that_are_not_finite_are_taken(run: Callable[..., SimpleNamespace], folder: Path) -> None:
    made = TrainingHistory()
    for loss in (math.nan, 1.0, math.inf, -math.inf, 1e307, 0.0):
        made.append(loss=loss, learning_rate=math.nan, grad_norm=loss)
    for form in ("jsonl", "csv"):
        (folder / form).write_text(text(made, form), newline="")
    done = run("plot", "jsonl", "csv", "--log")
    assert (done.code, done.err) == (0, "")


def test_run_without_a_history_yet_is_drawn_from_its_last_checkpoint(
    run: Callable[..., SimpleNamespace], folder: Path, drawn: Drawn
) -> None:
    made = write_checkpoint(folder / "killed", 4)
    assert run("plot", "killed").code == 0
    assert same(drawn[0], made)


def test_newest_of_history_and_checkpoint_is_drawn(
    run: Callable[..., SimpleNamespace], folder: Path, drawn: Drawn
) -> None:
    made = write_checkpoint(folder / "run", 4)
    (folder / "run" / "history.jsonl").write_text(text(history(2)))
    checkpoint = next((folder / "run" / "checkpoints").iterdir())
    for moment, expected in ((1, history(2)), (10**10, made)):
        os.utime(checkpoint, (moment, moment))
        assert run("plot", "run").code == 0
        assert same(drawn.pop(), expected)


def test_runs_are_called_by_the_shortest_name_that_tells_them_apart(
    run: Callable[..., SimpleNamespace], folder: Path, drawn: Drawn
) -> None:
    for name in ("x/one", "y/one", "two", "l" * 100):
        write_run(folder / name, history(2))
    paths = ["x/one", "y/one/history.jsonl", "two/.", "l" * 100]
    assert run("plot", *paths).code == 0
    assert [curves.label for curves in drawn] == ["x/one", "y/one/history.jsonl", "two", f"...{'l' * 57}"]


def test_name_that_is_no_text_can_be_drawn(run: Callable[..., SimpleNamespace], folder: Path) -> None:
    name = os.fsdecode(b"\xff\x1b$_")
    write_run(folder / name, history(2))
    write_run(folder / "b", history(2))
    assert run("plot", name, "b").code == 0


def test_real_run_is_drawn(run: Callable[..., SimpleNamespace], folder: Path, request: pytest.FixtureRequest) -> None:
    assert run("train", "--max-steps", 20, "--output", "out").code == 0
    drawn = request.getfixturevalue("drawn")  # not before: a run draws its own picture
    assert run("plot", "out").code == 0
    assert len(drawn[0].steps) == 20
    assert [step for step, _ in drawn[0].measures] == list(range(21))


# ---------------------------------------------------------------------- what is refused


def row(step: int, **changes: Any) -> str:
    made = {"step": step, "loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0, "perplexity": 2.7, "skipped": False}
    return json.dumps({**made, **changes}) + "\n"


REFUSED = {
    "missing": (None, "missing cannot be read: No such file or directory"),
    "empty": ("", "empty: line 1 must be the header step,loss,learning_rate,"),
    "header only": (text(TrainingHistory(), "csv"), "header only: must have a step to draw, got none"),
    "binary": (b"\x80\x04\x95\xff\x00" * 100, "binary: line 1 or one soon after must be text ("),
    "zeros": (b"\0" * 1000, "zeros: line 1 must be "),
    "picture": (PNG + bytes(range(256)), "picture: line 1 or one soon after must be text"),
    "cut": (row(0) + row(1)[:30], "cut: line 2 must be a JSON object, got "),
    "other json": ('{"loss": 1}\n', "other json: line 1 must have the keys step, loss,"),
    "list": ("{}\n[1]\n", "list: line 1 must have the keys step, loss,"),
    "csv of others": ("epoch,loss\n1,2\n", "csv of others: line 1 must be the header step,loss,learning_rate,grad"),
    "text for a number": (row(0, loss="x"), "text for a number: line 1: loss must be a number, got 'x'"),
    "skipped is 2": (row(0, skipped=2), "skipped is 2: line 1: skipped must be true or false, got 2"),
    "backwards": (row(3) + row(3), "backwards: line 2: step must be in [4, 9007199254740992), got 3"),
    "negative": (row(-1), "negative: line 1: step must be in [0, 9007199254740992), got -1"),
    "far": (row(2**60), "far: line 1: step must be in [0, 9007199254740992), got 1152921504606846976"),
    "endless line": ('{"step": ' + "1" * 100_000, "endless line: line 1 must have at most 65536 characters, got more"),
    "endless csv": ("step," * 100_000, "endless csv: line 1 must have at most 65536 characters, got more"),
    "deep": ("{" + '"a":[' * 10_000 + "\n", "deep: line 1 must be a JSON object, got "),
    "zip bomb of digits": (row(0).replace("0,", "1" * 5000 + ",", 1), "zip bomb of digits: line 1 must be a JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_file_is_one_line_and_exit_code_2(run: Callable[..., SimpleNamespace], folder: Path, name: str) -> None:
    content, message = REFUSED[name]
    if content is not None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    write_run(folder / "good", history(2))
    done = run("plot", "good", name)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"cylora: error: {message}"), done.err
    assert done.err.count("\n") == 1
    assert not (folder / "plot.png").exists()


@pytest.mark.parametrize(
    ("measures", "line"),
    [
        ("[1]\n", 1),
        ('{"accuracy": 1}\n', 1),
        ('{"step": 0, "accuracy": 1}\n{"step": 1.5, "accuracy": 1}\n', 2),
        ('{"step": true, "accuracy": 1}\n', 1),
        ('{"step": -1}\n', 1),
        ('{"step": 1, "accuracy": "high"}\n', 1),
        ('{"step": 1, "accuracy": 1' + "0" * 400 + "}\n", 1),
        ("nonsense\n", 1),
        ("[" * 60_000 + "\n", 1),
    ],
)
def test_measures_that_are_none_are_refused(
    run: Callable[..., SimpleNamespace], folder: Path, measures: str, line: int
) -> None:
    write_run(folder / "a", history(2), measures)
    done = run("plot", "a")
    assert (done.code, done.out) == (2, "")
    message = f"a/measures.jsonl: line {line} must be a JSON object of a step and named numbers, got "
    assert done.err.startswith(f"cylora: error: {message}")
    assert done.err.count("\n") == 1


def test_measures_that_are_no_text_are_refused(run: Callable[..., SimpleNamespace], folder: Path) -> None:
    write_run(folder / "a", history(2))
    (folder / "a" / "measures.jsonl").write_bytes(b"\xff")
    done = run("plot", "a")
    assert done.code == 2
    assert done.err.startswith("cylora: error: a/measures.jsonl: must be text ('utf-8' codec")


def test_folder_that_is_no_run_is_refused(run: Callable[..., SimpleNamespace], folder: Path) -> None:
    (folder / "a" / "checkpoints").mkdir(parents=True)
    done = run("plot", "a")
    rule = "must be a run's folder, or a file such as history.jsonl"
    assert (done.code, done.out) == (2, "")
    assert done.err == f"cylora: error: a: {rule}, got a folder without history.jsonl and without checkpoints\n"


def test_checkpoint_that_is_damaged_or_has_no_steps_is_refused(
    run: Callable[..., SimpleNamespace], folder: Path
) -> None:
    write_checkpoint(folder / "new", 0)
    done = run("plot", "new")
    assert done.code == 2
    assert "checkpoint-00000001.safetensors: must have a step to draw, got none" in done.err
    checkpoint = folder / "new" / "checkpoints" / "checkpoint-00000001.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    done = run("plot", "new")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "checkpoint-00000001.safetensors" in done.err


def test_pipes_links_and_huge_files_are_refused(
    run: Callable[..., SimpleNamespace], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "file").write_text(text(history(2)))
    (folder / "link").symlink_to("file")
    (folder / "loop").symlink_to("loop")
    with (folder / "huge").open("wb") as file:
        file.truncate(2**40)
    for name, message in (
        ("pipe", "pipe: must be a regular file, got a directory, pipe or device"),
        ("link", "link: must be a regular file, got a symbolic link"),
        ("loop", "loop: must be a regular file, got a symbolic link"),
        ("loop/x", "loop/x cannot be read: Too many levels of symbolic links"),
        ("huge", "huge: must have at most 1073741824 bytes, got 1099511627776"),
        ("/dev/zero", "/dev/zero: must be a regular file, got a directory, pipe or device"),
        ("file/x", "file/x cannot be read: Not a directory"),
    ):
        done = run("plot", name)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(f"cylora: error: {message}"), done.err
        assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: RUN"),
        (["a", "--output", "a/history.jsonl"], "a picture's path must end in .pdf, .png, .svg, got 'a/history.jsonl'"),
        (["a", "--output", "none/x.png"], "--output none/x.png cannot be written: No such file or directory"),
        (["a", "--output", "dir.png"], "--output dir.png cannot be written: Is a directory"),
        (["a", "--smooth", "-1"], "smooth (if not None) must be an integer >= 0, got -1"),
        (["a", "--smooth", "x"], "--smooth must be an integer, got 'x'"),
        (["a"] * 25, "at most 24 runs can be told apart in one picture, got 25"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    run: Callable[..., SimpleNamespace], folder: Path, arguments: list[str], message: str
) -> None:
    write_run(folder / "a", history(2))
    (folder / "dir.png").mkdir()
    done = run("plot", *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert (folder / "a" / "history.jsonl").read_text() == text(history(2))


def test_missing_matplotlib_is_one_line(
    run: Callable[..., SimpleNamespace], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(folder / "a", history(2))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run("plot", "a")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.endswith("pip install 'cylora[plot]'\n")


def test_limits_leave_room_for_seven_million_steps() -> None:
    assert _cli_plot.MAX_BYTES // len(row(9_999_999, loss=0.123456789012345678)) > 7_000_000
