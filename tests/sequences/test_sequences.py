"""Samples as token sequences: every form, token by token, with tokenizers that are real; what is cut, shortened and refused."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import environment, shared
from factory import CODEBOOK_SIZE, image_sample, multi_sample, random_codes, text_sample
from tokenizers import Tokenizer
from tokens import IMAGE_TOKENS, write_tokenizer

from wds_tools.errors import Reject, StorageError, TokenizerError, UsageError
from wds_tools.format.codes import join_grids
from wds_tools.format.schema import Sample
from wds_tools.sequences.build import Example, ExampleBuilder
from wds_tools.sequences.choices import choose
from wds_tools.sequences.config import SequenceConfig
from wds_tools.sequences.prompts import Prompts
from wds_tools.sequences.sources import codebook_size_of
from wds_tools.sequences.vocabulary import add_tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


def builder(tokenizer: Path, *, seed: int = 1, codebook_size: int = CODEBOOK_SIZE, **settings: Any) -> ExampleBuilder:
    config = SequenceConfig(**{"tokenizer": str(tokenizer), "max_length": 256, **settings})
    return ExampleBuilder(config, seed, codebook_size)


def built(tokenizer: Path, sample: Sample, **settings: Any) -> Example:
    made = builder(tokenizer, **settings)
    made.check(sample)
    (example,) = made.build([sample], [0])
    return example


class Expected:
    """Says what a row should be, by the tokenizers library alone."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.bos, self.eos = self.ids("<s></s>")

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def codes(self, sample: Sample) -> list[int]:
        (grid,) = sample.codes.values()
        return [self.tokenizer.get_vocab_size() + code for code in grid.reshape(-1).tolist()]


def row(*parts: tuple[Sequence[int], bool]) -> tuple[list[int], list[bool]]:
    """Ids and their loss, from (ids, trained) parts."""
    return [token for ids, _ in parts for token in ids], [trained for ids, trained in parts for _ in ids]


def as_row(example: Example) -> tuple[list[int], list[bool]]:
    return example.ids.tolist(), example.loss.tolist()


def wording(sample: Sample, kind: str, seed: int = 1) -> str:
    wordings: tuple[str, ...] = getattr(Prompts(), kind)
    return wordings[choose(seed, 0, sample.key).wording % len(wordings)]


def test_text_to_image_trains_codes_eoi_and_eos(tokenizer: Path) -> None:
    sample, is_ = image_sample(3), Expected(tokenizer)
    (boi,), (eoi,) = is_.ids("<boi>"), is_.ids("<eoi>")
    before = [is_.bos, *is_.ids(sample.text), *is_.ids(wording(sample, "draw")), boi]
    example = built(tokenizer, sample, t2i_ratio=1, unconditional_ratio=0)
    assert as_row(example) == row((before, False), ([*is_.codes(sample), eoi, is_.eos], True))


def test_without_guidance_the_unconditional_token_stands_for_text_and_prompt(tokenizer: Path) -> None:
    sample, is_ = image_sample(3), Expected(tokenizer)
    example = built(tokenizer, sample, t2i_ratio=1, unconditional_ratio=1)
    before = [is_.bos, *is_.ids("<unconditional><boi>")]
    assert as_row(example) == row((before, False), ([*is_.codes(sample), *is_.ids("<eoi>"), is_.eos], True))


def test_a_caption_trains_text_and_eos(tokenizer: Path) -> None:
    sample, is_ = image_sample(3), Expected(tokenizer)
    before = [is_.bos, *is_.ids("<boi>"), *is_.codes(sample), *is_.ids("<eoi>"), *is_.ids(wording(sample, "describe"))]
    example = built(tokenizer, sample, t2i_ratio=0)
    assert as_row(example) == row((before, False), ([*is_.ids(sample.text), is_.eos], True))


@pytest.mark.parametrize("dropped", [False, True])
def test_images_of_many_shapes_state_their_size_before_prompt_and_unconditional(tokenizer: Path, dropped: bool) -> None:
    sample, is_ = multi_sample(3, height=32, width=96), Expected(tokenizer)
    size = is_.ids("\nThe picture is 96 pixels wide and 32 pixels high.")
    text = [*size, *is_.ids("<unconditional>")] if dropped else [*is_.ids(sample.text), *size, *is_.ids(wording(sample, "draw"))]
    example = built(tokenizer, sample, t2i_ratio=1, unconditional_ratio=float(dropped))
    trained = [*is_.codes(sample), *is_.ids("<eoi>"), is_.eos]
    assert as_row(example) == row(([is_.bos, *text, *is_.ids("<boi>")], False), (trained, True))


@pytest.mark.parametrize("document_eos", [False, True])
def test_a_document_is_trained_in_full(tokenizer: Path, document_eos: bool) -> None:
    sample, is_ = text_sample(1, "Some words, and some more."), Expected(tokenizer)
    end = [is_.eos] if document_eos else []
    example = built(tokenizer, sample, document_eos=document_eos)
    assert as_row(example) == row(([is_.bos, *is_.ids(sample.text), *end], True))
    assert example.is_document


def conversation(*turns: tuple[str, str], images: int = 1, key: str = "talk") -> Sample:
    codes = {f"vqcode_512_{number}" if number else "vqcode_512": random_codes(number, 2, 3) for number in range(images)}
    says = [{"from": role, "value": value} for role, value in turns]
    return Sample(key=key, data_type="visual_sft", text="", codes=codes, conversations=says)


def test_a_conversation_trains_its_answers_only_and_puts_the_image_at_its_mark(tokenizer: Path) -> None:
    turns = ("human", "Look: <image>\nWhat?"), ("gpt", "A cat."), ("human", "Sure?"), ("gpt", "Yes.")
    sample, is_ = conversation(*turns), Expected(tokenizer)
    image = [*is_.ids("<boi>"), *is_.codes(sample), *is_.ids("<eoi>")]
    assert as_row(built(tokenizer, sample)) == row(
        ([is_.bos, *is_.ids("User: Look: "), *image, *is_.ids("\nWhat?\nAssistant: ")], False),
        ([*is_.ids("A cat."), is_.eos], True),
        (is_.ids("User: Sure?\nAssistant: "), False),
        ([*is_.ids("Yes."), is_.eos], True),
    )


def test_a_conversation_may_have_no_image_several_or_one_without_a_mark(tokenizer: Path) -> None:
    is_ = Expected(tokenizer)
    (boi,) = is_.ids("<boi>")
    for images, question in ((0, "Hello?"), (2, "<image> and <image>"), (1, "Look.")):
        ids = built(tokenizer, conversation(("human", question), ("gpt", "Well."), images=images)).ids.tolist()
        assert ids.count(boi) == images
        assert sum(token >= is_.tokenizer.get_vocab_size() for token in ids) == 6 * images
    assert ids[: 2 + len(is_.ids("User: "))] == [is_.bos, *is_.ids("User: "), boi]


def test_images_that_share_a_column_give_the_row_of_images_apart(tokenizer: Path) -> None:
    apart = conversation(("human", "<image> and <image>"), ("gpt", "Well."), images=2)
    codes, grids = join_grids(list(apart.codes.values()), np.dtype("<u2"))
    together = apart._replace(codes={"vqcode_512": codes}, grids={"vqcode_512": grids})
    assert as_row(built(tokenizer, together)) == as_row(built(tokenizer, apart))


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (conversation(("human", "<image> <image>"), ("gpt", "Two?")), "image_count"),
        (conversation(("human", "<image>"), ("gpt", "None."), images=0), "image_count"),
        (conversation(("human", "Anyone?")), "no_answer"),
        (conversation(("narrator", "So it was."), ("gpt", "Yes.")), "unknown_role"),
        (conversation(("human", "<image>"), ("gpt", "A."))._replace(codes={"vqcode_512": random_codes(1, 16, 16)}), "too_long"),
        (image_sample(1, side=16), "too_long"),
        (image_sample(1)._replace(codes={}), "no_codes"),
        (image_sample(1)._replace(codes={"vqcode_512": np.full((2, 2), CODEBOOK_SIZE, "<u2")}), "code_out_of_range"),
    ],
)
def test_what_makes_no_example_is_refused_with_its_key_and_reason(tokenizer: Path, sample: Sample, reason: str) -> None:
    with pytest.raises(Reject, match=sample.key) as caught:
        builder(tokenizer).check(sample)
    assert caught.value.reason == reason


@pytest.mark.parametrize("t2i_ratio", [0, 1])
def test_an_image_is_whole_and_a_caption_that_leaves_it_no_room_is_shortened(tokenizer: Path, t2i_ratio: float) -> None:
    sample, is_ = image_sample(3)._replace(text="many words " * 200), Expected(tokenizer)
    example = built(tokenizer, sample, max_length=64, t2i_ratio=t2i_ratio, unconditional_ratio=0)
    ids = example.ids.tolist()
    codes = is_.codes(sample)
    at = ids.index(codes[0])
    assert (len(ids), ids[at : at + len(codes)], ids[-1], example.is_shortened) == (64, codes, is_.eos, True)
    kept = 64 - 5 - len(codes) - len(is_.ids(wording(sample, "draw" if t2i_ratio else "describe"))) + 1
    text = is_.ids(sample.text)[:kept]
    assert ids[1 : 1 + kept] == text if t2i_ratio else ids[-1 - kept : -1] == text


def test_the_longest_texts_of_a_conversation_give_way_and_every_answer_keeps_its_eos(tokenizer: Path) -> None:
    turns = ("human", "<image>\n" + "why " * 300), ("gpt", "because " * 300), ("human", "ok?"), ("gpt", "ok.")
    sample, is_ = conversation(*turns), Expected(tokenizer)
    example = built(tokenizer, sample, max_length=128)
    ids = example.ids.tolist()
    assert (len(ids) <= 128, example.is_shortened, ids.count(is_.eos)) == (True, True, 2)
    assert ids[-4 - len(is_.ids("ok.")) + 3 :] == [*is_.ids("ok."), is_.eos]
    assert [token for token in ids if token >= is_.tokenizer.get_vocab_size()] == is_.codes(sample)


def test_a_text_is_cut_before_it_is_joined_to_its_prompt(tokenizer: Path) -> None:
    made = builder(tokenizer, max_length=64, t2i_ratio=1, unconditional_ratio=0)
    for number, text in enumerate(["many words " * 200, "🐶" * 300, "x" * 900, "a\n" * 200]):
        sample, is_ = image_sample(number)._replace(text=text), Expected(tokenizer)
        made.check(sample)
        (example,) = made.build([sample], [0])
        ids = example.ids.tolist()
        joined = ids[1 : ids.index(is_.ids("<boi>")[0])]
        draw, turn = wording(sample, "draw"), choose(1, 0, sample.key).wording
        cut = is_.tokenizer.decode(joined).removesuffix(draw)
        assert text.startswith(cut)
        assert len(cut) < len(text)
        assert joined == is_.ids(cut + draw)
        assert 60 <= len(ids) <= 64
        assert made.vocabulary.prompt_ids(cut, wording=turn) == [is_.bos, *joined, *is_.ids("<boi>")]


def test_a_pair_without_text_is_trained_without_it(tokenizer: Path) -> None:
    sample = image_sample(3)._replace(text="")
    without = built(tokenizer, sample, t2i_ratio=1, unconditional_ratio=1)
    for t2i_ratio in (0, 1):
        assert as_row(built(tokenizer, sample, t2i_ratio=t2i_ratio, unconditional_ratio=0)) == as_row(without)


def test_the_name_of_a_special_token_in_a_text_is_text(tokenizer: Path) -> None:
    is_ = Expected(tokenizer)
    special = {is_.tokenizer.token_to_id(name) for name in (*IMAGE_TOKENS, "</s>")}
    example = built(tokenizer, text_sample(1, "a <boi> b </s> c <unconditional>"))
    assert special.isdisjoint(example.ids.tolist())
    assert is_.tokenizer.decode(example.ids[1:].tolist()) == "a <boi> b </s> c <unconditional>"


def test_the_name_of_a_token_that_its_tokenizer_does_not_hold_for_special_is_text_too(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer", added=())
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens(list(IMAGE_TOKENS))  # as transformers' add_tokens does, without special_tokens=True
    backend.save(str(folder / "tokenizer.json"))
    test_the_name_of_a_special_token_in_a_text_is_text(folder)


def test_a_document_that_makes_no_token_is_refused(tokenizer: Path) -> None:
    with pytest.raises(Reject, match="no_tokens: text-00000001"):
        builder(tokenizer, bos="").check(text_sample(1, ""))
    assert built(tokenizer, text_sample(1, ""), bos="", document_eos=True).ids.tolist() == [2]


@pytest.mark.slow
def test_choices_depend_on_seed_epoch_and_key_alone_and_keep_their_shares(tokenizer: Path) -> None:
    samples = [image_sample(number, side=1) for number in range(4000)]
    made = builder(tokenizer, t2i_ratio=0.3, unconditional_ratio=0.2)
    forms = Counter(_form(example, made) for example in made.build(samples, [0] * len(samples)))
    assert forms["caption"] == pytest.approx(2800, abs=120)
    assert forms["unconditional"] == pytest.approx(240, abs=60)
    again = builder(tokenizer, t2i_ratio=0.3, unconditional_ratio=0.2).build(samples[::-1], [0] * len(samples))[::-1]
    assert all(map(_same, again, made.build(samples, [0] * len(samples))))
    for other in (made.build(samples, [1] * len(samples)), builder(tokenizer, seed=2).build(samples, [0] * len(samples))):
        assert sum(map(_same, again, other)) < 2000


def _form(example: Example, made: ExampleBuilder) -> str:
    if example.ids[1] == made.vocabulary.unconditional:
        return "unconditional"
    return "caption" if example.ids[1] == made.vocabulary.boi else "text to image"


def _same(one: Example, other: Example) -> bool:
    return one.ids.tolist() == other.ids.tolist()


def test_draws_are_fixed_for_ever() -> None:
    assert choose(42, 0, "000000-00000007") == (0.7548200376668319, 0.9300079342147001, 280483649074380)
    assert choose(42, 1, "000000-00000007").form != choose(42, 0, "000000-00000007").form


def test_a_tokenizer_without_the_special_tokens_is_refused_with_all_that_is_missing(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "bare", added=())
    (folder / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}}')
    with pytest.raises(UsageError, match=r"no <boi>; it has no <eoi>; it has no <unconditional>; .*vocabulary.*no eos_token"):
        builder(folder)
    with pytest.raises(UsageError, match="no <none>"):
        builder(folder, eos="</s>", codebook_size=0, bos="<none>")
    assert builder(folder, eos="</s>", codebook_size=0, bos="").vocabulary.bos is None


def test_missing_tokens_are_added_to_a_copy_that_transformers_reads_alike(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    bare = write_tokenizer(tmp_path / "bare", added=())
    ours = add_tokens(str(bare), str(tmp_path / "new"), IMAGE_TOKENS)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "new"))
    assert len(theirs) == ours.num_tokens == 2003
    assert [ours.id_of(name) for name in IMAGE_TOKENS] == theirs.convert_tokens_to_ids(list(IMAGE_TOKENS)) == [2000, 2001, 2002]
    assert {theirs.bos_token, ours.named("bos_token")} == {"<s>"}
    text = "Ein Text, with <odd> things\n\n and  spaces"
    assert ours.encode([text])[0].tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    with pytest.raises(UsageError, match="exists already"):
        add_tokens(str(bare), str(tmp_path / "new"), IMAGE_TOKENS)


def test_a_tokenizer_that_cannot_be_written_is_said_with_its_folder(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file/new"):
        add_tokens(str(tokenizer), str(tmp_path / "file" / "new"), IMAGE_TOKENS)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        builder(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        builder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no tokenizer\.json"):
        builder(tmp_path / "empty")


def test_saved_truncation_and_padding_of_a_tokenizer_do_not_cut_or_pad(tokenizer: Path, tmp_path: Path) -> None:
    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text((tokenizer / "tokenizer_config.json").read_text())
    samples = [text_sample(1, "short"), text_sample(2, "a much longer text " * 5)]
    assert [as_row(e) for e in builder(tmp_path).build(samples, [0, 0])] == [
        as_row(e) for e in builder(tokenizer).build(samples, [0, 0])
    ]


def test_wordings_come_from_a_file_and_may_hold_special_tokens(tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"draw": [" =>"], "human": ["<s>user ", "</s>"]}))
    is_ = Expected(tokenizer)
    sample = image_sample(3)
    ids = built(tokenizer, sample, t2i_ratio=1, unconditional_ratio=0, prompts=str(file)).ids.tolist()
    assert ids[: ids.index(is_.ids("<boi>")[0])] == [is_.bos, *is_.ids(sample.text), *is_.ids(" =>")]
    talk = built(tokenizer, conversation(("human", "hm <image>"), ("gpt", "ok")), prompts=str(file)).ids.tolist()
    assert (talk[:3], talk.count(is_.eos)) == ([is_.bos, is_.bos, is_.ids("user")[0]], 2)
    wrong = (b"[]", b"{", b'{"paint": []}', b'{"draw": []}', b'{"draw": [1]}', b'{"human": ["a"]}', b'{"size": "{wide}"}')
    for data in wrong:
        file.write_bytes(data)
        with pytest.raises(UsageError, match=str(file)):
            builder(tokenizer, prompts=str(file))


READ_ALL = """
import sys
from wds_tools.errors import UsageError
from wds_tools.sequences.prompts import read_prompts

for path in sys.argv[1:]:
    try:
        print("taken", read_prompts(path))
    except UsageError as error:
        print(error)
"""


def test_a_size_that_is_no_wording_is_refused_also_where_python_leaves_assertions_out(tmp_path: Path) -> None:
    sizes = ["5", '["{width}"]', '"{wide}"', '"{width.x}"', '"{"']
    files = [tmp_path / f"{number}.json" for number in range(len(sizes))]
    for file, size in zip(files, sizes, strict=True):
        file.write_text(f'{{"size": {size}}}')
    command = [sys.executable, "-O", "-c", READ_ALL, *files]
    lines = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True).stdout.splitlines()
    assert len(lines) == len(sizes)
    assert all(line.startswith(f"prompts: size in {file} is ") for line, file in zip(lines, files, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 1}, "max_length=1"),
        ({"t2i_ratio": 1.5}, r"t2i_ratio=1\.5"),
        ({"unconditional_ratio": -1}, "unconditional_ratio"),
        ({"eos": ""}, "eos"),
    ],
)
def test_impossible_settings_are_refused(tokenizer: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        builder(tokenizer, **settings)


def test_codes_of_two_image_tokenizers_are_not_mixed() -> None:
    from wds_tools.format.manifest import Manifest, ShardInfo

    def manifest(weights: str | None) -> Manifest:
        codes = {"vqcode_512": {"tokenizer": "t", "weights_hash": weights, "codebook_size": 512}} if weights else {}
        row = ShardInfo(name="a.tar", samples=1, bytes=1, xxh128="0" * 32, members=(), data_types={}, text_chars=1, num_codes=4)
        return Manifest(shards=(row,), inputs=1, codes=codes)

    config = SequenceConfig(tokenizer="t", max_length=8)
    assert codebook_size_of([manifest("x"), manifest("x")], ["a", "b"], config, [None, None]) == 512
    with pytest.raises(UsageError, match="different image tokenizers"):
        codebook_size_of([manifest("x"), manifest("y")], ["a", "b"], config, ["", ""])
    with pytest.raises(UsageError, match="b has codes, but its manifest does not say"):
        codebook_size_of([manifest("x"), manifest(None)], ["a", "b"], config, [None, None])
    assert codebook_size_of([manifest(None)], ["b"], replace(config, codebook_size=300), [None]) == 300


TURNS = ("A cat.", "User: ?\nAssistant: ", "!")


def shown(made: ExampleBuilder, sample: Sample, **settings: Any) -> list[Example]:
    """Of a builder with other ratios; a tokenizer takes seconds to load."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "config", replace(made.config, **settings))
        made.check(sample)
        return made.build([sample], [0])


GOLDEN = {
    "llama": ("<s>", "</s>", 32003),
    "minimind": (None, None, 6400),
    "gpt_neo": ("<|endoftext|>", "<|endoftext|>", 50280),
    "gemma3": ("<bos>", "<eos>", 262145),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name == "gemma3" else []) for name in GOLDEN])
def test_real_tokenizers_give_the_rows_that_transformers_gives(name: str, tmp_path: Path) -> None:
    """Up to where the loss begins the ids are those of the joined string: in one call, special tokens and all."""
    from transformers import AutoTokenizer

    bos, eos, size = GOLDEN[name]
    source = shared(f"tokenizer/{name}")
    for file in source.iterdir():
        data = lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes()
        (tmp_path / file.name.removesuffix(".xz")).write_bytes(data)
    folder = tmp_path / "added"
    assert add_tokens(str(tmp_path), str(folder), IMAGE_TOKENS).num_tokens == size + 3
    if not (folder / "tokenizer_config.json").exists():
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    theirs = AutoTokenizer.from_pretrained(str(folder))
    text = "Zwei Hunde 🐶 spielen - two dogs\nplay <b>here</b>.  终"
    sample = image_sample(7)._replace(text=text)
    made = builder(folder, bos=bos, eos=eos, t2i_ratio=0)
    made.check(sample)
    (example,) = made.build([sample], [0])
    begin, end = (made.vocabulary.bos, made.vocabulary.eos)
    boi, eoi = theirs.convert_tokens_to_ids(["<boi>", "<eoi>"])
    codes = (size + 3 + sample.codes["vqcode_512"].astype(int)).reshape(-1).tolist()
    ask, says = (theirs(part, add_special_tokens=False)["input_ids"] for part in (wording(sample, "describe"), text))
    assert as_row(example) == row(([begin, boi, *codes, eoi, *ask], False), ([*says, end], True))
    assert made.vocabulary.size == size + 3 + CODEBOOK_SIZE

    def called(string: str, *images: Sample) -> list[int]:
        """BOS, and what one call gives for a string, with codes in each <boi><eoi>."""
        ids = list(theirs(string, add_special_tokens=False)["input_ids"])
        for image in images:
            at = next(at for at in range(len(ids)) if ids[at : at + 2] == [boi, eoi]) + 1
            ids[at:at] = (size + 3 + image.codes["vqcode_512"].astype(int)).reshape(-1).tolist()
        return ids if begin is None else [begin, *ids]

    draw = Prompts().draw
    for number, pixels in ((3, None), (4, (96, 32)), (5, None)):
        pair = (multi_sample(number, height=32, width=96) if pixels else image_sample(number))._replace(text=text)
        (ids,) = (example.ids.tolist() for example in shown(made, pair, t2i_ratio=1, unconditional_ratio=0))
        stated = f"\nThe picture is {pixels[0]} pixels wide and {pixels[1]} pixels high." if pixels else ""
        turn = choose(1, 0, pair.key).wording
        before = called(f"{text}{stated}{draw[turn % len(draw)]}<boi>")
        assert ids[: ids.index(boi) + 1] == before == made.vocabulary.prompt_ids(text, size=pixels, wording=turn)
        (ids,) = (example.ids.tolist() for example in shown(made, pair, t2i_ratio=1, unconditional_ratio=1))
        before = called(f"{stated}<unconditional><boi>")
        assert ids[: ids.index(boi) + 1] == before == made.vocabulary.prompt_ids("", size=pixels)
    talk = conversation(
        ("system", "Be kind."), ("human", "Look: <image>\nWhat?"), ("gpt", "A cat."), ("human", "?"), ("gpt", "!")
    )
    (example,) = made.build([talk], [0])
    prompt = called("Be kind.\nUser: Look: <boi><eoi>\nWhat?\nAssistant: ", talk)
    answer, more, last = (list(theirs(part, add_special_tokens=False)["input_ids"]) for part in TURNS)
    assert as_row(example) == row((prompt, False), ([*answer, end], True), (more, False), ([*last, end], True))
    assert made.vocabulary.padded(128) % 128 == 0
