"""The manifest of a dataset that was made in parts, when all of them are through."""

from __future__ import annotations

from dataclasses import dataclass

from wds_tools.dataset.files import check_complete
from wds_tools.dataset.layout import MANIFEST
from wds_tools.dataset.output import Output, clear_complete, count_rejects
from wds_tools.dataset.reader import read_manifest
from wds_tools.format.manifest import Manifest
from wds_tools.jobs.options import JobOptions, RejectBudget, check_kept, way_on
from wds_tools.storage import open_store


@dataclass(frozen=True, kw_only=True)
class FinalizeConfig:
    """Write the manifest of a dataset that was made in parts, or name the missing parts."""

    output: str
    """The dataset: the --output of the parts."""
    max_rejects: str = JobOptions.max_rejects
    """Maximum of unusable inputs, over all parts: a count or a share."""

    def __post_init__(self) -> None:
        RejectBudget.parse(self.max_rejects)


def finalize(config: FinalizeConfig) -> Manifest:
    """Write the manifest over all parts.

    Args:
        config: which dataset.

    Returns:
        The manifest, also if it was written before.

    Raises:
        NotFound: nothing was begun there, or a part is not finished; says which.
        UsageError: a part is still at work.
        TooManyRejects: over all parts.
        FormatError: a file is not what its part wrote.
    """
    store = open_store(config.output)
    if store.exists(MANIFEST):
        manifest = read_manifest(store, any_members=True)
        check_complete(store, manifest)
        clear_complete(store)
        return manifest
    with Output.begun(store) as output:
        results = output.results()
        num_inputs = sum(result.inputs for result in results.values())
        budget = RejectBudget.parse(config.max_rejects)
        rejects = count_rejects(results.values())
        budget.check(rejects, num_inputs, final=True, store=store, way_on=way_on(store))
        check_kept(rejects, num_inputs)
        return output.finish(results)
