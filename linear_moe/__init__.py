"""Linear sequence mixers and Mixture-of-Memories for Megatron-Core."""

__version__ = "0.1.0"


def build_model(config, **overrides):
    """The model of a name, YAML file or mapping, in one process: see ``linear_moe.mcore.model.build_model``."""
    from linear_moe.mcore.model import build_model as build  # importing Megatron takes seconds

    return build(config, **overrides)


def load_model(path, iteration=None, **overrides):
    """The model of a Megatron checkpoint folder, in one process: see ``linear_moe.mcore.load.load_model``."""
    from linear_moe.mcore.load import load_model as load

    return load(path, iteration, **overrides)
