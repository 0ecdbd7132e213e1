"""One call of a rule: the sizes, dtypes and layout that all of its kernels' launches have in common."""

from copy import copy

import torch
import triton
import triton.language as tl

from .chunks import Chunks
from .decay import NONE
from .launch import configure, precision


def block(width):
    """The tile that holds it whole: products want at least 16."""
    return max(16, triton.next_power_of_2(width))


def contiguous(*tensors):
    """Each of them, or None, as a kernel reads it."""
    return [x if x is None else x.contiguous() for x in tensors]


class Problem:
    """B sequences of T tokens or N packed ones, of H key and HV value heads with K and V channels; C tokens at a time.

    C is the tuned length of a chunk; or `mini_batch`, for rules that learn online, as is `offset`. decay: of decay.py;
    delta: whether there is a beta. tuned_as: what the tuning table calls the kernel {}.
    """

    def __init__(
        self, k, v, scale, cu_seqlens, *, decay=NONE, delta=False, tuned_as="{}", mini_batch=None, offset=None
    ):
        self.B, self.T, self.HV, self.V = v.shape
        self.H, self.K = k.shape[2:]
        self.tokens, self.scale, self.device, self.dtype = self.B * self.T, float(scale), v.device, v.dtype
        self.cu_seqlens, self.decay, self.delta, self.tuned_as, self.offset = cu_seqlens, decay, delta, tuned_as, offset
        self.N = self.B if cu_seqlens is None else len(cu_seqlens) - 1
        self.C = mini_batch or self.configure("chunk")["C"]
        self.chunks = None if mini_batch else Chunks(self.B, self.T, cu_seqlens, self.C)
        # the dtype of products with the state: float16 could not hold it
        self.wide = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
        self.precision = precision(v.dtype, v.device)

    def with_values(self, V):
        """The same problem, in the same chunks, with V value channels."""
        other = copy(self)
        other.V = V
        return other

    def configure(self, name, **widths):
        """The tuned options of a kernel; tiles no wider than the widths of that name."""
        options = configure(self.tuned_as.format(name), self.K, self.V, self.device, self.dtype)
        return options | {tile: min(options[tile], block(width)) for tile, width in widths.items()}

    def sizes(self, *names):
        """The constexpr arguments of those names."""
        known = {
            "H": self.H,
            "HV": self.HV,
            "K": self.K,
            "V": self.V,
            "C": self.C,
            "LEVELS": self.C.bit_length() - 1,
            "BK": block(self.K),
            "BC": block(self.C),
            "DECAY": self.decay,
            "DELTA": self.delta,
            "PRECISION": self.precision,
            "WIDE": tl.bfloat16 if self.wide == torch.bfloat16 else tl.float32,
        }
        return {name: known[name] for name in names}

    def empty(self, *shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=self.device)

    def rows(self, *shape, dtype=torch.float32):
        """[tokens, HV, ...]: room for something of every token and value head."""
        return self.empty(self.tokens, self.HV, *shape, dtype=dtype)

    def states(self, count, dtype=torch.float32):
        """[count, HV, K, V]: room for so many states."""
        return self.empty(count, self.HV, self.K, self.V, dtype=dtype)
