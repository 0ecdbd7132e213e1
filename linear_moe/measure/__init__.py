"""What measures and checks on a GPU; no part of what a model runs."""
