"""A map-style dataset over a jsonl file, for sets that are small or kept by hand.

    a line -> record (`sources`, as the conversions read it) -> Sample, and the paths of images without codes -> item
                                                                 items -> token rows (`collate`)

Opening scans the file once for line ends and keeps 24 bytes a line; a record is read when it is asked for, by range, so a file of
many gigabytes opens in constant memory otherwise, may lie on object storage, and travels to workers as its offsets alone.
Invariant: of a record nothing that it names is left out without an error, but for what `JsonlDataset` says here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from loaders.reading.fetches import end_with_trainer
from loaders.tokens.rows import RowMaker, sample_of
from wds_tools.errors import DataError, FormatError, Reject, StorageError, UsageError
from wds_tools.format.codes import CODE_COLUMNS, CodeGrid
from wds_tools.format.schema import DATA_TYPES, MARKED_TYPES, PAIR_TYPES, Sample
from wds_tools.records.coded import SIDE_512, CodedRows, codes_in, talk_of
from wds_tools.records.conversations import TalkReader
from wds_tools.records.fields import CAPTION, required_text
from wds_tools.records.images import ImageSource, read_image
from wds_tools.records.interleaved import PageReader
from wds_tools.sequences.choices import check_texts, choose_text, text_weights
from wds_tools.sequences.config import SequenceConfig
from wds_tools.sequences.sources import check_order
from wds_tools.sequences.templates import find_template
from wds_tools.sources.text.objects import MAX_LINE_BYTES, Line, parse_record
from wds_tools.storage import open_store, split_url

_READ_BYTES = 8 << 20
_MOST_TRIED = 64
_MOST_TOLD = 1000
_CODES = "vq_code"
_ANY_CODE = 1 << 31

Item = dict[str, Any]


class JsonlDataset(Dataset[Item]):
    """Records of a jsonl file, by number. Blank lines are no records.

    `dataset[i]` has `__key__` (the line's number), `data_type`, and `text` (the record's `text_prompt`, else its `text`); a
    conversation has `conversations` instead. If the record has codes, `codes`: int64, (n,) of a `vq_code`, (h, w) of Liquid's
    `vqcode_512` or `vqcode_multi768` (the first of the three that it has, and `width` and `height` with the last); images
    beside codes are not read. With `layout` the array of a `vq_code` has its axes: int64, or float32 in place of codes.
    Else, for each image, `pixels_CHW`: uint8 (3, H, W), or what `transform` makes of it.
    A conversation or an interleaved document has lists of codes or pixels, one for each image. Without a `data_type`, records
    with an image or codes are image_text (image_text_multi, with that mode), those with `conversations` visual_sft.

    Args:
        path: the file: a path or URL.
        image_root: folder or URL that image paths are relative to, and may not leave; they may be absolute. By default the file's
            own folder, which they may leave.
        mode: size of images, as `convert pairs --mode` has it; None: as they are, whatever their shape. Needs Pillow.
        size: pixels of a side: a centre square of this size in place of `mode`'s; images beyond 2:1 are refused.
        transform: called with the pixels of each image; its result takes their place.
        stride: pixels of a side for each code of Liquid's columns.
        on_error: "raise" a FormatError for a record that can't be used, or "substitute" the next one that can; see `stats`.
        max_bad: with substitute: more records than this, over all workers, are an error.
        sequences: how items become token rows, for `collate`; a record that makes none can't be used. Its codebook_size says how
            many codes there may be.
        seed: of the choices that token rows leave to chance, and of `texts`.
        layout: of the nested lists in `vq_code`, one image's: their axes and codebooks, or floats. None: a list of codes.
        texts: of pairs with a field `texts`, an object of texts by name: which becomes `text`, as Source(texts=...) has it.

    Raises:
        NotFound: no such file.
        UsageError: it holds no records; or settings that exclude each other; or a layout of which the template of `sequences`
            can't make ids.
    """

    def __init__(
        self,
        path: str,
        *,
        image_root: str | None = None,
        mode: str | None = "cc512",
        size: int | None = None,
        transform: Callable[[torch.Tensor], Any] | None = None,
        stride: int = 16,
        on_error: Literal["raise", "substitute"] = "raise",
        max_bad: int = 100,
        sequences: SequenceConfig | None = None,
        seed: int = 42,
        texts: Mapping[str, float] | None = None,
        layout: CodeGrid | None = None,
    ) -> None:
        self._seed, self._weights = seed, text_weights("JsonlDataset", texts or {})
        if on_error not in ("raise", "substitute"):
            raise UsageError(f"on_error={on_error!r} is not raise or substitute")
        if size is not None and (size < 1 or mode != "cc512"):
            raise UsageError(f"size={size}, mode={mode!r}: a size is at least 1 pixel, and takes the place of a mode")
        if stride < 1 or SIDE_512 % stride:
            raise UsageError(f"stride={stride}, expected a divisor of {SIDE_512}")
        if not isinstance(layout, CodeGrid | None):
            raise UsageError(f"layout={layout!r}, expected a CodeGrid, such as CodeGrid(layout='hw')")
        self._path = path
        root, self._name = split_url(path)
        self._store = open_store(root)
        self._images = ImageSource(path, image_root)
        self._mode = mode if size is None else size
        self._transform = transform
        self._rows = CodedRows(_ANY_CODE, stride)
        self._on_error, self._max_bad = on_error, max_bad
        self._layout = CodeGrid(layout=layout.layout, dtype="float32") if layout is not None and layout.is_float else layout
        if sequences is not None and layout is not None:
            check_order(f"{path}: {_CODES}", layout, find_template(sequences.template))
        self._maker = RowMaker(sequences, seed, ()) if sequences is not None else None
        self._epoch = 0
        self._starts, self._ends, self._numbers = self._scan()
        if not len(self._starts):
            raise UsageError(f"{path} holds no records")
        num_flags = len(self) if on_error == "substitute" else 0
        self._bad = torch.zeros(num_flags, dtype=torch.bool, device="cpu").share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        """Number of records."""
        return len(self._starts)

    def __getitem__(self, number: int) -> Item:
        """Record `number` (negative counts from the end).

        Raises:
            IndexError: out of range.
            FormatError: it can't be used, and neither, if it was to be substituted, can the next 64; names the file and the line.
            DataError: more than max_bad can't be used.
            StorageError: the file or an image can't be read, through no fault of the record's.
        """
        end_with_trainer()
        try:
            return self._item(number)
        except FormatError as error:
            if self._on_error == "raise":
                raise
            return self._substitute(range(len(self))[number], error)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the token rows that `collate` makes, and of `texts`. Call it before the workers start.

        Args:
            epoch: from 0.
        """
        self._epoch = epoch

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        """Token rows of items, for `DataLoader(dataset, collate_fn=dataset.collate)`: padded batches as build_loader makes them.

        Args:
            items: of this dataset.

        Returns:
            Columns of the batch: lists, and tensors of B rows.

        Raises:
            UsageError: the dataset has no `sequences`.
        """
        if self._maker is None:
            raise UsageError("collate makes token rows: give JsonlDataset sequences=SequenceConfig(...)")
        epochs = np.full(len(items), self._epoch)
        columns = self._maker.padded([_tokens_of(item) for item in items], epochs, [self._path] * len(items))
        assert columns.tokens is not None
        return {**columns.lists, **columns.tokens.to_columns()}

    def stats(self) -> dict[str, int]:
        """What became of records with on_error="substitute".

        Returns:
            `bad`, the records that could not be used so far, and `bad_REASON`; in all workers.
        """
        problems = [self._problem(number) for number in self._bad.nonzero().flatten().tolist()]
        return {"bad": len(problems), **Counter(f"bad_{_reason(error)}" for error in problems)}

    def validate(self) -> dict[str, Any]:
        """Read all records as `dataset[i]` does, images included.

        Returns:
            `records`, how many; `bad`, those that can't be used, by reason; `problems`, a sentence with file and line for each
            of the first 1,000 of them.
        """
        bad: Counter[str] = Counter()
        problems: list[str] = []
        for number in range(len(self)):
            if (error := self._problem(number)) is not None:
                bad[_reason(error)] += 1
                problems += [str(error)] if len(problems) < _MOST_TOLD else []
        return {"records": len(self), "bad": dict(sorted(bad.items())), "problems": problems}

    def _substitute(self, number: int, error: FormatError) -> Item:
        for step in range(_MOST_TRIED):
            self._bad[(number + step) % len(self)] = True
            if (num_bad := int(self._bad.sum())) > self._max_bad:
                raise DataError(f"{num_bad} records can't be used, max_bad={self._max_bad}; one of them: {error}") from error
            with suppress(FormatError):
                return self._item((number + step + 1) % len(self))
        raise FormatError(f"{error}; nor can any of the next {_MOST_TRIED} be used") from error

    def _problem(self, number: int) -> FormatError | None:
        try:
            self._item(number)
        except FormatError as error:
            return error
        return None

    def _item(self, number: int) -> Item:
        start, end, line = int(self._starts[number]), int(self._ends[number]), int(self._numbers[number])
        where = f"{self._path}, line {line}"
        try:
            data = bytes(self._store.read_range(self._name, start, end)) if end - start <= MAX_LINE_BYTES else None
            record = parse_record(Line(line, data))
            sample, paths = self._sample(str(line), record)
            check_texts(sample.key, sample.data_type, sample.texts, self._weights)
            if self._maker is not None:
                self._maker.builder.check(sample)
            pixels = [self._pixels(path) for path in paths]
        except Reject as cause:
            raise FormatError(f"{where}: {cause}") from cause
        except StorageError as error:
            error.add_note(f"It was read for {where}.")
            raise
        is_marked = sample.data_type in MARKED_TYPES
        text = choose_text(self._seed, self._epoch, sample.key, sample.text, sample.texts, self._weights)
        item: Item = {"__key__": sample.key, "data_type": sample.data_type, "text": text}
        item |= {"conversations": sample.conversations} if sample.conversations is not None else {}
        if sample.width is not None:
            item |= {"width": sample.width, "height": sample.height}
        for column in list(sample.codes)[:1]:
            grids = [torch.from_numpy(one if one.dtype.kind == "f" else one.astype(np.int64)) for one in sample.grids_of(column)]
            item["codes"] = grids if is_marked else grids[0]
        if pixels:
            item["pixels_CHW"] = pixels if is_marked else pixels[0]
        return item

    def _sample(self, key: str, record: dict[str, Any]) -> tuple[Sample, list[str]]:
        """The sample of a record, and the paths of its images if it has no codes. Raises Reject."""
        columns = [column for column in (_CODES, *CODE_COLUMNS) if codes_in(record, column) is not None]
        kind = record.get("data_type") or self._kind(record, has_image=bool(columns) or record.get("image_path") is not None)
        if kind not in DATA_TYPES:
            raise Reject("unknown_data_type", f"data_type is {kind!r}, expected one of {', '.join(DATA_TYPES)}")
        paths: list[str] = []
        if kind == "visual_sft":
            talk = record if "conversations" in record else talk_of(record)
            sample = self._rows.conversation(key, record, talk)
            paths = [] if columns else _paths(TalkReader().read(talk).images)
        elif kind == "interleaved":
            page = None if columns else PageReader().read(record)
            sample = self._rows.page(key, record) if page is None else Sample(key, kind, page.text)
            paths = [] if page is None else _paths(page.images)
        else:
            sample = Sample(key, kind, required_text(record, CAPTION))
            if kind == "text_pretrain":
                if columns or record.get("image_path") is not None:
                    raise Reject("wrong_type", f"text_pretrain with {(*columns, 'image_path')[0]}: a document has no image")
            elif not columns:
                paths = [required_text(record, ("image_path",))]
            elif columns[0] != _CODES:
                sample = self._rows.sample(key, {**record, "data_type": kind, "text": sample.text})
        if columns[:1] == [_CODES]:
            sample = sample._replace(codes={_CODES: self._vq_code(codes_in(record, _CODES) or [])}, grids=None)
        if kind in PAIR_TYPES and (texts := record.get("texts")) is not None:
            if not isinstance(texts, dict) or not all(isinstance(text, str | None) for text in texts.values()):
                raise Reject("wrong_type", f"texts is {str(texts)[:40]!r}, expected an object of texts, or null, by name")
            sample = sample._replace(texts=texts)
        return sample._replace(codes=dict(list(sample.codes.items())[:1])), paths

    def _vq_code(self, value: list[Any]) -> NDArray[Any]:
        """What a list is, of the layout that was given. Raises Reject."""
        if self._layout is None:
            return self._rows.values(_CODES, value)
        array = self._rows.array(self._layout, _CODES, value)
        try:
            self._layout.check_values(_CODES, array)
        except FormatError as error:
            raise Reject("bad_codes", str(error)) from error
        return array

    def _kind(self, record: dict[str, Any], has_image: bool) -> str | None:
        """What a record is that does not say it; None: who knows."""
        if "conversations" in record:
            return "visual_sft"
        is_multi = isinstance(self._mode, str) and not self._mode.startswith("cc")
        return PAIR_TYPES[is_multi] if has_image else None

    def _pixels(self, image_path: str) -> Any:
        from wds_tools.images import ImageLimits, prepare

        pixels_HWC = prepare(read_image(image_path, ImageLimits.max_bytes, self._images.read), self._mode)
        pixels_CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1).contiguous()
        return pixels_CHW if self._transform is None else self._transform(pixels_CHW)

    def _scan(self) -> tuple[Any, Any, Any]:
        """Start and end (without its newline) of each line that is not empty, and its number from 1."""
        newlines = [np.array([-1])]
        ends = []
        at, last = 0, b"\n"
        with self._store.open(self._name) as stream:
            while chunk := stream.read(_READ_BYTES):
                data = np.frombuffer(last + chunk, np.uint8)
                found = np.flatnonzero(data[1:] == ord("\n"))
                newlines.append(found + at)
                ends.append(found + at - (data[found] == ord("\r")))
                at += len(chunk)
                last = chunk[-1:]
        starts = np.concatenate(newlines) + 1
        stops = np.concatenate([*ends, np.array([at])])
        kept = stops > starts
        return starts[kept], stops[kept], np.flatnonzero(kept) + 1


def _paths(images: Sequence[Any]) -> list[str]:
    """Those of images; what is none is a Reject."""
    return [required_text({"image": image}, ("image",)) for image in images]


def _reason(error: FormatError | None) -> str:
    """A short word for a count."""
    cause = error and error.__cause__
    return cause.reason if isinstance(cause, Reject) else "changed"


def _tokens_of(item: Item) -> Sample:
    """What token rows are made of."""
    codes = item.get("codes", [])
    grids = [grid.numpy() for grid in (codes if isinstance(codes, list) else [codes])]
    return sample_of(item["__key__"], {"width": None, "height": None, **item}, grids)
