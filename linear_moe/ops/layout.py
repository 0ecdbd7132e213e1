"""Where the tokens of dense or packed sequences lie when rules run chunk by chunk.

A chunk holds C tokens of one sequence; a sequence's last chunk is filled up with zero rows, which write nothing. Chunks
are ordered by scan step: step s holds the s-th chunk of every sequence that has one, longest sequence first (as in
torch.nn.utils.rnn.PackedSequence). So the scan runs all sequences at once and spends nothing on padding. Where lengths
may not be read (on a GPU that would stall it), every step holds one chunk, and a sequence's first chunk takes its
initial state.
"""

import torch
from torch.nn.functional import pad

from .sequences import remembered, sequence_of
from .take import put, take


class Layout:
    """Chunk layout of [B, T, H, D] tensors; a chunked tensor is [rows, C, D] with one row a (chunk, head)."""

    def __init__(self, v, cu_seqlens=None, chunk=64, read_lengths=None):
        self.B, self.T, self.H, _ = v.shape
        self.C, self.cu_seqlens = chunk, cu_seqlens
        self.N = self.B if cu_seqlens is None else len(cu_seqlens) - 1
        self.order, self.in_order = None, False  # set by the two ways to pack
        if cu_seqlens is None:
            steps = [self.B] * -(-self.T // chunk)
        elif v.device.type == "cpu" if read_lengths is None else read_lengths:
            key = ("chunks by length", self.T, chunk)
            self.order, self.slot, steps = remembered(cu_seqlens, key, lambda: self._pack_by_length(cu_seqlens))
        else:
            steps = self._pack_in_order(cu_seqlens)
        self.rows = [n * self.H for n in steps]  # of every scan step
        self.chunks = sum(steps)

    def _place(self, cu_seqlens):
        """Chunks of each sequence, and for every token its sequence and place in it."""
        token = torch.arange(self.T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        sequence = sequence_of(self.T, cu_seqlens)
        counts = (cu_seqlens.diff() + self.C - 1) // self.C
        return counts.long(), sequence, (token - cu_seqlens[sequence]).long()

    def _pack_by_length(self, cu_seqlens):
        """The sequences' order, every token's place, and the chunks of every scan step."""
        counts, sequence, place = self._place(cu_seqlens)
        # Sequences by length, the longest first: lane l of every step is the l-th of them
        order = counts.argsort(descending=True, stable=True)
        lane = order.argsort()
        # Of every step s: how many sequences have more than s chunks, and how many chunks the steps before it hold
        active = self.N - torch.bincount(counts).cumsum(0)[:-1]
        before = active.cumsum(0) - active
        # Of every token: its step, its chunk, and its place among all chunks' tokens
        step = place // self.C
        chunk = before[step] + lane[sequence]
        return order, chunk * self.C + place % self.C, active.tolist()

    def _pack_in_order(self, cu_seqlens):
        counts, sequence, place = self._place(cu_seqlens)
        self.in_order = True
        bound = self.T // self.C + self.N if self.N else 0  # the true number of chunks is not known here
        end = counts.cumsum(0)
        self.slot = (end - counts)[sequence] * self.C + place
        index = torch.arange(bound, device=cu_seqlens.device)
        self.owner = torch.searchsorted(end, index, right=True).clamp(max=self.N - 1)
        self.first = (index == (end - counts)[self.owner]).repeat_interleave(self.H).view(-1, 1, 1)
        self.last, self.empty = (end - 1).clamp(min=0), (counts == 0).view(-1, 1, 1, 1)
        return [1] * bound

    def pack(self, x):
        """[B, T, H, D] -> [rows, C, D]."""
        D = x.shape[-1]
        if self.cu_seqlens is None:
            if fill := -self.T % self.C:
                x = pad(x, (0, 0, 0, 0, 0, fill))
            x = x.reshape(self.B, len(self.rows), self.C, self.H, D)
            return x.permute(1, 0, 3, 2, 4).reshape(-1, self.C, D)
        x = put(x[0], self.slot, self.chunks * self.C)
        return x.view(self.chunks, self.C, self.H, D).transpose(1, 2).reshape(-1, self.C, D)

    def unpack(self, x):
        """[rows, C, D] -> [B, T, H, D]."""
        D = x.shape[-1]
        if self.cu_seqlens is None:
            x = x.view(len(self.rows), self.B, self.H, self.C, D).permute(1, 0, 3, 2, 4)
            return x.reshape(self.B, len(self.rows) * self.C, self.H, D)[:, : self.T]
        x = x.view(self.chunks, self.H, self.C, D).transpose(1, 2).reshape(-1, self.H, D)
        return take(x, self.slot).unsqueeze(0)

    def scan(self, update, state, *inputs, keep=True):
        """Runs `state, y = update(state, *chunk's inputs)` along every sequence.

        state [N, H, K, V]; inputs [rows, ...]. Returns the state BEFORE every chunk [rows, K, V], all y [rows, ...]
        and the final states [N, H, K, V]; without `keep` only these, and None for the others.
        """
        shape = state.shape
        if not self.chunks:
            return state.new_zeros(0, *shape[2:]), inputs[0], state
        if self.in_order:
            initial = state[self.owner].flatten(0, 1).split(self.rows)
            first, S = self.first.split(self.rows), state.new_zeros(self.H, *shape[2:])
        else:
            S = (state if self.order is None else take(state, self.order)).flatten(0, 1)
        before, outputs, after = [], [], []
        for s, chunk in enumerate(zip(*(x.split(self.rows) for x in inputs))):
            if self.in_order:
                S = torch.where(first[s], initial[s], S)
            elif self.rows[s] < len(S):
                S, done = S.split([self.rows[s], len(S) - self.rows[s]])
                after.append(done)
            S_before = S
            S, y = update(S, *chunk)
            if keep:
                before.append(S_before)
                outputs.append(y)
            if self.in_order:
                after.append(S)
        final = self._final(state, S, after)
        if not keep:
            return None, None, final
        return torch.cat(before), torch.cat(outputs) if outputs[0] is not None else None, final

    def _final(self, state, S, after):
        if self.in_order:
            S = torch.stack(after).view(-1, *state.shape[1:])
            return torch.where(self.empty, state, S[self.last])
        S = torch.cat([S, *reversed(after)]).view(state.shape)
        return S if self.order is None else put(S, self.order, self.N)
