"""One linear map for each group of consecutive rows."""

import torch
import torch.nn.functional as F


def grouped_linear(x, weight, offsets):
    """See api.grouped_linear. On CUDA this is one ``torch.nn.functional.grouped_mm``, which in bfloat16 on Hopper or
    newer reads nothing back."""
    if x.is_cuda:
        return grouped_mm(x, weight, offsets)
    # On the CPU the offsets are free to read, and separate products also take float64 and any stride.
    sizes = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    # Split, not sliced: every slice's backward would fill a gradient of all rows with zeros.
    return torch.cat([F.linear(rows, w) for rows, w in zip(x.split(sizes), weight.unbind(0))])


def grouped_mm(x, weight, offsets):
    """The CUDA path of `grouped_linear`."""
    _, width, depth = weight.shape
    # Rows of 16 bytes are what the kernel loads, also of the gradient in its backward.
    fill, deepen = (-size % (16 // x.element_size()) for size in (width, depth))
    y = F.grouped_mm(F.pad(x, (0, deepen)), F.pad(weight, (0, deepen, 0, fill)).mT, offs=offsets)
    if y.requires_grad:
        y.register_hook(torch.Tensor.contiguous)  # its backward takes no expanded gradient, such as a sum's
    return y[:, :width]
