"""Samples -> examples: ids, and which of them are trained. The forms, with BOS where the tokenizer has one:

    text to image   BOS text [size] prompt <boi> codes <eoi> EOS        trained: codes <eoi> EOS
      without text  BOS [size] <unconditional> <boi> codes <eoi> EOS    the same
    caption         BOS <boi> codes <eoi> instruction text EOS          text EOS
    document        BOS text [EOS]                                      all
    conversation    BOS turns, <boi> codes <eoi> for each <image>       answers, with their images, each with its EOS
    interleaved     BOS text, <boi> codes <eoi> for each <image> [EOS]  text; images by a share

What <boi> and <eoi> are, what else stands around and between codes, and where their ids are: templates.py. Which form, which
wording, whether the text is dropped, and which images of an interleaved document are trained: choices.py.
Texts and wordings that stand side by side are one string, tokenized in one call, as inference does it; they are apart where an
image or a special token stands between them, and where the loss begins or ends, since a prompt ends there.
Invariant: an image is whole. Where texts leave no room for it in a row, the longest are shortened to one length, before they are
joined, and counted; a document is never cut here. An interleaved one that is longer than a row becomes pieces, each with BOS: its
texts are cut anywhere, images never.
Cost: all texts of a call are tokenized at once; the rest is about 15 us a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from itertools import accumulate, islice, pairwise, zip_longest
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from wds_tools.errors import FormatError, Reject
from wds_tools.format.codes import Codes, check_range
from wds_tools.format.schema import IMAGE_MARK, PAIR_TYPES, Sample
from wds_tools.sequences.choices import choose, is_image_trained
from wds_tools.sequences.config import SequenceConfig
from wds_tools.sequences.tokenizer import NO_IDS, Ids, Part, TextTokenizer, joined
from wds_tools.sequences.vocabulary import ROLES, Shape, Size, find_vocabulary, ids_of

ROWS_VERSION = 2
"""Which ids an example has. 1: texts and wordings were tokenized apart."""
_DOCUMENT, _INTERLEAVED = "text_pretrain", "interleaved"

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
    pieces: tuple[int, ...] = ()
    """Of an interleaved document that is longer than a row: tokens of each piece, at most max_length, which are examples of
    their own, in this order. (): it is one example."""


class ExampleBuilder:
    """Makes examples.

    A document and a caption, with a tokenizer of three words, which knows one word of the wording ("Write a caption for it."):

    >>> import os, tempfile
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> names = "<s> </s> <boi> <eoi> <unconditional> <unk> a red cat".split()
    >>> words = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> _ = words.add_special_tokens(names[:6])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     words.save(path := os.path.join(folder, "tokenizer.json"))
    ...     config = SequenceConfig(tokenizer=path, max_length=32, bos="<s>", eos="</s>", t2i_ratio=0)
    ...     builder = ExampleBuilder(config, seed=1, codebook_size=16)
    >>> document = Sample(key="document", data_type="text_pretrain", text="a red cat")
    >>> pair = Sample(key="pair", data_type="image_text", text="a red cat", codes={"vqcode_512": np.array([[3, 5]])})
    >>> for example in builder.build([document, pair], epochs=[0, 0]):
    ...     print(example.ids.tolist(), example.loss.astype(int).tolist())
    [0, 6, 7, 8] [1, 1, 1, 1]
    [0, 2, 12, 14, 3, 5, 6, 5, 5, 5, 5, 6, 7, 8, 1] [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]

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
        self._around = {role: [part for words in getattr(prompts, role) for part in wording(words)] for role in ROLES}
        self._bos, self._eos = Part(ids_of(self.vocabulary.bos)), Part(ids_of(self.vocabulary.eos), True)
        self._most_tokens = lru_cache(4096)(self._count_most_tokens)

    @property
    def spec(self) -> dict[str, Any]:
        """All that examples depend on beside seed, epoch and sample, as plain JSON values, wherever the files lie."""
        template = asdict(self.vocabulary.template)
        content = {"tokenizer": self.tokenizer.backend.to_str().encode(), "prompts": repr(template["prompts"]).encode()}
        given = asdict(self.config)
        if self.config.image_ratio == SequenceConfig.image_ratio:  # nothing of it: states from before it was there stay good
            del given["image_ratio"]
        settings = {name: template.get(name, value) for name, value in given.items() if name != "template"}
        hashes = {name: xxhash.xxh3_128_hexdigest(data) for name, data in content.items()}
        settings |= hashes | {"codebook_size": self.vocabulary.codebook_size}
        return {"version": ROWS_VERSION, **self.vocabulary.template.spec, **settings}

    def check(self, sample: Sample) -> None:
        """Raise Reject if no example can be made of a valid sample, whatever chance says."""
        key = sample.key
        for column in sample.codes:
            try:
                for codes in sample.grids_of(column):
                    check_range(f"{key}: {column}", self.vocabulary.template.to_ids(codes), self.vocabulary.codebook_size)
            except FormatError as error:
                raise Reject("code_out_of_range", str(error)) from error
        if sample.data_type in PAIR_TYPES:
            if not sample.codes:
                raise Reject("no_codes", f"{key} is {sample.data_type} without codes: run `wds-tools encode` first")
            (codes,) = sample.codes.values()
            self._check_fits(key, self._most_tokens(_size_of(sample), codes.shape))
        elif sample.data_type == "visual_sft":
            self._check_turns(sample)
        elif sample.data_type in (_DOCUMENT, _INTERLEAVED):
            if not (sample.text or len(self._bos.ids) or self.config.document_eos):
                raise Reject("no_tokens", f"{key} is a document without text, and without BOS and EOS it makes no token")
            if sample.data_type == _INTERLEAVED:
                images = self._checked_images(sample, sample.text.count(IMAGE_MARK))
                self._check_fits(key, len(self._bos.ids) + max(map(self._length, images), default=0))
        else:
            raise Reject("unknown_data_type", f"{key}: there is no form for data_type={sample.data_type!r}")

    def build(self, samples: Sequence[Sample], epochs: Sequence[int]) -> list[Example]:
        """The examples of samples that `check` accepts.

        Args:
            samples: any number; their texts are tokenized together.
            epochs: of each in its source.

        Returns:
            Examples whose arrays are views of two arrays that all of the call share, but for interleaved documents.
        """
        plans = [self._plan(sample, epoch) for sample, epoch in zip(samples, epochs, strict=True)]
        rows = [joined(unit) for plan in plans for unit in plan]
        units = iter(zip(rows, self.tokenizer.encode_runs(rows), strict=True))
        made: list[tuple[list[Part], list[Ids], bool]] = []
        pages: dict[int, Example] = {}
        for number, (sample, plan) in enumerate(zip(samples, plans, strict=True)):
            own = list(islice(units, len(plan)))
            if sample.data_type == _INTERLEAVED:
                pages[number] = self._in_pieces(sample.key, own)
                made.append(([], [], False))
                continue
            ((parts, runs),) = own
            is_shortened = sample.data_type != _DOCUMENT and sum(map(len, runs)) > self.config.max_length
            made.append((*(self._shortened(plan[0], runs) if is_shortened else (parts, runs)), is_shortened))
        sizes = [len(run) for _, runs, _ in made for run in runs]
        ids = np.concatenate([NO_IDS, *(run for _, runs, _ in made for run in runs)])
        loss = np.repeat(np.array([part.trained for parts, *_ in made for part in parts], np.bool_), sizes)
        examples, begin = [], 0
        for sample, (_, runs, is_shortened) in zip(samples, made, strict=True):
            taken = slice(begin, begin := begin + sum(map(len, runs)))
            examples.append(Example(sample.key, ids[taken], loss[taken], sample.data_type == _DOCUMENT, is_shortened))
        return [pages.get(number, example) for number, example in enumerate(examples)]

    def _plan(self, sample: Sample, epoch: int) -> list[list[Part]]:
        """The parts of an example; of an interleaved document apart: BOS, and each text and image."""
        begin, end = self._bos._replace(trained=True), [self._eos] if self.config.document_eos else []
        if sample.data_type == _DOCUMENT:
            return [[begin, Part(words=sample.text, is_own=True, trained=True), *end]]
        if sample.data_type == "visual_sft":
            return [[self._bos, *self.vocabulary.turns(sample.conversations or (), _grids_of(sample))]]
        if sample.data_type == _INTERLEAVED:
            draws = (self._seed, epoch, sample.key)
            units = [[begin]]
            for number, (words, codes) in enumerate(zip_longest(sample.text.split(IMAGE_MARK), _grids_of(sample))):
                units.append([Part(words=words, is_own=True, trained=True)])
                if codes is not None:
                    is_trained = is_image_trained(*draws, number, self.config.image_ratio)
                    units.append(self.vocabulary.image(codes, trained=is_trained))
            return [*units, end]
        (codes,) = sample.codes.values()
        choice = choose(self._seed, epoch, sample.key)
        if choice.form >= self.config.t2i_ratio and sample.text:
            return [self._caption(sample.text, choice.wording, codes)]
        text = "" if choice.drop < self.config.unconditional_ratio else sample.text
        return [self._text_to_image(text, _size_of(sample), choice.wording, codes)]

    def _text_to_image(self, text: str, size: Size | None, wording: int, codes: Codes) -> list[Part]:
        before = self.vocabulary.before_image(text, size, wording, codes.shape)
        return [*before, *self.vocabulary.codes(self.vocabulary.ids_of_codes(codes), trained=True), self._eos]

    def _caption(self, text: str, wording: int, codes: Codes) -> list[Part]:
        instruction = self._describe[wording % len(self._describe)]
        caption = Part(words=text, is_own=True, trained=True)
        return [self._bos, *self.vocabulary.image(codes), *instruction, caption, self._eos]

    def _in_pieces(self, key: str, units: Sequence[tuple[list[Part], list[Ids]]]) -> Example:
        """An interleaved document of BOS, and its texts and images."""
        _, *rest = units
        ends = [*accumulate(sum(map(len, runs)) for _, runs in rest)]
        images = [span for (parts, _), span in zip(rest, pairwise([0, *ends]), strict=True) if parts and not parts[0].is_own]
        ids = np.concatenate([NO_IDS, *(run for _, runs in rest for run in runs)])
        trained = [(part.trained, len(run)) for unit in rest for part, run in zip(*unit, strict=True)]
        loss = np.repeat(np.array([flag for flag, _ in trained], np.bool_), [size for _, size in trained])
        bos = self._bos.ids
        room, cuts = self.config.max_length - len(bos), [0]
        while (end := cuts[-1] + room) < len(ids):
            cuts.append(next((low for low, high in images if low < end < high), end))
        if len(bos):
            ids, loss = np.insert(ids, cuts, bos), np.insert(loss, cuts, [True])
        pieces = [high - low + len(bos) for low, high in pairwise([*cuts, ends[-1]])]
        return Example(key, ids, loss, False, pieces=tuple(pieces) if len(cuts) > 1 else ())

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

    def _count_most_tokens(self, size: Size | None, shape: Shape) -> int:
        """The most tokens of a pair with codes of this shape, whose text may have shrunk to one."""
        codes = np.zeros(shape, np.uint16)
        plans = [self._text_to_image("", size, 0, codes)]
        plans += [self._text_to_image(".", size, number, codes) for number in range(len(self.vocabulary.prompts.draw))]
        plans += [self._caption(".", number, codes) for number in range(len(self._describe))]
        return max(map(self._length, map(joined, plans)))

    def _length(self, runs: Sequence[Part]) -> int:
        return sum(map(len, self.tokenizer.encode_runs([runs])[0]))

    def _check_fits(self, key: str, num_tokens: int) -> None:
        if num_tokens > self.config.max_length:
            most = self.config.max_length
            raise Reject("too_long", f"{key} needs rows of {num_tokens} tokens for its images, max_length is {most}")

    def _check_turns(self, sample: Sample) -> None:
        turns = sample.conversations or []
        unknown = [turn["from"] for turn in turns if turn["from"] not in ROLES]
        if unknown:
            raise Reject("unknown_role", f"{sample.key}: a turn is from {unknown[0][:40]!r}, expected human, gpt or system")
        if not any(turn["from"] == "gpt" for turn in turns):
            raise Reject("no_answer", f"{sample.key}: no turn is from gpt, so there is nothing to train")
        marks = sum(turn["value"].count(IMAGE_MARK) for turn in turns)
        images = self._checked_images(sample, marks or None if any(turn["from"] == "human" for turn in turns) else marks)
        wordings = [part for turn in turns for part in self._around[turn["from"]]]
        others = 1 + 2 * len(turns) + marks  # BOS, EOS, and a token of every text
        self._check_fits(sample.key, self._length([*wordings, *(part for image in images for part in image)]) + others)

    def _checked_images(self, sample: Sample, marks: int | None) -> list[list[Part]]:
        """The images of a sample with so many marks; None: with any number. Raises Reject."""
        images = list(map(self.vocabulary.image, _grids_of(sample)))
        if marks not in (None, len(images)):
            raise Reject("image_count", f"{sample.key}: {marks} times {IMAGE_MARK} for {len(images)} images with codes")
        return images


def _grids_of(sample: Sample) -> Iterator[Codes]:
    """The codes of each image."""
    return (grid for column in sample.codes for grid in sample.grids_of(column))


def _size_of(sample: Sample) -> Size | None:
    """What an image of many shapes states before its prompt: (width, height)."""
    if sample.data_type != "image_text_multi" or sample.width is None or sample.height is None:
        return None
    return sample.width, sample.height


def _common_length(lengths: Sequence[int], room: int) -> int:
    """The greatest length to which texts can be shortened so that they fit the room together."""
    return max(most for most in range(max(lengths) + 1) if sum(min(length, most) for length in lengths) <= room)
