"""Names in MLflow: of parameters and tags, and of the metrics, so that its page shows the losses first.

MLflow 3.17 draws the metrics in groups by what stands before their last slash: the groups in alphabetical order, then
those without a slash, then `system/`. So `train/` and `val/` come first when what else a row has carries no slash.
"""

import re

_LENGTH = 250
_PLAIN = {
    "perf/images_per_second": "images_per_second",
    "perf/step_time_s": "step_time_s",
    "perf/data_wait_s": "data_wait_s",
    "perf/mfu": "mfu",
    "memory/peak_gib": "peak_memory_gib",
    "data/cache_hits": "cache_hits",
    "plan/step_time_s": "planned_step_time_s",
    "plan/memory_gib": "planned_memory_gib",
}
_IN_METRICS_LOG = {plain: name for name, plain in _PLAIN.items()}


def allowed_name(key: str) -> str:
    """Return `key` with the characters and the length that MLflow allows in a name."""
    return re.sub(r"[^\w./\- :]", "_", key)[:_LENGTH]


def name_in_mlflow(metric: str) -> str:
    """Return the name in MLflow of a metric of metrics.jsonl."""
    return _PLAIN.get(metric) or allowed_name(metric)


def name_in_metrics_log(metric: str) -> str:
    """Return the name in metrics.jsonl of a metric of MLflow."""
    return _IN_METRICS_LOG.get(metric, metric)
