import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opus_jax.data.prepare as preparation
from opus_jax.config import EvaluationConfig, MeshConfig, from_mapping
from opus_jax.data.documents import Corpus, Document, Domain
from opus_jax.data.documents_table import read_columns
from opus_jax.data.records import Manifest, RowReader
from opus_jax.data.tokenizer import load_tokenizer
from opus_jax.distributed.mesh import make_mesh
from opus_jax.errors import ConfigError, UserError
from opus_jax.evaluation.bits_per_byte import Evaluator, make_evaluator, spread
from opus_jax.models import transformer
from opus_jax.models.presets import ModelSpec

V = 260  # of the byte tokenizer
SPEC = ModelSpec(layers=1, width=16, hidden=32, heads=2, kv_heads=2, head_dim=8, vocab_size=V)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def documents(domain: str, count: int) -> Iterator[Document]:
        for i in range(count):
            yield Document(f"{domain} {i} " + " ".join(str(i * j) for j in range(3 + i % 17)), f"{domain}/{i}")

    sizes = {"plain": 40, "ünïcode": 60}
    domains = tuple(Domain(name, "none", lambda n=name, k=k: documents(n, k)) for name, k in sizes.items())
    corpus = {"row_tokens": 64, "validation_share": 0.4, "workers": 1}
    corpus["cache_dir"] = str(tmp_path_factory.mktemp("cache"))
    with patch.object(preparation, "load_corpus", lambda config: Corpus("two", domains, {})):
        return preparation.prepare(from_mapping({"corpus": corpus, "tokenizer": {"kind": "byte"}}), progress=False)


def evaluator(
    records: Path, rows: int = 1000, batch_rows: int = 24, mesh: MeshConfig | None = None, **changes: Any
) -> Evaluator:
    reader = RowReader(records, "validation")
    return make_evaluator(
        SPEC, make_mesh(mesh or MeshConfig()), reader, Manifest.load(records), load_tokenizer(records).token_bytes,
        EvaluationConfig(rows=rows, batch_rows=batch_rows, **changes),
    )  # fmt: skip


@pytest.fixture(scope="module")
def params() -> dict:
    # Weights this large make the model far from uniform, so every single token counts in the comparison.
    fresh = transformer.init(SPEC, jax.random.key(0))
    return jax.tree.map(lambda x: 3 * x, fresh)


@pytest.fixture(scope="module")
def whole(records: Path) -> Evaluator:
    """Measures every validation row, the last batch filled up, over 8 data shards."""
    return evaluator(records)


@pytest.fixture(scope="module")
def measured(whole: Evaluator, params: dict) -> dict[str, float]:
    return whole(params)


def test_the_last_batch_is_not_full(whole: Evaluator) -> None:
    assert len(whole.rows) % 24
    assert np.bincount(whole.row_domains).min() > 2


def test_uniform_model_has_log2_of_the_vocabulary(whole: Evaluator, params: dict) -> None:
    bits = whole(jax.tree.map(jnp.zeros_like, params))
    assert bits == pytest.approx({"plain": math.log2(V), "ünïcode": math.log2(V)}, rel=1e-6)


def test_agrees_with_float64_loops_over_the_source_text(records: Path, params: dict, measured: dict) -> None:
    reader, eos_id = RowReader(records, "validation"), load_tokenizer(records).eos_id
    rows = reader.read(range(len(reader)))
    tokens, segments = jnp.asarray(rows["tokens"]), jnp.asarray(rows["segment_ids"])
    logits = np.asarray(transformer.apply(SPEC, params, tokens, segments), np.float64)
    documents = read_columns(records, "domain_id", "split", "text")
    for domain, name in enumerate(Manifest.load(records).domains):
        nats = sum(source_nats(rows[i], logits[i], eos_id) for i in reader.domain_rows[domain])
        size = sum(
            len(text.encode())
            for d, split, text in zip(*documents.values(), strict=True)
            if d == domain and split == "validation"
        )
        assert measured[name] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def source_nats(row: np.void, logits: np.ndarray, eos_id: int) -> float:
    tokens, segments = row["tokens"], row["segment_ids"]
    nats = 0.0
    for i in range(1, len(tokens)):
        if segments[i] != 0 and segments[i] == segments[i - 1] and tokens[i] != eos_id:
            nats += np.log(np.exp(logits[i - 1]).sum()) - logits[i - 1, tokens[i]]
    return nats


def test_batch_size_padding_and_mesh_change_nothing(records: Path, params: dict, measured: dict) -> None:
    other = evaluator(records, batch_rows=12, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    assert other(params) == pytest.approx(measured, rel=1e-6)


def test_rows_cap_each_domain(records: Path, params: dict, measured: dict) -> None:
    few = evaluator(records, rows=2)
    assert few.row_domains.tolist() == [0, 0, 1, 1]
    assert few(params) == few(params) != pytest.approx(measured, rel=1e-6)


def test_spread_takes_equal_distances() -> None:
    assert spread(np.arange(10, 20), 4).tolist() == [10, 12, 15, 17]
    assert spread(np.arange(3), 4).tolist() == [0, 1, 2]


def test_target_is_bits_over_bytes_of_the_domains(records: Path, whole: Evaluator) -> None:
    size = Manifest.load(records).bytes["validation"]
    bits = {"plain": 2.0, "ünïcode": 5.0}
    expected = (2 * size["plain"] + 5 * size["ünïcode"]) / sum(size.values())
    assert whole.target(bits, list(bits)) == pytest.approx(expected)
    assert whole.target(bits, ["ünïcode"]) == 5.0
    assert whole.target({"plain": 2.0}, list(bits)) == 2.0


def test_target_without_text_is_refused(whole: Evaluator) -> None:
    with pytest.raises(UserError, match="no validation text in poems; there is some in plain"):
        whole.target({"plain": 2.0}, ["poems"])


def test_only_the_wanted_domains_are_measured(records: Path, params: dict, measured: dict) -> None:
    one = evaluator(records, domains=["plain"])
    assert one(params) == pytest.approx({"plain": measured["plain"]}, rel=1e-6)
    with pytest.raises(ConfigError, match=r"evaluation.domains = .*plian.*nearest is 'plain'"):
        evaluator(records, domains=["plian"])
