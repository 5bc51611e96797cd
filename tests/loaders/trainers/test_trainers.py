"""Under a plain loop, the Trainer of transformers, Accelerate and Lightning: stopped, each goes on as if it had not been."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from commands import environment
from tokens import write_small_sets

from loaders import EpochLoader, Loader, LoaderConfig, SequenceConfig, Source, World, build_loader, model_inputs
from wds_tools.errors import UsageError

STEPS = 6
if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_sets(tmp_path_factory.mktemp("data"))


def loader(data: Path, *, packing: bool, num_workers: int = 0) -> Loader:
    config = LoaderConfig(
        sources=(Source(str(data / "pairs")), Source(str(data / "texts"))),
        sequences=SequenceConfig(tokenizer=str(data / "tokenizer"), max_length=64),
        packing=packing,
        batch_size=4,
        num_workers=num_workers,
    )
    return build_loader(config, World())


def model() -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=2003 + 8192, **shape))


PACKING = pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])


def train(net: LlamaForCausalLM, batches: Iterator[dict[str, Any]], optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for batch in batches:
        loss = net(**model_inputs(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@PACKING
def test_a_plain_loop_goes_on_from_its_state_with_the_same_losses(data: Path, packing: bool) -> None:
    def start() -> tuple[Loader, LlamaForCausalLM, torch.optim.Optimizer]:
        net = model()
        return loader(data, packing=packing), net, torch.optim.AdamW(net.parameters(), lr=1e-2)

    batches, net, optimizer = start()
    whole = train(net, islice(batches, STEPS), optimizer)
    batches, net, optimizer = start()
    first = train(net, islice(batches, 2), optimizer)
    other, again, another = start()
    other.load_state_dict(batches.state_dict())
    again.load_state_dict(net.state_dict())
    another.load_state_dict(optimizer.state_dict())
    assert first + train(again, islice(other, STEPS - 2), another) == whole
    assert whole[-1] < whole[0]


def run_trainer(
    data: Path,
    output: Path,
    updates: int,
    resume: Path | None = None,
    *,
    steps: int | None = 7,
    packing: bool = False,
    begun: int = 0,
    **settings: Any,
) -> tuple[list[tuple[float, float]], dict[str, float]]:
    """(loss, epoch) of each update of the Trainer of transformers, and what it logs at last; some batches were taken before."""
    from transformers import TrainingArguments

    from loaders.trainers.transformers import LoaderCallback, LoaderTrainer

    rounds = EpochLoader(loader(data, packing=packing), steps=steps)
    assert len(list(islice(rounds, begun))) == begun
    arguments = TrainingArguments(
        **{
            "output_dir": str(output),
            "max_steps": updates,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_steps": 1,
            "gradient_accumulation_steps": 2,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            **settings,
        }
    )
    trainer = LoaderTrainer(model=model(), args=arguments, train_dataset=rounds, callbacks=[LoaderCallback(rounds)])
    trainer.train(resume_from_checkpoint=resume and str(resume))
    *log, last = trainer.state.log_history
    return [(entry["loss"], entry["epoch"]) for entry in log if "loss" in entry], last


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "packing"), [(7, False), (7, True), (None, False)])
def test_the_trainer_of_transformers_goes_on_from_any_checkpoint_with_the_same_losses_and_epochs(
    data: Path, tmp_path: Path, steps: int | None, packing: bool
) -> None:
    whole, last = run_trainer(data, tmp_path / "whole", 6, steps=steps, packing=packing)
    if steps:
        assert [epoch for _, epoch in whole] == pytest.approx([2 / 7, 4 / 7, 6 / 7, 1, 9 / 7, 11 / 7])
    assert last["train_samples_per_second"] * last["train_runtime"] == pytest.approx(6 * 2 * 4, rel=0.01)
    for update in (3, 5):  # of seven batches, the fourth update has one
        kept = tmp_path / "whole" / f"checkpoint-{update}"
        found, _ = run_trainer(data, tmp_path / f"again-{update}", 6, kept, steps=steps, packing=packing)
        assert found == whole


@pytest.mark.slow
def test_what_the_trainer_of_transformers_would_count_otherwise_is_refused(data: Path, tmp_path: Path) -> None:
    run_trainer(data, tmp_path, 3)
    checkpoint = tmp_path / "checkpoint-3"
    with pytest.raises(UsageError, match="update 3: the Trainer counts 3 batches into an epoch of 7, the loader is 6"):
        run_trainer(data, tmp_path / "other", 6, checkpoint, gradient_accumulation_steps=1, max_grad_norm=0.0)
    with pytest.raises(UsageError, match="ignore_data_skip=True"):
        run_trainer(data, tmp_path / "other", 6, ignore_data_skip=True)
    with pytest.raises(UsageError, match=r"training begins: the Trainer counts 0 batches .* the loader is 2 into one"):
        run_trainer(data, tmp_path / "other", 1, begun=2)
    (checkpoint / "loader-000001.json").unlink()
    with pytest.raises(UsageError, match="checkpoint-3 has no save of a loader"):
        run_trainer(data, tmp_path / "other", 6, checkpoint)


@PACKING
def test_accelerate_saves_and_restores_the_loader_with_its_state(data: Path, tmp_path: Path, packing: bool) -> None:
    from accelerate import Accelerator, DataLoaderConfiguration

    def start() -> tuple[Any, EpochLoader, Any, Any]:
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=False))
        net = model()
        net, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=1e-2))
        rounds = EpochLoader(loader(data, packing=packing), steps=STEPS)
        accelerator.register_for_checkpointing(rounds)
        return accelerator, rounds, net, optimizer

    _, rounds, net, optimizer = start()
    whole = train(net, iter(rounds), optimizer)
    accelerator, rounds, net, optimizer = start()
    first = train(net, islice(rounds, 2), optimizer)
    accelerator.save_state(str(tmp_path / "state"))
    accelerator, rounds, net, optimizer = start()
    accelerator.load_state(str(tmp_path / "state"))
    assert len(rounds) == STEPS
    assert first + train(net, iter(rounds), optimizer) == whole


@PACKING
def test_checkpoints_of_torch_distributed_hold_all_that_a_state_has(data: Path, tmp_path: Path, packing: bool) -> None:
    import torch.distributed.checkpoint as dcp

    saved, restored = (EpochLoader(loader(data, packing=packing), steps=50) for _ in range(2))
    list(islice(saved, 6))
    dcp.save({"loader": saved}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the state does not know")
        dcp.load({"loader": restored}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    assert restored.state_dict() == {**saved.state_dict(), "starts": [[0, 0, 4, 1, "drop"], [24, 6, 4, 1, "drop"]]}
    for expected, found in zip(islice(saved, 5), islice(restored, 5), strict=True):
        assert expected["input_ids"].tolist() == found["input_ids"].tolist()


@pytest.mark.slow
@PACKING
def test_lightning_saves_and_restores_the_loader_with_its_checkpoints(data: Path, tmp_path: Path, packing: bool) -> None:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()
            self.losses: list[float] = []

        def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
            loss = self.net(**batch).loss
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def run(name: str, steps: int, resume: str | None = None) -> list[float]:
        module, rounds = Module(), EpochLoader(loader(data, packing=packing), steps=4)
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[ModelCheckpoint(dirpath=tmp_path / name, every_n_train_steps=3, save_top_k=-1)],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, rounds, ckpt_path=resume, weights_only=True)
        return module.losses

    whole = run("whole", 10)
    first = run("broken", 6)
    (checkpoint,) = (tmp_path / "broken").glob("*step=6*.ckpt")
    assert first + run("broken", 10, str(checkpoint)) == whole


def test_rounds_go_on_over_epochs_and_keep_their_length(data: Path) -> None:
    whole = loader(data, packing=False)
    expected = [batch["__key__"] for _ in range(2) for batch in whole]
    rounds = EpochLoader(loader(data, packing=False), steps=7, prepare=dict)
    found = [batch["__key__"] for _ in range(5) for batch in rounds]
    assert found == expected[:35]
    epochs = EpochLoader(loader(data, packing=False), prepare=dict)
    assert len(epochs) == 20
    assert [batch["__key__"] for batch in islice(epochs, 3)] == expected[:3]
    assert len(epochs) == 20
    assert [batch["__key__"] for batch in epochs] == expected[3:20]
    for settings in ({"steps": 0}, {}):
        with pytest.raises(UsageError, match="steps"):
            EpochLoader(loader(data, packing=True), **settings)


LIGHTNING_DDP = """
import json, sys, warnings
from pathlib import Path
import lightning, torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import LlamaConfig, LlamaForCausalLM
from loaders import EpochLoader, LoaderConfig, SequenceConfig, Source, build_loader, model_inputs

data, out, strategy = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def prepared(batch):
    return {**model_inputs(batch), "__key__": batch["__key__"]}

class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
        self.net = LlamaForCausalLM(LlamaConfig(vocab_size=2003 + 8192, **shape))
        self.keys = []

    def train_dataloader(self):
        config = LoaderConfig(
            sources=(Source(str(data / "pairs")), Source(str(data / "texts"))),
            sequences=SequenceConfig(tokenizer=str(data / "tokenizer"), max_length=64),
            batch_size=4,
        )
        return EpochLoader(build_loader(config), steps=5, prepare=prepared)

    def training_step(self, batch, number):
        self.keys.append(batch.pop("__key__"))
        return self.net(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

    def on_train_end(self):
        (out / f"rank-{self.trainer.global_rank}-{self.trainer.max_steps}.json").write_text(json.dumps(self.keys))

def fit(steps, checkpoint=None):
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
        callbacks=[ModelCheckpoint(dirpath=out, every_n_train_steps=steps, filename=str(steps))],  # by the processes that train
    )
    trainer.fit(Module(), ckpt_path=checkpoint, weights_only=True)

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    fit(*([int(sys.argv[4])] + sys.argv[5:]))
"""


@pytest.mark.slow
@pytest.mark.timeout(1900)
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_lightning_on_two_devices_gives_each_its_half_and_goes_on(data: Path, tmp_path: Path, strategy: str) -> None:
    script = tmp_path / "fit.py"
    script.write_text(LIGHTNING_DDP)

    def keys(*args: str | Path) -> list[list[str]]:
        """Of each step, the keys of both ranks."""
        subprocess.run([sys.executable, script, data, tmp_path, strategy, *args], check=True, timeout=900, env=environment())
        ranks = [json.loads((tmp_path / f"rank-{rank}-{args[0]}.json").read_text()) for rank in range(2)]
        return [of_first + of_second for of_first, of_second in zip(*ranks, strict=True)]

    alone = [batch["__key__"] for batch in islice(loader(data, packing=False), 9)]
    assert keys("6") == alone[:6]
    assert keys("9", tmp_path / "6.ckpt") == alone[6:]
