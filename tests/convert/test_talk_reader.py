"""`TalkReader`: one conversation in any convention has the same turns and images; what has no place in it is a reject."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wds_tools.errors import Reject
from wds_tools.records.conversations import IMAGE_MARK, ROLES, Talk, TalkReader, turns_of
from wds_tools.records.images import ImageFile

Record = dict[str, Any]

URI = "data:image/png;base64,iVBORw0KGgo="
STRUCT = {"bytes": b"\xff\xd8\xff\xe0", "path": None}
NAMED = {"bytes": b"\x89PNG", "path": "1.png"}


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def messages(question: Any, answer: Any = "Red.", **fields: Any) -> Record:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **fields}


def text(value: Any) -> Record:
    return {"type": "text", "text": value}


def reason(record: Record, reader: TalkReader | None = None) -> str:
    with pytest.raises(Reject) as caught:
        (reader or TalkReader()).read(record)
    return f"{caught.value.reason}: {caught.value.detail}"


ONE_IMAGE: list[tuple[Record, Any]] = [
    ({"conversations": turns("<image>What?", "Red."), "image": "a.jpg"}, "a.jpg"),
    ({"conversations": turns("<image>What?", "Red."), "image": STRUCT}, STRUCT),
    ({"conversations": turns("<image>What?", "Red."), "image": b"\xff\xd8"}, b"\xff\xd8"),
    ({"conversations": turns("<image>What?", "Red."), "images": [STRUCT]}, STRUCT),
    ({"conversations": turns("<image>What?", "Red."), "image": {"url": URI}}, URI),
    ({"conversations": '[{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "Red."}]', "image": URI}, URI),
    ({"conversations": {"from": ["human", "gpt"], "value": ["<image>What?", "Red."]}, "image": "a.jpg"}, "a.jpg"),
    ({"conversations": messages("<image>What?")["messages"], "image": "a.jpg"}, "a.jpg"),
    (messages("<image>What?", images=["a.jpg"]), "a.jpg"),
    (messages([{"type": "image"}, text("What?")], [text("Red.")], images=["a.jpg"]), "a.jpg"),
    (messages([{"type": "image", "text": None, "index": 0}, {**text("What?"), "index": None}], images=[STRUCT]), STRUCT),
    (messages([{"type": "image", "image": "a.jpg"}, text("What?")]), "a.jpg"),
    (messages([{"type": "image", "path": "a.jpg"}, text("What?")], images=["a.jpg"]), "a.jpg"),
    (messages([{"type": "image", "image": STRUCT}, text("What?")]), STRUCT),
    (messages([{"type": "image", **STRUCT}, text("What?")]), {"type": "image", **STRUCT}),
    (messages([{"image": "a.jpg"}, {"text": "What?"}]), "a.jpg"),
    (messages([{"type": "image_url", "image_url": {"url": URI}}, text("Wh"), text("at?")]), URI),
    (messages([{"type": "input_image", "image_url": URI}, {"type": "input_text", "text": "What?"}]), URI),
    ({"texts": [{"user": "What?", "assistant": "Red.", "source": "vqa"}], "images": [STRUCT]}, STRUCT),
    (messages([{"type": "image", "image": "a.jpg"}, text(""), text("What"), {**text("?"), "image": None}]), "a.jpg"),
    ({"texts": [{"user": "<image>What?", "assistant": "Red."}], "images": ["a.jpg"]}, "a.jpg"),
]


@pytest.mark.parametrize(("record", "image"), ONE_IMAGE, ids=lambda value: str(value)[:60])
def test_a_conversation_about_one_image_is_the_same_in_every_convention(record: Record, image: Any) -> None:
    assert TalkReader().read(record) == Talk(turns("<image>What?", "Red."), [image])


@given(st.sampled_from([(role, name) for role, names in ROLES.items() for name in names]), st.randoms())
def test_a_role_is_known_in_any_case(role_and_name: tuple[str, str], random: Any) -> None:
    role, name = role_and_name
    name = "".join(random.choice((letter, letter.upper())) for letter in name)
    talk = [{"from": role, "value": role} for role in ("system", "human", "gpt")]
    changed = [{**turn, "from": name} if turn["from"] == role else turn for turn in talk]
    assert TalkReader().read({"conversations": changed}).turns == talk


@pytest.mark.parametrize(("value", "expected"), [(5, "5"), (-0.25, "-0.25"), (10**25, "1" + 25 * "0")])
def test_a_number_is_its_text(value: Any, expected: str) -> None:
    assert TalkReader().read(messages("How many?", value)).turns == turns("How many?", expected)


@pytest.mark.parametrize("blank", ["", " \n", None, []])
def test_an_empty_turn_of_the_system_is_left_out(blank: Any) -> None:
    record = messages("What?")
    record["messages"].insert(0, {"role": "system", "content": blank})
    assert TalkReader().read(record).turns == turns("What?", "Red.")


def test_a_prompt_that_a_field_and_a_turn_give_is_there_once_and_another_is_a_reject() -> None:
    record = {"system": "Be kind.", "conversations": [{"from": "system", "value": "Be kind."}, *turns("What?", "Red.")]}
    talk = TalkReader().read(record)
    assert talk.turns == [{"from": "system", "value": "Be kind."}, *turns("What?", "Red.")]
    assert "bad_conversation: the turns are from: system, system, human" in reason({**record, "system": "Be short."})
    late = {"conversations": [*turns("What?", "Red."), {"from": "system", "value": "Be kind."}, *turns("Why?", "So.")]}
    assert reason(late).startswith("bad_conversation")


def test_what_gpt_says_before_anybody_asked_stands_beside_the_turns() -> None:
    record = {"system": "Be kind.", "conversations": [{"from": "gpt", "value": "Hello!"}, *turns("What?", "Red.")]}
    talk = TalkReader().read(record)
    assert (talk.turns, talk.first_answer) == ([{"from": "system", "value": "Be kind."}, *turns("What?", "Red.")], "Hello!")
    assert reason({"conversations": [{"from": "gpt", "value": "Hello!"}]}).startswith("bad_conversation")
    with pytest.raises(Reject, match="bad_conversation"):
        turns_of(record)


@pytest.mark.parametrize("name", ["tools", "videos", "video_id", "audio_file"])
def test_tools_and_other_media_are_refused_unless_they_are_kept_as_they_are(name: str) -> None:
    record = messages("What?", **{name: [{"name": "search"}]})
    assert reason(record).startswith("unsupported_")
    assert TalkReader(left_out=(name,)).read(record).turns == turns("What?", "Red.")
    assert TalkReader().read({**record, name: "[]"}).turns == turns("What?", "Red.")


def test_texts_may_speak_of_images_by_their_names_and_parts_be_white_space() -> None:
    assert TalkReader().read({"texts": [{"user": "Of a.jpg?", "assistant": "a.jpg"}]}).turns == turns("Of a.jpg?", "a.jpg")
    talk = TalkReader().read(messages([{"type": "image", "image": "a.jpg"}, text("\n"), text("What?")], "a.jpg"))
    assert talk.turns == turns("<image>\nWhat?", "a.jpg")


def test_images_without_a_mark_come_first_where_that_is_said() -> None:
    record = messages("What?", images=["a.jpg", "b.jpg"], system="Be kind.")
    assert "0 <image> marks, 2 images: expected as many; --image-marks first puts them" in reason(record)
    talk = TalkReader(marks="first").read(record)
    assert (talk.turns[1]["value"], talk.images) == ("<image><image>What?", ["a.jpg", "b.jpg"])
    assert "1 <image> marks, 2 images" in reason(messages("<image>What?", images=["a.jpg", "b.jpg"]), TalkReader(marks="first"))


def test_images_in_their_places_and_the_next_of_the_record_go_together() -> None:
    parts = [{"type": "image", "image": "a.jpg"}, text("and <image> and"), {"type": "image", "index": 1}]
    talk = TalkReader().read(messages(parts, images=["b.jpg", "c.jpg"]))
    assert (talk.turns[0]["value"], talk.images) == ("<image>and <image> and<image>", ["a.jpg", "b.jpg", "c.jpg"])


def test_fields_of_other_names_are_named() -> None:
    record = {"chat": turns("<image>What?", "Red."), "photo": "a.jpg"}
    assert "missing_field: no conversations or messages or" in reason(record)
    assert "unused_image: photo holds an image that is not used: 'a.jpg'; --image photo uses it" in reason(
        record, TalkReader("chat")
    )
    reader = TalkReader("chat", "photo")
    assert reader.read(record).images == ["a.jpg"]
    assert reader.roles(record) == {"conversations": "chat", "image": "photo"}


@pytest.mark.parametrize(
    ("used", "same"),
    [
        ("train/1.jpg", "1.jpg"),
        ("1.jpg", "/data/train/1.jpg"),
        ("a/1.jpg", "https://example.org/b/1.jpg"),
        ({"bytes": b"\x89PNG", "path": "1.png"}, "images/1.png"),
        ({"bytes": b"\x89PNG", "path": None}, b"\x89PNG"),
    ],
)
def test_another_field_may_say_where_the_image_is_from(used: Any, same: Any) -> None:
    assert TalkReader().read(messages("<image>What?", image=used, source=same)).images == [used]


def test_only_what_can_be_kept_is_said_to_be() -> None:
    assert "--keep mask or --drop mask leaves it out" in reason(messages("<image>", image="a.jpg", mask="b.jpg"))
    assert "; --image mask uses it, --drop mask leaves it out" in reason(messages("<image>", image="a.jpg", mask=NAMED))


def test_a_page_about_video_is_text() -> None:
    assert TalkReader().read(messages("<video>\n</video> is closed?", "Yes.")).turns[0]["value"].startswith("<video>")


def test_of_two_conversations_one_has_to_be_named() -> None:
    record = messages("What?", conversations=turns("Why?", "So."), system="Be kind.")
    assert "ambiguous_fields: conversations and messages hold conversations: say --conversations" in reason(record)
    reader = TalkReader("conversations")
    assert reader.read(record).turns[1:] == turns("Why?", "So.")
    assert reader.roles(record) == {"conversations": "conversations", "system": "system"}
    assert TalkReader(left_out=("messages",)).read(record) == reader.read(record)
    assert TalkReader().roles({**record, "messages": []}) == reader.roles(record)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (messages([{"type": "image"}], images=["a.jpg"], image="b.jpg"), "unused_image: images holds an image"),
        (messages("What?", photo=STRUCT), "unused_image: photo holds an image"),
        (messages("What?", scan={"of": [b"\xff\xd8\xff"]}), "unused_image: scan.of holds an image"),
        (messages("What?", scan=ImageFile("/x/a.jpg")), "unused_image: scan holds an image"),
        (messages("<image>", images=["src/1.png"], mask="mask/1.png"), "unused_image: mask holds an image"),
        (messages("<image>", image=NAMED, mask={**NAMED, "bytes": b"\x89PNG2"}), "unused_image: mask holds an image"),
        (
            {"image": "a.jpg", "conversations": [turn | {"image": "b.jpg"} for turn in turns("<image>", "a")]},
            "unused_image: image",
        ),
        (messages([text("<image>"), {**text("What?"), "images": ["b.jpg"]}], images=["a.jpg"]), "unused_image: images holds"),
        (messages("What?", image_base64_str=["/9j/4AAQ"]), "unused_image: image_base64_str holds an image"),
        (messages("What?", scan=f"iVBORw0KGgo{'A' * 200}=="), "unused_image: scan holds an image"),
        (messages("<video>\nWhat?"), "unsupported_media: a turn begins with <video>"),
        (messages([text("What?"), {"type": "image", "index": 1}], images=["a", "b"]), "image_marks: a part is image 1"),
        (messages("Say it in HTML.", "Write <image>."), "image_marks: 1 <image> marks, 0 images"),
        (
            {"conversations": [{"from": "gpt", "value": "<image>"}, *turns("What?", "Red.")], "image": "a.jpg"},
            "image_marks: gpt beg",
        ),
        (messages([{"type": "image", "image": "a.jpg"}, text("?")], images=["b.jpg"]), "image_marks: 0 <image> marks, 1 images"),
        (messages([{"type": "video", "video": "a.mp4"}, text("What?")]), "unsupported_media"),
        (messages([{"type": "input_audio", "input_audio": {}}, text("What?")]), "unsupported_media"),
        (messages([{"type": "tool_use"}]), "bad_conversation: a part of a turn has the type 'tool_use'"),
        (messages([["What?"]]), "wrong_type: a part of a turn is a list"),
        (messages({"text": "What?"}), "wrong_type: content is a dict"),
        (messages(True), "wrong_type: content is a bool"),
        (messages(float("nan")), "wrong_type: content is a float"),
        (messages([]), "empty_text: content is empty"),
        (messages([text("")]), "empty_text: content is empty"),
        (messages([text(None)]), "wrong_type: text is a NoneType"),
        (messages([{**text("What?"), "image": "a.jpg"}]), "unused_image: image holds an image that is not used: 'a.jpg'"),
        (messages("What?", None), "missing_field: a turn has no value or content; its fields are: role, content"),
        ({"messages": [{"role": "assistant", "content": "Red.", "tool_calls": [{}]}]}, "unsupported_tools"),
        ({"messages": [{"role": "tool", "content": "5"}]}, "bad_conversation: a turn is from 'tool', expected one of system"),
        ({"messages": [{"content": "5"}]}, "bad_conversation: a turn is from 'None'"),
        ({"messages": "What?"}, "wrong_type: messages is 'What?', expected a list of turns, or its JSON"),
        ({"conversations": {"from": ["human"], "value": []}}, "wrong_type: conversations is a dict"),
        ({"texts": [{"user": "What?", "assistant": ""}]}, "empty_text: assistant is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_place_in_a_conversation_is_a_reject(record: Record, expected: str) -> None:
    assert reason(record).startswith(expected)


DRAWN = turns("<image>Redder.", "<image>")
ANSWERED: list[tuple[Record, list[dict[str, str]], list[Any]]] = [
    (messages("Draw.", "See: <image>!", images=["a.jpg"]), turns("Draw.", "See: <image>!"), ["a.jpg"]),
    (messages([text("Draw.")], [{"type": "image", "image": STRUCT}]), turns("Draw.", "<image>"), [STRUCT]),
    ({"conversations": DRAWN, "image": ["a.jpg", "b.jpg"]}, DRAWN, ["a.jpg", "b.jpg"]),
    (
        {"conversations": [*DRAWN, *turns("And <image>?", "<image>")], "images": [*"abcd"]},
        [*DRAWN, *turns("And <image>?", "<image>")],
        [*"abcd"],
    ),
    ({"source_image": "a.jpg", "instruction": "Redder.", "target_image": "b.jpg"}, DRAWN, ["a.jpg", "b.jpg"]),
    (
        {"original_image": STRUCT, "edit_prompt": "Redder.", "edited_image": b"\xff\xd8", "edited_prompt": "x"},
        DRAWN,
        [STRUCT, b"\xff\xd8"],
    ),
    (
        {"src_img": "a.jpg", "edited_prompt_list": ["Redder.", "Make it redder."], "edited_img": "b.jpg"},
        DRAWN,
        ["a.jpg", "b.jpg"],
    ),
    (
        {"input_images": ["a", "b"], "instruction": "Join.", "output_image": "c"},
        turns("<image><image>Join.", "<image>"),
        [*"abc"],
    ),
    (
        {"input_images": ["a", "b"], "instruction": "<image>, <image>.", "output_image": "c"},
        turns("<image>, <image>.", "<image>"),
        [*"abc"],
    ),
    ({"input_images": None, "instruction": "Draw.", "output_image": "c"}, turns("Draw.", "<image>"), ["c"]),
    ({"image_list": ["a", "b"], "instruction_list": [["Redder.", "Red!"]]}, DRAWN, ["a", "b"]),
    (
        {"image_list": ["a", "b", "c"], "instruction_list": ["Redder.", ["Larger."]]},
        [*DRAWN, *turns("Larger.", "<image>")],
        [*"abc"],
    ),
    ({"prompt": "Redder.", "image": "a.jpg", "output_image": "b.jpg"}, DRAWN, ["a.jpg", "b.jpg"]),
]


@pytest.mark.parametrize(("record", "expected", "images"), ANSWERED)
def test_images_in_answers_keep_their_places_and_edits_are_such_conversations(
    record: Record, expected: list[dict[str, str]], images: list[Any]
) -> None:
    assert TalkReader().read(record) == Talk(expected, images)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"source_img": "a.jpg", "mask_img": "m.jpg", "instruction": "Redder.", "target_img": "b.jpg"}, "unused_image: mask_img"),
        ({"source_img": "a.jpg", "mask_img": STRUCT, "instruction": "Redder.", "target_img": "b.jpg"}, "unused_image: mask_img"),
        (
            {"image_list": ["a", "b", "c"], "instruction_list": ["Redder."]},
            "image_marks: instruction_list has 1 instructions for 2",
        ),
        (
            {"image_list": ["a", None, "c"], "instruction_list": ["Redder.", "Larger."]},
            "image_marks: image_list has 3 places, and an image at 2 of them",
        ),
        ({"source_img": "a", "instruction": ["Redder."], "target_img": ["b", None]}, "image_marks: target_img has 2 places"),
        ({"input_images": [None, "b"], "instruction": "Join.", "target_img": "c"}, "image_marks: input_images has 2 places"),
        ({"image_list": ["a", "b"], "instruction_list": []}, "missing_field"),
        ({"source_img": "a", "instruction": "", "target_img": "b"}, "missing_field"),
        ({"source_img": "a", "instruction": [5], "target_img": "b"}, "wrong_type: instruction holds a int"),
        ({"source_img": "a", "instruction": " ", "target_img": {"bytes": None, "path": None}}, "image_marks"),
        ({"source_img": "a", "instruction": "<image> <image>", "target_img": "b"}, "image_marks: 3 <image> marks, 2 images"),
        ({"source_img": "a", "instruction": "Redder <img>", "target_img": "b"}, "unused_image: a turn holds <img>"),
        ({"conversations": turns("What?", "Red."), "edited_image": "b.jpg"}, "unused_image: edited_image"),
    ],
)
def test_what_is_no_whole_edit_is_a_reject(record: Record, expected: str) -> None:
    assert reason(record).startswith(expected)


def test_options_name_the_fields_of_an_edit() -> None:
    record = {"before": "a.jpg", "after": "b.jpg", "what": "Redder.", "conversations": turns("x", "y"), "mask": "m.jpg"}
    reader = TalkReader(image="before", edited="after", instruction="what", left_out=("mask",))
    assert reader.read(record) == Talk(DRAWN, ["a.jpg", "b.jpg"])


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.binary(max_size=3)
    | st.sampled_from([IMAGE_MARK, "a.jpg", "x", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["from", "value", "role", "content", "type", "text", "image", "url", "user"]), inner)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["conversations", "messages", "texts", "system", "image", "images", "tools"]), VALUES))
def test_whatever_a_record_holds_it_is_a_conversation_or_a_reject(record: Record) -> None:
    try:
        talk = TalkReader().read(record)
    except Reject:
        return
    assert sum(turn["value"].count(IMAGE_MARK) for turn in talk.turns) == len(talk.images)
    assert [turn["from"] for turn in talk.turns if turn["from"] != "system"] == ["human", "gpt"] * (len(talk.turns) // 2)


def test_an_image_in_the_field_of_a_turn_that_is_not_read_is_not_left_behind() -> None:
    asked = {"from": "human", "value": "q", "content": [{"type": "image", "image": "a.jpg"}]}
    with pytest.raises(Reject) as caught:
        TalkReader().read({"conversations": [asked, {"from": "gpt", "value": "a"}]})
    assert caught.value.reason == "unused_image"
