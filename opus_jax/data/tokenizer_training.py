"""Training a SentencePiece model on a bounded, seeded sample of the corpus."""

import hashlib
import heapq
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from opus_jax.config import TokenizerConfig
from opus_jax.data.tokenizer import ESCAPED_SPACE, SEPARATOR, Tokenizer, byte_tokenizer, sentencepiece_tokenizer
from opus_jax.errors import ConfigError, UserError

SAMPLE_BYTES = 8_000_000
SAMPLE_SEED = 0
_SENTENCE_CHARACTERS = 1000

# Names with a blank cannot be learned from text (blanks are escaped first), so no text ever collides with them.
_SPECIALS: dict[str, Any] = {
    "unk_piece": "< unk >",
    "bos_piece": "< bos >",
    "eos_piece": "< eos >",
    "pad_piece": "< pad >",
}

# A piece learned as "<0x41>" would collide with the byte token of that name, and the escape character with the blank;
# the trainer passes over whole sentences with NUL or tab.
_NEVER_LEARNED = re.compile(f"(?<=<)(?=0x)|[{ESCAPED_SPACE}\x00\t]")


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str], folder: str | Path) -> Tokenizer:
    """Make the tokenizer that `config` asks for, and save it in `folder`.

    Kind "byte" needs no training, and `config.path` names a trained SentencePiece model; otherwise BPE with byte
    fallback and no normalisation is trained on at most `SAMPLE_BYTES` of `texts`, sampled by document with a
    stated seed, so that equal texts give equal bytes.

    Raises:
      ConfigError: `vocab_size` is impossible for these texts.
      UserError: `config.path` is absent or unusable.
    """
    if config.kind == "byte":
        tokenizer = byte_tokenizer()
    elif config.path is not None:
        tokenizer = sentencepiece_tokenizer(read_model(config.path), config.path)
    else:
        model = _train(config.vocab_size, list(_sentences(sample_texts(texts))))
        tokenizer = sentencepiece_tokenizer(model, "the tokenizer trained here")
    tokenizer.save(folder)
    return tokenizer


def read_model(path: str) -> bytes:
    """The bytes of `tokenizer.path`. Raises UserError when it cannot be read."""
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer.path = {path!r} cannot be read ({error.strerror}): give a .model file") from None


def sample_texts(texts: Iterable[str], limit: int = SAMPLE_BYTES, seed: int = SAMPLE_SEED) -> list[str]:
    """The texts whose seeded hashes are smallest, `limit` UTF-8 bytes in all; the last one is cut.

    A hash, so that the choice does not depend on the order of the texts. Holds about `limit` bytes in memory.
    """
    kept: list[tuple[int, str]] = []  # a heap with the largest hash first
    total = 0
    for text in texts:
        heapq.heappush(kept, (-_sample_key(text, seed), text))
        total += len(text.encode())
        while total - (surplus := len(kept[0][1].encode())) >= limit:
            heapq.heappop(kept)
            total -= surplus
    chosen = [text for _, text in sorted(kept, reverse=True)]
    if total > limit:
        chosen[-1] = chosen[-1].encode()[: limit - total].decode(errors="ignore")
    return chosen


def _sample_key(text: str, seed: int) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little")


def _sentences(texts: list[str]) -> Iterator[str]:
    for text in texts:
        for part in _NEVER_LEARNED.split(text):
            for start in range(0, len(part), _SENTENCE_CHARACTERS):
                yield part[start : start + _SENTENCE_CHARACTERS]


def _train(vocab_size: int, sentences: list[str]) -> bytes:
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=written,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,  # rarer characters are spelled in bytes
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            control_symbols=[SEPARATOR],
            max_sentence_length=4 * _SENTENCE_CHARACTERS + 1,
            shuffle_input_sentence=False,
            num_threads=1,  # the outcome must not depend on the machine
            minloglevel=2,
            **_SPECIALS,
        )
    except RuntimeError as error:
        raise ConfigError("tokenizer.vocab_size", vocab_size, _reason(str(error))) from None
    return written.getvalue()


def _reason(error: str) -> str:
    too_high = re.search(r"to a value <= (\d+)", error)
    if too_high:
        return f"this corpus gives at most {too_high[1]} tokens; lower it, or add text"
    too_low = re.search(r"required_chars\. \d+ vs (\d+)", error)
    if too_low:
        return f"this corpus needs at least {too_low[1]}, or tokenizer.kind = byte"
    return f"SentencePiece cannot train on this corpus: {' '.join(error.split())}"
