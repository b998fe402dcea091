"""`cylora inspect`, `verify` and `export` as their user meets them: what they print, write and answer."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_gguf_reader import GOOD_KEYS, GOOD_TENSORS, STRING, made
from test_inspection import REFUSED, change_weight, killed_run, trained
from training import make_adapter, make_set, make_trainer

import cylora
from cylora import AdapterSet, LoraConfig
from cylora.formats import durable, gguf_reader, inspection
from cylora.formats.checkpoint import save_checkpoint
from cylora.formats.durable import publish_directory
from cylora.formats.generations import list_generations, save_generation
from cylora.formats.gguf import save_gguf
from cylora.formats.peft import TENSORS_NAME, load_peft, peft_files, save_peft
from cylora.formats.peft_config import CONFIG_NAME

COMMAND = [sys.executable, "-c", "import sys; from cylora.cli import main; sys.exit(main())"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(cylora.__file__).parent.parent), "OPENBLAS_NUM_THREADS": "1"}
MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
}
NAMES = {"model.layers.0.self_attn.q_proj": (8, 8), "model.layers.0.mlp.down_proj": (12, 8)}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(run: Callable[..., SimpleNamespace]) -> Callable[..., str]:
    """Return a function that runs a command that must fail with code 2 and one line, and returns the line."""

    def refused(*arguments: object) -> str:
        done = run(*arguments)
        assert (done.code, done.out) == (2, "")
        assert re.fullmatch(r"cylora: error: [^\n]+\n", done.err), done.err
        return str(done.err)

    return refused


@pytest.fixture
def model(folder: Path) -> Path:
    """Return the config.json of a small Llama."""
    path = folder / "base" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(MODEL))
    return path


@pytest.fixture
def training(folder: Path) -> Path:
    """Return a run's folder with two checkpoints and an adapter, made for `model`."""
    run = folder / "run"
    for part in (run, run / "checkpoints", run / "adapters"):
        part.mkdir()
    trainer, adapters = trained(AdapterSet(NAMES, LoraConfig(rank=2), seed=0))
    for _ in range(2):
        save_generation(run / "checkpoints", trainer, adapters)
    publish_directory(run / "adapters", "adapter", 1, peft_files(adapters, step=1))
    return run


# ---------------------------------------------------------------------- inspect


def test_inspect_prints_facts_and_a_table(run: Callable[..., SimpleNamespace], training: Path) -> None:
    done = run("inspect", "run")
    assert (done.code, done.err) == (0, "")
    facts, table = done.out.split("\n\n")
    shown = dict(re.split(r"  +", line, maxsplit=1) for line in facts.splitlines())
    assert list(shown) == [
        *("kind", "path", "bytes", "sha256", "parameters", "finite", "cylora", "generation", "steps", "skipped steps"),
        *("micro-batches pending", "optimizer state", "training"),
    ]
    assert shown["path"] == "run/checkpoints/checkpoint-00000002.safetensors"
    assert shown["finite"] == "yes"
    assert shown["parameters"] == "72"
    assert shown["training"] == (
        "learning_rate 0.01, schedule constant, warmup_steps 0, max_steps 1000, max_grad_norm 1.0, weight_decay 0.01"
    )
    head, *rows = table.splitlines()
    assert head.split() == ["adapter", "d_in", "d_out", "rank", "alpha", "scaling", "norm", "A", "norm", "B"]
    assert [row.split()[:6] for row in rows] == [
        ["model.layers.0.self_attn.q_proj", "8", "8", "2", "8", "4"],
        ["model.layers.0.mlp.down_proj", "12", "8", "2", "8", "4"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_inspect_prints_thousands_and_a_schedule_that_was_a_function(
    run: Callable[..., SimpleNamespace], folder: Path
) -> None:
    save_checkpoint(make_trainer(schedule=lambda _: 0.1), AdapterSet({"q": (100, 60)}, seed=0), folder / "file")
    out = run("inspect", "file").out
    assert re.search(r"^parameters +1,280$", out, re.M)
    assert "schedule a function, " in out


def test_inspect_shows_only_the_settings_that_a_file_has(
    run: Callable[..., SimpleNamespace], training: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = inspection.read_checkpoint

    def without(path: Path) -> Any:
        saved = read(path)
        return saved._replace(facts=saved.facts._replace(training={"schedule": "cosine", "max_steps": 3}))

    monkeypatch.setattr(inspection, "read_checkpoint", without)
    assert re.search(r"^training +schedule cosine, max_steps 3$", run("inspect", "run").out, re.M)


def test_inspect_json_is_one_strict_object(run: Callable[..., SimpleNamespace], folder: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    save_peft(make_set(), folder / "adapter", step=3)
    change_weight(folder / "adapter", np.nan)
    done = run("inspect", "--json", "adapter")
    assert (done.code, done.err) == (0, "")
    facts = json.loads(done.out, parse_constant=refuse)
    assert facts["kind"] == "PEFT adapter"
    assert facts["finite"] is False
    assert facts["parameters"] == make_set().param_count()
    assert facts["adapters"]["q"]["norm A"] == "nan"
    assert set(facts["adapters"]) == set(make_set())

    save_checkpoint(make_trainer(max_grad_norm=float("inf")), make_adapter(), folder / "file")
    facts = json.loads(run("inspect", "file", "--json").out, parse_constant=refuse)
    assert facts["training"]["max_grad_norm"] == "inf"
    assert facts["training"]["lora_config"]["rank"] == 8


def test_inspect_says_loudly_that_a_weight_is_not_finite(run: Callable[..., SimpleNamespace], folder: Path) -> None:
    save_peft(make_set(), folder / "adapter")
    change_weight(folder / "adapter", np.inf)
    done = run("inspect", "adapter")
    assert done.code == 0
    assert re.search(r"^finite +NO: a weight is NaN or infinite$", done.out, re.M)
    assert re.search(r"^q .* inf +\S+$", done.out, re.M)


def test_inspect_a_gguf_adapter(run: Callable[..., SimpleNamespace], training: Path, model: Path) -> None:
    save_gguf(load_peft(training / "adapters" / "latest"), "adapter.gguf", model)
    done = run("inspect", "adapter.gguf")
    assert done.code == 0
    assert re.search(r"^architecture +llama$", done.out, re.M)
    assert re.search(r"^blk.0.attn_q.weight +8 +8 +2 +8 +4 ", done.out, re.M)
    assert "training" not in done.out


def test_names_cannot_move_the_terminals_cursor(run: Callable[..., SimpleNamespace], folder: Path) -> None:
    evil = "\x1b[2J\x9b\r\nok\u202e"
    shown = r"\x1b[2J\x9b\r\nok\u202e"
    tensors = [(name.replace("blk", evil), *rest) for name, *rest in GOOD_TENSORS]
    path = folder / f"{evil}.gguf"
    path.write_bytes(made(GOOD_KEYS | {"general.architecture": (STRING, evil)}, tensors))
    done = run("inspect", path.name)
    assert done.code == 0
    assert f"architecture  {shown}\n" in done.out
    assert f"\n{shown}.0.attn_q.weight" in done.out
    assert f"path          {shown}.gguf\n" in done.out
    assert json.loads(run("inspect", path.name, "--json").out)["path"] == path.name
    assert run("verify", path.name).out == f"ok       {shown}.gguf\n"
    path.write_bytes(b"GGUF")
    assert run("verify", path.name).out.startswith(f"DAMAGED  {shown}.gguf: must hold all keys and names")
    for done in (run("inspect", path.name), run("inspect", f"no{evil}")):
        assert done.code == 2
        assert re.fullmatch(r"cylora: error: [ -~]+\n", done.err)


def test_letters_of_other_languages_are_printed_as_they_are(run: Callable[..., SimpleNamespace], folder: Path) -> None:
    (folder / "Größe 模型.gguf").write_bytes(made())
    assert run("verify", "Größe 模型.gguf").out == "ok       Größe 模型.gguf\n"


def test_name_that_is_no_text_is_printed(run: Callable[..., SimpleNamespace], folder: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    (folder / name).write_bytes(made())
    done = run("inspect", name)
    assert done.code == 0
    assert re.search(r"^path +caf\\udce9$", done.out, re.M)


@pytest.mark.parametrize("arguments", [["inspect", "adapter"], ["inspect", "adapter", "--json"]])
def test_inspect_ends_quietly_when_head_has_seen_enough(folder: Path, arguments: list[str]) -> None:
    save_peft(AdapterSet({f"layer.{n}.{'x' * 60}": (4, 3) for n in range(1500)}, seed=0), folder / "adapter")
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, cwd=folder
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


@pytest.mark.parametrize("command", [("inspect",), ("export", "--format", "peft")], ids=["inspect", "export"])
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_adapter_is_one_line_and_code_2(
    refused: Callable[..., str],
    folder: Path,
    command: tuple[str, ...],
    make: Callable[[Path], object],
    message: str,
) -> None:
    make(folder / "path")
    assert message in refused(*command, "path")
    assert [path.name for path in folder.iterdir()] == ["path"]


def test_what_cannot_be_read_is_named(
    refused: Callable[..., str], training: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refused("inspect", "gone") == "cylora: error: gone cannot be read: No such file or directory\n"
    assert refused("verify", "gone") == "cylora: error: gone cannot be read: No such file or directory\n"
    assert refused("inspect", "a" * 300).endswith(" cannot be read: File name too long\n")
    (training / "adapters" / "latest" / TENSORS_NAME).unlink()
    got = refused("export", "run/adapters/latest", "--format", "peft")
    assert got.endswith(
        f"@v1-{os.readlink('run/adapters/latest')[-8:]}/{TENSORS_NAME} cannot be read: No such file or directory\n"
    )

    def deny(path: object) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(inspection.os, "listdir", deny)
    for command, named in (("inspect", "run/checkpoints"), ("verify", "run")):  # which lists the folder itself first
        assert refused(command, "run") == f"cylora: error: {named} cannot be read: Permission denied\n"

    def fail(path: object) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))  # as read() reports it: without a name

    monkeypatch.setattr(inspection, "list_generations", fail)
    assert refused("verify", "run") == "cylora: error: run cannot be read: Input/output error\n"


# ---------------------------------------------------------------------- verify


def test_verify_a_whole_run(run: Callable[..., SimpleNamespace], training: Path) -> None:
    done = run("verify", "run")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        "ok       run/checkpoints/checkpoint-00000001.safetensors",
        "ok       run/checkpoints/checkpoint-00000002.safetensors",
        f"ok       run/adapters/{os.readlink('run/adapters/latest')}",
    ]


def test_verify_says_what_is_damaged_and_goes_on(run: Callable[..., SimpleNamespace], training: Path) -> None:
    first = list_generations(training / "checkpoints")[0][1]
    raw = bytearray(first.read_bytes())
    raw[-40] ^= 1
    first.write_bytes(raw)
    done = run("verify", "run")
    assert (done.code, done.err) == (1, "")
    damaged, *rest = done.out.splitlines()
    assert re.fullmatch(
        r"DAMAGED  run/checkpoints/checkpoint-00000001.safetensors: 'sha256' must be .*damaged", damaged
    )
    assert len(rest) == 2
    assert all(line.startswith("ok ") for line in rest)


@pytest.mark.parametrize("name", ["a text", "a pipe", "a device", "nothing in it", "a model", "a model in GGUF"])
def test_verify_a_file_of_another_kind_is_one_line_and_code_1(
    run: Callable[..., SimpleNamespace], folder: Path, name: str
) -> None:
    make, message = REFUSED[name]
    make(folder / "path")
    done = run("verify", "path")
    assert (done.code, done.err) == (1, "")
    assert re.fullmatch(r"DAMAGED  [^\n]*\n", done.out)
    assert message in done.out


def test_verify_with_nothing_to_check_is_code_2(refused: Callable[..., str], folder: Path) -> None:
    killed_run(folder / "run")
    assert "got a run that has not saved any" in refused("verify", "run")
    (folder / "empty").mkdir()
    assert "got a folder with none of their files" in refused("verify", "empty")


def test_verify_prints_what_it_knows_before_something_cannot_be_read(
    run: Callable[..., SimpleNamespace], training: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(inspection, "read_peft", fail)
    done = run("verify", "run")
    assert done.code == 2
    assert done.out.count("ok ") == 2
    assert re.fullmatch(r"cylora: error: run/adapters/adapter@v1-\w{8} cannot be read: Input/output error\n", done.err)


# ---------------------------------------------------------------------- export


@pytest.mark.parametrize("source", ["run", "run/checkpoints", "run/adapters/latest", "run/adapters"])
def test_export_to_peft_keeps_the_weights(run: Callable[..., SimpleNamespace], training: Path, source: str) -> None:
    done = run("export", source, "--format", "peft", "--output", "out", "--base-model", "some/model")
    assert (done.code, done.out, done.err) == (0, "out\n", "")
    original, copy = load_peft(training / "adapters" / "latest"), load_peft("out")
    assert list(copy) == list(original)
    assert np.array_equal(copy.flat.vector, original.flat.vector)
    assert copy.origin["base_model_name_or_path"] == "some/model"
    assert inspection.inspect("out").facts["steps"] == 1


def test_export_options_reach_the_file(run: Callable[..., SimpleNamespace], folder: Path) -> None:
    mixed = AdapterSet.from_adapters({"a": make_adapter(alpha=2.0), "b": make_adapter(alpha=4.0)})
    save_peft(mixed, folder / "mixed", portable=False)
    arguments = ("export", "mixed", "--format", "peft", "--dtype", "bfloat16", "--task-type", "CAUSAL_LM")
    assert run(*arguments, "--no-portable", "--output", "own").code == 0
    assert run(*arguments, "--output", "portable").code == 0
    own, portable = (json.loads((folder / name / CONFIG_NAME).read_text()) for name in ("own", "portable"))
    assert own["alpha_pattern"]
    assert not portable["alpha_pattern"]
    assert own["task_type"] == portable["task_type"] == "CAUSAL_LM"
    assert b'"BF16"' in (folder / "own" / TENSORS_NAME).read_bytes()


def test_export_to_gguf(run: Callable[..., SimpleNamespace], training: Path, model: Path) -> None:
    arguments = ("export", "run", "--format", "gguf", "--dtype", "float16", "--base-config")
    done = run(*arguments, "base", "--output", "out.gguf")
    assert (done.code, done.out, done.err) == (0, "out.gguf\n", "")
    adapters, facts = gguf_reader.read_gguf("out.gguf")
    assert facts == {"architecture": "llama", "alpha": 8.0}
    original = load_peft(training / "adapters" / "latest")
    down = original["model.layers.0.mlp.down_proj"]
    assert np.array_equal(adapters["blk.0.ffn_down.weight"].a_matrix, down.a_matrix.astype(np.float16))


def test_export_makes_up_a_name_in_the_current_folder(
    run: Callable[..., SimpleNamespace], training: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("export", "run", "--format", "peft").out == "run-peft\n"
    assert run("export", "run", "--format", "gguf", "--base-config", model).out == "run.gguf\n"
    monkeypatch.chdir("run/checkpoints")
    assert run("export", ".", "--format", "peft").out == "checkpoints-peft\n"
    assert run("export", "checkpoint-00000001.safetensors", "--format", "peft").out == "checkpoint-00000001-peft\n"
    assert (training / "checkpoints" / "checkpoint-00000001-peft" / CONFIG_NAME).exists()


def test_export_replaces_nothing(refused: Callable[..., str], training: Path, model: Path, folder: Path) -> None:
    (folder / "taken").mkdir()
    (folder / "taken" / "file").write_text("mine")
    rule = "must not exist yet, or be an empty folder for PEFT\n"
    assert refused("export", "run", "--format", "peft", "--output", "taken") == (
        f"cylora: error: --output taken {rule}"
    )
    assert refused("export", "run", "--format", "peft", "--output", "taken/file").endswith(rule)
    for output in ("taken", "taken/file"):
        assert refused("export", "run", "--format", "gguf", "--base-config", model, "--output", output).endswith(rule)
    assert (folder / "taken" / "file").read_text() == "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["base", "run", "taken"]


def test_export_where_nothing_can_be_written(
    run: Callable[..., SimpleNamespace],
    refused: Callable[..., str],
    training: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for arguments in (("--format", "peft"), ("--format", "gguf", "--base-config", model)):
        assert refused("export", "run", *arguments, "--output", "gone/out") == (
            "cylora: error: --output gone/out cannot be written: No such file or directory\n"
        )
        assert refused("export", "run", *arguments, "--output", "base/config.json/out") == (
            "cylora: error: --output base/config.json/out cannot be written: Not a directory\n"
        )

    def full(descriptor: int, content: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable.os, "write", full)
    done = run("export", "run", "--format", "peft")
    assert (done.code, done.out) == (1, "")  # not the user's input
    assert re.fullmatch(r"cylora: error: .*No space left on device\n", done.err)
    assert not Path("run-peft").exists()


def test_export_refuses_what_has_no_module_names(
    refused: Callable[..., str], run: Callable[..., SimpleNamespace], folder: Path, model: Path
) -> None:
    save_checkpoint(make_trainer(), make_adapter(), folder / "lone")
    rule = "only runs, checkpoints and PEFT adapters with names can be exported, got"
    for arguments in (("--format", "peft"), ("--format", "gguf", "--base-config", model)):
        got = refused("export", "lone", *arguments)
        assert got == f"cylora: error: lone: {rule} a lone adapter, which no module's name goes with\n"
    (folder / "adapter.gguf").write_bytes(made())
    assert refused("export", "adapter.gguf", "--format", "peft").endswith(f"{rule} GGUF adapter\n")


def test_export_refuses_weights_that_are_not_finite(refused: Callable[..., str], folder: Path, model: Path) -> None:
    save_peft(make_set(), folder / "adapter")
    change_weight(folder / "adapter", np.nan)
    for arguments in (("--format", "peft"), ("--format", "gguf", "--base-config", model)):
        assert "q.A must be finite, got nan at [0, 0]" in refused("export", "adapter", *arguments)


def test_export_options_that_do_not_go_together(refused: Callable[..., str], training: Path, model: Path) -> None:
    rule = "--base-config goes with --format gguf, and only with it: the base model's config.json, got"
    assert f"{rule} none\n" in refused("export", "run", "--format", "gguf")
    assert f"{rule} base\n" in refused("export", "run", "--format", "peft", "--base-config", "base")
    arguments = ("export", "run", "--format", "gguf", "--base-config", "base")
    for more, named in (
        (("--base-model", "x"), "--base-model"),
        (("--task-type", "x", "--base-model", "x"), "--base-model, --task-type"),
        (("--no-portable",), "--no-portable"),
    ):
        assert refused(*arguments, *more) == f"cylora: error: {named} goes with --format peft only\n"
    assert "invalid choice: 'onnx'" in refused("export", "run", "--format", "onnx")
    assert "arguments are required: --format" in refused("export", "run")
    assert "unrecognized arguments: --jso (cylora inspect --help" in refused("inspect", "run", "--jso")


def test_export_says_what_is_wrong_with_the_base_config(
    refused: Callable[..., str], training: Path, model: Path
) -> None:
    arguments = ("export", "run", "--format", "gguf", "--base-config")
    assert refused(*arguments, "gone").endswith("gone cannot be read: No such file or directory\n")
    model.write_text("{")
    assert "base/config.json: the text must be JSON" in refused(*arguments, "base")
    model.unlink()
    os.mkfifo(model)
    assert "must be a regular file" in refused(*arguments, "base/config.json")
    assert not Path("run.gguf").exists()
