"""save_peft and load_peft: the weights to the bit, the exact config, and no reading of what is not understood."""

import hashlib
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors import numpy as reference
from safetensors import safe_open
from training import make_adapter, make_set, make_trainer, same_bits

import cylora
from cylora import AdapterSet, Gradients, LoraAdapter, LoraConfig, LoraTrainingConfig
from cylora.errors import ConfigError, FormatError, InputError
from cylora.formats import durable
from cylora.formats.durable import publish_directory
from cylora.formats.peft import TENSORS_NAME, load_peft, peft_files, save_peft
from cylora.formats.peft_config import CONFIG_NAME

PREFIX = "base_model.model."
NAMES = [f"model.layers.{n}.self_attn.{name}" for n in range(2) for name in ("q_proj", "v_proj")]
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def uniform(seed: int = 0, **config: Any) -> AdapterSet:
    """One rank and one scale, as most adapters are; B not zero."""
    shapes = {name: (6, 4) if name.endswith("q_proj") else (6, 3) for name in NAMES}
    adapters = AdapterSet(shapes, LoraConfig(**{"rank": 2, "alpha": 4.0} | config), seed=seed)
    adapters.flat.vector[...] = np.random.default_rng(seed).normal(size=adapters.param_count())
    return adapters


def mixed(seed: int = 0, rslora: tuple[bool, ...] = (False, True, False, True)) -> AdapterSet:
    """Three ranks, three alphas, and rsLoRA for some."""
    configs = [
        LoraConfig(rank=rank, alpha=alpha, use_rslora=scaled, dropout=0.125)
        for (rank, alpha), scaled in zip([(2, 5.0), (8, 16.0), (4, 8.0), (3, 0.1)], rslora, strict=True)
    ]
    made = {name: LoraAdapter(6, 5, config, seed=1) for name, config in zip(NAMES, configs, strict=True)}
    adapters = AdapterSet.from_adapters(made)
    adapters.flat.vector[...] = np.random.default_rng(seed).normal(size=adapters.param_count())
    return adapters


def saved(folder: Path, adapters: AdapterSet | None = None, **options: Any) -> Path:
    save_peft(uniform() if adapters is None else adapters, folder / "adapter", **options)
    return folder / "adapter"


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / CONFIG_NAME).read_text())


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path / TENSORS_NAME, "numpy") as file:
        return file.metadata()


def rewritten(path: Path, **keys: Any) -> Path:
    """Change keys of the config; ``...`` removes one."""
    config = config_of(path) | keys
    (path / CONFIG_NAME).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return path


def foreign(folder: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None, **keys: Any) -> Path:
    """Write a directory as another program would: the reference library's bytes and the least config."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]} | keys
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    (folder / TENSORS_NAME).write_bytes(reference.save(tensors, metadata))
    return folder


def pair(module: str = "q", a: Any = (2, 3), b: Any = (4, 2), dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def delta(adapter: LoraAdapter) -> np.ndarray:
    """B @ A times its scale, in float64."""
    return adapter.scaling * adapter.b_matrix.astype(np.float64) @ adapter.a_matrix.astype(np.float64)


def litter(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------ writing


@pytest.mark.parametrize("portable", [True, False])
def test_the_reference_library_reads_the_weights_to_the_bit(tmp_path: Path, portable: bool) -> None:
    adapters = uniform()
    path = saved(tmp_path, adapters, portable=portable)
    assert litter(tmp_path) == ["adapter"]
    assert litter(path) == [CONFIG_NAME, TENSORS_NAME]
    tensors = reference.load((path / TENSORS_NAME).read_bytes())
    expected = {
        f"{PREFIX}{name}.lora_{part}.weight": matrix
        for name, one in adapters.items()
        for part, matrix in (("A", one.a_matrix), ("B", one.b_matrix))
    }
    assert set(tensors) == set(expected)
    for name, matrix in expected.items():
        assert same_bits(tensors[name], matrix)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_types_are_rounded_as_ml_dtypes_rounds(tmp_path: Path, dtype: str) -> None:
    adapters = uniform()
    path = saved(tmp_path, adapters, dtype=dtype)
    kind = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    loaded = load_peft(path)
    raw = (path / TENSORS_NAME).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    tensors = raw[8 + int.from_bytes(raw[:8], "little") :]
    for name, one in adapters.items():
        for part, matrix, got in (
            ("A", one.a_matrix, loaded[name].a_matrix),
            ("B", one.b_matrix, loaded[name].b_matrix),
        ):
            entry = header[f"{PREFIX}{name}.lora_{part}.weight"]
            assert entry["dtype"] == TYPES[dtype]
            assert tensors[slice(*entry["data_offsets"])] == matrix.astype(kind).tobytes()
            assert same_bits(got, matrix.astype(kind).astype(np.float32))


def test_the_config_is_exactly_this(tmp_path: Path) -> None:
    path = saved(tmp_path, uniform(dropout=0.125), base_model="some/model", task_type="CAUSAL_LM")
    expected = {
        "alpha_pattern": {},
        "base_model_name_or_path": "some/model",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 4,
        "lora_dropout": 0.125,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 2,
        "rank_pattern": {},
        "revision": None,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    assert (path / CONFIG_NAME).read_text() == json.dumps(expected, indent=2) + "\n"


def test_the_metadata_says_step_version_and_hash(tmp_path: Path) -> None:
    path = saved(tmp_path, step=np.int64(7))
    metadata = metadata_of(path)
    assert metadata["format"] == "pt"  # transformers refuses a file that does not say so
    raw = (path / TENSORS_NAME).read_bytes()
    digest = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    assert json.loads(metadata["cylora"]) == {"step": 7, "version": cylora.__version__, "sha256": digest}
    assert set(metadata) == {"format", "cylora"}


def test_without_a_step_it_is_null(tmp_path: Path) -> None:
    assert json.loads(metadata_of(saved(tmp_path))["cylora"])["step"] is None


def test_uniform_float32_is_written_from_the_adapters_own_memory() -> None:
    adapters = uniform()
    parts = peft_files(adapters)[TENSORS_NAME][1:]
    assert len(parts) == 2 * len(adapters)
    assert all(np.shares_memory(np.frombuffer(part, np.uint8), adapters.flat.vector) for part in parts)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    adapters = mixed()
    adapters.origin = {"revision": "main"}
    before = pickle.dumps(adapters)
    for number, options in enumerate(
        ({}, {"dtype": "float16"}, {"dtype": "bfloat16", "base_model": "x", "task_type": "y", "step": 1})
    ):
        save_peft(adapters, tmp_path / str(number), **options)
    assert pickle.dumps(adapters) == before


PROGRAM = """
import sys
from test_peft import mixed, uniform
from cylora.formats.peft import save_peft
adapters = mixed()
adapters.origin = dict.fromkeys(sorted({"revision", "auto_mapping", "some", "other", "keys"}, key=hash))
save_peft(adapters, sys.argv[1] + "/one", dtype="bfloat16", step=3)
save_peft(uniform(), sys.argv[1] + "/two", portable=False)
"""


def test_equal_adapters_make_equal_bytes_in_any_process(tmp_path: Path) -> None:
    folders = [tmp_path / seed for seed in ("1", "2")]
    for folder in folders:
        folder.mkdir()
        paths = [str(Path(cylora.__file__).parents[1]), str(Path(__file__).parent)]
        environment = os.environ | {"PYTHONHASHSEED": folder.name, "PYTHONPATH": os.pathsep.join(paths)}
        subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], check=True, env=environment)
    for one, name in itertools.product(("one", "two"), (CONFIG_NAME, TENSORS_NAME)):
        first, second = ((folder / one / name).read_bytes() for folder in folders)
        assert first == second


def test_files_can_be_published(tmp_path: Path) -> None:
    adapters = uniform()
    path = publish_directory(tmp_path, "mine", 3, peft_files(adapters))
    assert same_bits(load_peft(path).flat.vector, adapters.flat.vector)
    assert same_bits(load_peft(tmp_path / "latest").flat.vector, adapters.flat.vector)


# ------------------------------------------------------------------ portable or with patterns


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_portable_folds_ranks_and_scales_into_one(tmp_path: Path, dtype: str) -> None:
    adapters = mixed()
    path = saved(tmp_path, adapters, dtype=dtype)
    config = config_of(path)
    assert (config["r"], config["use_rslora"]) == (8, False)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    loaded = load_peft(path)
    assert list(loaded) == list(adapters)
    assert {one.config.rank for one in loaded.values()} == {8}
    assert len({(one.alpha, one.config.use_rslora) for one in loaded.values()}) == 1
    rounding = {"float32": 2.0**-23, "float16": 2.0**-9, "bfloat16": 2.0**-6}[dtype]
    for name, one in adapters.items():
        size = one.scaling * np.abs(one.b_matrix).astype(np.float64) @ np.abs(one.a_matrix)
        assert np.all(np.abs(delta(loaded[name]) - delta(one)) <= rounding * size)
        assert np.abs(delta(one)).max() > 0.01


def test_portable_turns_rslora_into_alpha(tmp_path: Path) -> None:
    adapters = uniform(rank=4, alpha=3.0, use_rslora=True)
    path = saved(tmp_path, adapters)
    assert (config_of(path)["r"], config_of(path)["lora_alpha"], config_of(path)["use_rslora"]) == (4, 6, False)
    loaded = load_peft(path)
    assert same_bits(loaded.flat.vector, adapters.flat.vector)
    assert loaded[NAMES[0]].scaling == adapters[NAMES[0]].scaling == 1.5


def test_without_portable_the_patterns_name_each_module_in_full(tmp_path: Path) -> None:
    adapters = mixed(rslora=(True,) * 4)
    path = saved(tmp_path, adapters, portable=False)
    config = config_of(path)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 5, True)
    escaped = ["^" + re.escape(name) for name in NAMES]
    assert config["rank_pattern"] == {escaped[1]: 8, escaped[2]: 4, escaped[3]: 3}
    assert config["alpha_pattern"] == {escaped[1]: 16.0, escaped[2]: 8.0, escaped[3]: 0.1}
    loaded = load_peft(path)
    assert same_bits(loaded.flat.vector, adapters.flat.vector)
    for name, one in adapters.items():
        mine, its = one.config, loaded[name].config
        assert (its.rank, its.alpha, its.use_rslora, its.dropout) == (mine.rank, mine.alpha, True, 0.125)
    assert set(loaded.config.target_modules) == {"q_proj", "v_proj"}


def test_only_what_differs_gets_a_pattern(tmp_path: Path) -> None:
    made = {"q": LoraConfig(rank=2, alpha=4.0), "k": LoraConfig(rank=2, alpha=1.0), "v": LoraConfig(rank=1, alpha=4.0)}
    adapters = AdapterSet.from_adapters({name: LoraAdapter(3, 3, config, seed=0) for name, config in made.items()})
    config = config_of(saved(tmp_path, adapters, portable=False))
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"^v": 1}, {"^k": 1.0})


# ------------------------------------------------------------------ there and back


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("portable", [True, False])
def test_names_keep_their_order(tmp_path: Path, portable: bool, reverse: bool) -> None:
    names = sorted((f"layers.{n}.x" for n in (11, 2, 0, 1, 10)), reverse=reverse)
    adapters = AdapterSet(dict.fromkeys(names, (3, 2)), seed=0)
    assert list(load_peft(saved(tmp_path, adapters, portable=portable))) == names


def test_what_the_config_says_besides_is_kept_and_written_back(tmp_path: Path) -> None:
    path = rewritten(saved(tmp_path), revision="abc", layers_pattern="layers", peft_version="0.21.2", mine={"a": [1]})
    adapters = load_peft(path)
    assert adapters.origin == {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "layers_pattern": "layers",
        "mine": {"a": [1]},
        "modules_to_save": None,
        "peft_version": "0.21.2",
        "revision": "abc",
        "task_type": None,
        "use_dora": False,
    }
    save_peft(adapters, tmp_path / "back")
    assert config_of(tmp_path / "back") == config_of(path)


def test_options_say_more_than_the_origin(tmp_path: Path) -> None:
    adapters = uniform()
    adapters.origin = {"base_model_name_or_path": "old", "task_type": "CAUSAL_LM"}
    config = config_of(saved(tmp_path, adapters, base_model="new"))
    assert (config["base_model_name_or_path"], config["task_type"]) == ("new", "CAUSAL_LM")
    assert adapters.origin["base_model_name_or_path"] == "old"


def test_loaded_adapters_train_on(tmp_path: Path) -> None:
    adapters = load_peft(saved(tmp_path, uniform(use_rslora=True), portable=False))
    config = LoraTrainingConfig(lora_config=adapters.config)
    assert config.lora_config.target_modules == ("q_proj", "v_proj")
    twin, trainers = uniform(use_rslora=True), (make_trainer(), make_trainer())
    for trainer, mine in zip(trainers, (adapters, twin), strict=True):
        gradients = Gradients(mine)
        gradients.vector[...] = np.random.default_rng(1).normal(size=gradients.vector.size)
        trainer.step(1.0, mine, gradients)
    assert same_bits(adapters.flat.vector, twin.flat.vector)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_files_of_others_are_read(tmp_path: Path, dtype: Any) -> None:
    """Tensors sorted by name, no metadata, keys that servers do not write."""
    names = (f"layers.{n}.{name}" for n in (0, 1) for name in ("q", "v"))
    tensors = {name: matrix for module in names for name, matrix in pair(module, dtype=dtype).items()}
    described = {
        name: matrix.view(np.uint16) if dtype == ml_dtypes.bfloat16 else matrix for name, matrix in tensors.items()
    }
    path = foreign(tmp_path / "foreign", described, rank_pattern=None, use_dora=False)
    if dtype == ml_dtypes.bfloat16:
        raw = (path / TENSORS_NAME).read_bytes()
        (path / TENSORS_NAME).write_bytes(raw.replace(b'"U16" '[:-1], b'"BF16"'))
        length = int.from_bytes(raw[:8], "little") + len(tensors)
        (path / TENSORS_NAME).write_bytes(length.to_bytes(8, "little") + (path / TENSORS_NAME).read_bytes()[8:])
    adapters = load_peft(path)
    assert {name: (one.d_in, one.d_out, one.rank, one.alpha) for name, one in adapters.items()} == {
        f"layers.{n}.{name}": (3, 4, 2, 4.0) for n in (0, 1) for name in ("q", "v")
    }
    for name, one in adapters.items():
        assert same_bits(one.a_matrix, tensors[f"{PREFIX}{name}.lora_A.weight"].astype(np.float32))
        assert same_bits(one.b_matrix, tensors[f"{PREFIX}{name}.lora_B.weight"].astype(np.float32))


def test_patterns_by_the_end_of_a_name_are_read(tmp_path: Path) -> None:
    tensors = pair("layers.0.q") | pair("layers.1.q", (5, 3), (4, 5)) | pair("layers.1.v")
    path = foreign(tmp_path / "foreign", tensors, rank_pattern={r"1\.q": 5}, alpha_pattern={"v": 8, "q": 1})
    adapters = load_peft(path)
    got = {name: (one.rank, one.alpha) for name, one in adapters.items()}
    assert got == {"layers.0.q": (2, 1.0), "layers.1.q": (5, 1.0), "layers.1.v": (2, 8.0)}


def test_odd_module_names_survive(tmp_path: Path) -> None:
    names = ["x.lora_A.weight", "base_model.model.y", "é ß/*", "m.weight", "lora_B"]
    adapters = AdapterSet(dict.fromkeys(names, (3, 2)), seed=0)
    assert list(load_peft(saved(tmp_path, adapters))) == names


def test_loading_takes_twice_the_file(tmp_path: Path) -> None:
    adapters = AdapterSet({f"layers.{n}.q": (1024, 1024) for n in range(8)}, LoraConfig(rank=256), seed=0)
    path = saved(tmp_path, adapters)  # 16 MiB
    size = (path / TENSORS_NAME).stat().st_size
    del adapters
    tracemalloc.start()
    try:
        load_peft(path)
        assert size < tracemalloc.get_traced_memory()[1] < 2.2 * size
    finally:
        tracemalloc.stop()


# ------------------------------------------------------------------ what is not written


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "float64"}, ConfigError, "dtype must be one of 'float32', 'float16', 'bfloat16', got 'float64'"),
        ({"step": -1}, InputError, "step must be an integer >= 0, got -1"),
        ({"step": 1.5}, InputError, "step must be an integer, got 1.5"),
        ({"base_model": Path("x")}, InputError, "base_model must be a string, got PosixPath('x')"),
        ({"task_type": 3}, InputError, "task_type must be a string, got 3"),
    ],
)
def test_an_option_that_breaks_its_rule_is_refused(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        saved(tmp_path, **options)
    assert litter(tmp_path) == []


def test_a_lone_adapter_has_no_name_to_be_saved_under(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="adapters must be an AdapterSet, which names the modules, got LoraAdapter"):
        save_peft(make_adapter(), tmp_path / "adapter")  # type: ignore[arg-type]
    assert litter(tmp_path) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name_and_place(tmp_path: Path, value: float) -> None:
    adapters = make_set()
    adapters["out.proj"].a_matrix[1, 0] = value
    with pytest.raises(InputError, match=rf"out\.proj\.A must be finite, got {value} at \[1, 0\]"):
        saved(tmp_path, adapters)
    assert litter(tmp_path) == []


def test_weights_beyond_the_type_are_refused_by_name_and_place(tmp_path: Path) -> None:
    adapters = uniform()
    adapters[NAMES[1]].b_matrix[2, 1] = 7e4
    message = f"{PREFIX}{NAMES[1]}.lora_B.weight must fit float16, got 70000.0 at [2, 1]"
    with pytest.raises(InputError, match=re.escape(message)):
        saved(tmp_path, adapters, dtype="float16")
    assert litter(tmp_path) == []
    saved(tmp_path, adapters, dtype="bfloat16")


def test_scales_too_far_apart_for_one_alpha_are_refused(tmp_path: Path) -> None:
    made = {name: LoraAdapter(3, 3, LoraConfig(rank=1, alpha=alpha), seed=0) for name, alpha in (("q", 1), ("v", 1e6))}
    adapters = AdapterSet.from_adapters(made)
    adapters["q"].b_matrix = adapters["v"].b_matrix = np.full((3, 1), 1e35, np.float32)
    # Where both count the same, the largest alpha is the common one, and q's B shrinks.
    assert load_peft(saved(tmp_path, adapters))["q"].b_matrix[0, 0] == np.float32(1e29)
    twin = AdapterSet.from_adapters({"q": adapters["q"], "k": adapters["q"], "v": adapters["v"]})
    with pytest.raises(InputError, match=r"v\.b_matrix times 1e\+06, for the common alpha, must fit float32"):
        save_peft(twin, tmp_path / "twin")
    assert litter(tmp_path) == ["adapter"]


def test_an_alpha_that_load_peft_would_refuse_is_not_written(tmp_path: Path) -> None:
    adapters = AdapterSet({"q": (3, 3)}, LoraConfig(rank=4, alpha=6e5, use_rslora=True), seed=0)
    message = "alpha for rank 4 without rsLoRA must be in (0, 1e+06] with portable=True, got 1200000.0"
    with pytest.raises(InputError, match=re.escape(message)):
        saved(tmp_path, adapters)
    assert litter(tmp_path) == []
    assert load_peft(saved(tmp_path, adapters, portable=False)).config.alpha == 6e5


@pytest.mark.parametrize("name", ["^q", "q$", r"a\.b", "a b", "a*", "é", "q\n"])
def test_names_that_patterns_cannot_say_are_refused(tmp_path: Path, name: str) -> None:
    adapters = AdapterSet({"fine": (3, 3), name: (3, 3)}, seed=0)
    message = f"a name must be of letters, digits, '_', '-' and '.' with portable=False, got {name!r}"
    with pytest.raises(InputError, match=re.escape(message)):
        saved(tmp_path, adapters, portable=False)
    assert litter(tmp_path) == []


@pytest.mark.parametrize("name", ["a..b", "a\nb", "x" * 600, "\ud800"])
def test_names_that_no_tensor_can_have_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="a tensor's name must"):
        saved(tmp_path, AdapterSet({name: (3, 3)}, seed=0))
    assert litter(tmp_path) == []


def test_rslora_for_some_needs_portable(tmp_path: Path) -> None:
    message = f"use_rslora must be the same for all with portable=False, got another for {NAMES[1]}"
    with pytest.raises(InputError, match=re.escape(message)):
        saved(tmp_path, mixed(), portable=False)
    assert litter(tmp_path) == []


def test_a_directory_that_is_there_is_never_overwritten(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = (path / TENSORS_NAME).read_bytes()
    with pytest.raises(FileExistsError, match="adapter"):
        saved(tmp_path, uniform(1))
    assert (path / TENSORS_NAME).read_bytes() == before
    assert litter(tmp_path) == ["adapter"]


def test_an_empty_directory_that_is_there_is_filled(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    assert len(load_peft(saved(tmp_path))) == 4


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, call, fail)
        with pytest.raises(OSError, match="No space left on device"):
            saved(tmp_path)
    assert litter(tmp_path) == []
    saved(tmp_path)


# ------------------------------------------------------------------ what is not read


def test_a_variant_in_the_config_is_refused_before_the_tensors_are_opened(tmp_path: Path) -> None:
    path = rewritten(saved(tmp_path), use_dora=True)
    (path / TENSORS_NAME).unlink()
    message = f"{path / CONFIG_NAME}: use_dora must not be set, since it changes what adapters do, got True"
    with pytest.raises(FormatError, match=re.escape(message)):
        load_peft(path)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.npz"])
def test_a_directory_with_only_a_pickle_is_refused(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path)
    (path / TENSORS_NAME).rename(path / name)
    message = f"{path / name}: must be {TENSORS_NAME}, got a format that can run code"
    with pytest.raises(FormatError, match=re.escape(message)):
        load_peft(path)


def test_a_pickle_beside_the_tensors_is_not_touched(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert len(load_peft(path)) == 4


def test_a_pickle_under_the_right_name_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / TENSORS_NAME).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(
        FormatError, match="must be safetensors, got a pickle, zip or NumPy file, which is never opened"
    ):
        load_peft(path)


@pytest.mark.parametrize("name", [CONFIG_NAME, TENSORS_NAME])
def test_a_file_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path)
    (path / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(path / name))):
        load_peft(path)


@pytest.mark.parametrize("name", [CONFIG_NAME, TENSORS_NAME])
def test_a_link_instead_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path)
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    message = f"{path / name}: must be a regular file, got a symbolic link"
    with pytest.raises(FormatError, match=re.escape(message)):
        load_peft(path)


def test_a_config_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / CONFIG_NAME).write_text('{"r": 2, "r": 3}')
    with pytest.raises(FormatError, match=re.escape(f"{path / CONFIG_NAME}: ")):
        load_peft(path)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.q.lora_A.weight",
        f"{PREFIX}q.lora_A.default.weight",
        f"{PREFIX}q.lora_A",
        f"{PREFIX}q.lora_magnitude_vector",
        f"{PREFIX}q.lora_embedding_A",
        f"{PREFIX}lm_head.weight",
        f"{PREFIX[:-1]}.lora_B.weight",
        "lora_A.weight",
    ],
)
def test_a_tensor_of_another_name_is_refused(tmp_path: Path, name: str) -> None:
    path = foreign(tmp_path / "foreign", pair() | {name: np.zeros((2, 3), np.float32)})
    rule = f"a tensor's name must be {PREFIX}<module>.lora_A.weight or .lora_B.weight, got {name!r}"
    with pytest.raises(FormatError, match=re.escape(f"{path / TENSORS_NAME}: {rule}")):
        load_peft(path)


@pytest.mark.parametrize(("gone", "suffix"), [(0, "lora_A.weight"), (1, "lora_B.weight")])
def test_a_tensor_without_its_pair_is_refused(tmp_path: Path, gone: int, suffix: str) -> None:
    tensors = pair() | pair("v")
    del tensors[list(tensors)[2 + gone]]
    path = foreign(tmp_path / "foreign", tensors)
    message = f"{path / TENSORS_NAME}: 'v' must have both matrices, got none named {suffix}"
    with pytest.raises(FormatError, match=re.escape(message)):
        load_peft(path)


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    path = foreign(tmp_path / "foreign", {})
    message = f"{path / TENSORS_NAME}: must hold the tensors of at least one adapter, got none"
    with pytest.raises(FormatError, match=re.escape(message)):
        load_peft(path)


@pytest.mark.parametrize(
    ("tensors", "keys", "message"),
    [
        (pair(a=(3, 3)), {}, "'q.lora_A.weight' must have 2 rows, the rank in adapter_config.json, got shape [3, 3]"),
        (
            pair(b=(4, 3)),
            {},
            "'q.lora_B.weight' must have 2 columns, the rank in adapter_config.json, got shape [4, 3]",
        ),
        (pair(), {"r": 3}, "'q.lora_A.weight' must have 3 rows, the rank in adapter_config.json, got shape [2, 3]"),
        (pair(), {"rank_pattern": {"q": 4}}, "'q.lora_A.weight' must have 4 rows"),
        (pair(a=(2, 3, 1)), {}, "'q.lora_A.weight' must be a matrix with elements, got shape [2, 3, 1]"),
        (pair(b=(8,)), {}, "'q.lora_B.weight' must be a matrix with elements, got shape [8]"),
        (pair(a=(2, 0)), {}, "'q.lora_A.weight' must be a matrix with elements, got shape [2, 0]"),
        (pair(b=(0, 2)), {}, "'q.lora_B.weight' must be a matrix with elements, got shape [0, 2]"),
        (pair(dtype=np.float64), {}, "'q.lora_A.weight' dtype must be one of F32, F16, BF16, got F64"),
        (pair(dtype=np.int32), {}, "'q.lora_A.weight' dtype must be one of F32, F16, BF16, got I32"),
    ],
)
def test_a_matrix_that_is_not_what_the_config_says_is_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray], keys: dict[str, Any], message: str
) -> None:
    path = foreign(tmp_path / "foreign", tensors, **keys)
    message = f"{path / TENSORS_NAME}: {message}".replace("'q.", f"'{PREFIX}q.")
    with pytest.raises(FormatError, match=re.escape(message)):
        load_peft(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, dtype: Any, value: float) -> None:
    tensors = pair(dtype=dtype)
    tensors[f"{PREFIX}q.lora_B.weight"][3, 1] = value
    path = foreign(tmp_path / "foreign", tensors)
    message = f"{path / TENSORS_NAME}: q.B must be finite, got {value} at [3, 1]"
    with pytest.raises(FormatError, match=re.escape(message)):
        load_peft(path)


def test_a_bfloat16_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, dtype="bfloat16")
    raw = bytearray((path / TENSORS_NAME).read_bytes())
    raw[-2:] = b"\x80\x7f"  # infinity, in the last module's B
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[:start] = re.sub(rb'(sha256[\\":]+)[0-9a-f]{64}', rb"\g<1>" + b"%b", raw[:start]).replace(
        b"%b", hashlib.sha256(raw[start:]).hexdigest().encode()
    )
    (path / TENSORS_NAME).write_bytes(raw)
    message = f"{NAMES[-1]}.B must be finite, got inf"
    with pytest.raises(FormatError, match=re.escape(message)):
        load_peft(path)


def test_what_the_reference_implementation_refuses_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(raw: bytes) -> None:
        raise safetensors.SafetensorError("its reason")

    path = saved(tmp_path)
    monkeypatch.setattr(safetensors, "deserialize", refuse)
    with pytest.raises(FormatError, match=f"{TENSORS_NAME}: its reason"):
        load_peft(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("step", [1], r"adapter_model.safetensors: metadata 'cylora' step must be an integer, got \[1\]"),
        ("step", -1, "metadata 'cylora' step must be an integer >= 0, got -1"),
        ("version", {"a": 1}, "metadata 'cylora' version must be text, got {'a': 1}"),
    ],
)
def test_own_notes_are_checked(tmp_path: Path, key: str, value: object, message: str) -> None:
    path = saved(tmp_path)
    raw = (path / TENSORS_NAME).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    notes = json.loads(header["__metadata__"]["cylora"]) | {key: value}
    header["__metadata__"]["cylora"] = json.dumps(notes)
    text = json.dumps(header).encode()
    (path / TENSORS_NAME).write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])
    with pytest.raises(FormatError, match=message):
        load_peft(path)


def test_a_flipped_bit_in_the_tensors_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path)
    raw = bytearray((path / TENSORS_NAME).read_bytes())
    raw[-1] ^= 1
    (path / TENSORS_NAME).write_bytes(raw)
    place = re.escape(f"{path / TENSORS_NAME}: metadata 'cylora' must have the tensors' sha256, ")
    said = json.loads(metadata_of(path)["cylora"])["sha256"]
    with pytest.raises(FormatError, match=rf"{place}[0-9a-f]{{64}}, got '{said}': it is damaged"):
        load_peft(path)


@pytest.mark.parametrize("value", ["[]", "{}", '{"sha256": 3}', '{"step": 1}', "3"])
def test_metadata_of_ours_without_a_hash_is_refused(tmp_path: Path, value: str) -> None:
    path = foreign(tmp_path / "foreign", pair(), {"format": "pt", "cylora": value})
    message = f"{path / TENSORS_NAME}: metadata 'cylora' must be an object with sha256, got {json.loads(value)!r}"
    with pytest.raises(FormatError, match=re.escape(message)):
        load_peft(path)


def test_metadata_of_ours_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = foreign(tmp_path / "foreign", pair(), {"cylora": "{"})
    with pytest.raises(FormatError, match="metadata 'cylora': the text must be JSON"):
        load_peft(path)


def test_metadata_of_others_is_ignored(tmp_path: Path) -> None:
    path = foreign(tmp_path / "foreign", pair(), {"format": "pt", "sha256": "x", "other": "{"})
    assert list(load_peft(path)) == ["q"]


def test_what_the_reference_library_refuses_is_refused(tmp_path: Path) -> None:
    """``-0`` is the integer 0 in Python, and no size to the reference library."""
    path = foreign(tmp_path / "foreign", pair())
    raw = (path / TENSORS_NAME).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].replace(b"[0,", b"[-0,")
    (path / TENSORS_NAME).write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    with pytest.raises(FormatError, match=re.escape(f"{path / TENSORS_NAME}: ") + ".*header"):
        load_peft(path)


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_file_that_was_cut_is_refused(tmp_path: Path, cut: int) -> None:
    path = saved(tmp_path)
    raw = (path / TENSORS_NAME).read_bytes()
    (path / TENSORS_NAME).write_bytes(raw[:cut])
    with pytest.raises(FormatError, match=re.escape(str(path / TENSORS_NAME))):
        load_peft(path)


def test_a_path_may_be_a_string(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_peft(uniform(), "adapter")
    reader: Callable[[str], AdapterSet] = load_peft
    assert list(reader("adapter")) == NAMES
