"""Pretraining of Titans, the neural-long-term-memory language models of arXiv 2501.00663."""

from typing import TYPE_CHECKING, Any

from titans_scale.config import ConfigError, TitansConfig, load_config

if TYPE_CHECKING:
    from titans_scale.models import TitansLM

__version__ = "0.1.0"
__all__ = ["ConfigError", "TitansConfig", "TitansLM", "load_config"]


def __getattr__(name: str) -> Any:
    """TitansLM on first use: a command that only parses its options need not import torch."""
    if name == "TitansLM":
        from titans_scale.models import TitansLM

        return TitansLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
