"""Evaluation: every pass over a validation set is the same, from the start, on any topology, under every trainer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from commands import environment
from factory import make_dataset, text_sample
from hypothesis import given, settings
from hypothesis import strategies as st
from tokens import write_small_sets

from loaders import EpochLoader, Loader, LoaderConfig, SequenceConfig, Source, World, build_loader, model_inputs
from loaders.order.partition import BatchPartition
from wds_tools.errors import UsageError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_sets(tmp_path_factory.mktemp("data"))


def config(data: Path, **changed: Any) -> LoaderConfig:
    sequences = SequenceConfig(tokenizer=str(data / "tokenizer"), max_length=64)
    made: dict[str, Any] = {"sources": (Source(str(data / "pairs")),), "sequences": sequences, "batch_size": 7}
    return LoaderConfig(**{**made, "evaluation": True, **changed})


def validation(data: Path, world: World | None = None, **changed: Any) -> Loader:
    return build_loader(config(data, **changed), world or World())


def rows(loader: Loader) -> list[tuple[str, list[int]]]:
    """Key and trained ids of each row: what the form, the wording, the text and its drop decide."""
    return [
        (key, ids[labels != -100].tolist())
        for batch in loader
        for key, ids, labels in zip(batch["__key__"], batch["input_ids"], batch["labels"], strict=True)
    ]


def model() -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=2003 + 8192, **shape))


def loss_of(net: LlamaForCausalLM, ranks: list[Iterator[dict[str, Any]]]) -> float:
    """The mean over all trained tokens of all ranks."""
    total = count = 0.0
    for rank in ranks:
        for batch in rank:
            labels = batch["labels"][:, 1:]
            with torch.no_grad():
                logits = net(**model_inputs(batch)).logits[:, :-1].double()
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
            count += int((labels != -100).sum())
    return total / count


def test_every_pass_has_every_sample_once_with_the_same_rows_on_any_topology(data: Path) -> None:
    loader = validation(data)
    first = rows(loader)
    assert [key for key, _ in first] == sorted({key for key, _ in first})
    assert len(first) == loader.num_samples == 40
    assert rows(loader) == first
    next(iter(loader))  # a sanity check, which leaves the loop
    assert len(loader) == 6
    assert rows(loader) == first
    for world_size, batch_size, num_workers in ((2, 7, 0), (3, 40, 0), (1, 5, 2)):
        worlds = [World(rank=rank, world_size=world_size) for rank in range(world_size)]
        ranks = [validation(data, world, batch_size=batch_size, num_workers=num_workers) for world in worlds]
        for _ in range(2):
            assert len({len(rank) for rank in ranks}) == 1
            assert sorted(row for rank in ranks for row in rows(rank)) == first
        for rank in ranks:
            rank.close()
    other = rows(build_loader(replace(config(data), seed=7), World()))
    assert [key for key, _ in other] == [key for key, _ in first]
    assert other != first  # of another seed, other forms


def test_a_training_config_becomes_one_of_evaluation_and_trains_on_unmoved(data: Path) -> None:
    train = LoaderConfig(sources=(Source(str(data / "texts")),), sequences=config(data).sequences, batch_size=4)
    alone = [batch["__key__"] for batch in islice(build_loader(train, World()), 6)]
    batches, loader = iter(build_loader(train, World())), build_loader(replace(train, evaluation=True), World())
    seen = []
    for _ in range(3):
        seen += [batch["__key__"] for batch in islice(batches, 2)]
        assert len(rows(loader)) >= loader.num_samples
    assert seen == alone


def test_the_loss_is_that_of_any_topology(data: Path) -> None:
    net = model().double().eval()
    reference = loss_of(net, [iter(validation(data))])
    for world_size, batch_size in ((1, 11), (2, 7), (3, 9)):
        worlds = [World(rank=rank, world_size=world_size) for rank in range(world_size)]
        found = loss_of(net, [iter(validation(data, world, batch_size=batch_size)) for world in worlds])
        assert found == pytest.approx(reference, rel=1e-9)


@given(length=st.integers(1, 60), world_size=st.integers(1, 9), more=st.integers(0, 20))
@settings(deadline=None)
def test_the_parts_of_a_pass_are_its_samples_and_nothing_of_another_pass(length: int, world_size: int, more: int) -> None:
    steps = BatchPartition(length, 0, world_size + more, "short", world_size, makes_up=False)
    parts = [steps.part(step, rank) for step in range(len(steps)) for rank in range(world_size)]
    assert [position for low, high in parts for position in range(low, high)] == list(range(length))
    assert all(low < high for low, high in parts) or length < world_size


def test_ranks_without_a_sample_get_no_batch_and_know_the_number_of_steps(tmp_path: Path) -> None:
    make_dataset(tmp_path / "few", [text_sample(number) for number in range(3)])
    settings = LoaderConfig(sources=(Source(str(tmp_path / "few")),), batch_size=8, evaluation=True)
    ranks = [build_loader(settings, World(rank=rank, world_size=5)) for rank in range(5)]
    for _ in range(2):
        assert [len(rank) for rank in ranks] == [1] * 5
        batches = [[batch["__key__"] for batch in rank] for rank in ranks]
        assert sorted(map(len, batches)) == [0, 0, 1, 1, 1]
        assert sorted(key for of_rank in batches for batch in of_rank for key in batch) == [
            f"text-{number:08d}" for number in range(3)
        ]


def test_what_contradicts_an_evaluation_is_refused(data: Path) -> None:
    for changed, says in (
        ({"packing": True}, "packed on the fly"),
        ({"sources": (Source(str(data / "pairs"), weight=1.0),)}, "weights"),
        ({"epochs": 2}, "epochs=2"),
        ({"last_batch": "wrap"}, "wrap"),
    ):
        with pytest.raises(UsageError, match=says):
            config(data, **changed)
    loader = validation(data)
    for call in (loader.state_dict, loader.receipt, loader.gather_state, lambda: loader.load_state_dict({})):
        with pytest.raises(UsageError, match="every pass is the same"):
            call()
    with pytest.raises(UsageError, match="max_samples"):
        EpochLoader(loader, steps=2)


def train_rounds(data: Path) -> EpochLoader:
    return EpochLoader(build_loader(config(data, evaluation=False, batch_size=4), World()), steps=4)


@pytest.mark.slow
def test_the_trainer_of_transformers_evaluates_the_whole_set_each_time(data: Path, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    from loaders.trainers.transformers import LoaderTrainer

    quiet: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), max_steps=4, eval_strategy="steps", eval_steps=2, **quiet)

    def trainer_of(validation_set: Any) -> LoaderTrainer:
        return LoaderTrainer(model=model(), args=arguments, train_dataset=train_rounds(data), eval_dataset=validation_set)

    trainer = trainer_of(EpochLoader(validation(data)))
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(loss_of(model().eval(), [iter(validation(data))]), rel=1e-5)
    trainer.train()
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(logged) == 2  # at steps 2 and 4
    assert before["eval_loss"] > logged[0] > logged[1]
    after = loss_of(trainer.model.eval(), [iter(validation(data))])
    assert logged[-1] == pytest.approx(after, rel=1e-5)
    assert trainer.evaluate(EpochLoader(validation(data, batch_size=11)))["eval_loss"] == pytest.approx(after, rel=1e-5)
    named = trainer_of({"pairs": EpochLoader(validation(data))}).evaluate()
    assert named["eval_pairs_loss"] == pytest.approx(before["eval_loss"])
    with pytest.raises(UsageError, match="evaluation=True"):
        trainer.evaluate(train_rounds(data))


@pytest.mark.slow
def test_lightning_checks_limits_and_validates_from_the_start_each_time(data: Path) -> None:
    import lightning

    def keyed(batch: dict[str, Any]) -> dict[str, Any]:
        return {**model_inputs(batch), "__key__": batch["__key__"]}

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()
            self.passes: list[list[str]] = []

        def train_dataloader(self) -> EpochLoader:
            return train_rounds(data)

        def val_dataloader(self) -> EpochLoader:
            return EpochLoader(validation(data), prepare=keyed)

        def on_validation_epoch_start(self) -> None:
            self.passes.append([])

        def training_step(self, batch: dict[str, Any], _: int) -> Any:
            return self.net(**batch).loss

        def validation_step(self, batch: dict[str, Any], _: int) -> None:
            self.passes[-1] += batch.pop("__key__")
            self.log("val_loss", self.net(**batch).loss, batch_size=len(batch["labels"]))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    whole = [key for batch in validation(data) for key in batch["__key__"]]
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "num_sanity_val_steps": 2, "max_steps": 8}
    for limit, expected in ((1.0, whole), (3, whole[:21])):
        module = Module()
        lightning.Trainer(limit_val_batches=limit, **quiet).fit(module)
        assert module.passes == [whole[:14], expected, expected]


ON_TWO_RANKS = """
import json, sys
from accelerate import Accelerator
from transformers import TrainingArguments
from loaders import EpochLoader, World, build_loader
from loaders.trainers.transformers import LoaderTrainer
from test_evaluation import config, model, loss_of, Path, model_inputs, torch

if __name__ == "__main__":
    data, accelerator = Path(sys.argv[1]), Accelerator(cpu=True)
    loader = build_loader(config(data, batch_size=9))
    net = accelerator.prepare_model(model(), evaluation_mode=True).eval()
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in loader:
        num_tokens = int((batch["labels"][:, 1:] != -100).sum())
        sums += torch.tensor([float(net(**model_inputs(batch)).loss.detach()) * num_tokens, num_tokens])
    total, count = accelerator.reduce(sums).tolist()
    arguments = TrainingArguments(sys.argv[2], use_cpu=True, report_to=[], disable_tqdm=True)
    trained = LoaderTrainer(model=model(), args=arguments, eval_dataset=EpochLoader(loader)).evaluate()
    if accelerator.is_main_process:
        Path(sys.argv[2], "found.json").write_text(json.dumps([loader.world.world_size, total / count, trained["eval_loss"]]))
"""


@pytest.mark.slow
def test_accelerate_and_the_trainer_on_two_ranks_find_the_loss_of_one(data: Path, tmp_path: Path) -> None:
    script = tmp_path / "evaluate.py"
    script.write_text(ON_TWO_RANKS)
    path = {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}:{Path(__file__).parents[2]}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, data, tmp_path]
    subprocess.run(command, check=True, timeout=200, env={**environment(), **path})
    alone = loss_of(model().eval(), [iter(validation(data))])
    assert json.loads((tmp_path / "found.json").read_text()) == [2, *[pytest.approx(alone, rel=1e-5)] * 2]
