"""What to stream: a `LoaderConfig` of `Source`s, values that are checked when they are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, get_args

from wds_tools.errors import UsageError
from wds_tools.sequences.choices import text_weights
from wds_tools.sequences.config import SequenceConfig

LastBatch = Literal["drop", "short", "wrap"]
_CHOICES = {"last_batch": get_args(LastBatch), "on_error": ("raise", "substitute"), "unit": ("samples", "tokens")}


@dataclass(frozen=True)
class Source:
    """A dataset and its part in the mixture: `Source("s3://bucket/pairs", weight=0.7)`."""

    url: str
    """Directory or URL of the dataset."""
    _: KW_ONLY
    weight: float | None = None
    """Weight in the mixture, relative to the other sources. None for all sources: every sample of each once per epoch."""
    repeat: int = 1
    """Passes over this source per epoch; in a weighted mixture, the number of passes after which it counts as exhausted."""
    max_samples: int | None = None
    """Number of its samples to use, the same ones in every epoch; None: all."""
    fraction: float | None = None
    """The same as a fraction of its samples, above 0 and at most 1."""
    name: str | None = None
    """Value of `__source__` in batches; by default the URL."""
    exclude: str | None = None
    """File of keys, one a line (or `DATASET<tab>KEY`), whose samples are no longer used: other samples replace them, and the
    order stays (docs/changes.md). Keys may be appended to it."""
    code_set: str | None = None
    """Code set to read, if its samples have several, or columns: "vqcode_256"; by default the first."""
    texts: Mapping[str, float] | None = None
    """For samples with several texts, weights of the one that becomes `text`: {"recap": 0.9, "alt": 0.1}, drawn again in each
    epoch of the source; a null text leaves its weight to the others. None: the stored `text`."""

    def __post_init__(self) -> None:
        weight, fraction = self.weight, self.fraction
        where = f"source {self.url}"
        if not isinstance(self.url, str):
            raise UsageError(f"{where}: a {type(self.url).__name__}, expected a string: a folder or URL")
        if not isinstance(self.exclude, str | None):
            raise UsageError(f"{where}: exclude={self.exclude!r} is a {type(self.exclude).__name__}, expected a string: a file")
        _check_ints(where, self, repeat=1, max_samples=1)
        if weight is not None and not 0 <= weight < float("inf"):
            raise UsageError(f"{where}: weight={weight}, expected a number of 0 or more")
        if fraction is not None and not 0 < fraction <= 1:
            raise UsageError(f"{where}: fraction={fraction} is not above 0 and up to 1")
        if fraction is not None and self.max_samples is not None:
            raise UsageError(f"{where}: give max_samples or fraction, not both")
        text_weights(where, self.texts or {})


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """A training stream."""

    sources: tuple[Source, ...]
    """Datasets, one or more. Either all have a weight or none has."""
    batch_size: int
    """Samples of a batch over all ranks."""
    seed: int = 42
    """Seed of the sample order, 0 ... 2**64 - 1."""
    shuffle: bool = True
    """False: the order of the manifest. One source or several without weights."""
    evaluation: bool = False
    """Every loop is a pass over a validation set: all samples once in the order of the manifest, from the start, with the same
    form, wording, text and draws in each pass and on any topology (docs/training.md#validation)."""
    last_batch: LastBatch = "drop"
    """What happens to the last, incomplete batch of an epoch: `drop` leaves its samples out (and counts them), `short` gives a
    smaller batch (or adds the samples to the previous batch, if they are fewer than the ranks), `wrap` fills it up from the
    beginning of the next epoch. Every rank takes the same number of steps, and no batch is empty."""
    stop_at: Literal["first_exhausted", "all_exhausted"] | int = "first_exhausted"
    """End of an epoch of sources with weights: when the first or when all of them are exhausted, or after a number of samples."""
    schedule: tuple[tuple[int, tuple[float, ...]], ...] = ()
    """Changes of the weights: (first step of the training with these weights, weights in the order of the sources). A step here
    always has the run's first batch size."""
    unit: Literal["samples", "tokens"] = "samples"
    """Unit of the weights. tokens: tokens of texts and images, which `wds-tools index SOURCE --tokens TOKENIZER` counts with the
    tokenizer of `sequences`; a weight is divided by the mean of its source, so shares are exact over whole passes."""
    epochs: int | None = None
    """Number of epochs of the run: after the last, iterating gives nothing, and nothing is fetched for another. None: no
    limit."""
    num_workers: int = 0
    """Worker processes that read for this rank; 0: this process reads. With 1, 2 or 4, workers share no lanes; with other numbers
    they may (docs/order.md)."""
    prefetch_factor: int = 4
    """Batches that each worker prepares ahead."""
    start_method: Literal["fork", "spawn", "forkserver"] | None = None
    """How worker processes are started; None: torch's default."""
    timeout_s: float = 1800.0
    """With workers: seconds to wait for a batch before the run ends with an error."""
    pin_memory: bool = False
    """Put the tensors of batches into pinned memory, so that `to(device, non_blocking=True)` does not wait for the copy. No
    effect without a CUDA or ROCm GPU."""
    memory_bytes: int = 2 << 30
    """Memory that one process may use for data that it has read. Less memory costs more requests, but never changes the order."""
    scarce_memory: bool = False
    """Allow memory_bytes that are too few for the data read at one time, so that data is fetched more than once; otherwise
    refused."""
    max_requests: int = 128
    """Maximum of requests in flight in one process. It starts with fewer, and uses more while that is faster."""
    cache_dir: str | None = None
    """Folder on a local disk that keeps data fetched from object storage, for all processes and runs."""
    cache_bytes: int = 100 << 30
    """Size limit of that folder."""
    check_crc: bool = False
    """Compare every sample's bytes with the CRC-32 of the index."""
    transform: Callable[[dict[str, Any], Any], dict[str, Any] | None] | None = None
    """Your own code, run in the reading processes. It takes a sample, as from ShardDataset, and a context (`rng`, `epoch`,
    `key`), and returns a dict of arrays; or None, and then the next sample of the shard replaces this one (docs/training.md)."""
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None
    """Makes a batch from a list of results of transform, in the same process. None: values of one shape become a tensor, others a
    list."""
    transform_id: str | None = None
    """Name of the transform: a state or receipt with another name is refused. None: nothing is compared."""
    max_unused: float = 0.01
    """Share of the samples that transform may leave unused, 0 ... 1; more stop the run. The first 1,000 samples are judged
    together."""
    sequences: SequenceConfig | None = None
    """How to make batches of token rows, instead of texts and codes. None: samples as stored; shards of `wds-tools pack` always
    give token rows."""
    packing: bool = False
    """With sequences: pack rows of exactly max_length on the fly. batch_size then counts rows, and epochs have no end
    (docs/training.md)."""
    trained_tokens: bool = False
    """For token rows: batches have `trained_tokens`, the number of trained tokens over all ranks, to divide summed losses by.
    Ranks add up over their group or torch.distributed at each batch, so all must take each batch together."""
    on_error: Literal["raise", "substitute"] = "raise"
    """What happens at an unreadable sample: it stops the run, or the next readable sample of its shard replaces it, and it is
    counted."""
    max_bad: int = 100
    """With substitute: number of unreadable samples on one rank above which the run stops."""

    def __post_init__(self) -> None:
        sources = self.sources if isinstance(self.sources, tuple | list) else ()
        if not sources or not all(isinstance(source, Source) for source in sources):
            raise UsageError(f"sources={self.sources!r}: expected a tuple of one or more Source(...)")
        least = dict.fromkeys(("batch_size", "epochs", "prefetch_factor", "memory_bytes", "cache_bytes", "max_requests"), 1)
        _check_ints("a loader", self, **least, **dict.fromkeys(("seed", "num_workers", "max_bad"), 0))
        if self.epochs is not None and self.packing:
            raise UsageError(f"epochs={self.epochs}: rows packed on the fly have no epochs")
        if self.seed >= 1 << 64:
            raise UsageError(f"seed={self.seed} is not in 0 ... 2**64 - 1")
        if self.evaluation:
            self._become_evaluation()
        for name, (*others, last) in _CHOICES.items():
            if (value := getattr(self, name)) not in (*others, last):
                raise UsageError(f"{name}={value!r} is not {', '.join(others)} or {last}")
        if self.transform is not None and self.sequences is not None:
            raise UsageError("transform= and sequences= both say what becomes of a sample: give one of them")
        if self.transform is None and (self.collate is not None or self.transform_id is not None):
            raise UsageError("collate= and transform_id= are of what transform= gives: give transform= too")
        if not 0 <= self.max_unused <= 1:
            raise UsageError(f"max_unused={self.max_unused} is not in 0 ... 1")
        if not self.timeout_s > 0:
            raise UsageError(f"timeout_s={self.timeout_s}, expected seconds, more than 0")
        if self.packing and self.sequences is None:
            raise UsageError("packing=True packs token rows: give sequences=SequenceConfig(...) too")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise UsageError("some sources have a weight and some have none: give every one a weight, or none")
        if self.unit == "tokens" and not (all(weighted) and self.sequences):
            raise UsageError("unit='tokens' is for sources with weights, by the tokenizer of sequences=SequenceConfig(...)")
        if not any(weighted) and self.schedule:
            raise UsageError("a schedule of weights needs a weight for every source")
        if not any(weighted) and self.stop_at != "first_exhausted":
            raise UsageError(f"stop_at={self.stop_at!r} is for sources with weights: without, an epoch is every sample once")
        if any(weighted) and not self.shuffle:
            raise UsageError("shuffle=False has no meaning for a mixture with weights")
        if self.stop_at not in ("first_exhausted", "all_exhausted") and not (type(self.stop_at) is int and self.stop_at >= 1):
            raise UsageError(f"stop_at={self.stop_at!r}: expected 'first_exhausted', 'all_exhausted' or a number of samples")
        for step, weights in self.schedule:
            if step < 1 or len(weights) != len(self.sources):
                raise UsageError(f"schedule entry {(step, weights)}: expected (step of 1 or more, one weight per source)")

    def _become_evaluation(self) -> None:
        """Settle what a pass over all samples needs; refuse what contradicts it."""
        if self.packing:
            raise UsageError(
                "evaluation=True: rows packed on the fly have no end; take padded rows, or pack ahead (`wds-tools pack`)"
            )
        if any(source.weight is not None for source in self.sources):
            raise UsageError("evaluation=True hands over every sample once: leave weights out, or make a loader of each source")
        if self.epochs not in (None, 1) or self.last_batch == "wrap":
            raise UsageError(
                f"evaluation=True with epochs={self.epochs}, last_batch={self.last_batch!r}: every loop is one pass over all "
                "samples, each once; leave these out"
            )
        for name, value in {"shuffle": False, "last_batch": "short", "epochs": 1}.items():
            object.__setattr__(self, name, value)


def _check_ints(where: str, settings: Source | LoaderConfig, **least: int) -> None:
    """Raise UsageError for the first setting that is not an int, which a state could not hold, or less than this."""
    for name, value in ((name, getattr(settings, name)) for name in least):
        if value is not None and (type(value) is not int or value < least[name]):
            raise UsageError(f"{where}: {name}={value!r}, expected an int of {least[name]} or more")
