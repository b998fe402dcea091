"""Checkpoints that are damaged, cut, mixed or forged: each is a FormatError, and none takes much memory."""

import json
import math
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Tensors, do_one, put_together, taken_apart
from training import make_adapter, make_set, make_trainer

from cylora import CyloraError, FormatError, LoraConfig, LoraTrainingConfig
from cylora.formats.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint

MIB = 2**20


def write_checkpoint(path: Path, actions: int = 8, seed: int = 0, **config: Any) -> Path:
    """Save a small set with everything a file can hold, micro-batches too."""
    trainer, adapters = make_trainer(**{"history_limit": 4, "nonfinite": "skip"} | config), make_set(seed)
    for index in range(actions):
        do_one(trainer, adapters, index)
    adapters.origin = {"base": "a/b"}
    save_checkpoint(trainer, adapters, path, generation=actions, rng=np.random.default_rng(seed), extra={"n": actions})
    return path


def check_refused(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    with pytest.raises(FormatError) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(str(path))


# ------------------------------------------------------------------ damage


def check_flips(path: Path, raw: bytes, places: Iterator[int] | range) -> None:
    for place in places:
        flipped = bytearray(raw)
        flipped[place // 8] ^= 1 << place % 8
        check_refused(path, flipped)


def check_truncations(path: Path, raw: bytes, lengths: range) -> None:
    for length in lengths:
        check_refused(path, raw[:length])


def check_splices(path: Path, count: int) -> None:
    """Join the start of one generation and the end of another, at the same place or at any two."""
    rng = random.Random(6)
    one, two = (write_checkpoint(path, actions, actions).read_bytes() for actions in (8, 13))
    assert len(one) == len(two)  # else every splice would be found by its size alone
    done = 0
    while done < count:
        first, second = rng.choice([(one, two), (two, one)])
        place = rng.randrange(len(one) + 1)
        mixed = first[:place] + second[place if rng.random() < 0.7 else rng.randrange(len(two)) :]
        if rng.random() < 0.3:  # a stretch of the one within the other, as when blocks were written out of order
            start, stop = sorted(rng.randrange(len(one) + 1) for _ in range(2))
            mixed = first[:start] + second[start:stop] + first[stop:]
        if mixed not in (one, two):
            check_refused(path, mixed)
            done += 1


def test_flipped_bits_are_found(tmp_path: Path) -> None:
    raw = write_checkpoint(tmp_path / "file").read_bytes()
    places = random.Random(1).sample(range(8 * len(raw)), 1500)
    check_flips(tmp_path / "file", raw, iter(places))


def test_cut_and_grown_files_are_found(tmp_path: Path) -> None:
    raw = write_checkpoint(tmp_path / "file").read_bytes()
    check_truncations(tmp_path / "file", raw, range(0, len(raw), 7))
    check_truncations(tmp_path / "file", raw, range(len(raw) - 40, len(raw)))
    for more in (b"\0", b"\0" * 8, raw[-32:], raw):
        check_refused(tmp_path / "file", raw + more)


def test_mixed_generations_are_found(tmp_path: Path) -> None:
    check_splices(tmp_path / "file", 300)


@pytest.mark.nightly
@pytest.mark.parametrize("state_dtype", ["float32", "8bit"])
def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path, state_dtype: str) -> None:
    raw = write_checkpoint(tmp_path / "file", state_dtype=state_dtype).read_bytes()
    check_flips(tmp_path / "file", raw, range(8 * len(raw)))
    check_truncations(tmp_path / "file", raw, range(len(raw)))


@pytest.mark.nightly
def test_ten_thousand_mixed_generations_are_found(tmp_path: Path) -> None:
    check_splices(tmp_path / "file", 10_000)


def test_blocks_of_zeros_are_found(tmp_path: Path) -> None:
    """What a file system may leave of a file that was never synced."""
    raw = write_checkpoint(tmp_path / "file").read_bytes()
    for block in (64, 512, 1024):
        for start in range(0, len(raw), block):
            zeroed = (raw[:start] + bytes(block) + raw[start + block :])[: len(raw)]
            check_refused(tmp_path / "file", zeroed)


# ------------------------------------------------------------------ forged, with a hash that is right

Forge = Callable[[dict[str, Any], Tensors], None]


def parts(tmp_path: Path, **config: Any) -> tuple[dict[str, Any], Tensors]:
    """Return metadata, its JSON parsed, and tensors of a file that is right."""
    metadata, tensors = taken_apart(write_checkpoint(tmp_path / "right", **config))
    return {key: json.loads(text) for key, text in metadata.items()}, tensors


def forged(tmp_path: Path, documents: dict[str, Any], tensors: Tensors, **more: Any) -> Path:
    metadata = {key: one if isinstance(one, str) else json.dumps(one) for key, one in documents.items()}
    return put_together(tmp_path / "forged", metadata, tensors, **more)


def refuses(path: Path, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
def test_a_file_put_together_by_hand_loads(tmp_path: Path, state_dtype: str) -> None:
    """So the refusals below are for what was changed, and for nothing else."""
    documents, tensors = parts(tmp_path, state_dtype=state_dtype)
    path = forged(tmp_path, documents, tensors)
    assert load_checkpoint(path).trainer.total_steps() == load_checkpoint(tmp_path / "right").trainer.total_steps() == 5


def test_a_wrong_hash_is_refused(tmp_path: Path) -> None:
    path = forged(tmp_path, *parts(tmp_path), digest=bytes(32))
    refuses(path, f"'sha256' must be that of all bytes before it, got {'0' * 64} for content of [0-9a-f]{{64}}")


def test_white_space_before_the_header_is_refused(tmp_path: Path) -> None:
    refuses(forged(tmp_path, *parts(tmp_path), space=b" "), "header: JSON must begin with {, got b' '")


CHECKPOINT = "cylora.checkpoint"


def facts(key: str, value: Any, *inner: Any) -> Forge:
    """Return a change of one value of the main document: ``key`` or what lies deeper."""

    def change(documents: dict[str, Any], tensors: Tensors) -> None:
        place, last = documents[CHECKPOINT], key
        for step in inner:
            place, last = place[last], step
        place[last] = value

    return change


def tensor(name: str, change: Callable[[Any], Any] | None) -> Forge:
    """Return a change of one tensor, or its removal."""

    def apply(documents: dict[str, Any], tensors: Tensors) -> None:
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors.get(name))

    return apply


def text(key: str, change: Callable[[str], str]) -> Forge:
    """Return a change of a document's text."""

    def apply(documents: dict[str, Any], tensors: Tensors) -> None:
        documents[key] = change(json.dumps(documents[key]) if key in documents else "")

    return apply


def put(values: np.ndarray, index: int, value: float) -> np.ndarray:
    values[index] = value
    return values


def hash_first(documents: dict[str, Any], tensors: Tensors) -> None:
    rest = dict(tensors)
    tensors.clear()
    tensors.update({"sha256": np.zeros(32, np.uint8)} | rest)


def without_accumulation(documents: dict[str, Any], tensors: Tensors) -> None:
    documents[CHECKPOINT]["accumulated"] = 0


def limits_differ(documents: dict[str, Any], tensors: Tensors) -> None:
    documents[CHECKPOINT]["training"]["history_limit"] = 5


def lone_but_two(documents: dict[str, Any], tensors: Tensors) -> None:
    documents[CHECKPOINT]["is_set"] = False


def huge(documents: dict[str, Any], tensors: Tensors) -> None:
    documents[CHECKPOINT]["adapters"] = [["a", 2**31, 2**31, 0]]
    documents[CHECKPOINT]["lora_configs"][0]["rank"] = 2**62


def hex_flag(values: np.ndarray) -> np.ndarray:
    values.view(np.uint8)[1] = 2
    return values


FORGED: dict[str, tuple[Forge, str]] = {
    # the metadata's keys and texts
    "no facts": (lambda d, _: d.pop(CHECKPOINT) and None, "the metadata must have 'cylora.checkpoint', got the keys"),
    "unknown document": (text("more", lambda _: "{}"), "must have no other keys than a checkpoint's, got 'more'"),
    "space before": (text(CHECKPOINT, lambda old: " " + old), "cylora.checkpoint: JSON must begin with {, got b' '"),
    "list": (text(CHECKPOINT, lambda _: "[]"), "JSON must begin with {"),
    "empty": (text("cylora.extra", lambda _: ""), "cylora.extra: JSON must begin with {, got b''"),
    "not JSON": (text("cylora.origin", lambda _: "{"), "cylora.origin: the text must be JSON"),
    "key twice": (
        text(CHECKPOINT, lambda old: '{"schema":1,' + old[1:]),
        "a key must not be repeated, got 'schema' twice",
    ),
    "key twice inside": (text("cylora.extra", lambda _: '{"a":{"b":1,"b":1}}'), "'b' twice"),
    "NaN": (text("cylora.extra", lambda _: '{"a":NaN}'), "numbers must be finite, got NaN"),
    "infinity": (text("cylora.extra", lambda _: '{"a":1e999}'), "numbers must be finite, got 1e999"),
    "huge integer": (text("cylora.extra", lambda _: f'{{"a":{2**63}}}'), "integers must fit 64 bits"),
    "too deep": (text("cylora.extra", lambda _: '{"a":' * 5 + "1" + "}" * 5), "at most 4 levels"),
    "much too deep": (text("cylora.extra", lambda _: '{"a":' * 50_000), "at most 4 levels, got many more|must be JSON"),
    # the main document
    "schema 3": (facts("schema", 3), "schema must be 1 or 2, those this version reads, got 3"),
    "schema 1 with what came later": (facts("schema", 1), "facts must be a mapping with the keys schema, version"),
    "schema 2.0": (facts("schema", 2.0), "schema must be 1 or 2, those this version reads, got 2.0"),
    "schema true": (facts("schema", True), "schema must be 1 or 2, those this version reads, got True"),
    "no schema": (lambda d, _: d[CHECKPOINT].pop("schema") and None, "schema must be 1 or 2.*got None"),
    "unknown key": (facts("more", 1), "facts must be a mapping with the keys schema, version"),
    "missing key": (lambda d, _: d[CHECKPOINT].pop("generation") and None, "facts must be a mapping with the keys"),
    "version": (facts("version", 1), "version must be text, got 1"),
    "generation below 0": (facts("generation", -1), "generation must be an integer >= 0, got -1"),
    "generation real": (facts("generation", 1.0), "generation must be an integer, got 1.0"),
    "generation true": (facts("generation", True), "generation must be an integer, got True"),
    "generation huge": (facts("generation", 2**62 + 1), "generation must be an integer >= 0, got 4611"),
    "is_set": (facts("is_set", 1), "is_set must be true or false, got 1"),
    # the adapters
    "two lone ones": (lone_but_two, "adapters must be a list of one, got"),
    "no adapters": (facts("adapters", []), "adapters must be a list of at least one, got"),
    "adapters object": (facts("adapters", {"q": 1}), "adapters must be a list of at least one, got"),
    "adapter short": (
        facts("adapters", ["q", 6, 5], 0),
        r"an adapter must be \[name, d_in, d_out, place of its config\]",
    ),
    "adapter text": (facts("adapters", "q650", 0), "an adapter must be"),
    "adapter number": (facts("adapters", 1, 0, 0), "an adapter must be"),
    "no name": (facts("adapters", "", 0, 0), "an adapter must be"),
    "name twice": (facts("adapters", "k", 0, 0), "adapters must not repeat a name, got 'k'"),
    "d_in 0": (facts("adapters", 0, 0, 1), r"d_in of 'q' must be an integer in \[1, 2147483648\], got 0"),
    "d_in true": (facts("adapters", True, 0, 1), "d_in of 'q' must be an integer, got True"),
    "d_out huge": (facts("adapters", 2**31 + 1, 0, 2), "d_out of 'q' must be an integer in"),
    "no such config": (facts("adapters", 1, 0, 3), r"config of 'q' must be an integer in \[0, 0\], got 1"),
    "config below 0": (facts("adapters", -1, 0, 3), "config of 'q' must be an integer in"),
    "no configs": (facts("lora_configs", []), r"config of 'q' must be an integer in \[0, -1\], got 0"),
    "configs object": (facts("lora_configs", {}), "lora_configs must be a list, got {}"),
    "config a number": (facts("lora_configs", 5, 0), "one of lora_configs must be a mapping with the keys rank"),
    "config unknown key": (facts("lora_configs", 5, 0, "more"), "one of lora_configs must be a mapping with the keys"),
    "rank 0": (facts("lora_configs", 0, 0, "rank"), "rank must be an integer >= 1, got 0"),
    "rank real": (facts("lora_configs", 2.0, 0, "rank"), "rank must be an integer, got 2.0"),
    "modules": (facts("lora_configs", [], 0, "target_modules"), "target_modules must be"),
    "another shape": (
        facts("adapters", 7, 0, 1),
        r"'parameters' must be F32 of shape \[56\], as the metadata has it, got F32 of shape \[54\]",
    ),
    "sizes beyond memory": (huge, r"'parameters' must be F32 of shape \[19807\d+\]"),
    # the training
    "training list": (facts("training", []), "training must be a mapping with the keys lora_config"),
    "training unknown": (facts("training", 1, "more"), "training must be a mapping with the keys"),
    "training missing": (lambda d, _: d[CHECKPOINT]["training"].pop("beta1") and None, "training must be a mapping"),
    "training config": (facts("training", {}, "lora_config"), "training lora_config must be a mapping with the keys"),
    "rate": (facts("training", -1, "learning_rate"), "learning_rate must be in"),
    "rate text": (facts("training", "1", "learning_rate"), "learning_rate must be in"),
    "no rate": (facts("training", None, "learning_rate"), "learning_rate must be in"),
    "max_steps real": (facts("training", 9.0, "max_steps"), "max_steps must be an integer, got 9.0"),
    "schedule": (facts("training", "sine", "schedule"), "schedule must be one of"),
    "schedule object": (facts("training", {}, "schedule"), "schedule must be one of"),
    "norm": (facts("training", False, "max_grad_norm"), "max_grad_norm must be > 0"),
    "limits differ": (limits_differ, "history_limit must be 4 in training too, got 5"),
    "dtypes differ": (
        facts("training", "8bit", "state_dtype"),
        "state_dtype must be 'float32' in training too, got '8bit'",
    ),
    # Adam
    "adam a number": (facts("adam", 3), "adam must be a mapping with the keys dtype, t"),
    "adam dtype": (
        facts("adam", "float64", "dtype"),
        "adam dtype must be one of float32, bfloat16, 8bit, got 'float64'",
    ),
    "adam dtype list": (facts("adam", [], "dtype"), r"adam dtype must be one of float32, bfloat16, 8bit, got \[\]"),
    "t 0": (facts("adam", 0, "t"), r"adam t must be an integer in \[1, 5\], got 0"),
    "t beyond the steps": (facts("adam", 6, "t"), r"adam t must be an integer in \[1, 5\], got 6"),
    "t real": (facts("adam", 3.0, "t"), "adam t must be an integer, got 3.0"),
    "adam, tensors of none": (facts("adam", None), "the tensors must be those of a checkpoint, got also 'adam.m'"),
    # the history
    "history": (facts("history", None), "history must be a mapping with the keys limit, total_steps, skipped_steps"),
    "steps below 0": (facts("history", -1, "total_steps"), "history total_steps must be an integer >= 0, got -1"),
    "steps huge": (facts("history", 2**63 - 1, "total_steps"), "history total_steps must be an integer >= 0"),
    "limit 0": (facts("history", 0, "limit"), "history_limit must be 0 in training too, got 4"),
    "limit real": (facts("history", 4.0, "limit"), "history limit must be an integer, got 4.0"),
    "skipped below 0": (
        facts("history", -1, "skipped_steps"),
        r"history skipped_steps must be an integer in \[0, 5\], got -1",
    ),
    "skipped too many": (facts("history", 6, "skipped_steps"), "history skipped_steps must be an integer in"),
    "fewer steps than records": (facts("history", 3, "total_steps"), "adam t must be an integer"),
    "flag of 2": (tensor("history.skipped", hex_flag), "'history.skipped' must be 0 or 1, got 2"),
    # the accumulation
    "accumulated below 0": (facts("accumulated", -1), "accumulated must be an integer >= 0, got -1"),
    "accumulated, tensors of none": (without_accumulation, "got also 'accumulated.gradient'"),
    "weight 0": (
        tensor("accumulated.sums", lambda old: put(old, 1, 0)),
        "accumulated weight must be finite and >= 1e-30, got 0",
    ),
    "weight NaN": (tensor("accumulated.sums", lambda old: put(old, 1, math.nan)), "accumulated weight must be finite"),
    "gradient NaN": (
        tensor("accumulated.gradient", lambda old: put(old, 9, math.nan)),
        "accumulated gradient must be finite, got nan",
    ),
    # the tensors
    "no parameters": (tensor("parameters", None), "'parameters' must be among the tensors, got"),
    "no m": (tensor("adam.m", None), "'adam.m' must be among the tensors, got"),
    "no gradient": (tensor("accumulated.gradient", None), "'accumulated.gradient' must be among the tensors"),
    "no losses": (tensor("history.loss", None), "'history.loss' must be among the tensors"),
    "extra tensor": (
        tensor("more", lambda _: np.zeros(3, np.float32)),
        "the tensors must be those of a checkpoint, got also 'more'",
    ),
    "empty tensor": (tensor("more", lambda _: np.zeros(0, np.float32)), "got also 'more'"),
    "float64": (
        tensor("parameters", lambda old: old.astype(np.float64)),
        r"'parameters' must be F32 of shape \[54\].*got F64",
    ),
    "two dimensions": (
        tensor("parameters", lambda old: old.reshape(2, -1)),
        r"'parameters' must be F32 of shape \[54\].*got F32 of shape \[2, 27\]",
    ),
    "m too short": (
        tensor("adam.m", lambda old: old[:-1]),
        r"'adam.m' must be F32 of shape \[54\].*got F32 of shape \[53\]",
    ),
    "v too long": (tensor("adam.v", lambda old: np.append(old, old[:1])), "'adam.v' must be F32 of shape"),
    "flags as octets": (
        tensor("history.skipped", lambda old: old.view(np.uint8)),
        r"'history.skipped' must be BOOL of shape \[4\].*got U8",
    ),
    "loss missing": (tensor("history.loss", lambda old: old[:-1]), r"'history.loss' must be F64 of shape \[4\]"),
    "hash first": (hash_first, "'sha256' must be the last tensor, got"),
    "parameter NaN": (
        tensor("parameters", lambda old: put(old, 25, math.nan)),
        r"k\.A must be finite, got nan at \[0, 3\]",
    ),
    "parameter infinite": (
        tensor("parameters", lambda old: put(old, 0, -math.inf)),
        r"q\.A must be finite, got -inf at \[0, 0\]",
    ),
    "m infinite": (tensor("adam.m", lambda old: put(old, 7, math.inf)), "adam m must be finite, got inf"),
    "v NaN": (tensor("adam.v", lambda old: put(old, 53, math.nan)), "adam v must be finite, got nan"),
    "v negative": (tensor("adam.v", lambda old: put(old, 3, -1e-30)), "adam v must be >= 0, got -"),
    # the generator
    "generator": (lambda d, _: d["cylora.rng"].update(bit_generator="LCG"), "rng bit_generator must be one of PCG64"),
    "generator empty": (text("cylora.rng", lambda _: "{}"), "rng bit_generator must be one of .*, got None"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_checkpoint_is_refused_by_the_rule_it_breaks(tmp_path: Path, case: str) -> None:
    change, message = FORGED[case]
    documents, tensors = parts(tmp_path)
    change(documents, tensors)
    refuses(forged(tmp_path, documents, tensors), message)


OPTIONS = {
    "train_a": False, "ema_decay": 0.5, "divergence": "rollback", "divergence_window": 3, "divergence_factor": 9.0,
    "rollback_every": 1, "early_stopping_patience": 9,
}  # fmt: skip
# Forgeries of a file in which options have left something.
FORGED_OPTIONS: dict[str, tuple[Forge, str]] = {
    "ema a number": (facts("ema", 1), "ema must be true or false, got 1"),
    "ema of none": (facts("ema", False), "good ema must be there|the tensors must be those of a checkpoint, got also"),
    "ema without decay": (facts("training", None, "ema_decay"), "ema_decay must be set in training with what is kept"),
    "good without rollback": (facts("training", "ignore", "divergence"), "divergence must be set in training with"),
    "ema NaN": (tensor("ema", lambda old: put(old, 3, math.nan)), "ema must be finite, got nan"),
    "ema short": (tensor("ema", lambda old: old[:-1]), r"'ema' must be F32 of shape \[54\]"),
    "good a list": (facts("good", []), "good must be a mapping with the keys t, got list"),
    "good t": (facts("good", -1, "t"), r"good t must be an integer in \[0, 5\], got -1"),
    "good t beyond adam's": (facts("good", 5, "t"), "good must be an earlier state of adam, got one after 5 steps"),
    "good infinite": (tensor("good.parameters", lambda old: put(old, 0, math.inf)), "good.parameters must be finite"),
    "good ema NaN": (tensor("good.ema", lambda old: put(old, 0, math.nan)), "good.ema must be finite, got nan"),
    "good v": (tensor("good.v", lambda old: put(old, 0, -1.0)), "adam v must be >= 0, got -1.0"),
    "good missing": (tensor("good.m", None), "'good.m' must be among the tensors"),
    "watch a list": (facts("watch", []), "watch must be a mapping with the keys kept, stopping"),
    "watch kept": (facts("watch", -1, "kept"), r"watch kept must be an integer in \[0, 65536\], got -1"),
    "watch more": (facts("watch", 2, "kept"), r"'watch.losses' must be F64 of shape \[2\]"),
    "watch NaN": (tensor("watch.norms", lambda old: put(old, 0, math.nan)), "watch norms must be finite, got nan"),
    "stopping": (facts("watch", {}, "stopping"), "early stopping must be a mapping with the keys best"),
    "stopping count": (facts("watch", 9.5, "stopping", "waited"), "early stopping"),
    "no watch": (facts("watch", None), "got also 'watch.losses'"),
    "pattern of none": (facts("training", {"v": 2}, "rate_pattern"), "each key of rate_pattern must count for"),
    "pattern a list": (facts("training", [], "rate_pattern"), "rate_pattern must be a mapping of module names"),
    "pattern a regular expression": (facts("training", {"(a+)+": 2}, "rate_pattern"), "must have names of modules or"),
    "rank pattern": (facts("lora_configs", {"q": 2}, 0, "rank_pattern"), "rank_pattern must be empty for a lone"),
    "all of A, moments of B": (facts("training", True, "train_a"), r"'adam.m' must be F32 of shape \[54\]"),
    "ratio": (facts("training", 0, "lora_plus_ratio"), r"lora_plus_ratio must be in \(0, 1e6\], got 0"),
    "no ratio": (lambda d, _: d[CHECKPOINT]["training"].pop("lora_plus_ratio") and None, "training must be a mapping"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED_OPTIONS)
def test_a_forged_checkpoint_with_options_is_refused_by_the_rule_it_breaks(tmp_path: Path, case: str) -> None:
    change, message = FORGED_OPTIONS[case]
    documents, tensors = parts(tmp_path, **OPTIONS)
    load_checkpoint(forged(tmp_path, documents, tensors))
    change(documents, tensors)
    refuses(forged(tmp_path, documents, tensors), message)


def test_there_are_enough_forgeries() -> None:
    assert len(FORGED) >= 80


@pytest.mark.parametrize(("name", "limit"), [("m_exponents", 237), ("v_exponents", 221)])
def test_exponents_that_would_overflow_are_refused(tmp_path: Path, name: str, limit: int) -> None:
    documents, tensors = parts(tmp_path, state_dtype="8bit")
    tensors[f"adam.{name}"][0] = limit + 1
    refuses(forged(tmp_path, documents, tensors), f"adam {name} must be at most {limit}, got {limit + 1}")


@pytest.mark.parametrize("name", ["m", "v"])
def test_compact_moments_that_are_not_finite_are_refused(tmp_path: Path, name: str) -> None:
    documents, tensors = parts(tmp_path, state_dtype="bfloat16")
    tensors[f"adam.{name}"][-1] = 0x7F80
    refuses(forged(tmp_path, documents, tensors), f"adam {name} must be finite, got inf")


def test_metadata_is_checked_as_the_container_says(tmp_path: Path) -> None:
    _, tensors = parts(tmp_path)
    path = tmp_path / "forged"
    refuses(put_together(path, "[]", tensors), "__metadata__ must be an object of strings")
    refuses(put_together(path, '{"cylora.checkpoint":{}}', tensors), "__metadata__ must be an object of strings")
    refuses(put_together(path, '{"a":"","a":""}', tensors), "a key must not be repeated, got 'a' twice")


def test_optional_documents_may_be_missing(tmp_path: Path) -> None:
    documents, tensors = parts(tmp_path)
    loaded = load_checkpoint(forged(tmp_path, {CHECKPOINT: documents[CHECKPOINT]}, tensors))
    assert (loaded.rng, loaded.extra, loaded.adapters.origin) == (None, {}, {})


def test_every_setting_of_a_config_is_in_the_file(tmp_path: Path) -> None:
    documents, _ = parts(tmp_path)
    assert set(documents[CHECKPOINT]["training"]) == set(LoraTrainingConfig().to_dict())
    assert set(documents[CHECKPOINT]["lora_configs"][0]) == set(LoraConfig().to_dict())


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "file")
    (tmp_path / "link").symlink_to(path)
    refuses(tmp_path / "link", "must be a regular file, got a symbolic link")
    refuses(tmp_path, "must be a regular file, got a directory")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "missing")


# ------------------------------------------------------------------ random forgeries, and memory


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of everything in a JSON value."""
    if place:
        yield place
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members:
        yield from leaves(member, (*place, key))


VALUES = [
    None, True, 0, 1, -1, 2, 5, 2**31, 2**62, 2**63 - 1, 0.5, 1e308, -0.0, "", "x", "0", "f" * 16, "8bit", [], [1],
    [[]], {}, {"a": 1},
]  # fmt: skip


def test_any_value_at_any_place_is_refused_or_loads(tmp_path: Path) -> None:
    """Only documented errors, whatever the metadata has where."""
    rng, accepted, tries = random.Random(4), 0, 1000
    documents, tensors = parts(tmp_path)
    text = json.dumps(documents)
    places = [place for place in leaves(documents) if len(place) > 1]
    for _ in range(tries):
        changed = json.loads(text)
        for place in rng.sample(places, rng.choice([1, 1, 1, 2])):
            inner: Any = changed
            try:
                for step in place[:-1]:
                    inner = inner[step]
                inner[place[-1]] = rng.choice(VALUES)
            except (KeyError, IndexError, TypeError):  # the first change took that place away
                continue
        try:
            load_checkpoint(forged(tmp_path, changed, tensors), schedule="constant")
            accepted += 1
        except CyloraError:
            pass
    assert 0.05 * tries < accepted < 0.6 * tries


def members(count: int) -> Forge:
    """Return what lists that many tiny adapters, with tensors that go with them."""

    def many(documents: dict[str, Any], tensors: Tensors) -> None:
        documents[CHECKPOINT]["adapters"] = [[f"{i:x}", 1, 1, 0] for i in range(count)]
        documents[CHECKPOINT]["lora_configs"][0]["rank"] = 1
        for name in ("parameters", "adam.m", "adam.v", "accumulated.gradient"):
            tensors[name] = np.zeros(2 * count, np.float32)

    return many


def lists(documents: dict[str, Any], tensors: Tensors) -> None:
    documents["cylora.extra"] = {"a": [[]] * 400_000}


def wide(documents: dict[str, Any], tensors: Tensors) -> None:
    documents["cylora.extra"] = {f"{i:x}": 0 for i in range(300_000)}


def check_memory(tmp_path: Path, change: Forge) -> None:
    documents, tensors = parts(tmp_path)
    change(documents, tensors)
    path = forged(tmp_path, documents, tensors)
    tracemalloc.start()
    try:
        load_checkpoint(path)
    except FormatError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= 64 * MIB + 2 * path.stat().st_size


@pytest.mark.parametrize("change", [huge, facts("history", 2**61, "total_steps"), facts("accumulated", 2**62)])
def test_sizes_that_are_only_claimed_take_no_memory(tmp_path: Path, change: Forge) -> None:
    check_memory(tmp_path, change)


@pytest.mark.nightly  # memory is traced object by object
@pytest.mark.parametrize("change", [members(17_000), members(200_000), lists, wide])
def test_very_many_entries_take_no_more_memory_than_allowed(tmp_path: Path, change: Forge) -> None:
    check_memory(tmp_path, change)


def test_adapters_are_no_more_than_the_files_size_allows(tmp_path: Path) -> None:
    documents, tensors = parts(tmp_path)
    members(300)(documents, tensors)
    path = forged(tmp_path, documents, tensors)
    assert len(read_checkpoint(path).adapters) == 300
    members(30_000)(documents, tensors)
    path = forged(tmp_path, documents, tensors)
    most = (40 * MIB + 2 * path.stat().st_size) // 2400
    refuses(path, f"adapters must be at most {most} in a file of this size, got 30000")


def test_a_lone_adapter_has_no_second(tmp_path: Path) -> None:
    save_checkpoint(make_trainer(), make_adapter(), tmp_path / "right")
    metadata, tensors = taken_apart(tmp_path / "right")
    document = json.loads(metadata[CHECKPOINT])
    document["adapters"] = []
    path = put_together(tmp_path / "forged", {CHECKPOINT: json.dumps(document)}, tensors)
    refuses(path, r"adapters must be a list of one, got \[\]")
