"""One linear map for each group of consecutive rows."""

import torch
import torch.nn.functional as F


def grouped_linear(x, weight, offsets):
    """Row r of group m becomes ``x[r] @ weight[m].T``.

    x [R, D]; weight [G, E, D]; offsets int32 [G], the END of every group's rows, the last one R. Returns [R, E]. On
    CUDA this is one ``torch.nn.functional.grouped_mm`` (bfloat16, float16 or float32), which never reads them back.
    """
    if x.is_cuda:
        return F.grouped_mm(x, weight.transpose(-1, -2), offs=offsets)
    # On the CPU the offsets are free to read, and separate products also take float64 and any stride.
    ends = offsets.tolist()
    parts = [F.linear(x[start:end], w) for start, end, w in zip([0, *ends], ends, weight.unbind(0))]
    return torch.cat(parts)
