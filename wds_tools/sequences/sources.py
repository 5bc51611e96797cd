"""What the manifests of datasets say about the codes in them."""

from __future__ import annotations

from collections.abc import Sequence

from wds_tools.errors import UsageError
from wds_tools.format.codes import chosen_codes
from wds_tools.format.manifest import Manifest


def codebook_size_of(manifests: Sequence[Manifest], urls: Sequence[str], given: int | None, names: Sequence[str | None]) -> int:
    """Entries of the codebook that all datasets were encoded with; 0 if none of them has codes.

    Args:
        manifests, urls: of the datasets.
        given: what the user says that it is.
        names: the code set that is used of each; None: the first that it has.

    Raises:
        UsageError: they were encoded with different tokenizers, or one has codes and its manifest does not say of what.
    """
    found: dict[tuple[object, ...], str] = {}
    for manifest, url, name in zip(manifests, urls, names, strict=True):
        if not any(row.num_codes for row in manifest.shards):
            continue
        told = [
            (one.get("tokenizer"), one.get("weights_hash"), one.get("codebook_size"))
            for one in chosen_codes(manifest.codes, name).values()
        ]
        if given is None and (not told or any(type(size) is not int for *_, size in told)):
            raise UsageError(f"{url} has codes, but its manifest does not say of which codebook: give codebook_size")
        found |= dict.fromkeys(told or [(None, None, given)], url)
    if len(found) > 1:
        says = [f"{url}: {name}, {size} codes, weights {str(weights)[:19]}" for (name, weights, size), url in found.items()]
        raise UsageError(f"codes of different image tokenizers can't be mixed in one vocabulary ({'; '.join(says)})")
    return given or next((size for *_, size in found if isinstance(size, int)), 0)
