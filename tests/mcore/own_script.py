"""A user's own Megatron script; the lines with a number are all that linear_moe needs."""

import sys

import torch
from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from linear_moe.mcore.arguments import add_arguments  # 1
from linear_moe.mcore.cpu import enable_cpu  # only to run without a GPU
from linear_moe.mcore.model import model_config

FLAGS = """--hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32
    --position-embedding-type rope --normalization RMSNorm --disable-bias-linear --micro-batch-size 2
    --global-batch-size 4 --train-iters 3 --lr 1e-3 --min-lr 0 --eval-iters 0 --eval-interval 1000 --log-interval 1
    --tokenizer-type NullTokenizer --vocab-size 99""".split()


class Random(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        tokens = torch.randint(99, (33,), generator=torch.Generator().manual_seed(int(i)))
        return {"tokens": tokens[:-1], "labels": tokens[1:]}


def forward_step(data_iterator, model):
    batch = next(data_iterator)
    positions = torch.arange(32).expand_as(batch["tokens"])
    output = model(batch["tokens"].cuda(), positions.cuda(), None, labels=batch["labels"].cuda())
    return output, lambda output: (output.mean(), {"lm loss": output.mean().detach()})


def datasets(samples):
    return Random(), None, None


if __name__ == "__main__":
    enable_cpu()
    sys.argv += FLAGS
    args = parse_and_validate_args(extra_args_provider=add_arguments)  # 2
    config = pretrain_cfg_container_from_args(args, model_config(args))  # 3
    datasets.is_distributed = True
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)
