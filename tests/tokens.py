"""A small text tokenizer for tests, trained in a second on the READMEs of the installed packages; and datasets for it."""

from __future__ import annotations

import json
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

from factory import image_sample, make_dataset, text_sample
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

IMAGE_TOKENS = ("<boi>", "<eoi>", "<unconditional>")
PROVENANCE = {
    column: {"tokenizer": "tiny", "codebook_size": 8192, "weights_hash": "sha256:0"}
    for column in ("vqcode_512", "vqcode_multi768")
}
"""Of the factory's codes, for a manifest."""


@cache
def readmes() -> tuple[str, ...]:
    """Some prose: what the installed distributions say of themselves."""
    texts = [str(one.metadata.get_payload() or one.metadata["Summary"] or "") for one in distributions()]
    return tuple(sorted(text[:20_000] for text in texts if len(text) > 200))


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(readmes()[:80], trainer)
    return str(tokenizer.to_str())


def write_tokenizer(folder: Path, *, added: tuple[str, ...] = IMAGE_TOKENS) -> Path:
    """A tokenizer's folder, as transformers saves one."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer.from_str(_trained())
    tokenizer.add_special_tokens(list(added))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_small_sets(folder: Path) -> Path:
    """In a folder: a tokenizer, 40 pairs and 40 documents of 300 characters."""
    write_tokenizer(folder / "tokenizer")
    make_dataset(folder / "pairs", (image_sample(number) for number in range(40)), codes=PROVENANCE)
    prose = " ".join(readmes()[:5])
    make_dataset(folder / "texts", (text_sample(number, prose[100 * number :][:300]) for number in range(40)))
    return folder
