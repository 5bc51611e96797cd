"""Under torchtitan's Trainer and Megatron-Core, the real packages: some steps, stopped, resumed on another number of processes.

`make test-slow` puts them into .venv-trainers. torchtitan asks for an accelerator: the script hides that there is none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain, islice
from pathlib import Path

import pytest
from commands import ROOT, environment
from s3 import free_ports
from tokens import write_small_sets

from loaders import LoaderConfig, SequenceConfig, Source, World, build_loader

PACKAGES = ROOT / ".venv-trainers"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not (PACKAGES / "torchtitan").exists(), reason="no .venv-trainers: `make test-slow` makes it"),
]

TITAN = """
import json, sys
from pathlib import Path
import torch, torch._utils, torch.distributed
torch._utils._get_available_device_type = lambda: "cpu"
barrier = torch.distributed.barrier
torch.distributed.barrier = lambda *args, **settings: barrier()
from torchtitan.components import metrics

class NoMemory:
    device_name = "CPU"
    def get_peak_stats(self):
        return metrics.DeviceMemStats(*[0.0] * len(metrics.DeviceMemStats._fields))
    def reset_peak_stats(self):
        pass

metrics.build_device_memory_monitor = NoMemory
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.validate import Validator
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.trainer import Trainer
from loaders import LoaderConfig, SequenceConfig, Source
from loaders.trainers.torchtitan import TokenRowLoader

VOCABULARY = 2003 + 8192

def small_model():
    spec = model_registry("debugmodel", attn_backend="flex")
    spec.model.vocab_size = spec.model.tok_embeddings.num_embeddings = spec.model.lm_head.out_features = VOCABULARY
    spec.model.layers = spec.model.layers[:1]
    for layer in spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()  # of those there are the one for a CPU
    return spec

def main(data, out, steps, load_step):
    seen = []
    whole = TokenRowLoader.__iter__
    def spied(self):
        for inputs, labels in whole(self):
            seen.append([inputs["input"].tolist(), labels.tolist(), inputs["positions"].tolist()])
            yield inputs, labels
    TokenRowLoader.__iter__ = spied
    num_processes = int(__import__("os").environ["WORLD_SIZE"])
    config = llama3_debugmodel()
    config.model_spec = small_model()
    config.loss.loss_fn.global_vocab_size = VOCABULARY
    config.hf_assets_path, config.dump_folder = str(data / "tokenizer"), str(out)
    sources = Source(str(data / "pairs")), Source(str(data / "texts"))
    sequences = SequenceConfig(tokenizer=str(data / "tokenizer"), max_length=64)
    loader = LoaderConfig(sources=sources, sequences=sequences, packing=True, batch_size=4)
    config.dataloader = TokenRowLoader.Config(loader=loader)
    config.training = TrainingConfig(local_batch_size=4 // num_processes, seq_len=64, steps=steps)
    config.parallelism = ParallelismConfig(data_parallel_replicate_degree=num_processes, data_parallel_shard_degree=1)
    config.checkpoint = CheckpointManager.Config(enable=True, interval=3, load_step=load_step, last_save_model_only=False)
    config.validator = Validator.Config(enable=False)
    trainer = Trainer(config)
    trainer.train()
    (out / f"rows-{steps}-{torch.distributed.get_rank()}.json").write_text(json.dumps(seen))
    trainer.close()
    torch.distributed.destroy_process_group()

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
"""

MEGATRON = """
import json, sys
from pathlib import Path
import torch.distributed as dist
from megatron.core import parallel_state
from loaders import LoaderConfig, SequenceConfig, Source
from loaders.trainers.megatron import MegatronIterator

def main(data, out, steps, tensor_parallel, state=None):
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
    sources = Source(str(data / "pairs")), Source(str(data / "texts"))
    sequences = SequenceConfig(tokenizer=str(data / "tokenizer"), max_length=64)
    batches = MegatronIterator(LoaderConfig(sources=sources, sequences=sequences, packing=True, batch_size=4), seq_length=64)
    if state:
        batches.restore_state(json.loads(Path(state).read_text()))
    names = ("tokens", "labels", "position_ids", "loss_mask")
    rows = [[batch[name].tolist() for name in names] for batch in (next(batches) for _ in range(steps))]
    saved = batches.save_state()
    assert (saved is None) == (tensor_parallel > 1 and dist.get_rank() % tensor_parallel > 0)
    if saved and dist.get_rank() == 0:
        (out / "state.json").write_text(json.dumps(saved))
    (out / f"rows-{steps}-{dist.get_rank()}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_sets(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def expected(data: Path) -> list[list[list[list[int]]]]:
    """Of each of nine steps of all ranks, the ids, the labels of trainers that shift them, and the positions."""
    sources = Source(str(data / "pairs")), Source(str(data / "texts"))
    sequences = SequenceConfig(tokenizer=str(data / "tokenizer"), max_length=64)
    loader = build_loader(LoaderConfig(sources=sources, sequences=sequences, packing=True, batch_size=4), World())
    return [
        [batch["input_ids"].tolist(), [[*row[1:], -100] for row in batch["labels"].tolist()], batch["position_ids"].tolist()]
        for batch in islice(loader, 9)
    ]


def run(
    script: str, num_processes: int, data: Path, out: Path, steps: int, *args: str | Path
) -> list[list[list[list[list[int]]]]]:
    """Of each process, of each step, what it saw."""
    path = out / "train.py"
    path.write_text(script)
    shared = environment()
    shared |= {
        "PYTHONPATH": os.pathsep.join([shared["PYTHONPATH"], str(PACKAGES)]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
        "WORLD_SIZE": str(num_processes),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", str(path), str(data), str(out), str(steps), *map(str, args)]
    logs = [out / f"log-{rank}" for rank in range(num_processes)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            place = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=place, stdout=file, stderr=file, cwd=out))
    try:
        codes = [rank.wait(timeout=280) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert codes == [0] * num_processes, [log.read_text()[-3000:] for log in logs]
    return [json.loads((out / f"rows-{steps}-{rank}.json").read_text()) for rank in range(num_processes)]


def together(ranks: list[list[list[list[list[int]]]]]) -> list[list[list[list[int]]]]:
    """What all ranks saw of each step, rank after rank."""
    return [[list(chain(*column)) for column in zip(*step, strict=True)] for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_torchtitan_trains_on_rows_and_goes_on_from_its_checkpoint(
    data: Path, tmp_path: Path, expected: list[list[list[list[int]]]], num_processes: int
) -> None:
    assert together(run(TITAN, 1, data, tmp_path, 4, -1)) == expected[:4]
    assert together(run(TITAN, num_processes, data, tmp_path, 6, 3)) == expected[3:6]


def test_megatron_reads_once_for_tensor_parallel_peers_and_goes_on_with_data_parallel_ones(
    data: Path, tmp_path: Path, expected: list[list[list[list[int]]]]
) -> None:
    reader, peer = run(MEGATRON, 2, data, tmp_path, 3, 2)
    assert reader == peer
    wanted = [
        [
            ids,
            [[max(label, 0) for label in row] for row in labels],
            positions,
            [[float(label >= 0) for label in row] for row in labels],
        ]
        for ids, labels, positions in expected
    ]
    assert reader == wanted[:3]
    assert together(run(MEGATRON, 2, data, tmp_path, 4, 1, tmp_path / "state.json")) == wanted[3:7]
