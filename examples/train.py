"""Train a small causal language model on token rows streamed from anywhere; stop it at any moment and run it again to go on.

    torchrun --nproc-per-node 2 examples/train.py --source s3://bucket/pairs s3://bucket/dclm --tokenizer tok/ --output run/

A checkpoint is a file with the weights and the optimizer, and behind it a save of the loader: without one it does not count.
Every start goes on from the last one, on any number of ranks. With as many ranks as before the losses are those of a run that
was never stopped. The model is transformers' Llama, made from a configuration, with random weights.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
import tyro
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from loaders import Loader, LoaderConfig, SequenceConfig, Source, World, build_loader


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a small causal language model on datasets of pairs and documents."""

    source: tuple[str, ...]
    """The datasets: directories or URLs."""
    tokenizer: str
    """Folder of the text tokenizer."""
    output: Path
    """Where checkpoints, receipts and losses go."""
    packing: Literal["none", "fly"] = "none"
    """none: padded rows, an epoch of them. fly: full rows, packed as they are read; needs --steps."""
    max_length: int = 1152
    """Tokens of a row."""
    batch_size: int = 8
    """Samples (with packing: rows) of a batch over all ranks."""
    steps: int | None = None
    """Stop after so many steps of the whole training; by default at the end of the epoch."""
    save_every: int = 5
    """Steps between checkpoints."""
    num_workers: int = 1
    """Processes that read for each rank."""
    hidden_size: int = 64
    """Of the model, which has two layers."""
    learning_rate: float = 1e-3
    """Of AdamW."""
    seed: int = 42
    """Of the order, the choices and the weights."""


def train(config: TrainConfig) -> None:
    """Train, from the last checkpoint if there is one."""
    torch.set_num_threads(1)  # so that sums are the same each time
    torch.manual_seed(config.seed)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    world = World.detect()
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / f"pid-{world.rank}").write_text(str(os.getpid()))
    loader = make_loader(config, world)
    model = make_model(config, loader)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    resume(config, loader, model, optimizer)
    parallel = DistributedDataParallel(model) if dist.is_initialized() else model
    epoch = loader.epoch
    for batch in islice(loader, None if config.steps is None else config.steps - loader.step):
        loss = train_step(parallel, batch, optimizer)
        if world.rank == 0:
            with (config.output / "losses.jsonl").open("a") as log:
                log.write(json.dumps({"step": loader.step, "loss": loss}) + "\n")
        if loader.step % config.save_every == 0 or loader.epoch != epoch or loader.step == config.steps:
            save(config, loader, model, optimizer)
    stats = loader.stats()
    print(
        f"rank {world.rank} of {world.world_size}: step {loader.step}, waited {stats['wait_p50_s'] * 1e3:.1f} ms a step (median)",
        flush=True,
    )
    loader.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def make_loader(config: TrainConfig, world: World) -> Loader:
    """The batches of this rank."""
    return build_loader(
        LoaderConfig(
            sources=tuple(Source(url) for url in config.source),
            sequences=SequenceConfig(tokenizer=config.tokenizer, max_length=config.max_length),
            packing=config.packing == "fly",
            batch_size=config.batch_size,
            seed=config.seed,
            last_batch="short",
            num_workers=config.num_workers,
        ),
        world,
    )


def make_model(config: TrainConfig, loader: Loader) -> LlamaForCausalLM:
    """A small Llama whose vocabulary holds the text tokens and the codes."""
    size = loader.vocabulary.padded(128)
    shape = {"hidden_size": config.hidden_size, "intermediate_size": 2 * config.hidden_size}
    return LlamaForCausalLM(LlamaConfig(vocab_size=size, num_hidden_layers=2, num_attention_heads=2, **shape))


def train_step(model: torch.nn.Module, batch: dict[str, Any], optimizer: torch.optim.Optimizer) -> float:
    """One step on this rank's part of a batch; returns the mean loss of a token over all ranks.

    Ranks have different numbers of trained tokens: so losses are summed, and divided by the tokens of all.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    labels = batch["labels"]
    logits = model(**inputs, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    totals = torch.tensor([float(loss.detach()), float((labels[:, 1:] != -100).sum())], dtype=torch.float64)
    ranks = 1
    if dist.is_initialized():
        dist.all_reduce(totals)
        ranks = dist.get_world_size()  # DistributedDataParallel takes the mean of the ranks' gradients
    (loss * ranks / totals[1].item()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(totals[0] / totals[1])


def save(config: TrainConfig, loader: Loader, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint: the weights first, since it counts once the loader's save is whole."""
    if loader.world.rank == 0:
        weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(weights, config.output / f"weights-{loader.step:06d}.pt")
    loader.save(config.output)


def resume(config: TrainConfig, loader: Loader, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Go on from the last checkpoint, if there is one."""
    if step := loader.resume(config.output):
        weights = torch.load(config.output / f"weights-{step:06d}.pt", weights_only=True)
        model.load_state_dict(weights["model"])
        optimizer.load_state_dict(weights["optimizer"])


if __name__ == "__main__":
    train(tyro.cli(TrainConfig))
