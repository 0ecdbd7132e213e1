"""Generation with states whose size does not depend on how much was said."""

from linear_moe.inference.generation import Session, generate

__all__ = ["Session", "generate"]
