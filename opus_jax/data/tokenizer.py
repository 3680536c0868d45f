"""Text to token ids and back, without loss: `decode(encode(text)) == text` for every valid string.

Two kinds: SentencePiece (trained here, see tokenizer_training.py, or loaded) and plain bytes. Both decode by joining
the bytes that each token stands for, so one table of bytes gives decoding and the denominator of bits per byte.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import sentencepiece

from opus_jax.errors import UserError

MODEL_FILE = "tokenizer.model"
KIND_FILE = "tokenizer_kind.json"

SEPARATOR = "< separator >"

# SentencePiece writes a space as U+2581, so a literal U+2581 has to go around it, as bytes.
ESCAPED_SPACE = "\u2581"

# Where SentencePiece models lose text: NFKC, joined or trimmed blanks, an added prefix, unknown characters.
_PROBE = " A  ﬁ\u2460 e\u0301\n\n\t\u3000\u2581\x00<s></s><unk><0x41> \U0001f600\ue000 "


@dataclass(frozen=True)
class Tokenizer:
    """Token ids 0 .. V-1, four of which are special: they stand for no text and never come out of `encode`.

    Attributes:
      pieces: the UTF-8 bytes of every token, empty for special ones. A token may be a part of a character.
      kind: "sentencepiece" or "byte".
      model: the serialised SentencePiece model; empty for kind "byte".
    """

    kind: str
    pieces: tuple[bytes, ...] = field(repr=False)
    bos_id: int
    eos_id: int
    pad_id: int
    separator_id: int
    model: bytes = field(repr=False)
    encode_plain: Callable[[str], list[int]] = field(repr=False, compare=False)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int32[V]: UTF-8 bytes that each token stands for, 0 for special tokens."""
        return np.array([len(piece) for piece in self.pieces], np.int32)

    @cached_property
    def hash(self) -> str:
        """Hexadecimal digest of everything that decides the ids and the bytes."""
        specials = [self.bos_id, self.eos_id, self.pad_id, self.separator_id]
        return hashlib.sha256(json.dumps([self.kind, specials]).encode() + self.model).hexdigest()[:32]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS and EOS. Raises UnicodeEncodeError for a lone surrogate."""
        if ESCAPED_SPACE not in text:
            return self.encode_plain(text)
        escaped = [self._byte_ids[byte] for byte in ESCAPED_SPACE.encode()]
        first, *rest = text.split(ESCAPED_SPACE)
        ids = list(self.encode_plain(first))
        for part in rest:
            ids.extend(escaped)
            ids.extend(self.encode_plain(part))
        return ids

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of `ids`; special tokens vanish, and a broken character becomes U+FFFD."""
        return b"".join(self.pieces[int(i)] for i in ids).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        """Write the files that `load_tokenizer` reads."""
        folder = Path(folder)
        if self.model:
            (folder / MODEL_FILE).write_bytes(self.model)
        (folder / KIND_FILE).write_text(json.dumps({"kind": self.kind, "hash": self.hash}) + "\n")

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        return {piece[0]: i for i, piece in reversed(list(enumerate(self.pieces))) if len(piece) == 1}


def byte_tokenizer() -> Tokenizer:
    """One token per byte (ids 0 to 255), then BOS, EOS, PAD and the separator: V = 260."""
    pieces = (*(bytes([i]) for i in range(256)), b"", b"", b"", b"")
    return Tokenizer("byte", pieces, 256, 257, 258, 259, b"", lambda text: list(text.encode()))


def sentencepiece_tokenizer(model: bytes, where: str) -> Tokenizer:
    """A tokenizer from a serialised SentencePiece model; special tokens that it lacks get ids after its own.

    Args:
      where: the file, for the message.

    Raises:
      UserError: not a SentencePiece model, or one that loses text (normalisation, added prefix, no byte fallback).
    """
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(model)
    except RuntimeError:
        raise UserError(f"{where} is not a SentencePiece model: give a .model file in tokenizer.path") from None
    pieces = [_piece_bytes(processor, i) for i in range(processor.vocab_size())]
    found = [processor.bos_id(), processor.eos_id(), processor.pad_id(), processor.piece_to_id(SEPARATOR)]
    found[3] = found[3] if processor.is_control(found[3]) else -1
    for i, special in enumerate(found):
        if special < 0:
            found[i] = len(pieces)
            pieces.append(b"")
    bos, eos, pad, separator = found
    tokenizer = Tokenizer("sentencepiece", tuple(pieces), bos, eos, pad, separator, model, processor.encode)
    _require_lossless(tokenizer, where)
    return tokenizer


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote.

    Raises:
      UserError: files are missing, or differ from the hash written beside them or in the folder's manifest.json.
    """
    folder = Path(folder)
    try:
        stated = json.loads((folder / KIND_FILE).read_text())
        kind, expected = stated["kind"], stated["hash"]
        model = (folder / MODEL_FILE).read_bytes() if kind == "sentencepiece" else b""
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"no tokenizer in {folder} ({error}): run opus-jax prepare again") from None
    tokenizer = sentencepiece_tokenizer(model, str(folder / MODEL_FILE)) if model else byte_tokenizer()
    require_hash(tokenizer, expected, str(folder / KIND_FILE))
    return tokenizer


def require_hash(tokenizer: Tokenizer, expected: str, where: str) -> None:
    """Raise UserError unless `tokenizer` is the one that `where` was made with."""
    if tokenizer.hash != expected:
        raise UserError(
            f"tokenizer {tokenizer.hash} is not the one of {where} ({expected}): "
            "token ids would mean other text; use the tokenizer of the prepared corpus, or prepare again"
        )


def _piece_bytes(processor: sentencepiece.SentencePieceProcessor, i: int) -> bytes:
    piece = processor.id_to_piece(i)
    if processor.is_byte(i):
        return bytes([int(piece[3:5], 16)])
    if processor.is_control(i) or processor.is_unknown(i):
        return b""
    return piece.replace(ESCAPED_SPACE, " ").encode()


def _require_lossless(tokenizer: Tokenizer, where: str) -> None:
    if len(tokenizer._byte_ids) < 256 or any(tokenizer.decode(tokenizer.encode(c)) != c for c in (_PROBE, "x")):
        raise UserError(
            f"{where} loses text: tokenizer.path needs a SentencePiece model with byte_fallback, identity "
            "normalisation, no dummy prefix and white space kept; leave tokenizer.path null to train one"
        )
