"""Which members of a sample are read, of a source."""

from __future__ import annotations

from collections.abc import Sequence

from loaders.order.samples import OpenSource
from wds_tools.errors import UsageError
from wds_tools.format.codes import chosen_codes
from wds_tools.format.manifest import check_one_code_set
from wds_tools.format.schema import TOKEN_MEMBERS


def code_members(opened: OpenSource) -> Sequence[str]:
    """The members that hold the codes of a source; of those that a sample has the first counts.

    Raises:
        UsageError: there is no such code set; or samples that have none of the first have another: codes of another tokenizer.
    """
    members = {name.removesuffix(".npy"): name for name in opened.manifest.members if name.endswith(".npy")}
    code_set = opened.source.code_set
    if code_set is None and not opened.has_schema:
        return list(members.values())
    if code_set is None:
        first = [name for column in chosen_codes(opened.manifest.codes or members, None) if (name := members.get(column))]
        kinds = (kind for kind, _ in opened.manifest.shards.kinds)
        how = "code_set= chooses, and `wds-tools select` keeps them apart"
        check_one_code_set(f"source {opened.source.url}", kinds, members.values(), first, how)
        return first
    if not (chosen := chosen_codes(members, code_set)):
        known = ", ".join(members.values()) or "none at all"
        raise UsageError(f"source {opened.source.url} has no codes named {code_set!r}, but {known}")
    return list(chosen.values())


def wanted_members(opened: OpenSource, code_members: Sequence[str]) -> Sequence[Sequence[str]]:
    """The json and the codes of a sample, or the members of a row that was packed ahead; none of third-party tars."""
    if opened.has_schema:
        return ("json",), code_members
    return [(name,) for name in TOKEN_MEMBERS] if opened.manifest.token_rows else ()
