"""From text to a trained, evaluated model in minutes: what `make quickstart` runs."""

from titans_scale.quickstart.pipeline import default_workdir, run_quickstart
from titans_scale.quickstart.runner import StageFailed, Stopped

__all__ = ["StageFailed", "Stopped", "default_workdir", "run_quickstart"]
