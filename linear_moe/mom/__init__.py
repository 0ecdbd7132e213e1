"""Mixture-of-Memories: the router, and what it adds to a mixer."""

from linear_moe.mom.mom import MoMConfig, make_routes
from linear_moe.mom.router import Router, Routing

__all__ = ["MoMConfig", "Router", "Routing", "make_routes"]
