"""Every metric by name: direction, unit, range, formula, source and version; ours are defined here, once.

``workbook`` holds ours, ``saebench`` what SAEBench's core and absorption report, ``saebench_tasks`` what its other
evaluations do.
"""

from sae_lib.metrics import saebench, saebench_tasks, workbook
from sae_lib.metrics.metric import Metric
from sae_lib.metrics.workbook import explained_variance, explained_variance_by_part, mean_cos2

METRICS: dict[str, Metric] = {**workbook.METRICS, **saebench.METRICS, **saebench_tasks.METRICS}

__all__ = ["METRICS", "Metric", "explained_variance", "explained_variance_by_part", "mean_cos2", "of_core"]


def of_core(name: str) -> str:
    """Name in ``METRICS`` of what SAEBench core calls ``name``: some of its names are ours for something else."""
    return f"core/{name}" if f"core/{name}" in METRICS else name
