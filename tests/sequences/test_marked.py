"""Samples with any number of images as token rows: images in answers, interleaved documents; which of several texts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factory import CODEBOOK_SIZE, answer_sample, image_sample, page_sample, random_codes
from hypothesis import given
from hypothesis import strategies as st
from properties import tries
from tokenizers import Tokenizer
from tokens import IMAGE_TOKENS, write_tokenizer

from wds_tools.errors import Reject, UsageError
from wds_tools.format.codes import join_grids
from wds_tools.format.schema import Sample
from wds_tools.sequences.build import Example, ExampleBuilder
from wds_tools.sequences.choices import Weights, check_texts, choose_text, is_image_trained, text_weights
from wds_tools.sequences.config import SequenceConfig
from wds_tools.sequences.rows import cut

FRAMES = {
    "liquid": IMAGE_TOKENS,
    "chameleon": ("<racm3:break>", "<eoss>", "<reserved08706>"),
    "emu3": ("<|image start|>", "<|image end|>", "<|extra_200|>", "<|image token|>", "<|extra_201|>"),
}
"""Template -> the tokens around images: what begins one, what ends it, others."""
CODES = 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the tokens of all templates, and names for 16 codes."""
    from wds_tools.sequences.templates import BUILT_IN

    codes = [name for template in BUILT_IN.values() for name in template().code_tokens(CODES)]
    added = tuple(dict.fromkeys((*(name for names in FRAMES.values() for name in names), *codes)))
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small", added=added)


def builder(tokenizer: Path, *, seed: int = 1, **given: Any) -> ExampleBuilder:
    config = {"tokenizer": str(tokenizer), "max_length": 256, "codebook_size": CODEBOOK_SIZE, **given}
    return ExampleBuilder(SequenceConfig(**config), seed, 0)


def built(made: ExampleBuilder, sample: Sample, epoch: int = 0) -> Example:
    made.check(sample)
    (example,) = made.build([sample], [epoch])
    return example


def few(sample: Sample) -> Sample:
    """With codes that all templates have names for."""
    return sample._replace(codes={column: codes % CODES for column, codes in sample.codes.items()})


@pytest.mark.parametrize("template", FRAMES)
def test_an_image_in_an_answer_is_trained_whole_and_prompt_ids_end_before_its_codes(tokenizer: Path, template: str) -> None:
    made = builder(tokenizer, template=template, codebook_size=CODES)
    begin, end = (Tokenizer.from_file(str(tokenizer / "tokenizer.json")).token_to_id(name) for name in FRAMES[template][:2])
    sample = few(answer_sample(3, (2, 3), (3, 2)))
    example = built(made, sample)
    ids, loss = example.ids.tolist(), example.loss.tolist()
    begins, ends = ([at for at, one in enumerate(ids) if one == token] for token in (begin, end))
    assert [len(begins), len(ends)] == [2, 2]
    assert not any(loss[begins[0] : ends[0] + 1])  # what is asked about
    assert all(loss[begins[1] : ends[1] + 1])  # what is answered
    assert ids[ends[1] + 1 :] == [made.vocabulary.eos]
    asked, (_, answer) = sample.conversations, ("", "Here:")
    assert asked is not None
    grids = sample.grids_of("vqcode_512")
    codes = made.vocabulary.ids_of_codes(grids[1]).tolist()
    at = next(at for at in range(len(ids)) if at > begins[1] and ids[at : at + len(codes)] == codes)
    prompt = made.vocabulary.prompt_ids(
        [asked[0], {"from": "gpt", "value": answer}], images=grids[:1], shape=None if template != "emu3" else grids[1].shape
    )
    assert ids[:at] == prompt


def test_a_prompt_of_turns_needs_an_answer_that_was_begun_and_a_mark_for_each_image(tokenizer: Path) -> None:
    made, image = builder(tokenizer), random_codes(1, 2, 2)
    ask, begun = {"from": "human", "value": "<image> In red."}, {"from": "gpt", "value": ""}
    for turns, images in (([ask], [image]), ([ask, begun], []), ([], []), ([{"from": "narrator", "value": ""}, begun], [])):
        with pytest.raises(UsageError, match="expected those of system, human and gpt"):
            made.vocabulary.prompt_ids(turns, images=images)


def test_an_interleaved_document_is_its_texts_and_images_in_order_and_images_are_trained_by_a_share(tokenizer: Path) -> None:
    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    sample = page_sample(4, (2, 3), (1, 4))

    def text(number: int) -> list[int]:
        return list(backend.encode(sample.text.split("<image>")[number], add_special_tokens=False).ids)

    for ratio in (0.0, 1.0):
        made = builder(tokenizer, image_ratio=ratio, document_eos=True)
        own = made.vocabulary
        images = [[own.boi, *own.ids_of_codes(grid).tolist(), own.eoi] for grid in sample.grids_of("vqcode_512")]
        parts = [[own.bos], text(0), images[0], text(1), images[1], text(2), [own.eos]]
        trained = [True, True, ratio == 1, True, ratio == 1, True, True]
        example = built(made, sample)
        assert example.ids.tolist() == [one for part in parts for one in part]
        assert example.loss.tolist() == [flag for part, flag in zip(parts, trained, strict=True) for _ in part]
        assert (example.is_document, example.is_shortened, example.pieces) == (False, False, ())


def test_which_images_are_trained_depends_on_seed_epoch_key_and_number_alone() -> None:
    first = [is_image_trained(42, 0, "000000-00000007", number, 0.5) for number in range(8)]
    assert first == [False, False, True, False, True, True, False, True]
    drawn = [
        [is_image_trained(*draw, 0.3) for draw in draws]
        for draws in (
            [(1, 0, f"{key}", 0) for key in range(4000)],
            [(1, 1, f"{key}", 0) for key in range(4000)],
            [(2, 0, f"{key}", 0) for key in range(4000)],
            [(1, 0, f"{key}", 1) for key in range(4000)],
        )
    ]
    assert all(sum(each) == pytest.approx(1200, abs=120) for each in drawn)
    assert all(1400 < sum(a != b for a, b in zip(drawn[0], other, strict=True)) < 2000 for other in drawn[1:])


SHAPES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=6)
WORDS = st.sampled_from(["", " ", "a ", "some words, ", "many words " * 9, "🐶 Hund "])


@tries(60)
@given(SHAPES, st.data())
def test_a_long_interleaved_document_becomes_pieces_that_begin_with_bos_and_cut_no_image(
    long_builders: dict[str, ExampleBuilder], shapes: list[tuple[int, int]], data: st.DataObject
) -> None:
    words = [data.draw(WORDS) for _ in range(len(shapes) + 1)]
    codes, grids = join_grids([random_codes(number, *shape) for number, shape in enumerate(shapes)], np.dtype("<u2"))
    fields: dict[str, Any] = {"codes": {"vqcode_512": codes}, "grids": {"vqcode_512": grids}}
    sample = Sample(key="page", data_type="interleaved", text="<image>".join(words), **fields)
    whole, short = (built(long_builders[name], sample) for name in ("whole", "short"))
    made = long_builders["short"]
    pieces, bos = cut(short, made.config.max_length), made.vocabulary.bos
    assert [one.ids[0] for one in pieces] == [bos] * len(pieces)
    assert all(len(one.ids) <= made.config.max_length for one in pieces)
    for name in ("ids", "loss"):
        assert [int(one) for piece in pieces for one in getattr(piece, name)[1:]] == getattr(whole, name)[1:].tolist()
    for piece in pieces:
        begun = [made.vocabulary.boi, made.vocabulary.eoi]
        frames = [one for one in piece.ids.tolist() if one in begun]
        assert frames == begun * (len(frames) // 2)
    if len(pieces) > 1:
        assert min(len(one.ids) for one in pieces[:-1]) > made.config.max_length - 2 - 16  # an image of 16 codes did not fit
        assert short.pieces == tuple(len(one.ids) for one in pieces)


@pytest.fixture(scope="module")
def long_builders(tokenizer: Path) -> dict[str, ExampleBuilder]:
    return {name: builder(tokenizer, max_length=length) for name, length in (("whole", 4096), ("short", 24))}


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (page_sample(1, (2, 2))._replace(text="none"), "image_count"),
        (page_sample(1, (16, 16)), "too_long"),
        (page_sample(1)._replace(text=""), None),
        (answer_sample(1, (2, 2))._replace(conversations=[{"from": "gpt", "value": "<image><image>"}]), "image_count"),
    ],
)
def test_what_makes_no_example_is_refused_with_its_key_and_reason(tokenizer: Path, sample: Sample, reason: str | None) -> None:
    made = builder(tokenizer, max_length=64)
    if reason is None:
        assert built(made, sample).ids.tolist() == [made.vocabulary.bos]
        return
    with pytest.raises(Reject, match=sample.key) as caught:
        made.check(sample)
    assert caught.value.reason == reason


TEXTS = {"alt": "a", "recap": "r", "ocr": None, "none": ""}


def test_one_of_several_texts_is_taken_by_its_weight_and_null_leaves_its_weight_to_the_others() -> None:
    def shares(weights: Weights, epoch: int = 0) -> Counter[str]:
        return Counter(choose_text(42, epoch, f"{key}", "own", TEXTS, weights) for key in range(2000))

    assert shares((("alt", 0.1), ("recap", 0.9)))["r"] == pytest.approx(1800, abs=60)
    assert shares((("alt", 1.0), ("none", 7.0), ("ocr", 5.0), ("recap", 3.0)))["r"] == pytest.approx(1500, abs=80)
    assert shares((("alt", 1.0), ("recap", 0.0))) == {"a": 2000}
    assert shares((("ocr", 1.0),)) == {"own": 2000}
    assert shares(()) == {"own": 2000}
    drawn = [
        [choose_text(42, epoch, f"{key}", "", TEXTS, (("alt", 1), ("recap", 1))) for key in range(99)] for epoch in (0, 1, 0)
    ]
    assert drawn[0] == drawn[2] != drawn[1]
    first = [choose_text(42, 0, f"000000-{number:08d}", "", TEXTS, (("alt", 1), ("recap", 1))) for number in range(12)]
    assert "".join(first) == "araraararrar"


def test_weights_of_texts_are_numbers_and_names_that_a_pair_does_not_have_are_refused() -> None:
    assert text_weights("x", {"recap": 1, "alt": 0.5}) == (("alt", 0.5), ("recap", 1.0))
    wrong: list[dict[str, Any]] = [{"a": -1}, {"a": 0}, {"a": float("nan")}, {"a": float("inf")}, {"a": "1"}, {"a": True}]
    for weights in wrong:
        with pytest.raises(UsageError, match="source x: texts="):
            text_weights("source x", weights)
    pair = image_sample(1)
    check_texts(pair.key, pair.data_type, {"alt": None}, (("alt", 1.0),))
    check_texts("page", "interleaved", None, (("alt", 1.0),))
    for texts in (None, {"recap": "r"}):
        with pytest.raises(Reject, match=f"unknown_text: {pair.key} has no text named 'alt'"):
            check_texts(pair.key, pair.data_type, texts, (("alt", 1.0),))
