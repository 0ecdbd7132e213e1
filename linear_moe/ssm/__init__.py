"""The mixers: one file each, by the contract of ``mixer.py``."""

from linear_moe.ssm.mixer import HeadParameter, Mixer, Projection
from linear_moe.ssm.registry import MIXERS, mixer_class

__all__ = ["MIXERS", "HeadParameter", "Mixer", "Projection", "mixer_class"]
