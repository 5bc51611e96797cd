"""`make train-proof`: one training, the same on 1, 2, 3 and 4 ranks, and on 4, then 3, then 4. About a minute on two cores.

    pairs, documents -> pack -> rows, rows: a mixture of 0.6 and 0.4, from step CHANGE on of 0.3 and 0.7 (a new generation)
    each number of ranks -> STEPS losses in float64; between numbers of ranks a save, in the middle of an epoch
    -> the largest relative difference from the losses on one rank, at most 1e-9; the audit of each run; a picture

Every step is a batch of 12 rows over all ranks. Losses and gradients are sums over tokens, divided by the number of trained
tokens of the batch, so they are those of the batch however it is dealt out; what differs is the order in which float64 are added.
"""

from __future__ import annotations

import json
import shutil
import sys
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from loaders import EpochLoader, Loader, LoaderConfig, Source, build_loader
from loaders.proof.audit import audit, read_receipts
from wds_tools.api import PackConfig, pack

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
from factory import image_sample, make_dataset, text_sample  # noqa: E402
from tokens import PROVENANCE, readmes, write_tokenizer  # noqa: E402

STEPS, CHANGE, BATCH, LENGTH, WIDTH = 12, 6, 12, 64, 16
VOCABULARY = 10240
"""Text tokens and codes, rounded up."""
ALLOWED = 1e-9
Run = tuple[tuple[int, int], ...]
"""(ranks, step at which they stop), one after the other."""
RUNS: dict[str, Run] = {
    "1 rank": ((1, STEPS),),
    "2 ranks": ((2, STEPS),),
    "3 ranks": ((3, STEPS),),
    "4 ranks": ((4, STEPS),),
    "4, 3, 4 ranks": ((4, 4), (3, 8), (4, STEPS)),
}


class Start(NamedTuple):
    """What the ranks of a start are told."""

    data: Path
    run: Path
    begin: int
    stop: int


class SmallModel(nn.Module):
    """Embedding, one attention within segments, one layer; in float64. Packages' own models compute a part in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids_BL: Tensor, positions_BL: Tensor) -> Tensor:
        """Logits (B, L, VOCABULARY)."""
        hidden_BLD = self.embedding(ids_BL)
        segments_BL = (positions_BL == 0).cumsum(1)
        is_seen_BLL = (segments_BL[:, :, None] == segments_BL[:, None]).tril()
        queries, keys, values = self.queries_keys_values(hidden_BLD).chunk(3, -1)
        hidden_BLD = hidden_BLD + F.scaled_dot_product_attention(queries, keys, values, is_seen_BLL)
        return torch.tanh(self.layer(hidden_BLD)) @ self.embedding.weight.T


def make_data(folder: Path) -> None:
    """Two datasets of packed rows."""
    write_tokenizer(folder / "tokenizer")
    make_dataset(folder / "pairs", (image_sample(number) for number in range(300)), codes=PROVENANCE, shard_samples=50)
    prose = " ".join(readmes()[:20])
    make_dataset(folder / "texts", (text_sample(number, prose[50 * number :][:400]) for number in range(200)), shard_samples=50)
    for name in ("pairs", "texts"):
        settings = {"tokenizer": str(folder / "tokenizer"), "max_length": LENGTH, "codebook_size": 8192, "quiet": True}
        pack(PackConfig(input=(str(folder / name),), output=str(folder / f"{name}-rows"), **settings))


def config(data: Path, step: int) -> LoaderConfig:
    """What is read from a step on."""
    weights = {"pairs": 0.6, "texts": 0.4} if step < CHANGE else {"pairs": 0.3, "texts": 0.7}
    pairs, texts = (Source(str(data / f"{name}-rows"), weight=weights[name]) for name in ("pairs", "texts"))
    return LoaderConfig(sources=(pairs, texts), batch_size=BATCH, trained_tokens=True)


def rank_main(rank: int, ranks: int, start: Start) -> None:
    """A process of a start: trains from step `begin` to `stop`, across the change if it lies between."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    meeting = start.run / f"meeting-{start.begin}"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    model = SmallModel().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    stops = sorted({start.stop, *({CHANGE} if start.begin < CHANGE < start.stop else ())})
    for begin, stop in zip([start.begin, *stops], stops, strict=False):
        loader = build_loader(config(start.data, begin))
        if step := loader.resume(start.run, change="future" if begin == CHANGE else None):
            weights = torch.load(start.run / f"weights-{step}.pt", weights_only=True)
            model.load_state_dict(weights["model"])
            optimizer.load_state_dict(weights["optimizer"])
        for batch in islice(EpochLoader(loader, STEPS, prepare=dict), stop - begin):
            loss = train_step(model, optimizer, batch)
            if rank == 0:
                with (start.run / "losses.jsonl").open("a") as log:
                    log.write(json.dumps({"step": loader.step, "loss": loss, "ranks": ranks, "epoch": loader.epoch}) + "\n")
        save(start.run, loader, model, optimizer)
        loader.close()
    dist.destroy_process_group()


def train_step(model: SmallModel, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> float:
    """One step on this rank's part of a batch; returns the mean loss of the trained tokens of the whole batch."""
    logits_BLV = model(batch["input_ids"], batch["position_ids"])
    loss = F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    loss = loss / batch["trained_tokens"]
    loss.backward()
    total = loss.detach().clone()
    for tensor in (total, *(parameter.grad for parameter in model.parameters())):
        dist.all_reduce(tensor)
    optimizer.step()
    optimizer.zero_grad()
    return float(total)


def save(run: Path, loader: Loader, model: SmallModel, optimizer: torch.optim.Optimizer) -> None:
    """The weights, and behind them the loader, with which the checkpoint counts."""
    if loader.world.rank == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, run / f"weights-{loader.step}.pt")
    loader.save(run)


def train(data: Path, folder: Path, run: Run) -> list[dict[str, float]]:
    """All starts of a run; returns a line for each step."""
    folder.mkdir()
    begin = 0
    method = "fork" if sys.platform == "linux" else "spawn"  # the same processes, without the seconds of imports
    for ranks, stop in run:
        start = Start(data, folder, begin, stop)
        torch.multiprocessing.start_processes(rank_main, (ranks, start), ranks, start_method=method)
        begin = stop
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def picture(runs: dict[str, list[dict[str, float]]], difference: float) -> str:
    """All runs in one plot, each line thinner than the one below it."""
    width, height, left, top = 560, 220, 50, 40
    losses = [line["loss"] for lines in runs.values() for line in lines]
    low, high = min(losses), max(losses)
    dx = width / (STEPS - 1)
    colours = ("#cfd8dc", "#90caf9", "#a5d6a7", "#ffb74d", "#c62828")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 130}" height="{top + height + 40}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="100%" height="100%" fill="white"/><text x="{left}" y="20" font-size="14">The loss of each step on any '
        f"number of ranks: at most {difference:.0e} apart, relatively</text>",
        f'<text x="{left + (CHANGE - 0.5) * dx + 4}" y="{top + 12}" fill="#555">other weights from here on</text>',
        f'<path d="M{left + (CHANGE - 0.5) * dx} {top}v{height}" stroke="#999" stroke-dasharray="3 3"/>',
        f'<path d="M{left} {top}v{height}h{width}" stroke="#333" fill="none"/>',
        f'<text x="{left - 6}" y="{top + 10}" text-anchor="end">{high:.1f}</text>',
        f'<text x="{left - 6}" y="{top + height}" text-anchor="end">{low:.1f}</text>',
        f'<text x="{left + width}" y="{top + height + 30}" text-anchor="end">step {STEPS}</text>',
    ]
    for number, (name, lines) in enumerate(runs.items()):
        places = [(left + n * dx, top + (high - line["loss"]) / (high - low) * height) for n, line in enumerate(lines)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        stroke = f'fill="none" stroke="{colours[number]}" stroke-width="{14 - 3 * number}"'
        parts.append(
            f'<polyline points="{points}" {stroke}/><path d="M{left + width + 16} {top + 20 * number + 6}h20" {stroke}/>'
        )
        parts.append(f'<text x="{left + width + 42}" y="{top + 20 * number + 10}">{name}</text>')
    parts += [
        f'<text x="{left + n * dx:.1f}" y="{top + height + 15}" text-anchor="middle" fill="#c62828">{line["ranks"]}</text>'
        for n, line in enumerate(runs["4, 3, 4 ranks"])
    ]
    return "\n".join([*parts, "</svg>", ""])


def prove(out: Path, drawn: Path) -> float:
    """Run all, compare, draw; returns the largest relative difference. Exits where it is too large, or an audit not exact."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    make_data(out / "data")
    folders = {name: out / name.replace(", ", "-").replace(" ", "-") for name in RUNS}
    runs = {name: train(out / "data", folders[name], run) for name, run in RUNS.items()}
    reference = [line["loss"] for line in runs["1 rank"]]
    worst = 0.0
    for name, lines in runs.items():
        difference = max(abs(line["loss"] - loss) / loss for line, loss in zip(lines, reference, strict=True))
        worst = max(worst, difference)
        is_exact = audit(read_receipts([str(folders[name])])).is_exact()
        print(f"{name}: {lines[0]['loss']:.4f} -> {lines[-1]['loss']:.4f}, differs by {difference:.1e}, audit exact: {is_exact}")
        if not is_exact or difference > ALLOWED:
            sys.exit(f"{name}: not the training that one rank does")
    drawn.write_text(picture(runs, worst))
    return worst


if __name__ == "__main__":
    prove(Path(sys.argv[1] if len(sys.argv) > 1 else "train-proof-out").absolute(), ROOT / "docs/train-proof.svg")
