"""Samples -> examples: ids, and which of them are trained. The forms, with BOS where the tokenizer has one:

    text to image   BOS text [size] prompt <boi> codes <eoi> EOS        trained: codes <eoi> EOS
      without text  BOS [size] <unconditional> <boi> codes <eoi> EOS    the same
    caption         BOS <boi> codes <eoi> instruction text EOS          text EOS
    document        BOS text [EOS]                                      all
    conversation    BOS turns, <boi> codes <eoi> for each <image>       answers, each with its EOS

Codes are shifted behind the text vocabulary. Which form, which wording, and whether the text is dropped: choices.py.
Texts and wordings that stand side by side are one string, tokenized in one call, as inference does it; they are apart where an
image or a special token stands between them, and where the loss begins or ends, since a prompt ends there.
Invariant: an image is whole. Where texts leave no room for it in a row, the longest are shortened to one length, before they are
joined, and counted; a document is never cut here.
Cost: all texts of a call are tokenized at once; the rest is about 15 us a sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from wds_tools.errors import FormatError, Reject
from wds_tools.format.codes import Codes, check_range
from wds_tools.format.schema import Sample
from wds_tools.sequences.choices import choose
from wds_tools.sequences.config import SequenceConfig
from wds_tools.sequences.tokenizer import NO_IDS, Ids, Part, TextTokenizer, joined
from wds_tools.sequences.vocabulary import find_vocabulary, ids_of

ROWS_VERSION = 2
"""Which ids an example has. 1: texts and wordings were tokenized apart."""
IMAGE_MARK = "<image>"
_PAIRS = ("image_text", "image_text_multi")
_DOCUMENT = "text_pretrain"

Flags = NDArray[np.bool_]


class Example(NamedTuple):
    """A sample as tokens."""

    key: str
    """Of the sample."""
    ids: Ids
    """(T,) int32."""
    loss: Flags
    """(T,) which of them are trained."""
    is_document: bool
    """May be cut anywhere and go on in another row. Anything else has at most max_length tokens."""
    is_shortened: bool = False
    """Its text was cut to fit a row."""


class ExampleBuilder:
    """Makes examples.

    Args:
        config: how.
        seed: of the choices.
        codebook_size: image codes that there may be; 0: none. The config's own goes before.

    Raises:
        UsageError: the tokenizer lacks tokens, or the prompts can't be read.
    """

    def __init__(self, config: SequenceConfig, seed: int, codebook_size: int) -> None:
        self.config = config
        self._seed = seed
        self.tokenizer = TextTokenizer(config.tokenizer)
        self.vocabulary = find_vocabulary(self.tokenizer, config, config.codebook_size or codebook_size)
        prompts, wording = self.vocabulary.prompts, self.tokenizer.wording
        self._describe = [wording(text) for text in prompts.describe]
        self._turns = {
            role: (wording(before), wording(behind))
            for role, (before, behind) in (("system", prompts.system), ("human", prompts.human), ("gpt", prompts.gpt))
        }
        vocabulary = self.vocabulary
        self._bos, self._boi, self._eoi = (Part(ids_of(token)) for token in (vocabulary.bos, vocabulary.boi, vocabulary.eoi))
        self._trained_bos, self._trained_eoi = (part._replace(trained=True) for part in (self._bos, self._eoi))
        self._eos = Part(ids_of(vocabulary.eos), True)
        self._around_image = lru_cache(4096)(self._count_around_image)

    @property
    def recipe(self) -> dict[str, Any]:
        """All that examples depend on beside seed, epoch and sample, as plain JSON values, wherever the files lie."""
        content = {
            "tokenizer": self.tokenizer.backend.to_str().encode(),
            "prompts": repr(asdict(self.vocabulary.prompts)).encode(),
        }
        hashes = {name: xxhash.xxh3_128_hexdigest(data) for name, data in content.items()}
        return {"version": ROWS_VERSION, **asdict(self.config), **hashes, "codebook_size": self.vocabulary.codebook_size}

    def check(self, sample: Sample) -> None:
        """Raise Reject if no example can be made of a valid sample, whatever chance says."""
        key = sample.key
        for column, codes in sample.codes.items():
            try:
                check_range(f"{key}: {column}", codes, self.vocabulary.codebook_size)
            except FormatError as error:
                raise Reject("code_out_of_range", str(error)) from error
        if sample.data_type in _PAIRS:
            if not sample.codes:
                raise Reject("no_codes", f"{key} is {sample.data_type} without codes: run `wds-tools encode` first")
            self._check_fits(key, sample.num_codes + self._around_image(_size_of(sample)))
        elif sample.data_type == "visual_sft":
            self._check_turns(sample)
        elif sample.data_type == _DOCUMENT:
            if not (sample.text or len(self._bos.ids) or self.config.document_eos):
                raise Reject("no_tokens", f"{key} is a document without text, and without BOS and EOS it makes no token")
        else:
            raise Reject("unknown_data_type", f"{key}: there is no form for data_type={sample.data_type!r}")

    def build(self, samples: Sequence[Sample], epochs: Sequence[int]) -> list[Example]:
        """The examples of samples that `check` accepts.

        Args:
            samples: any number; their texts are tokenized together.
            epochs: of each in its source.

        Returns:
            Examples whose arrays are views of two arrays that all of the call share.
        """
        plans = [list(self._plan(sample, epoch)) for sample, epoch in zip(samples, epochs, strict=True)]
        rows = [joined(plan) for plan in plans]
        encoded = self.tokenizer.encode_runs(rows)
        shortened = [
            sample.data_type != _DOCUMENT and sum(map(len, runs)) > self.config.max_length
            for sample, runs in zip(samples, encoded, strict=True)
        ]
        for number in np.flatnonzero(shortened).tolist():
            rows[number], encoded[number] = self._shortened(plans[number], encoded[number])
        sizes = [len(run) for runs in encoded for run in runs]
        ids = np.concatenate([NO_IDS, *(run for runs in encoded for run in runs)])
        loss = np.repeat(np.array([part.trained for parts in rows for part in parts], np.bool_), sizes)
        examples, begin = [], 0
        for sample, runs, is_shortened in zip(samples, encoded, shortened, strict=True):
            taken = slice(begin, begin := begin + sum(map(len, runs)))
            examples.append(Example(sample.key, ids[taken], loss[taken], sample.data_type == _DOCUMENT, is_shortened))
        return examples

    def _plan(self, sample: Sample, epoch: int) -> Iterable[Part]:
        """The parts of an example."""
        if sample.data_type == _DOCUMENT:
            document = [self._trained_bos, Part(words=sample.text, is_own=True, trained=True)]
            return [*document, self._eos] if self.config.document_eos else document
        if sample.data_type == "visual_sft":
            return [self._bos, *self._conversation(sample)]
        (grid_hw,) = sample.codes.values()
        codes = self._shifted(grid_hw)
        choice = choose(self._seed, epoch, sample.key)
        if choice.form >= self.config.t2i_ratio and sample.text:
            instruction = self._describe[choice.wording % len(self._describe)]
            caption = Part(words=sample.text, is_own=True, trained=True)
            return [self._bos, *self._image(codes), *instruction, caption, self._eos]
        text = "" if choice.drop < self.config.unconditional_ratio else sample.text
        before = self.vocabulary.before_image(text, _size_of(sample), choice.wording)
        return [*before, Part(codes, True), self._trained_eoi, self._eos]

    def _conversation(self, sample: Sample) -> Iterator[Part]:
        images = [self._shifted(grid_hw) for grid_hw in _grids(sample)]
        turns = sample.conversations or []
        are_marked = any(IMAGE_MARK in turn["value"] for turn in turns)
        for turn in turns:
            before, behind = self._turns[turn["from"]]
            is_answer = turn["from"] == "gpt"
            yield from before
            if not are_marked and turn["from"] == "human":
                while images:
                    yield from self._image(images.pop(0))
            first, *others = turn["value"].split(IMAGE_MARK)
            yield Part(words=first, is_own=True, trained=is_answer)
            for words in others:
                yield from self._image(images.pop(0))
                yield Part(words=words, is_own=True, trained=is_answer)
            yield from behind
            if is_answer:
                yield self._eos

    def _shortened(self, plan: Sequence[Part], runs: Sequence[Ids]) -> tuple[list[Part], list[Ids]]:
        """The runs of an example whose texts are cut so that it fits a row, and their ids, which are too many as they are."""
        own = [at for at, part in enumerate(plan) if part.is_own]
        ends = self.tokenizer.ends([plan[at].words for at in own])
        room = sum(map(len, ends))
        while True:
            room -= sum(map(len, runs)) - self.config.max_length
            assert room >= 0, "check() lets no example pass that does not fit without its texts"
            most = _common_length(list(map(len, ends)), room)
            shorter = list(plan)
            for at, behind in zip(own, ends, strict=True):
                if len(behind) > most:
                    shorter[at] = plan[at]._replace(words=plan[at].words[: behind[most - 1] if most else 0])
            row = joined(shorter)
            (runs,) = self.tokenizer.encode_runs([row])
            if sum(map(len, runs)) <= self.config.max_length:  # else joined, or cut within a character, they take more
                return row, runs

    def _image(self, codes: Ids) -> Iterator[Part]:
        """An image that is not trained."""
        yield self._boi
        yield Part(codes)
        yield self._eoi

    def _shifted(self, grid_hw: NDArray[np.unsignedinteger]) -> Ids:
        shifted = grid_hw.reshape(-1).astype(np.int32)
        shifted += self.vocabulary.text_size
        return shifted

    def _count_around_image(self, size: tuple[int, int] | None) -> int:
        """The most tokens that stand beside the codes of a pair, whose text may have shrunk to one."""
        vocabulary = self.vocabulary
        before = [[*vocabulary.before_image("", size, 0)]]
        before += [vocabulary.before_image(".", size, number) for number in range(len(vocabulary.prompts.draw))]
        before += [[self._bos, self._boi, *instruction, Part(words=".", trained=True)] for instruction in self._describe]
        return max(sum(map(len, runs)) for runs in self.tokenizer.encode_runs(list(map(joined, before)))) + 2  # <eoi>, EOS

    def _check_fits(self, key: str, num_tokens: int) -> None:
        if num_tokens > self.config.max_length:
            most = self.config.max_length
            raise Reject("too_long", f"{key} needs rows of {num_tokens} tokens for its images, max_length is {most}")

    def _check_turns(self, sample: Sample) -> None:
        turns = sample.conversations or []
        unknown = [turn["from"] for turn in turns if turn["from"] not in self._turns]
        if unknown:
            raise Reject("unknown_role", f"{sample.key}: a turn is from {unknown[0][:40]!r}, expected human, gpt or system")
        if not any(turn["from"] == "gpt" for turn in turns):
            raise Reject("no_answer", f"{sample.key}: no turn is from gpt, so there is nothing to train")
        marks = sum(turn["value"].count(IMAGE_MARK) for turn in turns)
        num_images = len(_grids(sample))
        has_place = marks == num_images or (not marks and any(turn["from"] == "human" for turn in turns))
        if not has_place:
            raise Reject("image_count", f"{sample.key}: {marks} times {IMAGE_MARK} for {num_images} images with codes")
        wordings = (self._turns[turn["from"]] for turn in turns)
        ids = self.tokenizer.encode_runs([[part for around in turn for part in around] for turn in wordings])
        around = 1 + 2 * num_images + 2 * len(turns) + marks  # BOS, <boi> <eoi>, EOS, and a token of every text
        self._check_fits(sample.key, sample.num_codes + sum(len(run) for runs in ids for run in runs) + around)


def _size_of(sample: Sample) -> tuple[int, int] | None:
    """What an image of many shapes states before its prompt: (width, height)."""
    if sample.data_type != "image_text_multi" or sample.width is None or sample.height is None:
        return None
    return sample.width, sample.height


def _grids(sample: Sample) -> list[Codes]:
    """The grids of a conversation, one an image."""
    return [grid_hw for column in sample.codes for grid_hw in sample.grids_of(column)]


def _common_length(lengths: Sequence[int], room: int) -> int:
    """The greatest length to which texts can be shortened so that they fit the room together."""
    return max(most for most in range(max(lengths) + 1) if sum(min(length, most) for length in lengths) <= room)
