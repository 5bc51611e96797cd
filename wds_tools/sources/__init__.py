"""Files -> records, whatever contains them, and what records hold. The list is what a source of another package needs."""

from wds_tools.sources.record import InputFile, Record, Source, file_records

__all__ = ["InputFile", "Record", "Source", "file_records"]
