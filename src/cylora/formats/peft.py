"""PEFT directories: ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT and most servers read them.

(a) PEFT ignores in silence what it does not find where it looks, and servers ignore parts of its config. The default is
    therefore portable: one rank and one scale for all modules, everything else folded into the weights (`portable`),
    and ``target_modules`` made from the tensors.
(b) On the way in nothing is ignored: a tensor without its pair, a key that changes the mathematics, a shape that is not
    the config's is an error.
(c) Equal adapters give equal bytes.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from cylora import __version__, checks
from cylora.adapter import AdapterSet
from cylora.errors import FormatError, InputError
from cylora.formats import strict_json
from cylora.formats.container import Tensor, TensorFile, content, read_regular
from cylora.formats.durable import Content, create_directory
from cylora.formats.peft_config import CONFIG_NAME, PLAIN, PeftConfig, parse_config, to_config
from cylora.formats.portable import fold
from cylora.formats.weights import check_count, check_finite, narrowed, widen
from cylora.lora_config import MAX_ALPHA, LoraConfig
from cylora.patterns import Pattern

__all__ = ["TENSORS_NAME", "load_peft", "peft_files", "read_peft", "save_peft"]

TENSORS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIXES = {".lora_A.weight": 0, ".lora_B.weight": 1}
FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
OLD_NAMES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.npz")


def save_peft(
    adapters: AdapterSet,
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    portable: bool = True,
    step: int | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write ``adapters`` to the new directory ``path``, atomically and durably. Options as for `peft_files`.

    Raises
    ------
    InputError, ConfigError   As `peft_files` raises them. Nothing was written.
    FileExistsError           If there is something at ``path``; an empty directory may be.
    OSError                   If it cannot be written. Nothing of it is left.

    Notes
    -----
    While another thread steps these adapters, use ``trainer.hold(adapters, lambda _: ...)`` around the call, which
    keeps steps away meanwhile: else half a step would be written.
    """
    options = {"dtype": dtype, "portable": portable, "step": step, "base_model": base_model, "task_type": task_type}
    create_directory(path, peft_files(adapters, **options))  # type: ignore[arg-type]


def peft_files(
    adapters: AdapterSet,
    *,
    dtype: str = "float32",
    portable: bool = True,
    step: int | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
) -> dict[str, Content]:
    """Return the files of a PEFT directory by name, for `save_peft` or `cylora.formats.publish_directory`.

    With float32 and one rank and scale their content is the adapters' own memory: no step may come between (see
    `save_peft`) until it is written.

    Parameters
    ----------
    adapters : read only; their names are the paths of the modules in the model, such as
        ``model.layers.0.self_attn.q_proj``.
    dtype : "float32", "float16" or "bfloat16", rounded to nearest.
    portable : fold mixed ranks, mixed alphas and rsLoRA into the weights, for servers that know one rank and alpha.
        False keeps them as PEFT's patterns, which few servers read.
    step : how many steps these weights have seen; goes into the file's metadata.
    base_model, task_type : for the config, instead of what ``adapters.origin`` says.

    Raises
    ------
    InputError   If a weight is not finite (in ``dtype``), or a name cannot be that of a tensor.
    ConfigError  If an option breaks its rule.
    """
    if not isinstance(adapters, AdapterSet):
        raise InputError(f"adapters must be an AdapterSet, which names the modules, got {type(adapters).__name__}")
    check_finite(adapters)
    step = None if step is None else checks.integer("step", step, 0, error=InputError)
    for key, text in (("base_model", base_model), ("task_type", task_type)):
        if not isinstance(text, str | None):
            raise InputError(f"{key} must be a string, got {text!r:.80}")
    given = {"base_model_name_or_path": base_model, "task_type": task_type}
    kept = adapters.origin | {key: value for key, value in given.items() if value is not None}
    if portable:
        folded = fold(adapters)
        if folded.alpha > MAX_ALPHA:  # load_peft would refuse it
            rule = f"alpha for rank {folded.rank} without rsLoRA must be in (0, {MAX_ALPHA:g}] with portable=True"
            raise InputError(f"{rule}, got {folded.alpha!r}")
        matrices: Mapping[str, Any] = folded.tensors
        config = to_config(kept, adapters, rank=folded.rank, alpha=folded.alpha, dropout=adapters.config.dropout)
    else:
        matrices = {name: (one.a_matrix, one.b_matrix) for name, one in adapters.items()}
        config = _own_config(kept, adapters)
    tensors: dict[str, NDArray[Any]] = {}
    for name, pair in matrices.items():
        for suffix, matrix in zip(SUFFIXES, pair, strict=True):
            tensors[f"{PREFIX}{name}{suffix}"] = narrowed(f"{PREFIX}{name}{suffix}", matrix, dtype)
    digest = hashlib.sha256()
    for part in content(tensors, {})[1:]:
        digest.update(part)
    facts = {"step": step, "version": __version__, "sha256": digest.hexdigest()}
    metadata = {"format": "pt", "cylora": strict_json.to_text(facts)}
    text = strict_json.to_text(config, indent=2) + "\n"
    return {CONFIG_NAME: text.encode(), TENSORS_NAME: content(tensors, metadata, bfloat16=dtype == "bfloat16")}


def _own_config(kept: Mapping[str, Any], adapters: AdapterSet) -> dict[str, Any]:
    """Return a config with PEFT's patterns for what differs from the first adapter."""
    first = adapters.config
    for name, one in adapters.items():
        if not PLAIN.fullmatch(name):
            rule = "a name must be of letters, digits, '_', '-' and '.' with portable=False"
            raise InputError(f"{rule}, got {name!r:.120}")
        if one.config.use_rslora != first.use_rslora:
            raise InputError(f"use_rslora must be the same for all with portable=False, got another for {name}")
    return to_config(
        kept,
        adapters,
        rank=first.rank,
        alpha=first.alpha,
        use_rslora=first.use_rslora,
        dropout=first.dropout,
        rank_pattern={_key(name): one.rank for name, one in adapters.items() if one.rank != first.rank},
        alpha_pattern={_key(name): one.alpha for name, one in adapters.items() if one.alpha != first.alpha},
    )


def _key(name: str) -> str:
    """Return the regular expression that PEFT matches with this module alone: it looks at ends of names otherwise."""
    return "^" + name.replace(".", r"\.")


def load_peft(path: str | os.PathLike[str]) -> AdapterSet:
    """Read a PEFT directory into adapters that can be trained on.

    Parameters
    ----------
    path : the directory, with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns
    -------
    AdapterSet
        Named by the modules' paths, float32, in the file's order. Each adapter's ``config`` has its rank, alpha,
        dropout and use_rslora; the set's fits ``LoraTrainingConfig(lora_config=adapters.config)``. What else the config
        says is in ``origin``, and `save_peft` writes it back.

    Raises
    ------
    FormatError   If a file breaks a rule. The message names file, key and rule.
    OSError       If a file cannot be read.
    """
    adapters, _ = read_peft(path)
    try:
        check_finite(adapters)
    except InputError as error:
        raise FormatError(f"{Path(path) / TENSORS_NAME}: {error}") from None
    return adapters


def read_peft(path: str | os.PathLike[str]) -> tuple[AdapterSet, dict[str, Any]]:
    """Read a PEFT directory as `load_peft` does, but let weights be NaN or infinite: for looking at, not for use.

    Returned with them is what the file's writer noted if it was cylora: its version, and the step.
    """
    folder = Path(path)
    if not (folder / TENSORS_NAME).exists():
        for name in OLD_NAMES:
            if (folder / name).exists():
                raise FormatError(f"{folder / name}: must be {TENSORS_NAME}, got a format that can run code")
    config_path = folder / CONFIG_NAME
    document = strict_json.parse(read_regular(config_path, strict_json.MAX_BYTES), str(config_path))
    config = parse_config(document, config_path)
    with TensorFile(folder / TENSORS_NAME) as file:
        pairs = _pairs(file)
        check_count(str(file.path), len(pairs), file.size)
        members = _members(file, pairs, config)
        raw = file.read_all()
    facts = _own_facts(file, raw)
    # The reference implementation takes the tensors out: what it would refuse is refused here too.
    try:
        found = {name: entry["data"] for name, entry in safetensors.deserialize(raw)}  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise FormatError(f"{file.path}: {error}") from None
    del raw  # and each tensor below: at most two copies of the file at any time
    adapters = AdapterSet.zeros(members)
    adapters.origin = config.kept
    for module, names in pairs.items():
        for name, matrix in zip(names, (adapters[module].a_matrix, adapters[module].b_matrix), strict=True):
            dtype = file.tensors[name].dtype
            values = np.frombuffer(found.pop(name), FLOATS[dtype]).reshape(matrix.shape)
            widen(values, matrix)
    return adapters, facts


def _pairs(file: TensorFile) -> dict[str, tuple[str, str]]:
    """Return the names of A's and B's tensor by module."""
    found: dict[str, dict[int, str]] = {}
    for name in file.tensors:
        for suffix, place in SUFFIXES.items():
            module = name.removeprefix(PREFIX).removesuffix(suffix)
            if name == f"{PREFIX}{module}{suffix}":  # a module is never empty: no name has ".." in it
                found.setdefault(module, {})[place] = name
                break
        else:
            rule = f"a tensor's name must be {PREFIX}<module>.lora_A.weight or .lora_B.weight"
            raise FormatError(f"{file.path}: {rule}, got {name!r:.120}")
    if not found:
        raise FormatError(f"{file.path}: must hold the tensors of at least one adapter, got none")
    for module, places in found.items():
        if len(places) != 2:
            missing = next(suffix for suffix, place in SUFFIXES.items() if place not in places)
            raise FormatError(f"{file.path}: {module!r:.120} must have both matrices, got none named {missing[1:]}")
    return {module: (places[0], places[1]) for module, places in found.items()}


def _members(
    file: TensorFile, pairs: Mapping[str, tuple[str, str]], config: PeftConfig
) -> dict[str, tuple[int, int, LoraConfig]]:
    """Return d_in, d_out and config of each module, whose shapes must be what the config says."""
    targets = tuple(dict.fromkeys(module.rpartition(".")[2] for module in pairs))
    members = {}
    configs: dict[tuple[int, float], LoraConfig] = {}
    ranks, alphas = Pattern(config.rank_pattern), Pattern(config.alpha_pattern)
    for module, names in pairs.items():
        rank, alpha = ranks.value(module, config.rank), alphas.value(module, config.alpha)
        a, b = (_matrix(file, name) for name in names)
        for name, got, place in ((names[0], a, 0), (names[1], b, 1)):
            if got.shape[place] != rank:
                raise FormatError(
                    f"{file.path}: {name!r:.120} must have {rank} {'columns' if place else 'rows'}, the rank in "
                    f"{CONFIG_NAME}, got shape {list(got.shape)}"
                )
        if (rank, alpha) not in configs:
            configs[rank, alpha] = LoraConfig(
                rank=rank, alpha=alpha, dropout=config.dropout, target_modules=targets, use_rslora=config.use_rslora
            )
        members[module] = (a.shape[1], b.shape[0], configs[rank, alpha])
    return members


def _matrix(file: TensorFile, name: str) -> Tensor:
    tensor = file.tensors[name]
    if tensor.dtype not in FLOATS:
        raise FormatError(f"{file.path}: {name!r:.120} dtype must be one of {', '.join(FLOATS)}, got {tensor.dtype}")
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise FormatError(f"{file.path}: {name!r:.120} must be a matrix with elements, got shape {list(tensor.shape)}")
    return tensor


def _own_facts(file: TensorFile, raw: bytes) -> dict[str, Any]:
    """Return what cylora writes into its own files' metadata, the hash checked."""
    if "cylora" not in file.metadata:
        return {}
    place = f"{file.path}: metadata 'cylora'"
    facts = strict_json.parse(file.metadata["cylora"].encode(), place)
    if not isinstance(facts, dict) or not isinstance(facts.get("sha256"), str):
        raise FormatError(f"{place} must be an object with sha256, got {facts!r:.80}")
    got = hashlib.sha256(memoryview(raw)[len(file.head) :]).hexdigest()
    if got != facts["sha256"]:
        raise FormatError(f"{place} must have the tensors' sha256, {got}, got {facts['sha256']!r:.80}: it is damaged")
    version, step = facts.get("version"), facts.get("step")
    if not isinstance(version, str | None):
        raise FormatError(f"{place} version must be text, got {version!r:.80}")
    if step is not None:
        step = checks.integer(f"{place} step", step, 0, error=FormatError)
    return {"cylora": version, "steps": step}
