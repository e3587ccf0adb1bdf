"""The rows of a KV cache: each holds a text's keys and values, from which another text that begins alike can go on.

What a row has read stays there when its answer has ended. When another text needs the row, a copy is kept. A prompt
begins from the row or the copy that has most of its tokens. DeltaNets remember a text as a whole: with them a prompt
goes on from the end of an earlier one, or of its answer.
"""
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from config import ntk_alpha, rope_frequencies
from drafts import common_prefix
from generate import MAX_SNAPSHOTS, Engine, Snapshot, cache_bytes
from loading import check_memory


class Row:
    """A row of the KV cache, and what it holds of which text."""

    def __init__(self, index: int):
        self.index, self.used = index, 0           # used: when its last answer ended
        self.answer: Any = None                    # what batching.py has it answer
        self.forget()

    def forget(self) -> None:
        self.tokens: list[int] = []
        self.alpha = 1                             # see ntk_alpha
        self.snapshots: list[Snapshot] = []

    @property
    def is_decoding(self) -> bool:
        return self.answer is not None and self.answer.next is not None


@dataclass(eq=False)
class Kept:
    """A copy of what a row held."""
    tokens: list[int]
    alpha: int
    caches: list[list[Tensor]]                     # of each layer that has a KV cache, [K, T, D] or [K, T, 1]
    snapshots: list[Snapshot]
    used: int


def block_of(indices: Iterable[int]) -> tuple[int, int]:
    """The smallest block of 2^n rows, at a multiple of 2^n, that holds these: its first one, and 2^n."""
    indices, size = list(indices), 1
    while min(indices) // size != max(indices) // size:
        size *= 2
    return min(indices) // size * size, size


class Rows:
    """The rows of the model's KV cache, of which any block can be its batch, and the copies.

    capacity: positions of a row. cache_tokens: how many tokens the copies may have together; what DeltaNets remember
    counts as the tokens whose keys and values would take as much memory. Errors: UserError (memory).
    """

    def __init__(self, engine: Engine, max_batch: int, capacity: int, cache_tokens: int):
        self.engine, self.model, self.cache_tokens = engine, engine.model, cache_tokens
        local, dtype = self.model.local, self.model.kv_dtype
        self.token_bytes = cache_bytes(local, 1, 1, dtype) - cache_bytes(local, 1, 0, dtype)
        needed = cache_bytes(local, max_batch, capacity, dtype) + cache_tokens * self.token_bytes
        check_memory(self.model.device, needed, f"keys and values of {max_batch} x {capacity} positions and of "
                     f"{cache_tokens} tokens kept (max_batch, max_seq_length, cache_tokens)")
        engine.reserve(max_batch, capacity)
        self.model.set_prompt_lengths([0] * max_batch)
        self.frequencies = self.model.inv_freq                     # of each row where dynamic NTK is, else of all
        self.caches = [layer.attention.caches() for layer in self.model.full_layers()]
        self.states = [state.tensors() for state in self.model.delta_states()]
        self.fused, self.batch = {}, (0, 0)
        self.rows, self.kept, self.clock = [Row(i) for i in range(max_batch)], [], itertools.count(1)

    def use(self, first: int, size: int) -> None:
        """Makes a block the model's batch."""
        if self.batch == (first, size):
            return
        self.batch, rows = (first, size), slice(first, first + size)
        self.model.use_caches([[tensor[rows] for tensor in cache] for cache in self.caches])
        self.model.use_states([[tensor[rows] for tensor in state] for state in self.states])
        if self.model.args.dynamic_ntk:
            self.model.inv_freq = self.frequencies[rows]
        if self.batch not in self.fused:
            self.fused[self.batch] = self.model.fuse()
        self.engine.fused = self.fused[self.batch]

    def snapshots(self, source: Row | Kept) -> list[Snapshot]:
        """From where a source's text can go on, if there are DeltaNets. A row's own state comes first."""
        if isinstance(source, Kept) or not self.states:
            return source.snapshots
        self.use(source.index, 1)
        state = [[tensor[source.index:source.index + 1] for tensor in state] for state in self.states]
        return [Snapshot(*self.model.resumable(), state), *source.snapshots]

    def reusable(self, source: Row | Kept, prompt: list[int]) -> int:
        """How many of a prompt's first tokens need not be read where a source has them; the last always is."""
        known = min(common_prefix(source.tokens, prompt), len(prompt) - 1)
        if not known or source.alpha != ntk_alpha(self.model.args, len(prompt)):
            return 0
        if not self.states:
            return known
        return max((min(known, s.last) for s in self.snapshots(source) if s.first <= known), default=0)

    def place(self, prompt: list[int]) -> Row:
        """A free row for a prompt, with the tokens that it holds already."""
        free = [row for row in self.rows if not row.answer]
        reusable = {source: self.reusable(source, prompt) for source in (*self.rows, *self.kept)}
        source, n = max(reusable.items(), key=lambda item: item[1])
        row = source
        if not (n and source in free and 2 * n >= len(source.tokens)):         # else little is lost by going on there
            taken = [row.index for row in self.rows if row.answer]
            row = min(free, key=lambda row: (block_of([*taken, row.index])[1], bool(row.tokens), row.used))
            self.keep(row)
        assert isinstance(row, Row)
        self.load(row, source, n)
        row.alpha = ntk_alpha(self.model.args, len(prompt))
        if self.model.args.dynamic_ntk:
            self.frequencies[row.index] = rope_frequencies(self.model.args, len(prompt))
        return row

    def load(self, row: Row, source: Row | Kept, n: int) -> None:
        """Gives a row the first n tokens of a source."""
        if n and source is not row:
            if isinstance(source, Row):
                copies = [[tensor[source.index] for tensor in cache] for cache in self.caches]
            else:
                copies, source.used = source.caches, next(self.clock)
            for cache, copy in zip(self.caches, copies):
                for tensor, kept in zip(cache, copy):
                    tensor[row.index, :, :n] = kept[:, :n]
        if n and self.states:
            snapshots = self.snapshots(source)
            found = next(s for s in snapshots if s.first <= n <= s.last)
            if source is not row or found is not snapshots[0]:
                for state, saved in zip(self.states, found.states):
                    for tensor, old in zip(state, saved):
                        tensor[row.index] = old[0]
        row.snapshots = [s._replace(last=min(s.last, n)) for s in source.snapshots if n and s.first <= n]
        row.tokens, row.alpha = source.tokens[:n], source.alpha

    def keep(self, row: Row) -> None:
        """Copies what a row holds, which is to be written over, and drops what was used longest ago."""
        n = len(row.tokens)
        if not n or n > self.cache_tokens:
            return
        copies = [[tensor[row.index, :, :n].clone() for tensor in cache] for cache in self.caches]
        snapshots = self.snapshots(row)
        if snapshots:                              # of which the row's own state is no copy
            own = [[tensor.clone() for tensor in state] for state in snapshots[0].states]
            snapshots[0] = snapshots[0]._replace(states=own)
        self.kept = [kept for kept in self.kept if common_prefix(kept.tokens, row.tokens) < len(kept.tokens)]
        self.kept.append(Kept(row.tokens, row.alpha, copies, snapshots, row.used))
        self.kept.sort(key=lambda kept: kept.used)
        while sum(map(self.cost, self.kept)) > self.cache_tokens:
            del self.kept[0]

    def cost(self, kept: Kept) -> int:
        """In tokens."""
        states = sum(tensor.nbytes for s in kept.snapshots for state in s.states for tensor in state)
        return len(kept.tokens) + math.ceil(states / self.token_bytes)

    def compact(self) -> None:
        """Moves rows together where a smaller block can then hold them."""
        taken = [row for row in self.rows if row.answer]
        if not taken:
            return
        size = 1 << (len(taken) - 1).bit_length()
        if block_of(row.index for row in taken)[1] == size:
            return
        first = taken[0].index // size * size
        free = [row for row in self.rows[first:first + size] if not row.answer]
        for row in taken:
            if not first <= row.index < first + size:
                target = free.pop()
                self.keep(target)
                if self.model.args.dynamic_ntk:
                    self.frequencies[target.index] = self.frequencies[row.index]
                self.load(target, row, len(row.tokens))
                target.answer, row.answer = row.answer, None
                row.forget()

    def forget(self) -> None:
        """Whatever the rows hold, nothing is to go on from there."""
        for row in self.rows:
            row.forget()

    def remember(self, row: Row) -> None:
        """At the end of a prompt: its answer may not be part of the next turn (thoughts are dropped)."""
        if self.states:
            first, last = self.model.resumable()
            older = [snapshot for snapshot in row.snapshots if snapshot.first < first]
            row.snapshots = [*older[1 - MAX_SNAPSHOTS:], Snapshot(first, last, self.model.save())]
