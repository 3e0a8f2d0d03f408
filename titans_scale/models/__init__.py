"""The language model and its four variants."""

from titans_scale.models.model import TitansLM, TitansOutput, TitansState

__all__ = ["TitansLM", "TitansOutput", "TitansState"]
