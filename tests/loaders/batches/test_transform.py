"""The user's own code in the processes that read: exactly once, resumed, with equal steps, whatever it leaves out."""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factory import image_sample, make_dataset, text_sample
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loaders import Loader, LoaderConfig, SequenceConfig, Source, World, build_loader
from loaders.batches.transform import collate
from loaders.proof.audit import audit
from loaders.proof.receipt import parse_receipt
from loaders.testing import Topology, check_resume
from wds_tools.errors import DataError, FormatError, TransformError, UsageError, WorkerDied
from wds_tools.format.schema import Sample


def image_pair(number: int, width: int = 12, height: int = 8) -> Sample:
    """A caption and a PNG, kept as it is."""
    out = io.BytesIO()
    pixels_HWC = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels_HWC).save(out, "PNG")
    return Sample(
        key=f"p-{number:05d}", data_type="image_text", text=f"picture {number}", image=out.getvalue(), image_extension="png"
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = tmp_path_factory.mktemp("pictures") / "set"
    make_dataset(url, [image_pair(number) for number in range(40)], shard_samples=9)
    return str(url)


def cropped(sample: dict[str, Any], ctx: Any) -> dict[str, Any] | None:
    """A random 6 x 6 piece of the picture; pictures whose number ends in 7 are left out."""
    if sample["__key__"].endswith("7"):
        ctx.reason = "sevens"
        return None
    top, left = int(ctx.rng.integers(0, 3)), int(ctx.rng.integers(0, 7))
    pixels_HWC = np.asarray(Image.open(io.BytesIO(sample["image"])))
    return {"pixels": pixels_HWC[top : top + 6, left : left + 6], "epoch": ctx.epoch, "text": sample["text"]}


def config(url: str, **changed: Any) -> LoaderConfig:
    made: dict[str, Any] = {"batch_size": 8, "last_batch": "short", "transform": cropped, "max_unused": 0.2}
    return LoaderConfig(sources=(Source(url),), **{**made, **changed})


def loader(url: str, rank: int = 0, world_size: int = 1, **changed: Any) -> Loader:
    return build_loader(config(url, **changed), World(rank=rank, world_size=world_size))


def items(batch: dict[str, Any]) -> Iterable[tuple[str, int, bytes]]:
    """All of a batch, sample by sample."""
    return zip(batch["__key__"], batch["epoch"].tolist(), [one.numpy().tobytes() for one in batch["pixels"]], strict=True)


TOPOLOGIES = [Topology(8), Topology(5, 2), Topology(9, 3)]


def test_images_are_decoded_and_cropped_alike_after_any_resume_on_any_topology(pictures: str) -> None:
    found = check_resume(
        lambda topology, world: build_loader(config(pictures, batch_size=topology.batch_size), world),
        TOPOLOGIES,
        items=items,
        every=2,
    )
    assert len(found) == 40
    keys = [key for key, _, _ in found]
    assert set(keys) == {f"p-{number:05d}" for number in range(40) if number % 10 != 7}


@pytest.mark.slow
def test_worker_processes_of_every_start_method_make_the_same_batches(pictures: str) -> None:
    alone = [item for batch in loader(pictures) for item in items(batch)]
    for method in ("fork", "spawn", "forkserver"):
        with_workers = loader(pictures, num_workers=2, start_method=method)
        assert [item for batch in with_workers for item in items(batch)] == alone
        with_workers.close()


def test_check_resume_finds_a_transform_that_is_not_pure(pictures: str) -> None:
    rng = np.random.default_rng(0)

    def careless(sample: dict[str, Any], _: Any) -> dict[str, Any]:
        return {"pixels": rng.integers(0, 255, 4), "epoch": 0, "text": sample["text"]}

    def make(topology: Topology, world: World) -> Loader:
        return build_loader(config(pictures, batch_size=topology.batch_size, transform=careless), world)

    with pytest.raises(AssertionError, match="item 0"):
        check_resume(make, TOPOLOGIES, items=items)


def test_draws_differ_from_sample_to_sample_epoch_to_epoch_and_seed_to_seed(pictures: str) -> None:
    def drawn(_: dict[str, Any], ctx: Any) -> dict[str, Any]:
        return {"draw": int(ctx.rng.integers(1 << 62))}

    def draws(seed: int) -> list[int]:
        made = loader(pictures, transform=drawn, seed=seed)
        return [draw for _ in range(2) for batch in made for draw in batch["draw"].tolist()]

    assert len(set(draws(1) + draws(2))) == 4 * 40
    assert draws(1) == draws(1)


def test_what_is_not_used_is_counted_in_receipts_and_bounded(pictures: str) -> None:
    ranks = [loader(pictures, rank, 2) for rank in range(2)]
    steps = [len(list(rank)) for rank in ranks]
    assert steps == [5, 5]
    assert sum(rank.stats()["unused"] for rank in ranks) == 4
    assert sum(rank.stats().get("unused_sevens", 0) for rank in ranks) == 4
    assert all(rank.stats()["bad"] == 0 for rank in ranks)
    receipts = [parse_receipt(json.dumps(rank.receipt()).encode(), "receipt.json") for rank in ranks]
    (epoch,) = audit(receipts, complete=True).epochs
    assert epoch.is_exact
    assert dict(epoch.substituted) == {"unused_sevens": 4}
    assert epoch.substituted_ranges.num_samples == 4
    with pytest.raises(DataError, match=r"left 3 of 32 samples unused.*'unused_sevens': 3.*wds-tools select"):
        list(loader(pictures, max_unused=0.001))
    with pytest.raises(FormatError, match=r"transform gave None for p-000\d\d; nor can any of the next \d of its shard be taken"):
        list(loader(pictures, transform=lambda *_: None))


@given(unused=st.sets(st.integers(0, 39), max_size=20), world_size=st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_whatever_is_left_out_every_rank_takes_the_same_steps_and_finds_the_same(
    pictures: str, unused: set[int], world_size: int
) -> None:
    def some(sample: dict[str, Any], ctx: Any) -> dict[str, Any] | None:
        return None if int(sample["__key__"][2:]) in unused else {"epoch": ctx.epoch}

    whole_shards = [set(range(low, min(low + 9, 40))) for low in range(0, 40, 9)]
    if any(shard <= unused for shard in whole_shards):
        return
    settings_of_all: dict[str, Any] = {"transform": some, "max_unused": 1.0}
    ranks = [[batch["__key__"] for batch in loader(pictures, rank, world_size, **settings_of_all)] for rank in range(world_size)]
    alone = [batch["__key__"] for batch in loader(pictures, **settings_of_all)]
    assert [[key for of_rank in step for key in of_rank] for step in zip(*ranks, strict=True)] == alone
    seen = {int(key[2:]) for step in alone for key in step}
    assert seen == set(range(40)) - unused


def test_a_receipt_has_neighbours_with_one_stand_in_as_a_range(pictures: str) -> None:
    made = loader(pictures, transform=lambda sample, _: None if "p-00020" <= sample["__key__"] <= "p-00024" else {})
    assert sum(len(batch["__key__"]) for batch in made) == 40
    (found,) = made.receipt()["substitutions"]
    assert {name: found[name] for name in ("sample_index", "num_samples", "substitute_index")} == {
        "sample_index": 2,
        "num_samples": 5,
        "substitute_index": 7,
    }
    audited = audit([parse_receipt(json.dumps(made.receipt()).encode(), "receipt.json")], complete=True)
    assert audited.is_exact()
    assert dict(audited.epochs[0].substituted) == {"unused": 5}


def test_an_unreadable_sample_and_one_that_is_not_used_have_their_own_stand_ins(tmp_path: Path) -> None:
    url = tmp_path / "set"
    make_dataset(url, [text_sample(number) for number in range(12)])
    (shard,) = url.glob("*.tar")
    shard.write_bytes(shard.read_bytes().replace(b'"text":"document 5"', b'"text":"document 5 '))

    def even(sample: dict[str, Any], _: Any) -> dict[str, Any] | None:
        return None if sample["text"] == "document 6" else {"text": sample["text"]}

    made = loader(str(url), transform=even, shuffle=False, batch_size=12, on_error="substitute")
    (batch,) = made
    assert batch["text"] == [f"document {number}" for number in (0, 1, 2, 3, 4, 7, 7, 7, 8, 9, 10, 11)]
    assert batch["__key__"][5:8] == ["text-00000007"] * 3
    assert (made.stats()["bad"], made.stats()["unused"]) == (1, 1)
    with pytest.raises(FormatError, match=r"sample 5|byte"):
        list(loader(str(url), transform=even, shuffle=False, batch_size=12))


def test_the_chosen_text_is_the_samples_text(tmp_path: Path) -> None:
    pairs = [image_sample(number)._replace(texts={"long": f"long {number}", "alt": f"alt {number}"}) for number in range(30)]
    make_dataset(tmp_path / "set", pairs)
    source = Source(str(tmp_path / "set"), texts={"long": 0.5, "alt": 0.5})

    def made(**changed: Any) -> list[str]:
        both = build_loader(LoaderConfig(sources=(source,), batch_size=10, **changed), World())
        return [text for _ in range(2) for batch in both for text in batch["text"]]

    assert made(transform=lambda sample, _: {"text": sample["text"], "codes": sample["codes"]}) == made()


def test_collate_gets_what_the_transform_gave(pictures: str) -> None:
    def padded(samples: list[dict[str, Any]]) -> dict[str, Any]:
        most = max(len(sample["ids"]) for sample in samples)
        ids_BL = np.stack([np.pad(sample["ids"], (0, most - len(sample["ids"]))) for sample in samples])
        return {"ids": torch.from_numpy(ids_BL)}

    def ids(sample: dict[str, Any], _: Any) -> dict[str, Any]:
        return {"ids": np.arange(1, 2 + int(sample["__key__"][2:]))}

    batches = list(loader(pictures, transform=ids, collate=padded))
    for batch in batches:
        assert (batch["ids"] > 0).sum(1).tolist() == [1 + int(key[2:]) for key in batch["__key__"]]
        assert batch["__source__"] == [pictures] * len(batch["__key__"])
    ragged = next(iter(loader(pictures, transform=ids)))["ids"]
    assert [len(one) for one in ragged] == (batches[0]["ids"] > 0).sum(1).tolist()


def test_values_of_one_shape_become_a_tensor_and_others_stay_a_list() -> None:
    one = {"a": np.zeros((2, 3), np.float32), "b": 1, "c": 2.5, "d": "x", "e": np.zeros(2), "f": torch.ones(2), "g": np.uint16(3)}
    two = {"a": np.ones((2, 3), np.float32), "b": 2, "c": 3.5, "d": "y", "e": np.zeros(3), "f": torch.zeros(2), "g": np.uint16(4)}
    batch = collate([one, {**two, "only": True}])
    kinds = {name: (value.dtype, tuple(value.shape)) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert kinds == {
        "a": (torch.float32, (2, 2, 3)),
        "b": (torch.int64, (2,)),
        "c": (torch.float64, (2,)),
        "f": (torch.float32, (2, 2)),
        "g": (torch.uint16, (2,)),
    }
    assert batch["d"] == ["x", "y"]
    assert [value.shape for value in batch["e"]] == [(2,), (3,)]
    assert batch["only"] == [None, True]


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_error_of_the_users_code_names_the_sample_and_shows_the_line(pictures: str, num_workers: int) -> None:
    def broken(sample: dict[str, Any], _: Any) -> dict[str, Any]:
        return {"size": sample["no such field"]}

    made = loader(pictures, transform=broken, num_workers=num_workers, on_error="substitute")
    with pytest.raises(TransformError, match=r"transform raised KeyError for p-\d{5} \(.*shard-.*\.tar\)") as caught:
        list(made)
    assert any('return {"size": sample["no such field"]}' in note for note in caught.value.__notes__)
    made.close()
    with pytest.raises(TransformError, match=r"transform gave a list.*expected a dict of arrays, or None if it is not used"):
        list(loader(pictures, transform=lambda *_: [1]))
    with pytest.raises(TransformError, match=r"collate gave a NoneType.*expected a dict"):
        list(loader(pictures, collate=lambda _: None))


def test_a_state_of_another_transform_is_refused_or_changes_from_there_on(pictures: str) -> None:
    first = loader(pictures, transform_id="crop-6")
    seen = [item for _, batch in zip(range(2), first, strict=False) for item in items(batch)]
    state = json.loads(json.dumps(first.state_dict()))
    with pytest.raises(UsageError, match="transform_id was 'crop-6', is 'crop-8'"):
        loader(pictures, transform_id="crop-8").load_state_dict(state)
    second = loader(pictures, transform_id="crop-8")
    second.load_state_dict(state, change="future")
    rest = [item for batch in second for item in items(batch)]
    assert seen + rest == [item for batch in loader(pictures) for item in items(batch)]


def test_settings_that_contradict_a_transform_are_refused(pictures: str) -> None:
    sequences = SequenceConfig(tokenizer="t", max_length=8)
    for changed, says in (
        ({"sequences": sequences}, "transform= and sequences="),
        ({"transform": None, "collate": dict}, "give transform= too"),
        ({"max_unused": 2}, "max_unused=2"),
        ({"timeout_s": 0}, "timeout_s=0"),
    ):
        with pytest.raises(UsageError, match=says):
            config(pictures, **changed)


def test_an_evaluation_draws_the_same_at_each_pass(pictures: str) -> None:
    made = loader(pictures, evaluation=True)
    first = [item for batch in made for item in items(batch)]
    assert [item for batch in made for item in items(batch)] == first
    assert Counter(epoch for _, epoch, _ in first) == {0: 40}


def asleep(sample: dict[str, Any], _: Any) -> dict[str, Any]:
    if sample["__key__"] == "p-00012":
        time.sleep(600)
    return {"text": sample["text"]}


def test_a_transform_that_never_ends_ends_the_run(pictures: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)  # so long torch waits before it ends a worker
    made = loader(pictures, transform=asleep, num_workers=1, timeout_s=1.5, shuffle=False)
    with pytest.raises(WorkerDied, match=r"no batch for timeout_s=1.5 seconds"):
        list(made)
    made.close()


def test_pinned_memory_is_for_machines_with_a_gpu_and_changes_nothing_elsewhere(pictures: Path) -> None:
    plain, pinned = (list(loader(pictures, pin_memory=pin)) for pin in (False, True))
    assert [batch["__key__"] for batch in pinned] == [batch["__key__"] for batch in plain]
    tensors = [value for batch in pinned for value in batch.values() if isinstance(value, torch.Tensor)]
    assert all(value.is_pinned() == torch.cuda.is_available() for value in tensors)
