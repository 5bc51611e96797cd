"""Every line of the table of models in docs/tokenizers.md, typed on small weights of that model's own kind.

The codes are compared with none here (tests/vq does that): what is held is that the line can be typed, that all codes come at
their size, and that those of every picture are in the rows.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import ROOT, read_samples, write_pairs
from plugin import BLOCKS, COLOURS, installed, write_plugin
from tokens import write_chameleon_tokenizer, write_emu3_tokenizer, write_tokenizer
from weights import config_tree, save, vqgan, vqgan_state, write_vqgan

from wds_tools.cli.main import main
from wds_tools.dataset.reader import read_manifest
from wds_tools.images.mode import DEFAULT_STRIDE, parse_mode
from wds_tools.storage import open_store

FOUR, FIVE = (1,) * 4, (1,) * 5
"""Levels of networks of stride 8 and 16."""
CODEBOOK = 512
SECTION = (ROOT / "docs/tokenizers.md").read_text().partition("## Models\n")[2].partition("\n## ")[0]
_ROW = re.compile(r"^\| ([^|]+) \| [^|]+ \| `(--[^|`]+)`[^|]* \| ([^|]+) \| (?:`(--[^|`]+)` )?\|$", re.MULTILINE)
LINES: dict[str, tuple[list[str], str, list[str]]] = {
    model: (shlex.split(encode), template, shlex.split(pack)) for model, encode, template, pack in _ROW.findall(SECTION)
}
"""Model -> the words of ENCODE, its template, the words of PACK."""


def run(*words: str | Path) -> None:
    assert main(list(map(str, words))) == 0


def llamagen(path: Path, levels: tuple[int, ...]) -> None:
    torch.save({"model": vqgan_state(vqgan(levels, 1, 16, CODEBOOK, 8), llamagen=True)}, path)


def chameleon_release(folder: Path) -> None:
    config = vqgan(FIVE, 1, 16, CODEBOOK, 8)
    write_vqgan(folder, config_tree(config), vqgan_state(config))


def chameleon(folder: Path) -> None:
    save("chameleon", folder, FIVE)
    write_chameleon_tokenizer(folder, CODEBOOK)


def emu3(folder: Path) -> None:
    save("emu3", folder, FOUR)
    write_emu3_tokenizer(folder, CODEBOOK)


def emu35_release(folder: Path) -> None:
    config = vqgan(FIVE, 1, 16, CODEBOOK, 8)
    write_vqgan(folder, config_tree(config)["model"]["params"], vqgan_state(config), names=("config.yaml", "model.ckpt"))


def liquid(folder: Path) -> None:
    text = write_tokenizer(folder.parent / "text", added=())
    (command,) = re.findall(r"`wds-tools (vocabulary DIR [^`]+)`", SECTION)
    run(*(str({"DIR": text, "NEW/": folder}.get(word, word)) for word in shlex.split(command)))


WRITERS: Mapping[str, Callable[[Path], Any]] = {
    "vqgan/": chameleon_release,
    "Chameleon/": chameleon,
    "Lumina-mGPT/": lambda folder: write_chameleon_tokenizer(folder, CODEBOOK),
    "Emu3/": emu3,
    "Emu3.5-VisionTokenizer/": emu35_release,
    "Apertus-v1.5-8B/": lambda folder: save("emu35", folder, FIVE),
    "Janus/": lambda folder: save("janus", folder, FIVE),
    "vq_ds16_c2i.pt": lambda path: llamagen(path, FIVE),
    "vq_ds8_c2i.pt": lambda path: llamagen(path, FOUR),
    "GLM-Image/": lambda folder: save("glm-image", folder, FIVE),
    "vq/": lambda folder: save("vqmodel", folder, FIVE),
    "NEW/": liquid,
}
"""What the table names -> writes it, small."""
NOTES = ROOT / "examples/plugin/wds_tools_notes.py"


def placed(words: list[str], folder: Path) -> list[str]:
    """The words, with files that have been written in the place of those that they name."""
    for word in {*words} & WRITERS.keys():
        if not (folder / word).exists():
            WRITERS[word](folder / word)
    return [str(folder / word) if word in WRITERS else word for word in words]


def test_the_table_has_a_line_for_every_model_and_the_maker_of_its_weights() -> None:
    named = {"Liquid", "Chameleon", "Anole", "Lumina-mGPT", "Emu3", "Emu3.5", "Apertus", "Janus", "Janus-Pro", "LlamaGen"}
    for name in {*named, "Show-o", "GLM-Image", "TiTok", "UniTok"}:
        assert any(name in re.split("[ ,]", model) for model in LINES), name
    assert len(LINES) == SECTION.count(" `--tokenizer ") - sum(bool(pack) for _, _, pack in LINES.values())


def token_ids(rows: Path) -> list[np.ndarray[Any, Any]]:
    """Of the rows, by tarfile and numpy."""
    found = []
    for shard in sorted(rows.rglob("*.tar")):
        with tarfile.open(shard) as tar:
            found += [np.load(io.BytesIO(tar.extractfile(one).read())) for one in tar if one.name.endswith(".tokens.npy")]  # type: ignore[union-attr]
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", LINES)
def test_the_line_of_a_model_can_be_typed(model: str, tmp_path: Path) -> None:
    encode, template, pack = LINES[model]
    write_pairs(tmp_path, 1, width=300, height=220)
    write_plugin(tmp_path, "somebodys", COLOURS.replace('"colours"', '"magvit2"'), "magvit2 = somebodys:load")
    others = BLOCKS.replace('"line"', '"titok"').replace('"eight"', '"unitok"')
    write_plugin(tmp_path, "others", others, "titok = others:Line\nunitok = others:Eight")
    write_plugin(
        tmp_path, "wds_tools_notes", NOTES.read_text(), "[wds_tools.templates]\nlumina-mgpt = wds_tools_notes:LuminaMGPT"
    )
    with installed(tmp_path, "somebodys"):
        codes = tmp_path / "codes"
        run("encode", "--input", tmp_path / "pairs.jsonl", "--output", codes, *placed(encode, tmp_path), "--device", "cpu")
        mode, (provenance,) = parse_mode(encode[encode.index("--mode") + 1]), read_manifest(open_store(str(codes))).codes.values()
        stride, samples = provenance["stride"] or DEFAULT_STRIDE, read_samples(codes)  # a line of codes has none
        width, height = mode.at(model, stride, int(encode[-1]) if "--min-pixels" in encode else 0).crop_for(300, 220).size
        grid = height // stride, width // stride
        shape = {"n": (32,), "hwk": (*grid, 8)}.get(provenance.get("layout", "hw"), grid)
        for sample in samples:
            assert sample.codes[mode.column].shape == shape
            assert len(np.unique(sample.codes[mode.column])) > 4
        assert len(samples) == 1
        run("verify", codes)
        assert bool(pack) == (template != "none")
        if pack:
            run("pack", "--input", codes, "--output", tmp_path / "rows", *placed(pack, tmp_path))
            run("verify", tmp_path / "rows")
            rows = read_manifest(open_store(str(tmp_path / "rows")), any_members=True).source["rows"]
            assert rows.get("template", "liquid") in template or rows["template"] == "lumina-mgpt"
            runs = rows.get("code_ids", [[rows["text_size"], provenance["codebook_size"]]])
            ids = np.concatenate(token_ids(tmp_path / "rows"))
            found = sum(int(((begin <= ids) & (ids < begin + count)).sum()) for begin, count in runs)
            assert found == sum(sample.codes[mode.column].size for sample in samples), json.dumps(rows)
