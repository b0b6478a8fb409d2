"""The shared half of the project: what every script imports."""

from model.config import PRESETS, GPTConfig

__all__ = ["PRESETS", "GPTConfig"]
