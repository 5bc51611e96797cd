"""Token rows in the viewer: segments with their texts, what is trained, and the pictures of their codes."""

from __future__ import annotations

from pathlib import Path

from factory import answer_sample, image_sample, make_dataset, multi_sample, page_sample, text_sample
from tokens import IMAGE_TOKENS, write_tokenizer
from viewer import CODES, ask, fetch, serving, small_codes

from wds_tools.dataset.reader import read_manifest
from wds_tools.dataset.samples import SampleReader, is_small
from wds_tools.format.schema import Sample
from wds_tools.pack.rows import PackConfig, pack
from wds_tools.sequences.templates import Emu3
from wds_tools.storage import open_store
from wds_tools.view.token_rows import TokenRows

FEW = 16


def every_kind() -> list[Sample]:
    made = [
        image_sample(0),
        multi_sample(1),
        text_sample(2, "Only words."),
        answer_sample(3, (4, 4), (2, 3)),
        page_sample(4, (2, 2)),
    ]
    return [small_codes(one) for one in made]


def packed(folder: Path, samples: list[Sample], **settings: object) -> str:
    make_dataset(folder / "set", samples, codes=CODES)
    given = {"input": (str(folder / "set"),), "max_length": 256, "output": str(folder / "rows"), "quiet": True, **settings}
    pack(PackConfig(**given))  # type: ignore[arg-type]  # of a dict
    return str(folder / "rows")


def test_a_row_shows_its_segments_texts_pictures_and_what_is_trained(tmp_path: Path) -> None:
    tokenizer = str(write_tokenizer(tmp_path / "tokenizer"))
    rows = packed(tmp_path, every_kind(), tokenizer=tokenizer, t2i_ratio=1, unconditional_ratio=0, image_ratio=0)
    with serving(rows, text_tokenizer=tokenizer, device="cpu") as server:
        (card,) = ask(server, "/api/samples")["samples"]
        shown = ask(server, "/api/sample/0")
        assert card["type"] == "token row"
        assert card["text"] == f"segments: {len(every_kind())}; trained tokens: {shown['trained']}"
        assert card["row_tokens"] == 256
        assert sum(segment["tokens"] for segment in shown["segments"]) + shown["padding"] == 256
        texts = ["".join(run.get("text", "<image>") for run in segment["runs"]) for segment in shown["segments"]]
        assert "<s>Only words." in texts
        assert any(text.startswith("<s>caption 0\n") and text.endswith("<boi><image><eoi></s>") for text in texts)
        assert "<s>page 4, part 0. <boi><image><eoi> page 4, part 1." in texts
        talk = next(segment for segment in shown["segments"] if "Draw" in str(segment))
        assert [(run.get("text"), run["trained"]) for run in talk["runs"]] == [
            ("<s>User: <boi>", False), (None, False), ("<eoi>Draw 3.\nAssistant: ", False),
            ("Here:<boi>", True), (None, True), ("<eoi></s>", True),
        ]  # fmt: skip
        page = next(segment for segment in shown["segments"] if "page" in str(segment))
        assert [run["trained"] for run in page["runs"]] == [True, False, False, False, True]
        wanted = [grid for one in every_kind() for column in one.codes for grid in one.grids_of(column)]
        assert sorted(grid["codes"] for grid in shown["grids"]) == sorted(grid.reshape(-1).tolist() for grid in wanted)
        sides = sorted((grid["height"], grid["width"]) for grid in shown["grids"])
        assert sides == [(2, 2), (2, 3), (3, 4), (4, 4), (4, 4)]  # of 2 x 6 codes the row does not say how they lie
        assert [grid["is_guess"] for grid in shown["grids"]] == [grid["height"] != grid["width"] for grid in shown["grids"]]
        for kind in ("picture", "codes"):
            assert fetch(server, f"/{kind}/0/tokens.png?image=1")[0] == 200
        assert fetch(server, "/codes/0/tokens.png?image=9")[0] == 422
        run = next(run for run in talk["runs"] if "image" in run)
        assert shown["grids"][run["image"]]["codes"] == every_kind()[3].grids_of("vqcode_512")[0].reshape(-1).tolist()
    with serving(rows, device="cpu") as server:
        ids = ask(server, "/api/sample/0")["segments"][0]["runs"][0]["ids"]
        assert ids[0] == 1


def test_lines_of_codes_with_one_token_between_are_the_rows_of_one_image(tmp_path: Path) -> None:
    template = Emu3()
    names = (*template.tokens, *template.code_tokens(FEW), *IMAGE_TOKENS)
    tokenizer = str(write_tokenizer(tmp_path / "tokenizer", added=tuple(reversed(names))))
    samples = [answer_sample(3, (2, 3), (5, 2)), page_sample(4, (1, 4), (4, 1))]
    samples = [one._replace(codes={name: codes % FEW for name, codes in one.codes.items()}) for one in samples]
    rows = packed(tmp_path, samples, tokenizer=tokenizer, template="emu3", codebook_size=FEW)
    store = open_store(rows)
    manifest = read_manifest(store, any_members=True)
    assert manifest.token_rows is not None
    reader = SampleReader(store, manifest)
    found = TokenRows(manifest.token_rows, None).grids(reader.sample(0, is_small))
    reader.close()
    wanted = [grid.tolist() for one in samples for grid in one.grids_of("vqcode_512")]
    assert {str(codes.tolist()) for codes, _ in found} >= {str(grid) for grid in wanted if len(grid) > 1 and len(grid[0]) > 1}
    assert sorted(codes.size for codes, _ in found) == sorted(sum(map(len, grid)) for grid in wanted)
