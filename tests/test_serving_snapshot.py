"""AdapterSnapshot: whole, read-only, hashed over all that it means."""

import copy
import dataclasses
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training import fill, fingerprint, make_adapter, make_set, make_trainer, same_bits

from cylora import Adam, AdapterSet, Gradients, InputError, LoraAdapter, LoraConfig, LoraTrainer, grad_norm
from cylora.formats import load_checkpoint, load_peft, save_checkpoint, save_peft
from cylora.serving import AdapterPublisher, AdapterSnapshot


def snapshot_of(adapters: LoraAdapter | AdapterSet) -> AdapterSnapshot:
    return AdapterPublisher(adapters).publish()


def read_only(adapters: Any) -> Any:
    vector = adapters.flat.vector.copy()
    vector.flags.writeable = False
    return adapters.over(vector)


@pytest.mark.parametrize("make", [make_adapter, make_set])
def test_a_snapshot_has_the_adapters_bits_in_memory_of_its_own(make: Any) -> None:
    adapters = make()
    snapshot = snapshot_of(adapters)
    assert same_bits(snapshot.vector, adapters.flat.vector)
    assert not np.shares_memory(snapshot.vector, adapters.flat.vector)
    assert snapshot.vector is snapshot.adapters.flat.vector
    assert snapshot.vector.ctypes.data % 64 == 0
    assert snapshot.adapters.flat.layout == adapters.flat.layout
    assert type(snapshot.adapters) is type(adapters)
    assert snapshot.norm == grad_norm([adapters.flat.vector])
    assert (snapshot.version, snapshot.step, snapshot.restored_from) == (1, None, None)


def test_its_adapters_compute_what_the_originals_do() -> None:
    adapters = make_set()
    adapters.origin["base_model_name_or_path"] = "some/base"
    snapshot = snapshot_of(adapters)
    assert list(snapshot.adapters) == list(adapters)
    assert snapshot.adapters.origin == adapters.origin
    assert snapshot.adapters.origin is not adapters.origin
    for name, one in adapters.items():
        x = np.random.default_rng(1).normal(size=(4, one.d_in))
        other = snapshot.adapters[name]
        assert other.config == one.config
        assert same_bits(other.apply(x), one.apply(x))
        assert same_bits(other.delta_weight(), one.delta_weight())
        assert np.shares_memory(other.a_matrix, snapshot.vector)
        assert np.shares_memory(other.flat.vector, snapshot.vector)


@pytest.mark.parametrize("make", [make_adapter, make_set])
def test_nothing_of_it_can_be_written(make: Any) -> None:
    snapshot = snapshot_of(make())
    before = fingerprint(snapshot.adapters)
    one = snapshot.adapters if isinstance(snapshot.adapters, LoraAdapter) else snapshot.adapters["q"]
    flats = (snapshot.adapters.flat, one.flat)
    arrays = [flat.vector for flat in flats] + [flat[name] for flat in flats for name in flat]
    for array in [*arrays, one.a_matrix, one.b_matrix, snapshot.vector]:
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 1
        with pytest.raises(ValueError, match="cannot set WRITEABLE"):
            array.flags.writeable = True
    with pytest.raises(ValueError, match="read-only"):
        one.a_matrix = np.ones(one.a_matrix.shape)
    with pytest.raises(ValueError, match="read-only"):
        one.b_matrix = np.ones(one.b_matrix.shape)
    for name in (*(field.name for field in dataclasses.fields(snapshot)), "vector", "content_hash", "other"):
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"cannot assign to field '{name}'"):
            setattr(snapshot, name, 7)
    assert fingerprint(snapshot.adapters) == before


@pytest.mark.parametrize("make", [make_adapter, make_set])
def test_a_step_on_it_is_refused_and_changes_nothing(make: Any) -> None:
    snapshot = snapshot_of(make())
    gradients = fill(Gradients(snapshot.adapters))
    trainer = make_trainer()
    before = fingerprint(snapshot.adapters, trainer)
    message = (
        r"parameters must be writable to be trained, got read-only memory \(a snapshot's; adapters.with_parameters"
    )
    for call in (
        lambda: trainer.step(1.0, snapshot.adapters, gradients),
        lambda: trainer.accumulate(1.0, snapshot.adapters, gradients),
        lambda: Adam(snapshot.adapters.flat),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert fingerprint(snapshot.adapters, trainer) == before
    trained = snapshot.adapters.with_parameters(snapshot.vector)
    trainer.step(1.0, trained, gradients)  # the same trainer goes on with a copy
    assert not same_bits(trained.flat.vector, snapshot.vector)


def test_a_bound_trainer_does_not_take_it_for_its_adapters() -> None:
    adapters, trainer = make_set(), make_trainer()
    trainer.step(1.0, adapters, fill(Gradients(adapters)))
    snapshot = AdapterPublisher(adapters, trainer).publish()
    before = fingerprint(adapters, trainer, snapshot.adapters)
    with pytest.raises(ValueError, match="adapter must be the one of the first step"):
        trainer.step(1.0, snapshot.adapters, fill(Gradients(adapters)))
    assert fingerprint(adapters, trainer, snapshot.adapters) == before


def test_it_goes_into_files_and_a_checkpoint_loads_beside_it(tmp_path: Path) -> None:
    adapters, trainer = make_set(), make_trainer()
    trainer.step(1.0, adapters, fill(Gradients(adapters)))
    snapshot = AdapterPublisher(adapters, trainer).publish()
    save_peft(snapshot.adapters, tmp_path / "peft", step=snapshot.step)
    assert same_bits(load_peft(tmp_path / "peft").flat.vector, snapshot.vector)
    save_checkpoint(LoraTrainer(trainer.config), snapshot.adapters, tmp_path / "saved")
    assert same_bits(load_checkpoint(tmp_path / "saved").adapters.flat.vector, snapshot.vector)


def test_copies_of_its_adapters_can_be_trained_and_copies_of_it_are_itself() -> None:
    snapshot = snapshot_of(make_set())
    assert copy.copy(snapshot) is snapshot
    assert copy.deepcopy({"one": snapshot})["one"] is snapshot
    for copied in (copy.deepcopy(snapshot.adapters), pickle.loads(pickle.dumps(snapshot.adapters))):
        assert same_bits(copied.flat.vector, snapshot.vector)
        make_trainer().step(1.0, copied, fill(Gradients(copied)))
        assert not same_bits(copied.flat.vector, snapshot.vector)
    with pytest.raises(TypeError, match="an AdapterSnapshot is not pickled: send its adapters"):
        pickle.dumps(snapshot)


def test_adapters_over_writable_memory_are_refused() -> None:
    with pytest.raises(InputError, match=r"adapters must be over read-only memory, got LoraAdapter\(.*over writable"):
        AdapterSnapshot(1, None, make_adapter(), 1.0)
    assert AdapterSnapshot(1, None, read_only(make_adapter()), 1.0).version == 1


# ------------------------------------------------------------------ the hash


def hash_of(adapters: Any) -> str:
    return snapshot_of(adapters).content_hash


def test_equal_content_has_an_equal_hash_whatever_the_version() -> None:
    adapters = make_set()
    publisher = AdapterPublisher(adapters, keep=3)
    first, second = publisher.publish(), publisher.publish()
    assert first.content_hash == second.content_hash == publisher.rollback(1).content_hash == hash_of(make_set())
    assert first.content_hash is first.content_hash  # computed once
    assert len(first.content_hash) == 64
    assert int(first.content_hash, 16) >= 0


def test_every_bit_every_name_and_every_config_counts() -> None:
    adapters = make_set()
    hashes = [hash_of(adapters)]
    bits = adapters.flat.vector.view(np.uint32)
    for index in (0, 17, bits.size - 1):
        for bit in (0, 15, 31):
            bits[index] ^= np.uint32(1 << bit)
            hashes.append(hash_of(adapters))
            bits[index] ^= np.uint32(1 << bit)
    assert hash_of(adapters) == hashes[0]

    def zeros(**members: tuple[int, int, LoraConfig]) -> str:
        return hash_of(AdapterSet.zeros(members))

    config = LoraConfig(rank=2)
    hashes += [
        zeros(a=(3, 3, config)),
        zeros(b=(3, 3, config)),
        zeros(a=(2, 4, config)),
        zeros(a=(4, 2, config)),
        zeros(a=(3, 3, LoraConfig(rank=2, alpha=4))),
        zeros(a=(3, 3, LoraConfig(rank=2, use_rslora=True))),
        zeros(a=(3, 3, LoraConfig(rank=2, dropout=0.5))),
        zeros(a=(2, 1, config), b=(2, 1, config)),
        zeros(a=(1, 2, config), b=(2, 1, config)),
        zeros(b=(2, 1, config), a=(2, 1, config)),
        hash_of(LoraAdapter.zeros(3, 3, config)),
        hash_of(LoraAdapter.zeros(2, 4, config)),
    ]
    assert len(set(hashes)) == len(hashes)


def test_the_hash_is_the_same_from_many_threads() -> None:
    snapshot = snapshot_of(make_set())
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(snapshot.content_hash)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [snapshot.content_hash] * 8
