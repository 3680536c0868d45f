import re

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_corpus import documents

from opus_jax.config import TokenizerConfig
from opus_jax.data.tokenizer import byte_tokenizer, load_tokenizer, require_hash
from opus_jax.data.tokenizer_training import sample_texts, train_tokenizer
from opus_jax.errors import ConfigError, UserError

TEXTS = [d.text for d in documents("prose", 60)] + ["<0x41> <0x0A> <s>\u2581<unk> < bos >" * 9] * 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TokenizerConfig(vocab_size=340), TEXTS, folder)
    return folder


@pytest.fixture(scope="module", params=["sentencepiece", "byte"])
def tokenizer(request, folder):
    return load_tokenizer(folder) if request.param == "sentencepiece" else byte_tokenizer()


# Code points, and text built from what could go wrong.
BLANKS = ["\u2581", "\x00", " ", "  ", "\n", "\t", "\r\n", "\u3000", "\ufeff"]
LOOK_ALIKES = ["<0x41>", "<s>", "</s>", "<unk>", "< bos >", "< separator >"]
CHARACTERS = ["\U0001f600", "e\u0301", "\ufb01", "\ufffd", "\x7f", "bat", "dova"]
HARD = st.sampled_from([*BLANKS, *LOOK_ALIKES, *CHARACTERS])
ANY_TEXT = st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.lists(HARD).map("".join))


@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
@example(text="")
@example(text=" \u2581 \u2581\u2581 ")
@example(text="<0x41>\x00<s> ")
def test_decoding_gives_the_text_back_and_bytes_add_up(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.separator_id} & set(ids)


def test_text_that_looks_like_a_byte_token_is_spelled_out(folder):
    tokenizer = load_tokenizer(folder)
    byte_q = tokenizer.pieces.index(b"Q")
    assert tokenizer.encode("Q") == [byte_q]  # a character that training never saw
    assert byte_q not in tokenizer.encode("<0x51>")


def test_special_tokens_are_distinct_and_stand_for_nothing(tokenizer):
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.separator_id}
    assert len(special) == 4
    assert max(special) < tokenizer.vocab_size == len(tokenizer.token_bytes)
    assert tokenizer.token_bytes.dtype == np.int32
    assert not tokenizer.token_bytes[list(special)].any()
    assert tokenizer.decode(special) == ""


def test_frequent_text_is_shorter_than_its_bytes(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 340
    assert len(tokenizer.encode(TEXTS[0])) < 0.7 * len(TEXTS[0].encode())


def test_training_again_gives_the_same_tokenizer_whatever_the_order_of_texts(folder, tmp_path):
    again = train_tokenizer(TokenizerConfig(vocab_size=340), reversed(TEXTS), tmp_path)
    assert again.hash == load_tokenizer(folder).hash
    assert train_tokenizer(TokenizerConfig(vocab_size=330), TEXTS, tmp_path).hash != again.hash


def test_the_sample_is_bounded_and_seeded():
    texts = [f"é{i}" * 50 for i in range(200)]
    sample = sample_texts(texts, limit=3001)
    assert 2999 <= sum(len(t.encode()) for t in sample) <= 3001
    assert sample == sample_texts(texts[::-1], limit=3001)
    assert sample != sample_texts(texts, limit=3001, seed=1)
    assert set(sample[:-1]) <= set(texts)
    assert sorted(sample_texts(texts)) == sorted(texts)


def test_broken_characters_are_replaced_on_decoding(tokenizer):
    ids = byte_tokenizer().encode("é")[:1]
    assert byte_tokenizer().decode(ids) == "\ufffd"


@pytest.mark.parametrize(
    ("size", "allowed"), [(262, "needs at least"), (9000, "gives at most")], ids=["too small", "too large"]
)
def test_an_impossible_vocabulary_is_refused_with_the_possible_one(tmp_path, size, allowed):
    with pytest.raises(ConfigError, match=f"tokenizer.vocab_size = {size}.*{allowed}") as raised:
        train_tokenizer(TokenizerConfig(vocab_size=size), TEXTS, tmp_path)
    limit = int(re.search(allowed + r" (\d+)", str(raised.value))[1])
    assert train_tokenizer(TokenizerConfig(vocab_size=limit), TEXTS, tmp_path).vocab_size == limit


def test_a_given_model_is_used_and_its_missing_special_tokens_are_added(tmp_path):
    model = _foreign_model(tmp_path, normalization_rule_name="identity", add_dummy_prefix=False, byte_fallback=True)
    tokenizer = train_tokenizer(TokenizerConfig(path=str(model)), [], tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert tokenizer.bos_id == processor.bos_id()
    assert [tokenizer.pad_id, tokenizer.separator_id] == [processor.vocab_size(), processor.vocab_size() + 1]
    assert tokenizer.vocab_size == processor.vocab_size() + 2
    assert tokenizer.encode(TEXTS[0]) == processor.encode(TEXTS[0])
    assert load_tokenizer(tmp_path).hash == tokenizer.hash


@pytest.mark.parametrize(
    "setting",
    [
        {"normalization_rule_name": "nfkc"},
        {"add_dummy_prefix": True},
        {"byte_fallback": False},
        {"remove_extra_whitespaces": True},
    ],
    ids=lambda s: next(iter(s)),
)
def test_a_given_model_that_loses_text_is_refused(tmp_path, setting):
    good = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "byte_fallback": True}
    model = _foreign_model(tmp_path, **(good | setting))
    with pytest.raises(UserError, match="loses text"):
        train_tokenizer(TokenizerConfig(path=str(model)), [], tmp_path)


def test_a_path_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer.path = .*absent.model"):
        train_tokenizer(TokenizerConfig(path=str(tmp_path / "absent.model")), [], tmp_path)
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        train_tokenizer(TokenizerConfig(path=str(tmp_path / "text.model")), [], tmp_path)


def test_a_tokenizer_that_was_exchanged_is_refused(folder, tmp_path):
    train_tokenizer(TokenizerConfig(vocab_size=330), TEXTS, tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    with pytest.raises(UserError, match="is not the one of"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="is not the one of that run"):
        require_hash(byte_tokenizer(), load_tokenizer(folder).hash, "that run")
    with pytest.raises(UserError, match="no tokenizer in"):
        load_tokenizer(tmp_path / "nowhere")


def _foreign_model(folder, **settings):
    spec = {"remove_extra_whitespaces": False} | settings
    sentences = [t[:1000] for t in TEXTS[:60]]
    prefix = str(folder / "foreign")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=prefix, vocab_size=330 if spec["byte_fallback"] else 70,
        model_type="bpe", minloglevel=2, **spec,
    )  # fmt: skip
    return folder / "foreign.model"
