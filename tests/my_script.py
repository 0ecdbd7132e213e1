"""What a user's own Megatron script has, for README's example: data sets and a forward step, without linear_moe."""

import torch


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


datasets.is_distributed = True
