"""Files of keys that a user lists: a KEY, or DATASET<tab>KEY, a line -> (which dataset, key), in constant memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from wds_tools.errors import UsageError
from wds_tools.sources.text.lines import number_lines
from wds_tools.storage import open_store, split_url
from wds_tools.storage.place import place_of

BARE, OTHER = -1, -2
"""In place of the number of a dataset: the line names none, or one that is not among these."""
_READ_BYTES = 4 << 20


def read_keys(url: str, datasets: Sequence[str], option: str) -> Iterator[tuple[int, str]]:
    """The lines of a file of keys; blank ones are left out, as is a byte order mark.

    Args:
        url: the file.
        datasets: URLs or names, however they are spelled.
        option: what a message calls the file.

    Yields:
        Number of the line's dataset, BARE or OTHER, and the key; with OTHER, what the line calls its dataset.

    Raises:
        NotFound: there is no such file.
        UsageError: a line is no text, or too long.
    """
    folder, name = split_url(url)
    places = {place_of(dataset): number for number, dataset in enumerate(datasets)}
    with open_store(folder).open(name) as stream:
        for line in number_lines(iter(partial(stream.read, _READ_BYTES), b"")):
            try:
                dataset, tab, key = (b"\xff" if line.data is None else line.data).decode().rstrip("\r").rpartition("\t")
            except UnicodeDecodeError as error:
                raise UsageError(f"{option} {url}, line {line.number}: expected KEY, or DATASET<tab>KEY, in UTF-8") from error
            number = places.get(place_of(dataset), OTHER) if tab else BARE
            yield number, dataset if number == OTHER else key
