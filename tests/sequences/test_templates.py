"""Templates: the rows of each, against the processor and the vocabulary mapping of the model that they are for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from factory import image_sample, multi_sample, text_sample
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokens import IMAGE_TOKENS

from wds_tools.format.schema import Sample
from wds_tools.sequences.build import Example, ExampleBuilder
from wds_tools.sequences.config import SequenceConfig

CODEBOOK = 64


def write_bytes_tokenizer(folder: Path, special: tuple[str, ...], named: dict[str, Any], *, first: int = 0) -> Path:
    """A tokenizer of bytes and some merges: the same for ever. Its special tokens stand before the bytes or behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("o", "n"), ("a", "t")]
    pieces = [*alphabet, *("".join(pair) for pair in merges)]
    names = [*special[:first], *pieces, *special[first:]]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def examples(folder: Path, samples: list[Sample], **settings: Any) -> list[Example]:
    config = SequenceConfig(**{"tokenizer": str(folder), "max_length": 512, **settings})
    made = ExampleBuilder(config, 1, 8192)
    for sample in samples:
        made.check(sample)
    return made.build(samples, [0] * len(samples))


def conversation(key: str = "talk") -> Sample:
    turns = (
        ("system", "Be kind."),
        ("human", "Look: <image>\nWhat?"),
        ("gpt", "A cat."),
        ("human", "And?"),
        ("gpt", "On the mat."),
    )
    codes = {"vqcode_512": np.arange(6, dtype=np.uint16).reshape(2, 3)}
    says = [{"from": role, "value": value} for role, value in turns]
    return Sample(key=key, data_type="visual_sft", text="", codes=codes, conversations=says)


def test_rows_of_liquid_are_for_ever_what_they_were_before_there_were_templates(tmp_path: Path) -> None:
    folder = write_bytes_tokenizer(tmp_path / "t", ("<s>", "</s>", *IMAGE_TOKENS), {"bos_token": "<s>", "eos_token": "</s>"})
    samples = [*map(image_sample, range(12)), *(multi_sample(number, height=32, width=96) for number in range(12))]
    samples += [text_sample(1, "the cat on the mat"), conversation()]
    made = ExampleBuilder(SequenceConfig(tokenizer=str(folder), max_length=120), 1, 8192)
    for sample in samples:
        made.check(sample)
    digest = xxhash.xxh3_128()
    for example in made.build(samples, [0] * len(samples)):
        digest.update(example.ids.astype("<i4").tobytes() + example.loss.tobytes())
    spec = {name: value for name, value in made.spec.items() if name not in ("tokenizer", "prompts")}
    assert (digest.hexdigest(), spec) == ("", {})
