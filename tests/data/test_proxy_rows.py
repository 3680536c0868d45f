"""Which rows stand for the target."""

import numpy as np
import pytest
from small_corpus import prepare_small, small_config

from opus_jax.config import replace
from opus_jax.data.plan import rows_at
from opus_jax.data.proxy_rows import proxy_plan, proxy_row_indices
from opus_jax.data.records import Manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare_small(tmp_path_factory.mktemp("proxy"))


def plan_of(folder, tmp_path, **proxy):
    config = small_config(tmp_path)
    config = replace(config, proxy=replace(config.proxy, **{"domains": ["code"], **proxy}))
    return proxy_plan(Manifest.load(folder), config)


def test_rows_of_the_wanted_domains_only(folder, tmp_path):
    manifest = Manifest.load(folder)
    first = manifest.domain_starts("proxy")[manifest.domains.index("code")]
    rows = proxy_row_indices(plan_of(folder, tmp_path))
    assert rows.tolist() == list(range(first, first + manifest.rows["proxy"]["code"]))


def test_a_limit_uses_rows_at_equal_distances_and_no_others(folder, tmp_path):
    whole = proxy_row_indices(plan_of(folder, tmp_path, domains=[]))
    plan = plan_of(folder, tmp_path, domains=[], limit=7)
    rows = proxy_row_indices(plan)
    assert rows.tolist() == whole[np.arange(7) * len(whole) // 7].tolist()
    drawn = rows_at(plan, 0, 0, 70)
    counts = np.unique(drawn, return_counts=True)
    assert counts[0].tolist() == rows.tolist()
    assert counts[1].max() - counts[1].min() <= 3, "domains come by their rows in use"


def test_a_limit_beyond_the_rows_there_are_is_no_limit(folder, tmp_path):
    whole, limited = plan_of(folder, tmp_path), plan_of(folder, tmp_path, limit=10**6)
    assert np.array_equal(proxy_row_indices(whole), proxy_row_indices(limited))
    assert np.array_equal(rows_at(whole, 3, 0, 50), rows_at(limited, 3, 0, 50))
