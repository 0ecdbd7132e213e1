"""The Megatron side: the only folder that imports megatron, transformer_engine or apex."""
