"""A folder of checkpoints: numbered, pruned, and read from the newest back."""

import logging
from pathlib import Path

import numpy as np
import pytest
from training import fingerprint, make_adapter, make_pair, make_trainer

from cylora import FormatError, InputError
from cylora.formats import generations as module
from cylora.formats.checkpoint import save_checkpoint
from cylora.formats.generations import list_generations, load_generation, save_generation


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def filled(folder: Path, count: int, keep: int = 9) -> list[str]:
    """Save that many generations, a step apart; return the fingerprint of each."""
    trainer, adapter, prints = make_trainer(), make_adapter(), []
    for step in range(count):
        trainer.step(1.0, adapter, *make_pair(step))
        save_generation(folder, trainer, adapter, keep=keep)
        prints.append(fingerprint(trainer.state_dict(), adapter))
    return prints


def print_of(folder: Path, **arguments: bool) -> str:
    checkpoint = load_generation(folder, **arguments)
    return fingerprint(checkpoint.trainer.state_dict(), checkpoint.adapters)


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-40] ^= 1
    path.write_bytes(raw)


def test_generations_are_numbered_from_one_and_the_last_are_kept(tmp_path: Path) -> None:
    prints = filled(tmp_path, 5, keep=3)
    assert names(tmp_path) == [f"checkpoint-0000000{number}.safetensors" for number in (3, 4, 5)]
    assert [number for number, _ in list_generations(tmp_path)] == [3, 4, 5]
    assert load_generation(tmp_path).generation == 5
    assert print_of(tmp_path) == prints[-1]


def test_two_are_kept_by_default_and_never_fewer(tmp_path: Path) -> None:
    trainer, adapter = make_trainer(), make_adapter()
    for _ in range(3):
        path = save_generation(tmp_path, trainer, adapter)
    assert path == tmp_path / "checkpoint-00000003.safetensors"
    assert names(tmp_path) == ["checkpoint-00000002.safetensors", path.name]
    with pytest.raises(InputError, match="keep must be an integer >= 2, got 1"):
        save_generation(tmp_path, trainer, adapter, keep=1)


def test_a_higher_keep_removes_nothing(tmp_path: Path) -> None:
    filled(tmp_path, 2, keep=2)
    filled(tmp_path, 1, keep=9)
    assert len(names(tmp_path)) == 3


def test_numbers_beyond_eight_digits_sort_as_numbers(tmp_path: Path) -> None:
    trainer, adapter = make_trainer(), make_adapter()
    save_checkpoint(trainer, adapter, tmp_path / "checkpoint-99999999.safetensors", generation=99_999_999)
    assert save_generation(tmp_path, trainer, adapter).name == "checkpoint-100000000.safetensors"
    assert [number for number, _ in list_generations(tmp_path)] == [99_999_999, 100_000_000]
    assert load_generation(tmp_path).generation == 100_000_000


def test_other_files_are_neither_looked_at_nor_removed(tmp_path: Path) -> None:
    others = [
        "checkpoint-1.safetensors", "checkpoint-00000009.safetensors.bak", "xcheckpoint-00000009.safetensors",
        ".checkpoint-00000009.safetensors.tmp", ".other.7.0123456789abcdef.tmp", "notes.txt",
    ]  # fmt: skip
    for name in others:
        (tmp_path / name).write_text("mine")
    filled(tmp_path, 3, keep=2)
    assert set(others) < set(names(tmp_path))
    assert [number for number, _ in list_generations(tmp_path)] == [2, 3]


def test_what_a_killed_writer_left_is_removed_before_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, not after: on a disk that the leftovers filled, the save would fail."""
    filled(tmp_path, 1)
    left = tmp_path / ".checkpoint-00000002.safetensors.4711.0123456789abcdef.tmp"
    left.write_bytes(b"half")

    def save(*arguments: object, **named: object) -> None:
        assert not left.exists()
        save_checkpoint(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "save_checkpoint", save)
    filled(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-00000001.safetensors", "checkpoint-00000002.safetensors"]


def test_after_an_error_no_older_generation_is_gone(tmp_path: Path) -> None:
    prints = filled(tmp_path, 2)
    before = names(tmp_path)
    adapter = make_adapter()
    adapter.flat.vector[3] = np.nan
    with pytest.raises(InputError, match="A must be finite, got nan"):
        save_generation(tmp_path, make_trainer(), adapter)
    assert names(tmp_path) == before
    assert print_of(tmp_path) == prints[-1]


def test_rng_extra_and_changes_are_handed_through(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    save_generation(tmp_path, make_trainer(), make_adapter(), rng=rng, extra={"epoch": 3})
    seen: list[object] = []
    checkpoint = load_generation(tmp_path, max_steps=77, on_step=seen.append, log_every=1)
    assert fingerprint(checkpoint.rng) == fingerprint(rng)
    assert checkpoint.extra == {"epoch": 3}
    assert checkpoint.trainer.config.max_steps == 77
    checkpoint.trainer.step(1.0, checkpoint.adapters, *make_pair())
    assert len(seen) == 1


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    assert list_generations(tmp_path) == []
    with pytest.raises(FormatError, match=r"must hold a checkpoint-<number>.safetensors, got none"):
        load_generation(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_generation(tmp_path / "missing")
    with pytest.raises(FileNotFoundError):
        save_generation(tmp_path / "missing", make_trainer(), make_adapter())


def test_a_damaged_newest_one_is_an_error_that_names_the_older(tmp_path: Path) -> None:
    filled(tmp_path, 2)
    damage(tmp_path / "checkpoint-00000002.safetensors")
    message = "checkpoint-00000002.*it is damaged; an older one is there: checkpoint-00000001.safetensors"
    with pytest.raises(FormatError, match=message):
        load_generation(tmp_path)


def test_falling_back_is_asked_for_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prints = filled(tmp_path, 3)
    with caplog.at_level(logging.WARNING, "cylora"):
        assert print_of(tmp_path, fallback=True) == prints[2]
        assert not caplog.records
        damage(tmp_path / "checkpoint-00000003.safetensors")
        (tmp_path / "checkpoint-00000002.safetensors").write_bytes(b"")
        assert print_of(tmp_path, fallback=True) == prints[0]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "passed over a damaged checkpoint" in caplog.messages[0]
    assert "checkpoint-00000003" in caplog.messages[0]
    assert "checkpoint-00000002" in caplog.messages[1]


@pytest.mark.parametrize("fallback", [False, True])
def test_a_lone_damaged_one_is_an_error(tmp_path: Path, fallback: bool) -> None:
    filled(tmp_path, 1)
    damage(tmp_path / "checkpoint-00000001.safetensors")
    with pytest.raises(FormatError, match=r"it is damaged$"):
        load_generation(tmp_path, fallback=fallback)


def test_every_one_damaged_is_an_error(tmp_path: Path) -> None:
    filled(tmp_path, 2)
    for path in tmp_path.iterdir():
        damage(path)
    with pytest.raises(FormatError, match=r"checkpoint-00000001.*it is damaged$"):
        load_generation(tmp_path, fallback=True)


def test_a_file_under_another_number_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, 2)
    (tmp_path / "checkpoint-00000001.safetensors").rename(tmp_path / "checkpoint-00000007.safetensors")
    with pytest.raises(FormatError, match=r"generation must be 7, as in its name, got 1; an older one is there"):
        load_generation(tmp_path)
    assert load_generation(tmp_path, fallback=True).generation == 2
