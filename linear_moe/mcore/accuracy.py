"""A forward step that, in evaluation, also counts how often the most likely token is the right one."""

from __future__ import annotations

import functools

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region, vocab_parallel_cross_entropy
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from linear_moe.mcore.pretrain import forward_step, get_batch


def accuracy_step(data_iterator, model, counts: tuple[int, ...] = ()):
    """In training what ``pretrain.forward_step`` does. In evaluation the log also says ``accuracy``: at how many of the
    positions under the loss mask the label has the largest logit; and ``accuracy/<n>`` for each n in counts: among the
    samples with n such positions. Not for packed sequences.
    """
    if model.training:
        return forward_step(data_iterator, model)
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    logits = model(batch["tokens"], batch["position_ids"], batch["attention_mask"])
    return logits, functools.partial(_score, batch["labels"], batch["loss_mask"], counts)


def _score(labels: Tensor, mask: Tensor, counts: tuple[int, ...], logits: Tensor):
    """logits ``[b, s, vocabulary of this rank]`` -> as ``pretrain.loss_func``."""
    right = gather_from_tensor_model_parallel_region(logits).argmax(-1) == labels
    # It changes its argument.
    losses = vocab_parallel_cross_entropy(logits.float().transpose(0, 1).contiguous(), labels.t().contiguous()).t()
    loss, positions = (losses * mask).sum(), mask.sum(-1)
    report = {"lm loss": torch.stack([loss, mask.sum()])}
    samples = {"accuracy": positions > 0} | {f"accuracy/{n}": positions == n for n in counts}
    for name, rows in samples.items():
        chosen = mask * rows[:, None]
        report[name] = torch.stack([(right * chosen).sum(), chosen.sum()])
    return loss, mask.sum().to(torch.int), report
