"""Everything that measures, checks on a GPU, compiles for a report or tunes; no part of what a model runs."""
