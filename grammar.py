"""Structured output: which tokens may follow, so that an answer keeps to a JSON schema.

By llguidance: no dependencies, a mask in some 50 microseconds, and what it cannot enforce of a schema it refuses."""
import json
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cli import UserError
from tokenizer import Tokenizer

CACHED = 64                              # grammars that are kept compiled
# As json.dumps writes: a model that may put whitespace anywhere might never stop.
STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Vocabulary:
    """A tokenizer as llguidance asks for it: text, and no control token but the one that ends an answer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]):
        ends = sorted(id for id in stop_ids if id < vocab_size)
        if not ends:
            raise UserError("needs a checkpoint that has a token for the end of an answer", "response_format")
        self.encode = tokenizer.encode
        self.tokens = [tokenizer.piece(id) for id in range(vocab_size)]
        self.eos_token_id = tokenizer.eos_id if tokenizer.eos_id in ends else ends[0]
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = sorted({id for id in (*tokenizer.control.values(), *ends) if id < vocab_size})

    def __call__(self, text: str) -> list[int]:
        return self.encode(text, bos=False)


class Grammars:
    """The grammars of a tokenizer's texts, compiled when they are first asked for. For several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]):
        self.vocab_size = vocab_size
        self.tokenizer = lru_cache(1)(lambda: self.prepare(Vocabulary(tokenizer, vocab_size, stop_ids)))
        self.compiled = lru_cache(CACHED)(self.compile)

    def prepare(self, vocabulary: Vocabulary) -> Any:
        import llguidance
        wrapper: Any = llguidance.TokenizerWrapper(vocabulary)
        return llguidance.LLTokenizer(wrapper, n_vocab=self.vocab_size, slices=llguidance.LLTokenizer.json_slices())

    def from_schema(self, schema: dict[str, Any]) -> str:
        """The grammar of what a JSON schema allows, ready to use. Errors: UserError."""
        from llguidance import LLMatcher
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=STYLE)
        except ValueError as error:
            raise UserError(f"cannot be compiled: {error}", "response_format") from None
        self.compiled(grammar)
        return grammar

    def compile(self, grammar: str) -> Any:
        from llguidance import LLMatcher
        matcher = LLMatcher(self.tokenizer(), grammar, log_level=0)
        if matcher.is_error():
            said = " ".join(matcher.get_error().split())
            raise UserError(f"cannot be compiled: {said:.300}", "response_format")
        return matcher

    def matcher(self, grammar: str) -> "Matcher":
        """For one answer. Errors: UserError."""
        return Matcher(self.compiled(grammar).deep_copy(), self.vocab_size)


class Matcher:
    """Follows an answer through a grammar."""

    def __init__(self, matcher: Any, vocab_size: int):
        self.matcher, self.vocab_size = matcher, vocab_size

    def forbidden(self) -> Tensor:
        """bool [V]: which tokens may not follow."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        self.check()
        return torch.from_numpy(np.unpackbits(bits, count=self.vocab_size, bitorder="little") == 0)

    def take(self, id: int) -> None:
        self.matcher.consume_token(id)
        self.check()

    def check(self) -> None:
        """Errors: RuntimeError, for a grammar that turns out to be too complex."""
        if self.matcher.is_error():
            raise RuntimeError(self.matcher.get_error())

    @property
    def ended(self) -> bool:
        """Whether nothing more can follow."""
        return self.matcher.is_stopped()
