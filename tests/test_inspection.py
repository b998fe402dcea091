"""inspect and verify: what a path stands for, the facts told of it, and every kind of damage noticed."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from test_gguf_reader import A, B, made
from training import fill, make_adapter, make_set, make_trainer

from cylora import AdapterSet, Gradients, LoraAdapter
from cylora.errors import FormatError
from cylora.formats import inspection
from cylora.formats.checkpoint import save_checkpoint
from cylora.formats.durable import publish_directory
from cylora.formats.generations import list_generations, save_generation
from cylora.formats.inspection import Verdict, inspect, verify
from cylora.formats.peft import TENSORS_NAME, peft_files, save_peft
from cylora.formats.peft_config import CONFIG_NAME


def trained(adapters: AdapterSet | None = None, **config: Any) -> tuple[Any, AdapterSet]:
    """Return a trainer that has done a step, and its adapters."""
    adapters = make_set() if adapters is None else adapters
    trainer, gradients = make_trainer(**config), Gradients(adapters)
    trainer.step(1.0, adapters, fill(gradients))
    return trainer, adapters


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a folder as `cylora train` leaves it: three generations written, two kept; two adapters published."""
    folder = tmp_path / "run"
    for part in ("", "checkpoints", "adapters"):
        (folder / part).mkdir()
    trainer, adapters = trained()
    for _ in range(3):
        save_generation(folder / "checkpoints", trainer, adapters)
    for step in (10, 20):
        publish_directory(folder / "adapters", "adapter", step, peft_files(adapters, step=step))
    return folder


def problems(path: Path) -> dict[str, str | None]:
    return {verdict.path.name: verdict.problem for verdict in verify(path)}


def published(run: Path) -> list[Path]:
    return sorted(path for path in (run / "adapters").iterdir() if not path.is_symlink())


# ---------------------------------------------------------------------- inspect


def test_inspect_a_checkpoint_tells_its_facts(tmp_path: Path) -> None:
    trainer, adapters = trained(state_dtype="bfloat16", max_grad_norm=float("inf"))
    adapters.origin = {"base_model_name_or_path": "some/model"}
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(trainer, adapters, path, generation=7)
    kind, found, got, facts, average = inspect(path)
    assert average is None
    assert (kind, found) == ("checkpoint", path)
    assert isinstance(got, AdapterSet)
    assert got.origin == adapters.origin
    assert np.array_equal(got.flat.vector, adapters.flat.vector)
    training, members = facts.pop("training"), facts.pop("adapters")
    assert facts == {
        "kind": "checkpoint",
        "path": str(path),
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "parameters": adapters.param_count(),
        "finite": True,
        "cylora": facts["cylora"],
        "generation": 7,
        "steps": 1,
        "skipped steps": 0,
        "micro-batches pending": 0,
        "optimizer state": "bfloat16",
    }
    assert training["max_grad_norm"] == "inf"
    assert training["learning_rate"] == 1e-2
    assert training["lora_config"]["rank"] == trainer.config.lora_config.rank
    assert list(members) == ["q", "k", "out.proj"]
    assert members["k"] == {
        "d_in": 4,
        "d_out": 3,
        "rank": 2,
        "alpha": 8.0,
        "scaling": 4.0,
        "norm A": pytest.approx(np.linalg.norm(adapters["k"].a_matrix)),
        "norm B": pytest.approx(np.linalg.norm(adapters["k"].b_matrix)),
    }


def test_inspect_a_checkpoint_of_a_lone_adapter_before_its_first_step(tmp_path: Path) -> None:
    adapter = make_adapter()
    save_checkpoint(make_trainer(schedule=lambda _: 0.1), adapter, tmp_path / "file")
    kind, _, got, facts, _ = inspect(str(tmp_path / "file"))
    assert kind == "checkpoint"
    assert isinstance(got, LoraAdapter)
    assert facts["optimizer state"] == "none yet"
    assert facts["steps"] == 0
    assert facts["training"]["schedule"] is None
    assert list(facts["adapters"]) == ["adapter"]


def test_inspect_a_peft_directory_by_any_of_its_names(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_peft(make_set(), folder, step=12)
    (tmp_path / "link").symlink_to("adapter")
    for path in (
        folder,
        folder / TENSORS_NAME,
        folder / CONFIG_NAME,
        tmp_path / "link",
        tmp_path / "link" / CONFIG_NAME,
    ):
        kind, found, adapters, facts, _ = inspect(path)
        assert kind == "PEFT adapter"
        assert found.resolve() == folder
        assert np.array_equal(adapters.flat.vector, make_set().flat.vector)
        assert facts["steps"] == 12
        assert facts["bytes"] == (folder / TENSORS_NAME).stat().st_size
        assert facts["sha256"] == hashlib.sha256((folder / TENSORS_NAME).read_bytes()).hexdigest()


def test_another_file_beside_an_adapter_is_not_the_adapter(tmp_path: Path) -> None:
    save_peft(make_set(), tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("hello, this is no adapter")
    with pytest.raises(FormatError, match=r"README.md: header"):
        inspect(tmp_path / "adapter" / "README.md")


def test_inspect_a_gguf_adapter(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(made())
    kind, found, adapters, facts, _ = inspect(tmp_path / "file")
    assert (kind, found) == ("GGUF adapter", tmp_path / "file")
    assert np.array_equal(adapters.flat.vector, [*A.ravel(), *B.ravel()])
    assert facts["architecture"] == "llama"
    assert facts["alpha"] == 16.0


def test_inspect_a_run_shows_its_newest_checkpoint(run: Path) -> None:
    newest = run / "checkpoints" / "checkpoint-00000003.safetensors"
    assert inspect(run).path == inspect(run / "checkpoints").path == newest
    assert inspect(run).facts["generation"] == 3


def test_inspect_a_run_without_checkpoints_shows_its_latest_adapter(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    newest = published(run)[-1]
    for path in (run, run / "adapters", run / "adapters" / "latest"):
        assert inspect(path).path == newest  # not `latest`, which may point elsewhere a moment later
        assert inspect(path).facts["steps"] == 20


def test_inspect_follows_a_link_to_a_checkpoint(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("run/checkpoints/checkpoint-00000002.safetensors")
    assert inspect(tmp_path / "link").facts["generation"] == 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_inspect_shows_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    adapters = make_set()
    save_peft(adapters, tmp_path / "adapter")
    change_weight(tmp_path / "adapter", value)
    facts = inspect(tmp_path / "adapter").facts
    assert facts["finite"] is False
    assert facts["adapters"]["q"]["norm A"] == ("nan" if np.isnan(value) else "inf")
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert problems(tmp_path / "adapter") == {"adapter": "a weight is NaN or infinite"}


def change_weight(folder: Path, value: float) -> None:
    """Write the tensors of a PEFT directory anew, as if not by cylora, with another first weight."""
    adapters = inspect(folder).adapters
    assert isinstance(adapters, AdapterSet)
    adapters.flat.vector[0] = value
    tensors = {}
    for name, one in adapters.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = one.a_matrix
        tensors[f"base_model.model.{name}.lora_B.weight"] = one.b_matrix
    (folder / TENSORS_NAME).write_bytes(save(tensors))


def test_inspect_many_adapters(tmp_path: Path) -> None:
    shapes = {f"model.layers.{n // 7}.part_{n % 7}": (4, 3) for n in range(448)}
    save_peft(AdapterSet(shapes, seed=0), tmp_path / "adapter")
    assert list(inspect(tmp_path / "adapter").facts["adapters"]) == list(shapes)


# ---------------------------------------------------------------------- what is no such thing


def empty(path: Path) -> None:
    path.mkdir()


def killed_run(path: Path) -> None:
    for folder in (path, path / "checkpoints", path / "adapters"):
        folder.mkdir()
    (path / "config.toml").write_text("[run]\n")
    (path / "checkpoints" / ".checkpoint-00000001.safetensors.12.ab.tmp").write_bytes(b"half")


def broken_latest(path: Path) -> None:
    path.mkdir()
    (path / "latest").symlink_to("gone")


def pickled(path: Path) -> None:
    path.mkdir()
    (path / CONFIG_NAME).write_text("{}")
    (path / "adapter_model.bin").write_bytes(b"\x80\x02")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "an empty folder": (empty, "must be a run, a checkpoint or an adapter, got a folder with none of their files"),
    "a run killed at once": (killed_run, "must hold a checkpoint or an adapter, got a run that has not saved any"),
    "a broken latest": (broken_latest, "must be a run, a checkpoint or an adapter, got a folder"),
    "a pipe": (os.mkfifo, "must be a regular file, got a directory, pipe or device"),
    "a device": (lambda path: path.symlink_to(os.devnull), "must be a regular file, got a directory, pipe or device"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "must be a regular file, got a symbolic link"),
    "a text": (lambda path: path.write_text("hello, this is no adapter"), "header"),
    "nothing in it": (lambda path: path.write_bytes(b""), "must have at least 8 bytes"),
    "a model": (lambda path: path.write_bytes(save({"w": A})), "the metadata must have 'cylora.checkpoint'"),
    "a model in GGUF": (lambda path: path.write_bytes(made({})), "general.type must be 'adapter', got None"),
    "a pickle": (pickled, "must be adapter_model.safetensors, got a format that can run code"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_adapter_is_refused(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "path")
    with pytest.raises(FormatError, match=message):
        inspect(tmp_path / "path")


def test_what_is_missing_is_an_os_error_that_names_it(tmp_path: Path) -> None:
    save_peft(make_set(), tmp_path / "half")
    (tmp_path / "half" / TENSORS_NAME).unlink()
    (tmp_path / "broken").symlink_to("gone")
    (tmp_path / "file").write_bytes(b"")
    for name, named in (("gone", "gone"), ("half", f"half/{TENSORS_NAME}"), ("broken", "gone"), ("file/x", "file/x")):
        with pytest.raises(OSError, match=r"No such file|Not a directory") as caught:
            inspect(tmp_path / name)
        assert str(caught.value.filename) == str(tmp_path / named)


# ---------------------------------------------------------------------- verify


def test_verify_a_whole_run_lists_all_of_it(run: Path) -> None:
    checkpoints = [run / "checkpoints" / f"checkpoint-0000000{number}.safetensors" for number in (2, 3)]
    assert list(verify(run)) == [Verdict(path, None) for path in (*checkpoints, *published(run))]
    assert list(verify(run / "checkpoints")) == [Verdict(path, None) for path in checkpoints]
    assert list(verify(run / "adapters")) == [Verdict(path, None) for path in published(run)]
    assert list(verify(run / "adapters" / "latest")) == [Verdict(published(run)[-1], None)]
    assert list(verify(checkpoints[0])) == [Verdict(checkpoints[0], None)]


def test_verify_a_folder_whose_latest_lies_elsewhere(run: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "latest").symlink_to(published(run)[0])
    assert list(verify(tmp_path / "other")) == [Verdict(published(run)[0], None)]


def test_verify_finds_every_flipped_byte(tmp_path: Path) -> None:
    """Of a checkpoint, and of both files of a published adapter, whose config no hash within the files covers."""
    trainer, adapters = trained(AdapterSet({"q": (2, 2)}, seed=0))
    (tmp_path / "run").mkdir()
    checkpoint = save_generation(tmp_path / "run", trainer, adapters)
    adapter = publish_directory(tmp_path / "run", "adapter", 1, peft_files(adapters))
    config, tensors = adapter / CONFIG_NAME, adapter / TENSORS_NAME
    assert set(problems(tmp_path / "run").values()) == {None}
    for file, step in ((checkpoint, 131), (config, 7), (tensors, 13)):
        raw = file.read_bytes()
        with file.open("r+b", buffering=0) as opened:
            for place in range(0, len(raw), step):
                os.pwrite(opened.fileno(), bytes([raw[place] ^ 1]), place)
                assert [problem is None for problem in problems(tmp_path / "run").values()].count(False) == 1, place
                os.pwrite(opened.fileno(), raw[place : place + 1], place)
    assert set(problems(tmp_path / "run").values()) == {None}


def test_verify_compares_a_published_adapter_with_the_hash_in_its_name(run: Path) -> None:
    adapter = published(run)[0]
    document = json.loads((adapter / CONFIG_NAME).read_text())
    (adapter / CONFIG_NAME).write_text(json.dumps(document | {"lora_alpha": 9}))
    named = adapter.name[-8:]
    found = problems(run)
    assert found.pop(adapter.name).startswith(f"the files' hash must be {named}, as in the name, got ")  # type: ignore[union-attr]
    assert set(found.values()) == {None}


def test_verify_compares_a_generation_with_the_number_in_its_name(run: Path) -> None:
    second, third = (path for _, path in list_generations(run / "checkpoints"))
    third.write_bytes(second.read_bytes())
    found = problems(run)
    assert found.pop(third.name) == "generation must be 3, as in its name, got 2"
    assert set(found.values()) == {None}
    assert problems(third) == {third.name: None}  # by itself it is whole


def test_verify_reports_a_missing_file(run: Path) -> None:
    first, second = published(run)
    (first / TENSORS_NAME).unlink()
    (second / CONFIG_NAME).unlink()
    found = problems(run)
    assert found[first.name] == f"{first / TENSORS_NAME} must be there, got nothing"
    assert found[second.name] == f"{second / CONFIG_NAME} must be there, got nothing"
    assert list(verify(first)) == [Verdict(first, found[first.name])]


def test_verify_reports_what_is_no_regular_file(run: Path) -> None:
    (second, third) = (path for _, path in list_generations(run / "checkpoints"))
    second.unlink()
    second.symlink_to(third.name)
    (published(run)[0] / "folder").mkdir()
    found = problems(run)
    assert found[second.name] == f"{second}: must be a regular file, got a symbolic link (cp -L makes a file of it)"
    assert str(found[published(run)[0].name]).endswith(
        "folder: must be a regular file, got a directory, pipe or device"
    )


def test_verify_does_not_look_at_what_is_being_written(run: Path) -> None:
    before = problems(run)
    half = run / "adapters" / ".adapter.77.0123456789abcdef.tmp"
    half.mkdir()
    (half / CONFIG_NAME).write_text("{")
    (run / "checkpoints" / ".checkpoint-00000004.safetensors.77.0123.tmp").write_bytes(b"half")
    assert problems(run) == before


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_verify_refuses_a_folder_without_anything_and_reports_the_rest(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "path"
    make(path)
    if path.is_dir() and not (path / CONFIG_NAME).exists():
        with pytest.raises(FormatError, match=message):
            list(verify(path))
    else:
        (verdict,) = verify(path)
        assert message in str(verdict.problem)


def test_verify_a_path_with_nothing_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(verify(tmp_path / "gone"))


def test_verify_raises_what_the_system_reports(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(inspection, "read_checkpoint", refuse)
    with pytest.raises(PermissionError, match="checkpoint-00000002"):
        list(verify(run))


# ---------------------------------------------------------------------- while a training goes on


def going_on(monkeypatch: pytest.MonkeyPatch, run: Path, times: int, remove: Callable[[], None]) -> Callable[[], None]:
    """Let a training remove files between our listing them and our opening them, so many times."""
    opened = inspection.open_regular
    left = [times]

    def open_regular(path: Any) -> int:
        if left[0]:
            left[0] -= 1
            remove()
        return opened(path)

    monkeypatch.setattr(inspection, "open_regular", open_regular)
    return lambda: left.__setitem__(0, times)


def test_a_run_that_goes_on_is_inspected_and_verified(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, adapters = trained()

    def go_on() -> None:
        for _ in range(2):
            save_generation(run / "checkpoints", trainer, adapters)

    again = going_on(monkeypatch, run, 3, go_on)
    assert inspect(run).facts["generation"] == 9  # 3, 5 and 7 were gone when they were to be opened
    again()
    checkpoints = [verdict.path.name for verdict in verify(run / "checkpoints")]
    assert checkpoints == ["checkpoint-00000014.safetensors", "checkpoint-00000015.safetensors"]


def test_verify_passes_over_one_that_is_removed_meanwhile(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, adapters = trained()
    going_on(monkeypatch, run, 1, lambda: save_generation(run / "checkpoints", trainer, adapters))
    found = problems(run / "checkpoints")
    assert found == {"checkpoint-00000003.safetensors": None}
