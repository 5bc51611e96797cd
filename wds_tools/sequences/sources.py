"""What the manifests of datasets say about the codes in them."""

from __future__ import annotations

from collections.abc import Sequence

from wds_tools.errors import UsageError
from wds_tools.format.codes import CodeGrid, chosen_codes
from wds_tools.format.manifest import Manifest
from wds_tools.sequences.config import SequenceConfig
from wds_tools.sequences.templates import Template, find_template


def codebook_size_of(
    manifests: Sequence[Manifest], urls: Sequence[str], config: SequenceConfig, names: Sequence[str | None]
) -> int:
    """Entries of the codebook, or codebooks, that all datasets were encoded with; 0 if none of them has codes.

    Args:
        manifests, urls: of the datasets.
        config: its codebook_size is what the user says that it is, its template what makes ids of codes.
        names: the code set that is used of each; None: the first that it has.

    Raises:
        UsageError: they were encoded with different tokenizers, one has codes and its manifest does not say of what, or they are
            in a layout of which the template can't make ids; or as find_template.
    """
    given, template = config.codebook_size, find_template(config.template)
    found: dict[tuple[object, ...], str] = {}
    for manifest, url, name in zip(manifests, urls, names, strict=True):
        if not manifest.num_codes:
            continue
        told: list[tuple[object, ...]] = []
        for column, one in chosen_codes(manifest.codes, name).items():
            layout = manifest.layouts[column]
            check_order(f"{url}: {column}", layout, template)
            told.append((one.get("tokenizer"), one.get("weights_hash"), sum(layout.sizes) or None))
        if given is None and (not told or not all(size for *_, size in told)):
            raise UsageError(f"{url} has codes, but its manifest does not say of which codebook: give codebook_size")
        found |= dict.fromkeys(told or [(None, None, given)], url)
    if len(found) > 1:
        says = [f"{url}: {name}, {size} codes, weights {str(weights)[:19]}" for (name, weights, size), url in found.items()]
        raise UsageError(f"codes of different image tokenizers can't be mixed in one vocabulary ({'; '.join(says)})")
    return given or next((size for *_, size in found if isinstance(size, int)), 0)


def check_order(what: str, layout: CodeGrid, template: Template) -> None:
    """Raise UsageError, which begins with `what`, if the template can't make the ids of a text of codes in this layout."""
    has_order = layout.is_sequence and (layout.has_sides or not template.states_shape)
    if not has_order and type(template).to_ids is Template.to_ids:
        raise UsageError(
            f"{what} has {layout}, of which template {template.name} can't make the ids of a text: name one whose own "
            "to_ids(codes) does; docs/tokenizers.md says how a package adds it"
        )
