"""Text to token ids and back. A user's text never becomes a control token; a stream never shows half a character.

tokenizer.json runs on the `tokenizers` library, tokenizer.model on `sentencepiece` itself (converted to the former it
loses open_llama's whitespace rules), qwen.tiktoken is converted to the former.
"""
import base64
import codecs
import contextlib
import itertools
import json
import math
import os
import re
import secrets
import string
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import sentencepiece
import tokenizers
from pydantic import BaseModel, ConfigDict, Field, RootModel
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

import templates
from cli import UserError, atomic_write, read_json, read_text, system_errors
from schema import Checked, checked

TOKENIZER_FILES = ("tokenizer.json", "qwen.tiktoken", "tokenizer.model")         # the first that is there counts
END_OF_TURN = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
# Where Qwen's tokenizers split: contractions, words, single digits, punctuation, line ends, spaces.
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_stderr_lock = threading.Lock()
MAX_GROWTH = 64                                  # real ones put one character before a text, or for another
MAX_HOLES = 1 << 17                              # between the ids of a vocabulary: each costs 0.1 kB
CHATML = """{%- if messages[0].role != 'system' %}
{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


# ---- what is read of a checkpoint's JSON files

Id = Annotated[int, Field(ge=0, lt=1 << 31)]
Content = Annotated[str, Field(min_length=1)]


class Added(Checked):
    content: Content
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False


class Named(Checked):
    content: str


class Template(Checked):
    name: str
    template: str


class TokenizerConfig(Checked):               # special_tokens_map.json has some of these keys
    bos_token: str | Named | None = None
    eos_token: str | Named | None = None
    add_bos_token: bool | None = None
    added_tokens_decoder: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Added] = {}
    chat_template: str | list[Template] | None = None


class AddedTokens(RootModel[dict[Content, Id]]):
    model_config = ConfigDict(strict=True)


class StopIds(Checked):
    eos_token_id: Id | list[Id] | None = None


class ModelStopIds(StopIds):
    text_config: StopIds | None = None           # of a language model with a vision tower


SCHEMAS: dict[str, type[BaseModel]] = {
    "tokenizer_config.json": TokenizerConfig, "special_tokens_map.json": TokenizerConfig,
    "added_tokens.json": AddedTokens, "generation_config.json": StopIds, "config.json": ModelStopIds}


def read_config(file: Path) -> dict[str, Any]:
    """One of SCHEMAS' files; nothing, where there is none. Errors: UserError, for what is not as its schema says."""
    with system_errors():
        if not file.exists():
            return {}
    content = read_json(file)
    checked(SCHEMAS[file.name], content, str(file))
    return content


# ---- text to ids and back

class Tokenizer:
    """One checkpoint's tokenizer.

    vocab_size: the largest id + 1; the embedding may have more rows. stop_ids: the ids that end an answer.
    control: text -> id of the tokens that only a template or a model can write, special or not (Qwen3's <think>).
    """

    def __init__(self, folder: Path, backend: "_Json | _SentencePiece", config: dict[str, Any]) -> None:
        self.folder, self._backend, self._config = folder, backend, config
        self.control = {token.content: id for id, token in backend.added.items()}
        self._special = {id for id, token in backend.added.items() if token.special}
        self._pattern = _any_of(self.control)
        self.vocab_size = backend.vocab_size
        self.bos_id = self.control.get(_content(config.get("bos_token")) or "", backend.bos_id)
        self.eos_id = self.control.get(_content(config.get("eos_token")) or "", backend.eos_id)
        add_bos = config.get("add_bos_token")
        self._adds_bos = self.bos_id is not None and (backend.adds_bos if add_bos is None else bool(add_bos))
        self.stop_ids = self._find_stop_ids()

    def check_fits(self, vocab_size: int) -> None:
        """Errors: UserError, where text, BOS or EOS becomes ids that an embedding of vocab_size rows does not have.
        Added tokens beyond it, which fine-tuned checkpoints list and never use, are forgotten."""
        for name, id in (("the vocabulary", self._backend.text_size - 1), ("BOS", self.bos_id), ("EOS", self.eos_id)):
            if id is not None and id >= vocab_size:
                raise UserError(f"{self.folder}: {name} has the id {id}, and the embedding has {vocab_size} rows")
        self.control = {text: id for text, id in self.control.items() if id < vocab_size}
        self._pattern = _any_of(self.control)
        self.stop_ids = frozenset(id for id in self.stop_ids if id < vocab_size)

    @classmethod
    def from_dir(cls, path: str | Path) -> "Tokenizer":
        """Reads a checkpoint's folder: no network, no remote code. Errors: UserError, for none or a broken one."""
        folder = Path(path)
        config = read_config(folder / "special_tokens_map.json") | read_config(folder / "tokenizer_config.json")
        extra = {int(id): AddedToken(token["content"], normalized=False, special=token.get("special", False),
                                     lstrip=token.get("lstrip", False), rstrip=token.get("rstrip", False))
                 for id, token in config.get("added_tokens_decoder", {}).items()}
        for content, id in read_config(folder / "added_tokens.json").items():
            extra.setdefault(id, AddedToken(content, normalized=False, special=True))
        files = (folder / name for name in TOKENIZER_FILES)
        file = next(filter(Path.is_file, files), None)
        if file is None:
            raise UserError(f"{folder}: no tokenizer.json, tokenizer.model or qwen.tiktoken in this folder")
        with _library_errors(file), _silent_stderr():
            data = file.read_bytes()
            if file.name == "tokenizer.model":
                return cls(folder, _SentencePiece(data, extra), config)
            if file.name == "tokenizer.json":
                if b'"precompiled_charsmap"' in _unescaped(data):      # of Unigram: a damaged one aborts the process
                    raise ValueError("no supported family has a Precompiled normalizer")
                return cls(folder, _Json(tokenizers.Tokenizer.from_buffer(data), extra), config)
            return cls(folder, _Json(_tiktoken_bpe(file), extra), config | _qwen_config(config))

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        """Ids of `text` as plain text, whatever it spells. One BOS first if the checkpoint's files or `bos` say so."""
        return self.encode_segments([text], bos)

    def encode_segments(self, segments: Sequence[str | int], bos: bool | None = None) -> list[int]:
        """The same for a sequence of texts (str) and control tokens (their ids). A BOS at its start is not doubled."""
        wants_bos = self._adds_bos if bos is None else bos
        with _library_errors(self.folder, "its tokenizer fails on this text"):
            ids = self._backend.encode(segments)
        return [self.bos_id, *ids] if wants_bos and self.bos_id is not None and segments[0] != self.bos_id else ids

    @property
    def prefix_id(self) -> int:
        """The context of a text's first token: BOS, or else EOS (the end of a text before), as lm-eval has it."""
        id = self.eos_id if self.bos_id is None else self.bos_id
        if id is None:
            raise UserError(f"{self.folder}: the tokenizer names neither a BOS nor an EOS token to put before a text")
        return id

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`, exactly what a StreamDecoder fed with them returns in all. Spaces are never cleaned up."""
        stream = StreamDecoder(self, skip_special)
        return "".join(map(stream.push, ids)) + stream.flush()

    def piece(self, id: int) -> bytes:
        """The bytes an id stands for, leading space included; none for an id the tokenizer does not have."""
        if id in self._backend.added:
            return self._backend.added[id].content.encode()
        return self._backend.piece(id) if 0 <= id < self.vocab_size else b""

    def render_chat(self, messages: Sequence[dict[str, Any]], enable_thinking: bool = True,
                    add_generation_prompt: bool = True, tools: Sequence[dict[str, Any]] | None = None) -> list[int]:
        """Ids of a conversation ({"role", "content"} each) in the checkpoint's template, up to the assistant's answer.

        tools: the functions that the assistant may call, as JSON schemas.

        While the template runs, other characters stand for those of control tokens in the messages, so that only what
        the template itself writes, to the last character, is a control token. The exceptions are roles, types, and an
        assistant's <think> and </think>, which the model wrote and which templates look for.
        """
        template = self.template()
        hidden = _stand_ins(self.control, template, [*messages, *(tools or ())])
        shown = {ord(stand_in): chr(character) for character, stand_in in hidden.items()}

        def hide(value: Any, kept: str) -> Any:
            if isinstance(value, str):         # every second part is one of those kept
                parts = re.split(kept, value)
                return "".join(part if i % 2 else part.translate(hidden) for i, part in enumerate(parts))
            if isinstance(value, dict):        # names that templates ask for stay: {"type": "text", "text": ...}
                return {key if str(key).isidentifier() else hide(key, kept):
                        item if key == "type" and str(item).isidentifier() else hide(item, kept)
                        for key, item in value.items()}
            return [hide(item, kept) for item in value] if isinstance(value, (list, tuple)) else value
        kept = {"assistant": "(</?think>)"}
        conversation = [hide(message, kept.get(message["role"], "(?!)")) | {"role": message["role"]}
                        for message in messages]
        tokens = {key: content for key, value in self._config.items()
                  if key.endswith("_token") and (content := _content(value)) is not None}
        try:
            text = templates.render(template, conversation, tools=hide(tools, "(?!)"), documents=None, **tokens,
                                    add_generation_prompt=add_generation_prompt, enable_thinking=enable_thinking)
        except templates.TemplateFailed as error:
            said = str(error).translate(shown)
            raise UserError(f"{self.folder}: the chat template fails on this conversation: {said}") from error
        segments = re.split(f"({self._pattern.pattern})", text)           # text, control token, text, ...
        return self.encode_segments([self.control[segment] if i % 2 else segment.translate(shown)
                                     for i, segment in enumerate(segments)], bos=False)

    @property
    def has_template(self) -> bool:
        return bool(self._find_template())

    def template(self) -> str:
        """The chat template's source. Errors: UserError, where the checkpoint has none."""
        template = self._find_template()
        if not template:
            raise UserError(f"{self.folder}: this checkpoint has no chat template; it is a base model: run it without")
        return template

    def _find_template(self) -> str | None:
        file = self.folder / "chat_template.jinja"
        template = read_text(file) if file.is_file() else self._config.get("chat_template")
        if isinstance(template, list):           # several named ones
            template = next((item["template"] for item in template if item["name"] == "default"), None)
        return template

    def _find_stop_ids(self) -> frozenset[int]:
        found = {self.eos_id, self._backend.eos_id, *map(self.control.get, END_OF_TURN)}
        for name in ("generation_config.json", "config.json"):
            config = read_config(self.folder / name)
            for eos in (config.get("eos_token_id"), (config.get("text_config") or {}).get("eos_token_id")):
                found.update(eos if isinstance(eos, list) else [eos])
        return frozenset(id for id in found if id is not None)


class StreamDecoder:
    """Text of a sequence as its ids arrive: `push` returns what is complete, `flush` the rest. Constant cost per id.

    after: ids already shown (the prompt), whose text this one continues: a leading space is kept then.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False, after: Iterable[int] = ()) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer._backend.strips_space        # sentencepiece's own space before the first word
        for id in after:
            self.push(id)

    def push(self, id: int) -> str:
        added = id in self._tokenizer._backend.added
        if added and self._skip_special and id in self._tokenizer._special:
            return ""
        data = self._tokenizer.piece(id)
        if self._strip and not added and data:
            self._strip, data = False, data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def _stand_ins(control: Iterable[str], template: str, messages: Sequence[dict[str, Any]]) -> dict[int, str]:
    """For each character of control tokens one that occurs nowhere, of those that Unicode leaves to private use. Not
    for spaces, which templates trim, nor for what JSON escapes."""
    characters = sorted(set("".join(control)) - set(string.whitespace + '"\\'))
    used = set("".join([*control, template, json.dumps(messages, ensure_ascii=False, default=str)]))
    unused = (character for character in map(chr, range(0xF0000, 0x10FFFE)) if character not in used)
    return {ord(character): next(unused, "\ufffd") for character in characters}


def same_tokenizer(a: Tokenizer, b: Tokenizer) -> str | None:
    """None where every id means the same bytes in both, else a sentence that names the first difference."""
    if a.vocab_size != b.vocab_size:
        return f"{a.folder} has {a.vocab_size} tokens and {b.folder} has {b.vocab_size}"
    id = next((id for id in range(a.vocab_size) if a.piece(id) != b.piece(id)), None)
    return None if id is None else f"token {id} is {a.piece(id)!r} in {a.folder} and {b.piece(id)!r} in {b.folder}"


class _Json:
    """tokenizer.json. Added tokens get unguessable aliases, so that no text contains one."""

    def __init__(self, full: tokenizers.Tokenizer, extra: dict[int, AddedToken]) -> None:
        self.added = extra | full.get_added_tokens_decoder()
        self._id_to_token = full.id_to_token
        text_ids = set(full.get_vocab(with_added_tokens=False).values())
        self.text_size = 1 + max(text_ids, default=-1)
        self.vocab_size = max([self.text_size, *(id + 1 for id in self.added)])
        decoder = full.decoder.__getstate__().decode() if full.decoder is not None else ""
        is_byte_level = '"ByteLevel"' in decoder
        self._bytes = {ord(letter): byte for byte, letter in _byte_letters().items()} if is_byte_level else None
        self.strips_space = '"Strip"' in decoder or ('"Metaspace"' in decoder and '"never"' not in decoder)
        if full.normalizer is not None and _growth(json.loads(full.normalizer.__getstate__())) > MAX_GROWTH:
            raise ValueError(f"its normalizer makes text more than {MAX_GROWTH} times as long")
        full.no_padding()                        # of what size it asks for
        full.no_truncation()
        probe = full.encode("a")
        if unknown := {*probe.ids} - text_ids - self.added.keys():
            raise ValueError(f"it writes ids that it does not have: {sorted(unknown)}")
        self.adds_bos = 0 in probe.special_tokens_mask and probe.special_tokens_mask[0] == 1
        self.bos_id = probe.ids[0] if self.adds_bos else None
        self.eos_id = None

        self._plain = tokenizers.Tokenizer(full.model)       # the same vocabulary, no added tokens, no post-processing
        for step in ("normalizer", "pre_tokenizer"):
            if getattr(full, step) is not None:
                setattr(self._plain, step, getattr(full, step))
        nonce = secrets.token_hex(8)
        # New ids follow the vocabulary's size: fillers push the aliases past every id in use, though ids have holes.
        holes = self.vocab_size - full.get_vocab_size(with_added_tokens=False)
        if holes > MAX_HOLES:
            raise ValueError(f"the largest id is {self.vocab_size - 1}, and there are {self.vocab_size - holes} tokens")
        self._plain.add_special_tokens([f"<{nonce}-{i}>" for i in range(holes)])
        self._alias = {id: f"<{nonce}.{id}>" for id in self.added}
        self._plain.add_special_tokens([AddedToken(self._alias[id], lstrip=token.lstrip, rstrip=token.rstrip,
                                                   single_word=token.single_word, normalized=False)
                                        for id, token in self.added.items()])
        self._id_of = {self._plain.token_to_id(alias): id for id, alias in self._alias.items()}

    def encode(self, segments: Sequence[str | int]) -> list[int]:
        text = "".join(self._alias[segment] if isinstance(segment, int) else _valid(segment) for segment in segments)
        return [self._id_of.get(id, id) for id in self._plain.encode(text, add_special_tokens=False).ids]

    def piece(self, id: int) -> bytes:
        token = self._id_to_token(id) or ""
        if self._bytes is not None:
            return token.translate(self._bytes).encode("latin-1", "replace")
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


def _growth(step: dict[str, Any]) -> int:
    """How many times as long a normalizer of the `tokenizers` library may make a text."""
    inner = math.prod(map(_growth, step.get("normalizers", ())))
    return inner * max(1, len(step.get("content", "")), len(step.get("prepend", "")))


class _SentencePiece:
    """tokenizer.model, run by the sentencepiece library, which never reads its control tokens from text."""
    adds_bos = True                              # LlamaTokenizer's default, where tokenizer_config.json says nothing

    def __init__(self, proto: bytes, extra: dict[int, AddedToken]) -> None:
        # A user-defined piece (type 4) that looks like markup, say <|im_start|>, would be read from text; a control
        # piece (type 3) is not.
        proto = re.sub(rb"([>\]]\x15.{4}\x18)\x04", b"\\1\x03", proto, flags=re.DOTALL)
        self._model = model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        size = model.get_piece_size()
        if not size:
            raise ValueError("no pieces in it")
        self._pieces: list[str] = [model.id_to_piece(id) for id in range(size)]        # a damaged one is found here
        self.added = {id: AddedToken(piece, normalized=False, special=True) for id, piece in enumerate(self._pieces)
                      if model.is_control(id) or model.is_unknown(id)} | extra
        self.text_size, self.vocab_size = size, 1 + max([size - 1, *self.added])
        self.strips_space = model.encode("a", out_type=str)[0].startswith("▁")
        self.bos_id, self.eos_id = (id if id >= 0 else None for id in (model.bos_id(), model.eos_id()))

    def encode(self, segments: Sequence[str | int]) -> list[int]:
        encoded = ([s] if isinstance(s, int) else self._model.encode(_valid(s)) for s in segments)
        return list(itertools.chain.from_iterable(encoded))

    def piece(self, id: int) -> bytes:
        if id >= self.text_size:
            return b""
        token = self._pieces[id]
        return bytes([int(token[3:5], 16)]) if self._model.is_byte(id) else token.replace("▁", " ").encode()


@contextlib.contextmanager
def _library_errors(path: Path, what: str = "not a readable tokenizer") -> Iterator[None]:
    """Whatever the tokenizer libraries raise becomes a UserError: there is nothing narrower to expect."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":        # of Rust
            raise
        raise UserError(f"{path}: {what} ({str(error)[:200]})") from error


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """A panic of Rust's reports itself to descriptor 2, in several lines, before Python sees it."""
    with _stderr_lock, open(os.devnull, "w") as nowhere, contextlib.ExitStack() as at_end:
        with contextlib.suppress(OSError):       # a program may have closed it
            saved = os.dup(2)
            at_end.callback(os.close, saved)
            at_end.callback(os.dup2, saved, 2)
            os.dup2(nowhere.fileno(), 2)
        yield


def rebuild_tiktoken(folder: str | Path) -> None:
    """Writes tokenizer_config.json, then tokenizer.json, the one that is looked for, beside Qwen v1's qwen.tiktoken."""
    folder = Path(folder)
    config = _qwen_config(read_config(folder / "tokenizer_config.json"))
    with _library_errors(folder / "qwen.tiktoken"), _silent_stderr():
        text = _tiktoken_bpe(folder / "qwen.tiktoken").to_str()
    for name, content in (("tokenizer_config.json", json.dumps(config, indent=2)), ("tokenizer.json", text)):
        with atomic_write(folder / name) as partial:
            partial.write_text(content, encoding="utf-8")


def _tiktoken_bpe(file: Path) -> tokenizers.Tokenizer:
    """A BPE equal to tiktoken's. A token's merge: the pair left when the merges of lower rank have run on its bytes."""
    lines = map(bytes.split, file.read_bytes().splitlines())
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    if len(set(ranks.values())) != len(ranks) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError("a rank occurs twice or a single byte is missing")
    letters = _byte_letters()
    spelt = {token: "".join(letters[byte] for byte in token) for token in ranks}
    pairs = [_last_pair(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    bpe = tokenizers.Tokenizer(models.BPE(vocab={spelt[token]: rank for token, rank in ranks.items()},
                                          merges=[(spelt[pair[0]], spelt[pair[1]]) for pair in pairs if pair],
                                          ignore_merges=True))      # a whole word that is a token needs no merges
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in QWEN_SPECIAL])
    return bpe


def _last_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    pieces = [token[i:i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        pair_ranks = [ranks.get(left + right, ranks[token]) for left, right in itertools.pairwise(pieces)]
        i = pair_ranks.index(min(pair_ranks))
        if pair_ranks[i] >= ranks[token]:
            return None
        pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces[0], pieces[1]


def _qwen_config(config: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json for Qwen v1, in place of one that points to remote code."""
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.get("model_max_length", 8192),
            "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "add_bos_token": False,
            "clean_up_tokenization_spaces": False, "chat_template": config.get("chat_template", CHATML)}


def _byte_letters() -> dict[int, str]:
    """Byte-level BPE's alphabet (GPT-2): printable bytes are themselves, the others follow from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _unescaped(data: bytes) -> bytes:
    """JSON's bytes, with the letters that it may spell as \\u0061."""
    return re.sub(rb"\\u00([2-7][0-9a-fA-F])", lambda match: bytes.fromhex(match[1].decode()), data)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token if isinstance(token, str) else None


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode()          # a terminal's undecodable bytes arrive as lone surrogates
