"""A small text tokenizer for tests, trained in a second on the READMEs of the installed packages; and datasets for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from factory import image_sample, make_dataset, text_sample
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

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


MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("o", "n"), ("a", "t")]


def write_bytes_tokenizer(
    folder: Path, special: Sequence[str], named: dict[str, Any], *, before: int = 0, bos: bool = False
) -> Path:
    """A tokenizer of bytes and some merges, the same for ever, as transformers saves one.

    Args:
        folder: where it goes, beside a model's weights if need be.
        special: special tokens.
        named: tokenizer_config.json.
        before: so many of them stand before the bytes in the vocabulary, the others behind.
        bos: the first is put before every string, as Chameleon's tokenizer does.
    """
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, MERGES)]
    names = [*special[:before], *pieces, *special[before:]]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    if bos:
        first = f"{special[0]}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, names.index(first))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = {name: number for number, name in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("".join(f"{left} {right}\n" for left, right in MERGES))
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


LUMINA = tuple(f"<reserved{8800 + number:05d}>" for number in range(97))


def write_chameleon_tokenizer(folder: Path, codebook_size: int) -> Path:
    """As facebook/chameleon-7b has it: special tokens before the pieces, codes among them, not in the order of the codes."""
    codes = [f"IMGIMG{''.join('ABCDEFGHIJ'[int(digit)] for digit in str(code))}Z" for code in range(codebook_size)]
    codes = codes[40:] + codes[:40]
    special = ("<s>", "<pad>", "</s>", "<unk>", *codes, "<racm3:break>", "<eoss>", "<reserved08706>", "<image>")
    special += ("<reserved08799>", *LUMINA)
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    named |= {"unk_token": "<unk>", "sep_token": "<reserved08706>"}
    return write_bytes_tokenizer(folder, special, named, before=len(special), bos=True)


def write_emu3_tokenizer(folder: Path, codebook_size: int) -> Path:
    """As Emu3-Chat-hf has it: all special tokens behind the pieces."""
    around = {"image_token": "<image>", "boi_token": "<|image start|>", "eoi_token": "<|image end|>"}
    around |= {"image_wrapper_token": "<|image token|>", "eof_token": "<|extra_201|>"}
    named = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|extra_203|>", "eos_token": "<|extra_204|>"}
    named |= {"pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "extra_special_tokens": around}
    special = ("<|endoftext|>", "<|extra_203|>", "<|extra_204|>", "<|extra_200|>", *around.values())
    special += tuple(f"<|visual token {code:06d}|>" for code in range(codebook_size))
    return write_bytes_tokenizer(folder, special, named)


def write_small_sets(folder: Path) -> Path:
    """In a folder: a tokenizer, 40 pairs and 40 documents of 300 characters."""
    write_tokenizer(folder / "tokenizer")
    make_dataset(folder / "pairs", (image_sample(number) for number in range(40)), codes=PROVENANCE)
    prose = " ".join(readmes()[:5])
    make_dataset(folder / "texts", (text_sample(number, prose[100 * number :][:300]) for number in range(40)))
    return folder
