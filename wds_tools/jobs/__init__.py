"""Jobs: a command that makes a dataset is a `Job`, which `run_job` carries out."""

from wds_tools.dataset.writer import ShardLimits, TaskWriter
from wds_tools.jobs.job import Job, Work, run_job
from wds_tools.jobs.options import JobOptions
from wds_tools.run.local import Report
from wds_tools.run.progress import Advance

__all__ = ["Advance", "Job", "JobOptions", "Report", "ShardLimits", "TaskWriter", "Work", "run_job"]
