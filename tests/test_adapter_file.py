"""save_adapters: a safetensors file that holds the weights to the bit, or nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load

import cylora
from cylora import AdapterSet, LoraAdapter, LoraConfig
from cylora.errors import InputError
from cylora.formats.adapter_file import save_adapters


def mixed_set() -> AdapterSet:
    """Two ranks and both scales, B not zero."""
    adapters = AdapterSet.from_adapters(
        {
            "first": LoraAdapter(5, 3, LoraConfig(rank=2, alpha=4.0), seed=1),
            "second": LoraAdapter(4, 6, LoraConfig(rank=3, alpha=0.5, use_rslora=True), seed=2),
        }
    )
    adapters.flat.vector[:] = np.random.default_rng(0).standard_normal(adapters.param_count())
    return adapters


def test_saved_tensors_are_the_weights_to_the_bit(tmp_path: Path) -> None:
    adapters = mixed_set()
    save_adapters(tmp_path / "adapter.safetensors", adapters, step=7)
    tensors = load((tmp_path / "adapter.safetensors").read_bytes())
    assert set(tensors) == {"first.a_matrix", "first.b_matrix", "second.a_matrix", "second.b_matrix"}
    for name, adapter in adapters.items():
        for field in ("a_matrix", "b_matrix"):
            saved, own = tensors[f"{name}.{field}"], getattr(adapter, field)
            assert saved.dtype == np.float32
            assert saved.shape == own.shape
            assert saved.tobytes() == own.tobytes()


def test_metadata_says_what_the_tensors_cannot(tmp_path: Path) -> None:
    save_adapters(tmp_path / "adapter.safetensors", mixed_set(), step=7)
    with safe_open(tmp_path / "adapter.safetensors", "numpy") as file:
        metadata = file.metadata()
    assert json.loads(metadata.pop("cylora")) == {
        "version": cylora.__version__,
        "step": 7,
        "adapters": {
            "first": {"rank": 2, "alpha": 4.0, "use_rslora": False},
            "second": {"rank": 3, "alpha": 0.5, "use_rslora": True},
        },
    }
    assert metadata == {}


def test_equal_adapters_make_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_adapters(tmp_path / name, mixed_set(), step=7)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["a_matrix", "b_matrix"])
def test_non_finite_weights_are_refused_by_name_and_place(tmp_path: Path, field: str, value: float) -> None:
    adapters = mixed_set()
    getattr(adapters["second"], field)[2, 1] = value
    (tmp_path / "adapter.safetensors").write_bytes(b"old")
    message = rf"second.{field} must be finite to be saved, got {value} at \[2, 1\]"
    with pytest.raises(InputError, match=message):
        save_adapters(tmp_path / "adapter.safetensors", adapters, step=7)
    assert (tmp_path / "adapter.safetensors").read_bytes() == b"old"


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="adapters must hold at least one adapter, got none"):
        save_adapters(tmp_path / "adapter.safetensors", {}, step=7)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
