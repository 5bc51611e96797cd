"""Tar archives: header blocks in and out, members as they arrive, and where they lie."""

from wds_tools.format.tar.headers import BLOCK, MAX_MEMBER_BYTES, Member, changes_member, header_name, pax_records
from wds_tools.format.tar.places import first_name, member_places
from wds_tools.format.tar.reader import TarReader
from wds_tools.format.tar.write import END, MAX_SIZE, header, padding

__all__ = [
    "BLOCK",
    "END",
    "MAX_MEMBER_BYTES",
    "MAX_SIZE",
    "Member",
    "TarReader",
    "changes_member",
    "first_name",
    "header",
    "header_name",
    "member_places",
    "padding",
    "pax_records",
]
