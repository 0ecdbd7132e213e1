"""Megatron's own GPT on CPU: every layout trains like one process, checkpoints reshard, resume is bitwise."""

import sys

import torch

from tests.parallel import harness


class Numbers(torch.utils.data.Dataset):
    """Sample i is a function of i alone."""

    def __init__(self, samples: int, length: int, vocabulary: int):
        self.samples, self.length, self.vocabulary = samples, length, vocabulary

    def __len__(self):
        return self.samples

    def __getitem__(self, i):
        # Multiples of a small step, so that there is something to learn.
        start, step = torch.randint(self.vocabulary, (2,), generator=torch.Generator().manual_seed(int(i)))
        tokens = (start + (step % 4 + 1) * torch.arange(self.length + 1)) % self.vocabulary
        return {"tokens": tokens[:-1], "labels": tokens[1:]}


def pretrain(argv):
    """A user's Megatron script at its smallest."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain as megatron_pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    sys.argv = ["pretrain", *argv]
    args = parse_and_validate_args(extra_args_provider=harness.set_defaults)
    config = gpt_config_from_args(args)
    config.pre_wrap_hooks.append(_reinitialize)

    def datasets(samples):
        return [Numbers(max(n or 0, 1), args.seq_length, args.vocab_size) for n in samples]

    datasets.is_distributed = True
    cfg = pretrain_cfg_container_from_args(args, config)
    megatron_pretrain(cfg, datasets, ModelType.encoder_or_decoder, forward_step)


def _reinitialize(chunks):
    from linear_moe.mcore.init import reinitialize

    for chunk in chunks:
        reinitialize(chunk, seed=1234)
    return chunks


def forward_step(data_iterator, model):
    batch = next(data_iterator)
    tokens, labels = batch["tokens"].cuda(), batch["labels"].cuda()
    length = tokens.shape[1]
    positions = torch.arange(length, device="cuda").expand_as(tokens)
    mask = torch.ones(length, length, device="cuda").triu(1).bool()[None, None]
    return model(tokens, positions, mask, labels=labels), _loss


def _loss(output):
    loss = output.float().mean()
    return loss, {"lm loss": loss.detach().clone()}


def train(flags=(), save=None):
    return harness.train(pretrain, [*harness.TINY, *flags], save)
