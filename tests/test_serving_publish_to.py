"""publish_to: a version on disk, whole, before it is the latest in memory."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_durable import Faults, names
from training import fill, fingerprint, make_adapter, make_trainer, same_bits

from cylora import AdapterSet, ConfigError, Gradients, InputError, LoraConfig, PublishError
from cylora.formats import gguf_bytes, load_peft, publish_directory
from cylora.serving import AdapterPublisher

BASE = {
    "model_type": "qwen2",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 50,
}


def make_model(seed: int = 0) -> AdapterSet:
    shapes = {f"model.layers.{layer}.mlp.up_proj": (16, 24) for layer in range(2)}
    adapters = AdapterSet(shapes, LoraConfig(rank=2), seed=seed)
    adapters.flat.vector[...] = np.random.default_rng(seed).normal(size=adapters.param_count())
    return adapters


def versions_in(root: Path) -> list[str]:
    return sorted(name.partition("-")[0] for name in names(root) if name != "latest")


def test_a_version_on_disk_is_what_the_snapshot_is(tmp_path: Path) -> None:
    adapters, trainer = make_model(), make_trainer()
    trainer.step(1.0, adapters, fill(Gradients(adapters)))
    publisher = AdapterPublisher(adapters, trainer, name="tenant")
    path = publisher.publish_to(tmp_path)
    assert path.parent == tmp_path
    assert path.name.startswith("tenant@v1-")
    assert os.readlink(tmp_path / "latest") == path.name
    assert sorted(names(path)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert same_bits(load_peft(path).flat.vector, publisher.latest.vector)
    trainer.step(1.0, adapters, fill(Gradients(adapters), 1))
    second = publisher.publish_to(str(tmp_path))
    assert os.readlink(tmp_path / "latest") == second.name
    assert publisher.latest.version == 2
    assert same_bits(load_peft(second).flat.vector, adapters.flat.vector)
    assert not same_bits(load_peft(path).flat.vector, adapters.flat.vector)


def test_gguf_and_half_precision(tmp_path: Path) -> None:
    adapters = make_model()
    publisher = AdapterPublisher(adapters)
    path = publisher.publish_to(tmp_path, format="gguf", base_config=BASE)
    assert names(path) == ["adapter.gguf"]
    assert (path / "adapter.gguf").read_bytes() == gguf_bytes(adapters, BASE)
    half = publisher.publish_to(tmp_path, format="gguf", base_config=BASE, dtype="float16")
    assert (half / "adapter.gguf").read_bytes() == gguf_bytes(adapters, BASE, dtype="float16")
    half = publisher.publish_to(tmp_path, dtype="float16")
    assert np.array_equal(load_peft(half).flat.vector, adapters.flat.vector.astype(np.float16).astype(np.float32))


def test_the_hooks_get_the_directory_and_find_it_there(tmp_path: Path) -> None:
    publisher = AdapterPublisher(make_model())
    seen: list[Any] = []
    publisher.add_hook(lambda snapshot, path: seen.append((snapshot, path, path and names(path), publisher.latest)))
    path = publisher.publish_to(tmp_path)
    first = publisher.latest
    publisher.publish()
    second = publisher.latest
    publisher.publish_to(tmp_path, version=1)
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert seen == [(first, path, files, first), (second, None, None, second), (first, path, files, second)]


def test_a_kept_version_is_written_and_pointed_to_again(tmp_path: Path) -> None:
    adapters = make_model()
    publisher = AdapterPublisher(adapters, keep=3)
    first = publisher.publish()
    adapters.flat.vector[...] = 1
    second = publisher.publish_to(tmp_path)
    path = publisher.publish_to(tmp_path, version=1)
    assert same_bits(load_peft(path).flat.vector, first.vector)
    assert os.readlink(tmp_path / "latest") == path.name
    assert publisher.latest.version == 2
    assert publisher.publish_to(tmp_path, version=2) == second
    assert os.readlink(tmp_path / "latest") == second.name
    back = publisher.rollback(1)
    path = publisher.publish_to(tmp_path, version=back.version)
    assert path.name.startswith("adapter@v3-")
    assert versions_in(tmp_path) == ["adapter@v1", "adapter@v2", "adapter@v3"]
    with pytest.raises(InputError, match="version must be one of those kept, 1, 2, 3, got 4"):
        publisher.publish_to(tmp_path, version=4)


def test_keep_removes_the_older_ones(tmp_path: Path) -> None:
    adapters = make_model()
    publisher = AdapterPublisher(adapters)
    for value in range(5):
        adapters.flat.vector[...] = value + 1
        publisher.publish_to(tmp_path, keep=2)
    assert versions_in(tmp_path) == ["adapter@v4", "adapter@v5"]
    publisher.publish_to(tmp_path)
    assert len(versions_in(tmp_path)) == 3


def test_an_older_one_that_cannot_be_removed_keeps_no_version_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = AdapterPublisher(make_model())
    heard: list[Path | None] = []
    publisher.add_hook(lambda snapshot, path: heard.append(path))
    old = publisher.publish_to(tmp_path)
    (old / "of someone else").mkdir()
    new = publisher.publish_to(tmp_path, keep=1)
    assert (publisher.latest.version, heard) == (2, [old, new])
    assert os.readlink(tmp_path / "latest") == new.name
    assert [message.partition(": ")[0] for message in caplog.messages] == [
        f"{new} is published, but what it replaces could not be removed"
    ]


def test_a_new_process_counts_on_from_what_is_in_the_directory(tmp_path: Path) -> None:
    publish_directory(tmp_path, "adapter", 17, {"file": b"of an earlier process"})
    publish_directory(tmp_path, "other", 99, {"file": b""})
    publisher = AdapterPublisher(make_model())
    assert publisher.publish().version == 1
    assert publisher.publish_to(tmp_path).name.startswith("adapter@v18-")
    assert publisher.latest.version == 18
    assert publisher.versions == (1, 18)
    assert publisher.publish().version == 19
    assert publisher.publish_to(tmp_path).name.startswith("adapter@v20-")


# ------------------------------------------------------------------ what fails leaves everything as it was


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"format": "onnx"}, InputError, "format must be one of 'peft', 'gguf', got 'onnx'"),
        ({"format": "gguf"}, InputError, "base_config must be the base model's config with format='gguf', got None"),
        ({"base_config": BASE}, InputError, "base_config must be None with format='peft', got dict"),
        ({"dtype": "int8"}, ConfigError, "dtype must be one of"),
        ({"keep": 0}, InputError, r"keep \(if not None\) must be an integer >= 1, got 0"),
        ({"format": "gguf", "base_config": {"model_type": "bert"}}, InputError, "model_type must be one of"),
        (
            {"format": "gguf", "base_config": BASE | {"hidden_size": 8}},
            InputError,
            "d_in must be the base's hidden_size",
        ),
    ],
)
def test_a_wrong_option_publishes_nothing(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    publisher = AdapterPublisher(make_model())
    publisher.add_hook(lambda snapshot, path: pytest.fail("called"))
    with pytest.raises(error, match=message):
        publisher.publish_to(tmp_path, **options)
    assert names(tmp_path) == []
    assert publisher.latest is None
    assert publisher.counters()["published"] == 0


def test_a_lone_adapter_has_no_name_for_a_file(tmp_path: Path) -> None:
    publisher = AdapterPublisher(make_adapter())
    with pytest.raises(InputError, match="adapters must be an AdapterSet, which names the modules, got LoraAdapter"):
        publisher.publish_to(tmp_path)
    assert publisher.latest is None
    assert names(tmp_path) == []


def test_bad_weights_are_not_written(tmp_path: Path) -> None:
    adapters = make_model()
    publisher = AdapterPublisher(adapters)
    publisher.publish_to(tmp_path)
    before = names(tmp_path)
    adapters.flat.vector[3] = np.nan
    with pytest.raises(PublishError, match="version 1 stays"):
        publisher.publish_to(tmp_path)
    adapters.flat.vector[3] = 1e30
    with pytest.raises(InputError, match="must fit float16"):
        publisher.publish_to(tmp_path, dtype="float16")
    assert names(tmp_path) == before
    assert publisher.latest.version == 1


def test_a_missing_directory_is_the_systems_error(tmp_path: Path) -> None:
    publisher = AdapterPublisher(make_model())
    with pytest.raises(FileNotFoundError):
        publisher.publish_to(tmp_path / "none")
    assert publisher.latest is None


def test_a_failure_at_any_call_publishes_nowhere_or_is_made_good_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = make_model()
    with monkeypatch.context() as patched:
        (tmp_path / "count").mkdir()
        faults = Faults(patched, None, 0, is_done=False)
        AdapterPublisher(adapters).publish_to(tmp_path / "count")
    assert len(faults.calls) > 10
    for when, call in enumerate(faults.calls):
        root = tmp_path / f"{when}"
        root.mkdir()
        publisher = AdapterPublisher(adapters)
        heard: list[int] = []
        publisher.add_hook(lambda snapshot, path, heard=heard: heard.append(snapshot.version))
        first = publisher.publish()
        state = fingerprint(adapters)
        raised = False
        with monkeypatch.context() as patched:
            Faults(patched, OSError(28, "No space left on device"), when, is_done=False)
            try:
                publisher.publish_to(root)
            except OSError:
                raised = True
        assert raised or call == "close", (when, call)
        assert (publisher.latest is first) == raised, (when, call)
        assert heard == ([1] if raised else [1, 2]), (when, call)
        assert fingerprint(adapters) == state
        between = publisher.publish()
        assert between.version not in {int(name[len("adapter@v") :].partition("-")[0]) for name in versions_in(root)}
        path = publisher.publish_to(root)  # whatever is there, the next one goes in
        assert same_bits(load_peft(path).flat.vector, adapters.flat.vector)
        assert publisher.latest.version == int(path.name[len("adapter@v") :].partition("-")[0])
        assert [name for name in names(root) if name.startswith(".")] == []


def test_the_step_is_in_the_files_metadata(tmp_path: Path) -> None:
    adapters, trainer = make_model(), make_trainer()
    for step in range(2):
        trainer.step(1.0, adapters, fill(Gradients(adapters), step))
    path = AdapterPublisher(adapters, trainer).publish_to(tmp_path)
    raw = (path / "adapter_model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(header["__metadata__"]["cylora"])["step"] == 2
