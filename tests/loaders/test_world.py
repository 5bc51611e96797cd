"""Which process reads what: groups and meshes of several dimensions, srun, Lightning; ranks that differ are told."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from commands import environment
from factory import image_sample, make_dataset
from s3 import free_ports
from tokens import PROVENANCE, write_small_sets

from loaders import World
from wds_tools.errors import UsageError

# Four processes: two pairs of which each pair reads the same (tensor parallel), and of the last process nothing is read.
SCRIPT = """
import json, sys
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from loaders import EpochLoader, LoaderConfig, SequenceConfig, Source, World, build_loader
from wds_tools.errors import UsageError

def main():
    pairs, data = sys.argv[1:]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
    found = {"mesh": World.from_mesh(mesh["dp_replicate"]), "mesh of two": World.from_mesh(mesh["dp_replicate", "dp_shard"])}
    found["group"] = World.from_group(mesh.get_group("dp_replicate"))
    config = LoaderConfig(sources=(Source(pairs),), batch_size=6, last_batch="short", num_workers=rank % 2, start_method="fork")
    made = build_loader(config, found["group"])
    found["keys"] = [key for batch in made for key in batch["__key__"]]
    made.close()
    found = {name: value if isinstance(value, list) else [value.rank, value.world_size] for name, value in found.items()}
    if rank in (0, 2):  # the others have no loader, as the middle of a pipeline
        world = World.from_group(dist.new_group([0, 2], use_local_synchronization=True))
        sequences = SequenceConfig(tokenizer=data + "/tokenizer", max_length=64)
        sources = Source(data + "/pairs"), Source(data + "/texts")
        packed = LoaderConfig(sources=sources, sequences=sequences, packing=True, batch_size=4)
        epochs = EpochLoader(build_loader(packed, world), steps=4)
        next(iter(epochs))
        found["lanes"] = len(epochs.state_dict()["packing"]["lanes"])
        masked = Source(pairs, exclude=data + "/ids.txt") if rank else Source(pairs)
        differences = {"order": {"seed": rank}, "batch size": {"batch_size": 6 + rank}, "excluded": {"sources": (masked,)}}
        for name, settings in differences.items():
            other = LoaderConfig(**{"sources": (Source(pairs),), "batch_size": 6, **settings})
            try:
                next(iter(build_loader(other, world)))
            except UsageError as error:
                found[name] = str(error)
        ahead = build_loader(config, world)
        if rank == 2:
            ahead.load_state_dict({**ahead.state_dict(), "position": 12})
        try:
            ahead.gather_state()
        except UsageError as error:
            found["place"] = str(error)
        try:
            build_loader(packed, World(rank=rank // 2, world_size=2)).gather_state()
        except UsageError as error:
            found["no group"] = str(error)
    else:
        try:
            World._of_members([0, 2])
        except UsageError as error:
            found["stranger"] = str(error)
    print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("world")
    make_dataset(folder / "set", (image_sample(number) for number in range(30)), codes=PROVENANCE)
    data = write_small_sets(folder)
    (data / "ids.txt").write_text(f"{image_sample(3).key}\n")
    (folder / "train.py").write_text(SCRIPT)
    shared = environment() | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
        "WORLD_SIZE": "4",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(folder / "train.py"), str(folder / "set"), str(data)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen(command, env=shared | {"RANK": str(rank)}, **pipes) for rank in range(4)]
    try:
        outputs = [rank.communicate(timeout=200) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * 4, [err[-2000:] for _, err in outputs]
    return [json.loads(out) for out, _ in outputs]


@pytest.mark.slow
def test_peers_of_a_mesh_or_group_read_the_same_and_the_others_the_rest(found: list[dict[str, Any]]) -> None:
    for name in ("mesh", "mesh of two", "group"):
        assert [of_rank[name] for of_rank in found] == [[0, 2], [0, 2], [1, 2], [1, 2]]
    first, peer, second, other_peer = (of_rank["keys"] for of_rank in found)
    assert first == peer
    assert second == other_peer
    assert len(first) == len(second) == 15
    assert len({*first, *second}) == 30


@pytest.mark.slow
def test_the_state_of_packed_rows_is_gathered_from_those_who_read(found: list[dict[str, Any]]) -> None:
    assert found[0]["lanes"] == found[2]["lanes"] > 0
    assert "this world has 2 ranks, torch.distributed 4 processes" in found[0]["no group"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["order", "batch size", "excluded", "place"])
def test_ranks_of_a_group_that_differ_are_told_how(found: list[dict[str, Any]], what: str) -> None:
    assert f"ranks 0 and 1 differ in {what}" in found[0][what]
    assert f"ranks 1 and 0 differ in {what}" in found[2][what]


@pytest.mark.slow
def test_a_process_outside_of_a_group_gets_no_place_in_it(found: list[dict[str, Any]]) -> None:
    assert "process 1 of 4 is not among [0, 2]" in found[1]["stranger"]


def test_processes_of_srun_say_who_they_are() -> None:
    assert World.from_slurm({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}) == World(rank=3, world_size=8)
    with pytest.raises(UsageError, match="started by srun"):
        World.from_slurm({"SLURM_NTASKS": "8"})
    with pytest.raises(UsageError, match=r"World\.from_slurm\(\)"):
        World.detect({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"})


def test_a_process_of_lightning_that_makes_its_loader_too_early_is_told_where_to_make_it() -> None:
    with pytest.raises(UsageError, match=r"train_dataloader\(\)"):
        World.detect({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"})
