"""Templates: the rows of each, against the processor and the vocabulary mapping of the model that they are for."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from commands import ROOT
from factory import image_sample, make_dataset, multi_sample, text_sample
from PIL import Image
from plugin import installed, write_plugin
from tokenizers import Tokenizer
from tokens import IMAGE_TOKENS, write_bytes_tokenizer, write_chameleon_tokenizer, write_emu3_tokenizer

from loaders import LoaderConfig, Source, build_loader
from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.cli.main import main
from wds_tools.errors import Reject, UsageError
from wds_tools.format.schema import Sample
from wds_tools.pack.rows import PackConfig, pack
from wds_tools.sequences.build import Example, ExampleBuilder
from wds_tools.sequences.choices import choose
from wds_tools.sequences.config import SequenceConfig
from wds_tools.sequences.prompts import Prompts

CODEBOOK = 64
TURNS = (("system", "Be kind."), ("human", "Look: <image>\nWhat?"), ("gpt", "A cat."), ("human", "And?"), ("gpt", "On the mat."))


def built(folder: Path, samples: list[Sample], **settings: Any) -> tuple[ExampleBuilder, list[Example]]:
    """A builder, and what it makes of samples."""
    given = {"tokenizer": str(folder), "max_length": 512, "codebook_size": CODEBOOK, **settings}
    made = ExampleBuilder(SequenceConfig(**given), 1, 0)
    for sample in samples:
        made.check(sample)
    return made, made.build(samples, [0] * len(samples))


def square(number: int) -> Sample:
    """A pair with 4 x 4 codes."""
    sample = image_sample(number)
    return sample._replace(codes={name: codes % CODEBOOK for name, codes in sample.codes.items()})


def conversation(codes: np.ndarray[Any, Any] | None = None) -> Sample:
    """One with an image in a question."""
    image = np.arange(6).reshape(2, 3) if codes is None else codes
    says = [{"from": role, "value": value} for role, value in TURNS]
    image = image.astype(np.uint16)
    return Sample(key="talk", data_type="visual_sft", text="", codes={"vqcode_512": image}, conversations=says)


def test_rows_of_liquid_are_for_ever_what_they_were_before_there_were_templates(tmp_path: Path) -> None:
    folder = write_bytes_tokenizer(tmp_path / "t", ("<s>", "</s>", *IMAGE_TOKENS), {"bos_token": "<s>", "eos_token": "</s>"})
    samples = [*map(image_sample, range(12)), *(multi_sample(number, height=32, width=96) for number in range(12))]
    samples += [text_sample(1, "the cat on the mat"), conversation()]
    made, rows = built(folder, samples, codebook_size=8192, max_length=120)
    digest = xxhash.xxh3_128()
    for row in rows:
        digest.update(row.ids.astype("<i4").tobytes() + row.loss.tobytes())
    assert digest.hexdigest() == "39dfa467b54c5d0810f0d7c52d7a200b"
    names = ("version", "max_length", "t2i_ratio", "unconditional_ratio", "document_eos", "codebook_size", "bos", "eos")
    names = (*names, "boi", "eoi", "unconditional", "prompts")
    values = (2, 120, 0.5, 0.1, False, 8192, None, None, *IMAGE_TOKENS, "0eac79e41dc0657c8533b7394629aab7")
    assert {name: value for name, value in made.spec.items() if name != "tokenizer"} == dict(zip(names, values, strict=True))
    assert made.vocabulary.rows_spec == {"vocabulary_size": made.vocabulary.text_size + 8192, "text_size": 267}


def before_loss(row: Example) -> list[int]:
    """The ids before what is trained."""
    return row.ids[: int(row.loss.argmax())].tolist()


def put(ids: list[int], image_token: int, images: list[list[int]]) -> list[int]:
    """Ids with those of images in the place of their placeholders, as the model's forward puts them."""
    numbers = iter([number for image in images for number in image])
    whole = [next(numbers) if one == image_token else one for one in ids]
    assert next(numbers, None) is None
    return whole


# --- Chameleon -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chameleon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As facebook/chameleon-7b has it: special tokens before the pieces, codes among them, not in the order of the codes."""
    return write_chameleon_tokenizer(tmp_path_factory.mktemp("chameleon") / "t", CODEBOOK)


def chameleon_model(vocabulary: dict[str, int]) -> Any:
    from transformers import ChameleonConfig, ChameleonModel

    quantizer = {"num_embeddings": CODEBOOK, "embed_dim": 8, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1]}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 2, "vocab_size": len(vocabulary), "vq_config": {**quantizer, "num_res_blocks": 1}}
    return ChameleonModel(ChameleonConfig(vocabulary_map=vocabulary, **small))


def chameleon_processor(folder: Path, tokens: int) -> Any:
    from transformers import AutoTokenizer, ChameleonImageProcessor, ChameleonProcessor

    images = ChameleonImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return ChameleonProcessor(images, AutoTokenizer.from_pretrained(str(folder)), image_seq_length=tokens)


@pytest.mark.slow  # transformers takes seconds to import
def test_chameleon_rows_are_what_its_processor_and_its_vocabulary_mapping_give(chameleon: Path) -> None:
    processor = chameleon_processor(chameleon, 16)
    theirs = processor.tokenizer
    model = chameleon_model(theirs.get_vocab())

    def mapped(codes: np.ndarray[Any, Any]) -> list[int]:
        ids: list[int] = model.vocabulary_mapping.convert_img2bpe(torch.tensor(codes.astype(np.int64))).reshape(-1).tolist()
        return ids

    def called(text: str, *images: np.ndarray[Any, Any], **options: Any) -> list[int]:
        pictures = [Image.new("RGB", (32, 32))] * len(images) or None
        (ids,) = processor(images=pictures, text=text, **options)["input_ids"]
        return put(ids, model.config.image_token_id, [mapped(codes) for codes in images])

    special = {name: theirs.convert_tokens_to_ids(name) for name in ("<s>", "</s>", "<racm3:break>", "<eoss>", "<reserved08706>")}
    bos, eos, boi, eoi, turn = special.values()
    text = "the cat on a mat: 猫 <eoss>"
    pair = square(5)._replace(text=text)
    codes = pair.codes["vqcode_512"]
    made, (row,) = built(chameleon, [pair], template="chameleon", t2i_ratio=1, unconditional_ratio=0)
    spelled = made.tokenizer.encode([text])[0].tolist()  # by the processor a name in a text is the token
    assert before_loss(row) == [bos, *spelled, turn, boi]
    assert row.ids[row.loss].tolist() == [*mapped(codes), eoi, eos]
    assert made.vocabulary.prompt_ids(text) == before_loss(row)
    assert made.vocabulary.prompt_ids("the cat") == [*called("the cat"), boi]
    assert made.vocabulary.prompt_ids("") == [*called("", return_for_text_completion=True), boi]

    made, (row,) = built(chameleon, [pair], template="chameleon", t2i_ratio=0)
    asked = Prompts().describe[choose(1, 0, pair.key).wording % len(Prompts().describe)].removesuffix("\n")
    assert before_loss(row) == called(f"<image>{asked}", codes)
    assert row.ids[row.loss].tolist() == [*spelled, eos]

    talk = conversation(np.arange(16).reshape(4, 4))
    _, (row,) = built(chameleon, [talk], template="chameleon")
    assert before_loss(row) == called("Be kind.<reserved08706>Look: <image>\nWhat?", *talk.codes.values())
    assert made.vocabulary.size == made.vocabulary.text_size == len(theirs)


def test_tokens_that_are_entries_of_the_vocabulary_alone_are_found_and_no_text_makes_them(
    chameleon: Path, tmp_path: Path
) -> None:
    record = json.loads((chameleon / "tokenizer.json").read_text())
    record["added_tokens"] = [one for one in record["added_tokens"] if len(one["content"]) < 6]
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    (tmp_path / "tokenizer_config.json").write_text((chameleon / "tokenizer_config.json").read_text())
    samples = [square(number)._replace(text="IMGIMGAZ <eoss> the") for number in range(6)]
    (ours, rows), (_, expected) = (built(folder, samples, template="chameleon") for folder in (tmp_path, chameleon))
    assert [row.ids.tolist() for row in rows] == [row.ids.tolist() for row in expected]
    assert ours.vocabulary.prompt_ids("<eoss>").count(ours.vocabulary.eoi) == 0


# --- Emu3 ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emu3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Emu3-Chat-hf has it: all special tokens behind the pieces."""
    return write_emu3_tokenizer(tmp_path_factory.mktemp("emu3") / "t", CODEBOOK)


@pytest.mark.slow  # transformers takes seconds to import
def test_emu3_rows_are_what_its_processor_and_its_vocabulary_mapping_give(emu3: Path) -> None:
    from transformers import AutoTokenizer, Emu3Config, Emu3ImageProcessor, Emu3Model, Emu3Processor

    theirs = AutoTokenizer.from_pretrained(str(emu3))
    processor = Emu3Processor(Emu3ImageProcessor(min_pixels=256, max_pixels=4096), theirs)
    quantizer = {"codebook_size": CODEBOOK, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
    words = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words |= {"num_key_value_heads": 2, "vocab_size": len(theirs), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    small = {"text_config": words, "vq_config": {**quantizer, "hidden_size": 32, "attn_resolutions": []}}
    model = Emu3Model(Emu3Config(vocabulary_map=theirs.get_vocab(), **small))

    def mapped(codes: np.ndarray[Any, Any]) -> list[int]:
        ids: list[int] = model.vocabulary_mapping.convert_img2bpe(torch.tensor(codes.astype(np.int64))).reshape(-1).tolist()
        return ids

    def called(text: str, *images: np.ndarray[Any, Any]) -> list[int]:
        pictures = [Image.new("RGB", (8 * codes.shape[1], 8 * codes.shape[0])) for codes in images]
        (ids,) = processor(images=pictures, text=text)["input_ids"]
        return put(ids, model.config.image_token_id, [mapped(codes) for codes in images])

    def asked(text: str) -> list[int]:
        (ids,) = processor(text=text, return_for_image_generation=True, ratio="3:2", image_area=64 * 24)["input_ids"]
        return list(ids)

    eos = theirs.convert_tokens_to_ids("<|extra_204|>")
    codes = (np.arange(24, dtype=np.uint16) * 7 % CODEBOOK).reshape(4, 6)
    text = "the cat on a mat: 猫"
    wide = Sample(key="k", data_type="image_text_multi", text=text, codes={"vqcode_fit48": codes}, width=48, height=32)
    for dropped, words in ((0, text), (1, "")):
        made, (row,) = built(emu3, [wide], template="emu3", t2i_ratio=1, unconditional_ratio=dropped)
        assert before_loss(row) == asked(words) == made.vocabulary.prompt_ids(words, shape=(4, 6))
        assert row.ids.tolist() == [*called(f"{words}<image>", codes), eos]
        assert row.loss.sum() == 4 * 7 + 3  # rows with their ends; those of the frame, the image and the sequence

    made, (row,) = built(emu3, [wide], template="emu3", t2i_ratio=0)
    instruction = Prompts().describe[choose(1, 0, "k").wording % len(Prompts().describe)]
    assert before_loss(row) == called(f"<image>{instruction}", codes)

    talk = conversation(codes)
    _, (row,) = built(emu3, [talk], template="emu3")
    assert before_loss(row) == called("Be kind. USER: Look: <image>\nWhat? ASSISTANT:", codes)
    with pytest.raises(UsageError, match=r"give shape=\(rows, columns\)"):
        made.vocabulary.prompt_ids("the cat")


def test_an_image_is_measured_with_all_that_its_template_puts_around_and_between(emu3: Path) -> None:
    for samples in ([square(number) for number in range(16)], [conversation(np.zeros((4, 4)))]):
        lengths = []
        for max_length in range(24, 90):
            with contextlib.suppress(Reject):
                _, rows = built(emu3, samples, template="emu3", max_length=max_length, unconditional_ratio=0.5)
                assert max(len(row.ids) for row in rows) <= max_length
                lengths.append(max_length)
        assert lengths == list(range(lengths[0], 90))
        assert 4 * 5 + 5 < lengths[0] < 80


# --- Everything else -----------------------------------------------------------------------------------------------


def test_a_name_that_is_given_goes_before_that_of_the_template(chameleon: Path) -> None:
    made, (row,) = built(
        chameleon,
        [square(1)],
        template="chameleon",
        eos="<reserved08706>",
        unconditional="<unk>",
        t2i_ratio=1,
        unconditional_ratio=1,
    )
    assert row.ids[1] == made.tokenizer.id_of("<unk>")
    assert row.ids[-1] == made.tokenizer.id_of("<reserved08706>")
    for name in ("eos", "boi", "eoi"):
        with pytest.raises(UsageError, match=f"{name}=''"):
            built(chameleon, [], template="chameleon", **{name: ""})


def test_a_tokenizer_without_the_tokens_of_a_template_is_refused_with_the_command_that_adds_them(
    chameleon: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=r"no <\|image start\|>.* nor 61 others; .*--template emu3 --codebook-size 64 --output"):
        built(chameleon, [], template="emu3")
    words = ["vocabulary", str(chameleon), "--template", "emu3", "--codebook-size", str(CODEBOOK)]
    assert main(words) == 1
    assert "64 tokens of the text vocabulary, 64 missing" in capsys.readouterr().out
    assert main([*words, "--output", str(tmp_path / "new")]) == 0
    assert "64 tokens of the text vocabulary, none missing" in capsys.readouterr().out
    made, (row,) = built(tmp_path / "new", [square(1)], template="emu3")
    assert row.ids.max() < made.vocabulary.size == made.vocabulary.text_size
    with pytest.raises(UsageError, match=r"unknown template 'emu4': did you mean emu3\? there are liquid, chameleon, emu3"):
        built(chameleon, [], template="emu4")


def test_rows_that_are_packed_say_their_template_and_no_other_goes_on_with_them(chameleon: Path, tmp_path: Path) -> None:
    codes = {"vqcode_512": {"tokenizer": "t", "codebook_size": CODEBOOK, "weights_hash": "sha256:0"}}
    make_dataset(tmp_path / "pairs", map(square, range(20)), codes=codes)

    def packed(output: str, **settings: Any) -> Any:
        given = {"input": (str(tmp_path / "pairs"),), "tokenizer": str(chameleon), "max_length": 64, "quiet": True}
        return pack(PackConfig(**{**given, "output": str(tmp_path / output), "template": "chameleon", **settings}))

    rows = packed("rows").source["rows"]
    boi = Tokenizer.from_file(str(chameleon / "tokenizer.json")).token_to_id("<racm3:break>")
    assert (rows["template"], rows["template_version"]) == ("chameleon", 1)
    assert rows["code_ids"] == [[boi - 40, 40], [boi - 64, 24]]
    assert not verify(VerifyConfig(input=str(tmp_path / "rows"), quiet=True)).problems
    liquid = {"template": "liquid", "boi": "<s>", "eoi": "<pad>", "unconditional": "<unk>"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExampleBuilder, "build", lambda *_: (_ for _ in ()).throw(RuntimeError("a crash")))
        with pytest.raises(RuntimeError, match="a crash"):
            packed("others")
    with pytest.raises(UsageError, match=r"begun with other inputs or settings: .*template"):
        packed("others", **liquid, resume=True)
    packed("others", **liquid, overwrite=True)
    with pytest.raises(UsageError, match="can't be mixed"):
        build_loader(LoaderConfig(sources=tuple(Source(str(tmp_path / name)) for name in ("rows", "others")), batch_size=1))

    def loader(**settings: Any) -> Any:
        sequences = SequenceConfig(tokenizer=str(chameleon), max_length=64, **settings)
        sources = (Source(str(tmp_path / "pairs")),)
        return build_loader(LoaderConfig(sources=sources, sequences=sequences, packing=True, batch_size=1))

    made = loader(template="chameleon")
    next(iter(made))
    loader(template="chameleon").load_state_dict(made.state_dict())
    with pytest.raises(UsageError, match="other rows: template was 'chameleon', is None"):
        loader(boi="<s>", eoi="<pad>", unconditional="<unk>").load_state_dict(made.state_dict())


def test_a_template_of_a_package_is_found_by_its_name(chameleon: Path, tmp_path: Path) -> None:
    example = ROOT / "examples" / "plugin" / "wds_tools_notes.py"
    groups = "[wds_tools.templates]\nlumina-mgpt = wds_tools_notes:LuminaMGPT\nwrong = json:JSONDecoder"
    with installed(write_plugin(tmp_path, "wds_tools_notes", example.read_text(), groups), "wds_tools_notes"):
        pair = square(3)
        made, (row,) = built(chameleon, [pair], template="lumina-mgpt", t2i_ratio=1, unconditional_ratio=0)
        names = [made.tokenizer.backend.id_to_token(number) for number in row.ids.tolist()]
        begin = names.index("<racm3:break>")
        assert names[begin - 1 : begin + 3] == ["<reserved08706>", "<racm3:break>", "<reserved08802>", "<reserved08802>"]
        assert names[begin + 7 :: 5] == ["<reserved08799>"] * 4
        assert names[-3:] == ["<reserved08799>", "<eoss>", "<reserved08706>"]
        assert made.spec["template"] == "lumina-mgpt"
        with pytest.raises(UsageError, match="template 'wrong' gives JSONDecoder, expected a "):
            built(chameleon, [], template="wrong")
        with pytest.raises(UsageError, match="there are liquid, chameleon, emu3, lumina-mgpt, wrong"):
            built(chameleon, [], template="other")
