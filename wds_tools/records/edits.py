"""The record of an edit -> the turns of a conversation in which the answer is an image. Pure.

    instruction: a text      source image(s) + edited image       -> human: <image>instruction         gpt: <image>
    instructions: N texts    a source and its N edits, in order   -> the same, and then human: instruction   gpt: <image> ...

Where a list stands for an instruction, it is one in other words, and the first is taken. Without a source field, the first of
several edited images is what the others were made from.
"""

from __future__ import annotations

from typing import Any

from wds_tools.errors import Reject
from wds_tools.format.schema import IMAGE_MARK

SOURCES = ("source_image", "source_img", "src_img", "original_image", "input_image", "source_images", "input_images")
INSTRUCTIONS = ("instruction", "edit_prompt", "edit_instruction", "edit", "edited_prompt_list", "instruction_list")
EDITED = ("edited_image", "edited_img", "target_image", "target_img", "output_image", "output_images", "image_list")
"""Names of fields, in this order."""


def edit_turns(name: str, instructions: Any, num_sources: int, num_edited: int) -> list[dict[str, Any]]:
    """The turns of an edit, with a mark for each image. Raises Reject: "image_marks" or "wrong_type".

    Args:
        name: of the field with the instructions.
        instructions: a text, or a list of them, each perhaps in several words.
        num_sources: images in the first question.
        num_edited: images in answers, one each.
    """
    steps = instructions if isinstance(instructions, list) and num_edited > 1 else [instructions]
    if len(steps) != num_edited:
        raise Reject("image_marks", f"{name} has {len(steps)} instructions for {num_edited} edited images: expected as many")
    turns = []
    for number, step in enumerate(steps):
        while isinstance(step, list) and step:
            step = step[0]
        if not isinstance(step, str):
            raise Reject("wrong_type", f"{name} holds a {type(step).__name__}, expected a text or a list of texts")
        marks = "" if number or IMAGE_MARK in step else IMAGE_MARK * num_sources
        turns += [{"from": "human", "value": marks + step}, {"from": "gpt", "value": IMAGE_MARK}]
    return turns
