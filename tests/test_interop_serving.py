"""Real PEFT and real llama.cpp load what ``latest`` points to while another process trains and publishes at full rate.

Two publishers of different ranks and alphas share the root, and all parameters of a version are equal: a config, a
matrix or a number of another version than the rest shows.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from test_interop_gguf import CLOSE_OTHERWISE, base_of, distance, merged_log_probabilities, served_log_probabilities
from test_interop_peft import LIMIT, base, ids, lib, loaded_by_peft, logits, merged_logits, shapes_of
from training import same_bits
from worker_serving import CONFIGS

from cylora import AdapterSet
from cylora.serving import AdapterPublisher, AdapterSnapshot

__all__ = ["base", "base_of", "ids", "lib"]  # fixtures

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

WORKER = Path(__file__).with_name("worker_serving.py")
KEEP = 200


class Publishing:
    """A process that publishes; `latest` is followed once for each load, as every loader must."""

    def __init__(self, root: Path, kind: str, shapes: dict[str, tuple[int, int]], base_config: Path | str) -> None:
        self.root, self.versions, self.loads = root, dict.fromkeys(CONFIGS, 0), 0
        command = [sys.executable, WORKER, root, kind, str(KEEP), base_config]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._say(json.dumps(shapes))
        while not (root / "latest").is_symlink():
            assert self.process.poll() is None
        self.seen: set[str] = set()

    def _say(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    @contextmanager
    def loading(self) -> Iterator[tuple[Path, str]]:
        """Give the version to load and its publisher's name; versions of a name must not go backwards."""
        assert self.process.poll() is None
        folder = (self.root / "latest").resolve(strict=True)
        name, version = folder.name.partition("-")[0].split("@v")
        assert int(version) >= self.versions[name]
        self.versions[name] = int(version)
        self.seen.add(folder.name)
        yield folder, name
        self.loads += 1
        self._say("loaded")

    def is_short_of(self, loads: int) -> bool:
        """Return whether so many loads, of a third as many versions, are still to be done."""
        return self.loads < loads or len(self.seen) < loads // 3

    def end(self) -> dict[str, int]:
        """Let the process end, and return the figures: what was mixed or missing has raised."""
        out, _ = self.process.communicate()
        assert self.process.returncode == 0
        said: dict[str, Any] = json.loads(out)
        assert said["failed"] == []
        loaded = {"loads": self.loads, "versions_loaded": len(self.seen)}
        return loaded | {"published": sum(said["published"]), "mixed": 0, "missing": 0}


@pytest.mark.parametrize("loads", [30, pytest.param(600, marks=pytest.mark.nightly)])
def test_peft_never_loads_a_mixed_or_missing_pair(
    lib: SimpleNamespace, base: Any, ids: Any, tmp_path: Path, loads: int, figures: Callable[..., None]
) -> None:
    shapes = shapes_of(base, ["q_proj", "v_proj", "down_proj"])
    publishing = Publishing(tmp_path, "peft", shapes, "")
    while publishing.is_short_of(loads):
        number = publishing.loads
        with publishing.loading() as (folder, name):
            model = loaded_by_peft(lib, base, folder)  # every tensor to the bit, none added, no warning
            state = lib.peft.get_peft_model_state_dict(model, save_embedding_layers=False)
            values = np.concatenate([tensor.numpy().ravel() for tensor in state.values()])
            assert values.min() == values.max(), folder
            found = {module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")}
            assert found == {CONFIGS[name].scaling}
            ranks = {module.r["default"] for module in model.modules() if hasattr(module, "lora_A")}
            assert ranks == {CONFIGS[name].rank}
            assert len(state) == 2 * len(shapes)
        if number % 10 == 0:
            adapters = AdapterSet(shapes, CONFIGS[name], seed=0)
            adapters.flat.vector.fill(values[0])
            expected = merged_logits(lib, base, ids, adapters)
            assert np.abs(logits(lib, model.double(), ids) - expected).max() < LIMIT * np.abs(expected).max()
    figures(**publishing.end())


@pytest.mark.parametrize("loads", [6, pytest.param(60, marks=pytest.mark.nightly)])
def test_llama_cpp_never_loads_a_mixed_or_missing_file(
    base_of: Any, tmp_path: Path, loads: int, figures: Callable[..., None]
) -> None:
    base = base_of("llama")
    shapes = {
        name: (module.in_features, module.out_features)
        for name, module in base.model.named_modules()
        if name.rpartition(".")[2] in ("q_proj", "v_proj", "down_proj")
    }
    publishing = Publishing(tmp_path, "gguf", shapes, base.folder)
    without = merged_log_probabilities(base, {})
    while publishing.is_short_of(loads):
        with publishing.loading() as (folder, name):
            served = served_log_probabilities(base, folder / "adapter.gguf")
            reader = gguf.GGUFReader(folder / "adapter.gguf")
            tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
        values = np.concatenate([tensor.ravel() for tensor in tensors.values()])
        assert values.min() == values.max(), folder
        assert len(tensors) == 2 * len(shapes)
        adapters = AdapterSet(shapes, CONFIGS[name], seed=0)
        adapters.flat.vector.fill(values[0])
        expected = merged_log_probabilities(base, adapters)
        assert distance(expected, without) > 0.1
        assert distance(served, expected) < CLOSE_OTHERWISE
    figures(**publishing.end())


# ------------------------------------------------------------------ tensors of torch over a snapshot


TENSORS: dict[str, Callable[[Any, AdapterSnapshot], Any]] = {
    "from_numpy": lambda torch, snapshot: torch.from_numpy(snapshot.vector),
    "from_numpy of a view": lambda torch, snapshot: torch.from_numpy(snapshot.adapters["q"].a_matrix),
    "a view of it": lambda torch, snapshot: torch.from_numpy(snapshot.vector).view(8, -1)[3:, 5:].t(),
    "numpy of it": lambda torch, snapshot: torch.from_numpy(snapshot.vector)[7:].numpy(),
    "asarray": lambda torch, snapshot: torch.asarray(snapshot.vector)[:3],
    "frombuffer": lambda torch, snapshot: torch.frombuffer(snapshot.vector, dtype=torch.float32)[2:],
}


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
@pytest.mark.parametrize("how", TENSORS)
def test_a_tensor_over_a_snapshot_keeps_its_memory(lib: SimpleNamespace, how: str) -> None:
    adapters = AdapterSet({"q": (64, 64)}, seed=0)
    adapters.flat.vector.fill(1.0)
    publisher = AdapterPublisher(adapters, keep=1)
    holder = TENSORS[how](lib.torch, publisher.publish())
    for value in range(2, 12):
        adapters.flat.vector.fill(value)
        publisher.publish()
    assert (np.asarray(holder) == 1).all()
    assert same_bits(publisher.latest.vector, adapters.flat.vector)
    assert publisher.counters()["buffers"] == 3
