"""Text to token ids and back: plain bytes, a SentencePiece model, or a file of the `tokenizers` library.

Every tokenizer has a `separator`, the id that stands between documents, and a streaming decoder that never prints
half of a character.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .errors import UserError


class Decoder(Protocol):
    """Turns ids into text as they come."""

    def feed(self, token: int) -> str:
        """The text that is certain now that `token` has come; empty while a character is incomplete."""

    def finish(self) -> str:
        """What is left at the end: a replacement character for an incomplete one."""


class Tokenizer(Protocol):
    """What training and generation need of a tokenizer."""

    kind: str
    source: bytes  # the file's content, empty for bytes: a checkpoint carries it, so it speaks without the file
    vocab_size: int
    separator: int

    def encode(self, text: str) -> np.ndarray:
        """1-D array of ids."""

    def decoder(self) -> Decoder:
        """A fresh streaming decoder."""


def fingerprint(tokenizer: Tokenizer) -> str:
    """A short name of the tokenizer that changes whenever its ids could."""
    return f"{tokenizer.kind}-{hashlib.sha256(tokenizer.source).hexdigest()[:16]}"


class ByteTokenizer:
    """Each byte of the UTF-8 text is its own id. Byte 0 never occurs in text and separates documents: 256 ids."""

    kind = "bytes"
    source = b""
    vocab_size = 256
    separator = 0

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decoder(self) -> Decoder:
        return ByteDecoder()


class ByteDecoder:
    """Holds the bytes of an unfinished UTF-8 character back.

    An invalid byte, or an id beyond the bytes (a model may have more), becomes the replacement character.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        return self._decoder.decode(bytes((token if token < 256 else 0xFF,)))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class PieceDecoder:
    """Streams the text of subword ids, given a function that decodes a whole list.

    A piece's text can depend on its left neighbour (leading spaces) and a character can span pieces, so a window of
    ids is decoded anew at each step, and only what is new and complete is handed out.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._shown = 0  # ids at the start of the window whose text is out already

    def feed(self, token: int) -> str:
        self._window.append(token)
        return self._take(final=False)

    def finish(self) -> str:
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        before = self._decode(self._window[: self._shown])
        text = self._decode(self._window)
        if text.endswith("\ufffd") and not final:
            return ""
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return text[len(before) :]


class SentencePieceTokenizer:
    """A SentencePiece `.model` file. The separator is its end-of-text id, else its start id, else one id more."""

    kind = "sentencepiece"

    def __init__(self, source: bytes, name: str) -> None:
        try:
            import sentencepiece
        except ModuleNotFoundError:
            raise UserError(f"reading {name} needs the package 'sentencepiece': pip install sentencepiece") from None
        if not source:  # the library would take it for no model yet
            raise UserError(f"{name} is not a SentencePiece model (it is empty)")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=source)
            known = [i for i in (self._model.eos_id(), self._model.bos_id()) if i >= 0]
            self._pieces = self._model.get_piece_size()
        except Exception as error:  # the library raises RuntimeError or its own, by version
            raise UserError(f"{name} is not a SentencePiece model ({_first_line(error)})") from None
        self.source, self._name = source, name
        self.separator = known[0] if known else self._pieces
        self.vocab_size = _checked_size(max(self._pieces, self.separator + 1), name)

    def encode(self, text: str) -> np.ndarray:
        return _ids(lambda: self._model.encode(text), self._name)

    def decoder(self) -> Decoder:
        return PieceDecoder(lambda ids: self._model.decode([i for i in ids if i < self._pieces]))


class JsonTokenizer:
    """A `tokenizer.json` of the `tokenizers` library. The separator is its end-of-text token, else one id more."""

    kind = "tokenizers"
    _ENDS = ("<|endoftext|>", "<|eos|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")

    def __init__(self, source: bytes, name: str) -> None:
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise UserError(f"reading {name} needs the package 'tokenizers': pip install tokenizers") from None
        try:
            self._model: Any = tokenizers.Tokenizer.from_buffer(source)
            ids = self._model.get_vocab(with_added_tokens=True)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{name} is not a file of the tokenizers library ({_first_line(error)})") from None
        self.source, self._name = source, name
        pieces = max(ids.values(), default=-1) + 1
        self.separator = next((ids[end] for end in self._ENDS if end in ids), pieces)
        self.vocab_size = _checked_size(max(pieces, self.separator + 1), name)

    def encode(self, text: str) -> np.ndarray:
        return _ids(lambda: self._model.encode(text, add_special_tokens=False).ids, self._name)

    def decoder(self) -> Decoder:
        return PieceDecoder(lambda ids: self._model.decode(ids, skip_special_tokens=True))


def build(kind: str, source: bytes, name: str) -> Tokenizer:
    """The tokenizer of a kind from its file's content; `name` is for messages."""
    if kind == ByteTokenizer.kind:
        return ByteTokenizer()
    if kind == SentencePieceTokenizer.kind:
        return SentencePieceTokenizer(source, name)
    if kind == JsonTokenizer.kind:
        return JsonTokenizer(source, name)
    raise UserError(f"{name} has a tokenizer of the unknown kind {kind!r}: made by another version of grokkernels?")


def load(path: str | None) -> Tokenizer:
    """The tokenizer in a file, known by its ending: `.model` (SentencePiece) or `.json` (tokenizers); None is bytes."""
    if path is None:
        return ByteTokenizer()
    kinds = {".model": SentencePieceTokenizer.kind, ".json": JsonTokenizer.kind}
    kind = kinds.get(Path(path).suffix)
    if kind is None:
        raise UserError(f"the tokenizer {path} must end in .model (SentencePiece) or .json (tokenizers)")
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    return build(kind, source, path)


def check_ids(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> None:
    """Refuse ids outside the vocabulary, which a damaged tokenizer file can produce."""
    if len(ids) and int(np.max(ids)) >= tokenizer.vocab_size:
        raise UserError(
            f"the tokenizer gave id {int(np.max(ids))}, outside its own vocabulary of {tokenizer.vocab_size}"
        )


def _checked_size(size: int, name: str) -> int:
    """A vocabulary's size, if its ids fit into the int32 that a model takes."""
    if size > 1 << 31:
        raise UserError(f"the tokenizer {name} has {size:,} ids, separator included: at most 2^31 are supported")
    return size


def _ids(encode: Callable[[], Sequence[int]], name: str) -> np.ndarray:
    """What `encode` returns, as an array. A vocabulary without its unknown token cannot encode every text."""
    try:
        return np.asarray(encode(), dtype=np.uint32)
    except Exception as error:  # both libraries raise what they like
        raise UserError(f"the tokenizer {name} cannot encode the text ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
