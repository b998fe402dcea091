"""TrainingStep and TrainingHistory: the sequence, the ring, the columns, the totals, and text out and in."""

import copy
import csv
import io
import json
import math
import pickle
import struct
from collections.abc import Sequence

import numpy as np
import pytest
from training import make_adapter, make_pair, make_trainer, same_bits

from cylora import ConfigError, FormatError, InputError, StateError, TrainingHistory, TrainingStep

NAN, INF = math.nan, math.inf
ODD_FLOATS = [0.0, -0.0, NAN, INF, -INF, 5e-324, 1.7976931348623157e308, 0.1, 1 / 3, -2.5, 710.0, 1e-17]


def filled(steps: int, limit: int | None = None) -> TrainingHistory:
    history = TrainingHistory(limit)
    for step in range(steps):
        history.append(loss=2.0 - step / 8, learning_rate=step / 1000, grad_norm=step + 0.5, skipped=step % 5 == 3)
    return history


def odd(limit: int | None = None) -> TrainingHistory:
    """Return a history of every float that text formats get wrong."""
    history = TrainingHistory(limit)
    for i, loss in enumerate(ODD_FLOATS):
        history.append(loss=loss, learning_rate=ODD_FLOATS[i - 1], grad_norm=ODD_FLOATS[i - 2], skipped=i % 2 == 0)
    return history


def bits(step: TrainingStep) -> tuple:
    """Return a record with its floats as bytes, so that NaN equals NaN and -0.0 differs from 0.0."""
    return tuple(struct.pack("d", x) if isinstance(x, float) else x for x in step)


# ---------------------------------------------------------------- one record


def test_a_step_is_an_immutable_tuple_of_its_fields() -> None:
    step = TrainingStep(3, 1.5, 1e-3, 0.25, math.exp(1.5))
    assert step == (3, 1.5, 1e-3, 0.25, math.exp(1.5), False)
    assert step._fields == ("step", "loss", "learning_rate", "grad_norm", "perplexity", "skipped")
    with pytest.raises(AttributeError):
        step.loss = 2.0  # type: ignore[misc]
    assert step.to_dict() == dict(zip(step._fields, step, strict=True))
    assert json.loads(step.to_json()) == step.to_dict()
    assert pickle.loads(pickle.dumps(step)) == step


def test_json_is_strict_where_numbers_are_not_finite() -> None:
    step = TrainingStep(0, NAN, INF, -INF, NAN, True)
    row = json.loads(step.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row == {
        "step": 0, "loss": "NaN", "learning_rate": "Infinity", "grad_norm": "-Infinity", "perplexity": "NaN",
        "skipped": True,
    }  # fmt: skip


def test_records_of_a_trainer_and_of_its_history_are_of_the_same_kind() -> None:
    trainer, adapter = make_trainer(), make_adapter()
    records = [trainer.step(loss, adapter, *make_pair()) for loss in (1.5, np.float32(2), 3, 1000.0, NAN, -INF)]
    assert [bits(r) for r in records] == [bits(r) for r in trainer.training_history]
    for record in records:
        assert type(record) is TrainingStep
        assert [type(x) for x in record] == [int, float, float, float, float, bool]
    assert [record.perplexity for record in records[:4]] == [math.exp(1.5), math.exp(2), math.exp(3), INF]
    assert records[5].perplexity == 0.0
    assert json.loads(records[1].to_json())["loss"] == 2.0


# ---------------------------------------------------------------- sequence


@pytest.mark.parametrize("limit", [None, 1, 3, 7, 8, 100])
@pytest.mark.parametrize("steps", [0, 1, 7, 8, 9, 30])
def test_history_is_the_sequence_of_its_last_records(steps: int, limit: int | None) -> None:
    history = filled(steps, limit)
    everything = list(filled(steps))
    kept = everything if limit is None else everything[-limit:]
    assert isinstance(history, Sequence)
    assert len(history) == len(kept)
    assert list(history) == kept
    assert [history[i] for i in range(len(kept))] == kept
    assert [history[-1 - i] for i in range(len(kept))] == kept[::-1]
    assert list(reversed(history)) == kept[::-1]
    for part in (slice(None), slice(1, 3), slice(None, None, -1), slice(-2, None), slice(50, 60), slice(0, 99, 3)):
        assert history[part] == kept[part]
    for outside in (len(kept), -len(kept) - 1, 10**9):
        with pytest.raises(IndexError, match=rf"history index {outside} is out of range: {len(kept)} steps are kept"):
            history[outside]
    assert history.total_steps == steps
    assert bool(history) == bool(kept)
    assert all(history.index(step) == i for i, step in enumerate(kept))
    assert all(step in history for step in kept)
    assert history.last_step() == (kept[-1] if kept else None)


def test_index_may_be_any_integer_and_nothing_else() -> None:
    history = filled(4)
    assert history[np.int64(2)].to_json() == history[2].to_json()
    for bad in (1.0, "1", None):
        with pytest.raises(TypeError):
            history[bad]


@pytest.mark.parametrize("limit", [None, 1500, 1023, 1024, 1025, 3000])
def test_growing_keeps_every_record(limit: int | None) -> None:
    """The arrays double at 1,024 and 2,048 rows; a ring stops growing at its limit."""
    history = filled(5000, limit)
    everything = filled(10_000)
    kept = 5000 if limit is None else limit
    for i in (0, 1, kept // 2, kept - 1):
        assert history[i] == everything[5000 - kept + i]
    assert same_bits(history.column("loss"), everything.column("loss")[5000 - kept : 5000])


@pytest.mark.parametrize("limit", [0, -1, 1.0, True, "3"])
def test_limit_is_checked(limit: object) -> None:
    with pytest.raises(ConfigError, match=r"limit \(if not None\) must be an integer"):
        TrainingHistory(limit)


def test_append_returns_the_record_and_checks_its_numbers() -> None:
    history = TrainingHistory()
    assert history.append(loss=1, learning_rate=2, grad_norm=3) == (0, 1.0, 2.0, 3.0, math.e, False)
    assert history.append(loss=0, learning_rate=0, grad_norm=0, skipped=True).skipped is True
    for name in ("loss", "learning_rate", "grad_norm"):
        with pytest.raises(InputError, match=f"{name} must be a real number, got 'x'"):
            history.append(**{"loss": 1, "learning_rate": 1, "grad_norm": 1} | {name: "x"})
    assert len(history) == 2


def test_equality_is_by_content() -> None:
    assert filled(9) == filled(9)
    assert odd() == odd()
    assert TrainingHistory() == TrainingHistory()
    assert filled(9) != filled(10)
    assert filled(9) != filled(9, 9)
    assert filled(9, 3) != filled(9, 4)
    assert filled(9) != list(filled(9))
    with pytest.raises(TypeError, match="unhashable"):
        hash(filled(1))


def test_repr_tells_steps_and_mean() -> None:
    assert repr(filled(5, 3)) == "TrainingHistory(5 steps, 3 kept, average loss 1.75)"


# ---------------------------------------------------------------- totals


@pytest.mark.parametrize("limit", [None, 1, 4])
def test_totals_are_over_all_steps_whatever_the_limit(limit: int | None) -> None:
    history, losses = TrainingHistory(limit), []
    assert (history.average_loss(), history.convergence_rate(), history.last_step()) == (0.0, None, None)
    for step in range(20):
        losses.append(1.0 + 0.1 * step)
        history.append(loss=losses[-1], learning_rate=0, grad_norm=0, skipped=step % 3 == 0)
        total = 0.0
        for loss in losses:
            total += loss
        assert history.average_loss() == total / len(losses)
        assert history.skipped_steps() == step // 3 + 1
        assert history.total_steps == step + 1
        if step:
            assert history.convergence_rate() == (losses[0] - losses[-1]) / losses[0]
        else:
            assert history.convergence_rate() is None


def test_convergence_from_a_first_loss_of_zero_is_undefined() -> None:
    history = TrainingHistory()
    for loss in (0.0, 1.0, 2.0):
        history.append(loss=loss, learning_rate=0, grad_norm=0)
    assert history.convergence_rate() is None


# ---------------------------------------------------------------- columns


@pytest.mark.parametrize("limit", [None, 4, 100])
def test_columns_are_read_only_and_match_the_records(limit: int | None) -> None:
    history = filled(10, limit)
    dtypes = {"step": np.int64, "skipped": np.bool_}
    for name in TrainingStep._fields:
        column = history.column(name)
        assert column.tolist() == [getattr(step, name) for step in history]
        assert column.dtype == dtypes.get(name, np.float64)
        with pytest.raises(ValueError, match="read-only"):
            column[...] = 0


def test_a_column_does_not_change_when_steps_follow() -> None:
    for limit in (None, 4):
        history = filled(1024 if limit is None else 6, limit)
        columns = {name: history.column(name) for name in TrainingStep._fields}
        before = {name: column.copy() for name, column in columns.items()}
        for _ in range(2000):
            history.append(loss=9, learning_rate=9, grad_norm=9, skipped=True)
        for name, column in columns.items():
            assert same_bits(column, before[name])


def test_unknown_column_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"column must be one of 'step', 'loss', .*'skipped', got 'lr'"):
        filled(1).column("lr")


# ---------------------------------------------------------------- out and in


def test_to_dicts_under_both_names() -> None:
    history = filled(3)
    assert history.to_dicts() == [step.to_dict() for step in history]
    assert history.to_dicts(names="hf") == [
        {"step": s.step + 1, "loss": s.loss, "learning_rate": s.learning_rate, "grad_norm": s.grad_norm}
        for s in history
    ]
    with pytest.raises(ConfigError, match="names must be 'cylora' or 'hf', got 'torch'"):
        history.to_dicts(names="torch")


@pytest.mark.parametrize("form", ["jsonl", "csv"])
@pytest.mark.parametrize("make", [odd, lambda: filled(0), lambda: filled(1), lambda: filled(3000)])
def test_text_round_trip_is_exact_to_the_bit(form: str, make) -> None:
    history, text = make(), io.StringIO(newline="")
    getattr(history, f"write_{form}")(text)
    text.seek(0)
    again = getattr(TrainingHistory, f"read_{form}")(text)
    assert [bits(step) for step in again] == [bits(step) for step in history]
    assert again == history
    assert again.average_loss() == history.average_loss() or math.isnan(history.average_loss())


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_text_is_read_into_a_ring_with_exact_totals(form: str) -> None:
    history, text = filled(30), io.StringIO(newline="")
    getattr(history, f"write_{form}")(text)
    text.seek(0)
    ring = getattr(TrainingHistory, f"read_{form}")(text, 4)
    assert list(ring) == history[-4:]
    assert ring.average_loss() == history.average_loss()
    assert ring == filled(30, 4)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_text_of_a_ring_that_dropped_steps_is_refused_because_totals_are_lost(form: str) -> None:
    text = io.StringIO(newline="")
    getattr(filled(9, 4), f"write_{form}")(text)
    text.seek(0)
    with pytest.raises(FormatError, match=r"line [12]: step must be 0 \(0, then one more a row\), got 5"):
        getattr(TrainingHistory, f"read_{form}")(text)


def test_jsonl_allows_blank_lines_and_csv_files_of_other_writers() -> None:
    text = "\n".join(["", filled(2)[0].to_json(), "   ", filled(2)[1].to_json(), ""])
    assert TrainingHistory.read_jsonl(io.StringIO(text)) == filled(2)
    rows = io.StringIO()
    writer = csv.DictWriter(rows, TrainingStep._fields, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writeheader()
    writer.writerows(step.to_dict() | {"skipped": int(step.skipped)} for step in filled(2))
    assert TrainingHistory.read_csv(io.StringIO(rows.getvalue())) == filled(2)


ROW = {"step": 1, "loss": 1.0, "learning_rate": 0.1, "grad_norm": 2.0, "perplexity": 2.7, "skipped": False}
FIRST = json.dumps(ROW | {"step": 0})


def row(**changes: object) -> str:
    return json.dumps(ROW | changes)


BAD_LINES = [
    ("{", "line 2 must be a JSON object, got '{.*Expecting property name"),
    ("[1, 2]", r"line 2 must be a JSON object, got '\[1, 2\]"),
    ("3", "line 2 must be a JSON object, got '3"),
    ("null", "line 2 must be a JSON object, got 'null"),
    ('"text"', "line 2 must be a JSON object, got"),
    ("[" * 100_000, "line 2 must be a JSON object, got"),
    ("\x00", "line 2 must be a JSON object, got"),
    (row()[:-1], "line 2 must be a JSON object, got"),
    (row() + row(), "line 2 must be a JSON object, got"),
    (row().replace('"loss"', '"step": 1, "loss"'), r"line 2 must be a JSON object, got .*a key is repeated"),
    (row().replace("1.0", "9" * 5000), "line 2 must be a JSON object, got|line 2: loss must be a number"),
    ("{}", "line 2 must have the keys step, loss, .*skipped, got $"),
    (
        json.dumps({k: v for k, v in ROW.items() if k != "loss"}),
        "line 2 must have the keys .*, got step, learning_rate",
    ),
    (row(extra=1), "line 2 must have the keys .*, got .*extra"),
    *[(row(step=x), "line 2: step must be an integer, got") for x in (1.0, "x", None, [], {}, True, "1_0", "1.0")],
    *[(row(step=x), r"line 2: step must be 1 \(0, then one more a row\), got") for x in (0, 2, -1, 10**30)],
    *[
        (row(**{name: x}), f"line 2: {name} must be a number, got")
        for name in ("loss", "learning_rate", "grad_norm", "perplexity")
        for x in (None, "one", [], {}, True, "1_0", "", "0x1p3")
    ],
    (row(loss=10**400), "line 2: loss must be a number, got"),
    *[(row(skipped=x), "line 2: skipped must be true or false, got") for x in (2, -1)],
    *[(row(skipped=x), "line 2: skipped must be an integer, got") for x in (0.0, None, "no")],
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_jsonl_refuses_by_line_and_key(line: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        TrainingHistory.read_jsonl(io.StringIO(f"{FIRST}\n{line}\n"))


HEADER = "step,loss,learning_rate,grad_norm,perplexity,skipped"
BAD_CSV = [
    ("", "line 1 must be the header step,loss,.*, got None"),
    ("loss,step", r"line 1 must be the header .*, got \['loss', 'step'\]"),
    (HEADER + ",more", "line 1 must be the header"),
    (f"{HEADER}\n0,1,1,1,1", "line 2: skipped must be an integer, got None"),
    (f"{HEADER}\n0,1,1,1,1,0,7", "line 2 must have the keys"),
    (f"{HEADER}\n0,x,1,1,1,0", "line 2: loss must be a number, got 'x'"),
    (f"{HEADER}\n0.0,1,1,1,1,0", "line 2: step must be an integer, got '0.0'"),
    (f"{HEADER}\n0,1_0,1,1,1,0", "line 2: loss must be a number, got '1_0'"),
    (f"{HEADER}\n0,1,1,1,1,0\n2,1,1,1,1,0", "line 3: step must be 1"),
    (f"{HEADER}\n0,1,1,1,1,False", "line 2: skipped must be an integer, got 'False'"),
    (f'{HEADER}\n"{"9" * 200_000}",1,1,1,1,0', r"line 2 must be CSV \(field larger than field limit"),
    (f'"{"9" * 200_000}"', r"line 1 must be CSV \(field larger than field limit"),
]


@pytest.mark.parametrize(("text", "message"), BAD_CSV, ids=range(len(BAD_CSV)))
def test_csv_refuses_by_line_and_key(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        TrainingHistory.read_csv(io.StringIO(text))


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_text_that_does_not_decode_is_a_format_error(form: str) -> None:
    first = (HEADER if form == "csv" else FIRST).encode()
    stream = io.TextIOWrapper(io.BytesIO(first + b"\n\xff\xfe\n"), encoding="utf-8")
    with pytest.raises(FormatError, match=r"line 1 or one soon after must be text .*0xff"):
        getattr(TrainingHistory, f"read_{form}")(stream)


def test_a_csv_file_opened_in_bytes_is_a_format_error() -> None:
    with pytest.raises(FormatError, match=r"line 1 must be CSV \(iterator should return strings"):
        TrainingHistory.read_csv(io.BytesIO(b"step,loss\n"))


# ---------------------------------------------------------------- state and copies


@pytest.mark.parametrize("limit", [None, 1, 4, 8, 2000])
@pytest.mark.parametrize("steps", [0, 1, 4, 5, 9, 1024, 1500])
def test_state_continues_to_the_same_history(steps: int, limit: int | None) -> None:
    original = filled(steps, limit)
    again = TrainingHistory.from_state_dict(original.state_dict())
    assert again == original
    for history in (original, again):
        for loss in range(12):
            history.append(loss=loss, learning_rate=1, grad_norm=1, skipped=True)
    assert again == original
    assert list(again) == list(original)
    assert again.average_loss() == original.average_loss()
    assert again.convergence_rate() == original.convergence_rate()


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))], ids=["copy", "deepcopy", "pickle"]
)
@pytest.mark.parametrize("limit", [None, 4])
def test_a_copy_is_a_history_of_its_own(copied, limit: int | None) -> None:
    history = filled(9, limit)
    twin = copied(history)
    assert twin == history
    history.append(loss=1, learning_rate=1, grad_norm=1)
    assert twin == filled(9, limit)


def test_state_is_a_copy() -> None:
    history = filled(3)
    state = history.state_dict()
    state["loss"][...] = 77
    assert history == filled(3)
    restored = TrainingHistory.from_state_dict(state)
    state["loss"][...] = 78
    assert restored[0].loss == 77


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limit": 0}, "history limit must be an integer >= 1, got 0"),
        ({"limit": "3"}, "history limit must be an integer, got '3'"),
        ({"total_steps": -1}, "history total_steps must be an integer >= 0, got -1"),
        ({"total_steps": 3.0}, "history total_steps must be an integer, got 3.0"),
        ({"total_steps": 4}, r"history loss must be float64 of shape \(4,\), got float64 of shape \(3,\)"),
        ({"skipped_steps": 4}, r"history skipped_steps must be an integer in \[0, 3\], got 4"),
        ({"loss_sum": "x"}, "history loss_sum must be a real number, got 'x'"),
        ({"first_loss": None}, "history first_loss must be a real number, got None"),
        ({"loss": np.zeros(3, np.float32)}, "history loss must be float64 of shape"),
        ({"learning_rate": np.zeros((3, 1))}, "history learning_rate must be float64 of shape"),
        ({"grad_norm": None}, "history grad_norm must be float64"),
        ({"skipped": np.zeros(3)}, "history skipped must be bool of shape"),
        ({"more": 1}, "history must be a mapping with the keys limit, total_steps"),
    ],
)
def test_a_state_that_does_not_hold_together_is_refused(change: dict, message: str) -> None:
    with pytest.raises(StateError, match=message):
        TrainingHistory.from_state_dict(filled(3).state_dict() | change)


@pytest.mark.parametrize("state", [None, [], {}, 3])
def test_a_state_that_is_no_state_is_refused(state: object) -> None:
    with pytest.raises(StateError, match="history must be a mapping with the keys"):
        TrainingHistory.from_state_dict(state)
