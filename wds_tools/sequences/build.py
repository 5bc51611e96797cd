"""Samples -> examples: ids, and which of them are trained. The forms, with BOS where the tokenizer has one:

    text to image   BOS text [size] prompt <boi> codes <eoi> EOS        trained: codes <eoi> EOS
      without text  BOS [size] <unconditional> <boi> codes <eoi> EOS    the same
    caption         BOS <boi> codes <eoi> instruction text EOS          text EOS
    document        BOS text [EOS]                                      all
    conversation    BOS turns, <boi> codes <eoi> for each <image>       answers, each with its EOS

Codes are shifted behind the text vocabulary. Which form, which wording, and whether the text is dropped: choices.py.
Invariant: an image is whole. Where texts leave no room for it in a row, the longest are shortened to one length, and counted;
a document is never cut here.
Cost: all texts of a call are tokenized at once; the rest is about 15 us a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from wds_tools.errors import Reject
from wds_tools.format.schema import Codes, Sample
from wds_tools.sequences.choices import choose
from wds_tools.sequences.config import SequenceConfig
from wds_tools.sequences.prompts import read_prompts
from wds_tools.sequences.tokenizer import Ids, TextTokenizer
from wds_tools.sequences.vocabulary import find_vocabulary

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


class _Part(NamedTuple):
    """A run of ids of an example, all trained or none."""

    ids: Ids
    trained: bool = False
    text: int = -1
    """If not negative: the ids are those of this text of the call, not yet known."""


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
        prompts = read_prompts(config.prompts)
        self._prompts = asdict(prompts)
        encode = self.tokenizer.encode_template
        self._draw = [encode(text) for text in prompts.draw]
        self._describe = [encode(text) for text in prompts.describe]
        self._turns = {
            role: tuple(map(encode, turn))
            for role, turn in (("system", prompts.system), ("human", prompts.human), ("gpt", prompts.gpt))
        }
        self._size = lru_cache(4096)(lambda width, height: encode(prompts.size.format(width=width, height=height)))
        vocabulary = self.vocabulary
        self._bos, self._boi, self._eoi = (_Part(_ids(token)) for token in (vocabulary.bos, vocabulary.boi, vocabulary.eoi))
        self._trained_bos, self._trained_eoi = (part._replace(trained=True) for part in (self._bos, self._eoi))
        self._eos = _Part(_ids(vocabulary.eos), True)
        self._unconditional = _Part(_ids(vocabulary.unconditional))
        longest = (max(map(len, wordings)) for wordings in (self._draw, self._describe))
        self._around_image = max(longest) + 5  # BOS, <boi>, <eoi>, EOS, and a token of text

    @property
    def recipe(self) -> dict[str, Any]:
        """All that examples depend on beside seed, epoch and sample, as plain JSON values, wherever the files lie."""
        content = {"tokenizer": self.tokenizer.backend.to_str().encode(), "prompts": repr(self._prompts).encode()}
        hashes = {name: xxhash.xxh3_128_hexdigest(data) for name, data in content.items()}
        return {**asdict(self.config), **hashes, "codebook_size": self.vocabulary.codebook_size}

    def check(self, sample: Sample) -> None:
        """Raise Reject if no example can be made of a valid sample, whatever chance says."""
        key = sample.key
        for column, grid_hw in sample.codes.items():
            if (code := int(grid_hw.max(initial=0))) >= self.vocabulary.codebook_size:
                raise Reject(
                    "code_out_of_range",
                    f"{key}: {column} holds the code {code}; the codebook has {self.vocabulary.codebook_size} entries",
                )
        if sample.data_type in _PAIRS:
            if not sample.codes:
                raise Reject("no_codes", f"{key} is {sample.data_type} without codes: run `wds-tools encode` first")
            self._check_fits(key, sample.num_codes + self._around_image + len(self._size_of(sample)))
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
        texts: list[str] = []
        plans = [self._plan(sample, epoch, texts) for sample, epoch in zip(samples, epochs, strict=True)]
        encoded = self.tokenizer.encode(texts)
        runs = [self._runs(sample, plan, encoded) for sample, plan in zip(samples, plans, strict=True)]
        sizes = [len(run) for own, _ in runs for run in own]
        ids = np.concatenate([_NOTHING, *(run for own, _ in runs for run in own)])
        loss = np.repeat(np.array([part.trained for plan in plans for part in plan], np.bool_), sizes)
        examples, begin = [], 0
        for sample, (own, is_shortened) in zip(samples, runs, strict=True):
            taken = slice(begin, begin := begin + sum(map(len, own)))
            examples.append(Example(sample.key, ids[taken], loss[taken], sample.data_type == _DOCUMENT, is_shortened))
        return examples

    def _plan(self, sample: Sample, epoch: int, texts: list[str]) -> list[_Part]:
        """The parts of an example; the texts among them go to `texts`."""
        if sample.data_type == _DOCUMENT:
            document = [self._trained_bos, _text(sample.text, texts, True)]
            return [*document, self._eos] if self.config.document_eos else document
        if sample.data_type == "visual_sft":
            return [self._bos, *self._conversation(sample, texts)]
        (grid_hw,) = sample.codes.values()
        codes = self._shifted(grid_hw)
        choice = choose(self._seed, epoch, sample.key)
        if choice.form >= self.config.t2i_ratio and sample.text:
            instruction = self._describe[choice.wording % len(self._describe)]
            return [self._bos, *self._image(codes), _Part(instruction), _text(sample.text, texts, True), self._eos]
        size = _Part(self._size_of(sample))
        if choice.drop < self.config.unconditional_ratio or not sample.text:
            before = [size, self._unconditional]
        else:
            before = [_text(sample.text, texts), size, _Part(self._draw[choice.wording % len(self._draw)])]
        return [self._bos, *before, self._boi, _Part(codes, True), self._trained_eoi, self._eos]

    def _conversation(self, sample: Sample, texts: list[str]) -> Iterator[_Part]:
        images = [self._shifted(grid_hw) for grid_hw in _grids(sample)]
        turns = sample.conversations or []
        are_marked = any(IMAGE_MARK in turn["value"] for turn in turns)
        for turn in turns:
            before, behind = self._turns[turn["from"]]
            is_answer = turn["from"] == "gpt"
            yield _Part(before)
            if not are_marked and turn["from"] == "human":
                while images:
                    yield from self._image(images.pop(0))
            first, *others = turn["value"].split(IMAGE_MARK)
            yield _text(first, texts, is_answer)
            for words in others:
                yield from self._image(images.pop(0))
                yield _text(words, texts, is_answer)
            yield _Part(behind)
            if is_answer:
                yield self._eos

    def _runs(self, sample: Sample, plan: list[_Part], encoded: Sequence[Ids]) -> tuple[list[Ids], bool]:
        """The ids of each part of an example, and whether its texts were shortened to fit a row."""
        runs = [encoded[part.text] if part.text >= 0 else part.ids for part in plan]
        if sample.data_type == _DOCUMENT or sum(map(len, runs)) <= self.config.max_length:
            return runs, False
        texts = [at for at, part in enumerate(plan) if part.text >= 0]
        fixed = sum(len(run) for at, run in enumerate(runs) if at not in texts)
        most = _common_length([len(runs[at]) for at in texts], self.config.max_length - fixed)
        for at in texts:
            runs[at] = runs[at][:most]
        return runs, True

    def _image(self, codes: Ids) -> Iterator[_Part]:
        """An image that is not trained."""
        yield self._boi
        yield _Part(codes)
        yield self._eoi

    def _shifted(self, grid_hw: NDArray[np.unsignedinteger]) -> Ids:
        shifted = grid_hw.reshape(-1).astype(np.int32)
        shifted += self.vocabulary.text_size
        return shifted

    def _size_of(self, sample: Sample) -> Ids:
        """The sentence that states the size of an image of many shapes; nothing for others."""
        if sample.data_type != "image_text_multi" or sample.width is None or sample.height is None:
            return _NOTHING
        return self._size(sample.width, sample.height)

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
        wordings = sum(len(ids) for turn in turns for ids in self._turns[turn["from"]])
        around = 1 + 2 * num_images + 2 * len(turns) + marks  # BOS, <boi> <eoi>, EOS, and a token of every text
        self._check_fits(sample.key, sample.num_codes + wordings + around)


_NOTHING = np.zeros(0, np.int32)


def _grids(sample: Sample) -> list[Codes]:
    """The grids of a conversation, one an image."""
    return [grid_hw for column in sample.codes for grid_hw in sample.grids_of(column)]


def _common_length(lengths: Sequence[int], room: int) -> int:
    """The greatest length to which texts can be shortened so that they fit the room together."""
    return max(most for most in range(max(lengths) + 1) if sum(min(length, most) for length in lengths) <= room)


def _ids(token: int | None) -> Ids:
    return _NOTHING if token is None else np.array([token], np.int32)


def _text(text: str, texts: list[str], trained: bool = False) -> _Part:
    texts.append(text)
    return _Part(_NOTHING, trained, len(texts) - 1)
