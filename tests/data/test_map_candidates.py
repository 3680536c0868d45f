"""The plan over datasets of others: any elements, in any order, in exact proportions."""

import itertools
import pickle
from collections import Counter

import grain
import numpy as np
import pytest

from opus_jax.data.map_candidates import candidates, element_documents, fit
from opus_jax.data.plan import Plan, advance, rows_at
from opus_jax.errors import UserError

DOMAINS = np.array([0, 1, 2, 1, 0, 1, 2, 1, 0, 1] * 3)  # 9, 15 and 6 elements, not together


def dataset(elements=None) -> grain.MapDataset:
    return grain.MapDataset.source([f"element {i}" for i in range(30)] if elements is None else elements)


def take(stream: grain.MapDataset, count: int, first: int = 0) -> list[int]:
    return [int(stream[i].split()[1]) for i in range(first, first + count)]


def plan(*weights: float, priorities=None, first_slot: int = 0) -> Plan:
    return Plan(np.array(weights, float), priorities, first_slot)


def test_domains_come_in_proportion_and_elements_once_a_pass():
    drawn = take(candidates(dataset(), plan(1, 1, 2), 0, domain_ids=DOMAINS), 120)
    counts = Counter(DOMAINS[drawn].tolist())
    assert all(abs(counts[g] - share) <= 1 for g, share in enumerate((30, 30, 60)))
    of_last = [i for i in drawn if DOMAINS[i] == 2]
    passes = [of_last[i : i + 6] for i in range(0, 54, 6)]
    assert all(set(p) == set(np.flatnonzero(DOMAINS == 2)) for p in passes)
    assert len({tuple(p) for p in passes}) > 5


def test_it_is_the_order_of_the_plan_itself():
    stream = candidates(dataset(), plan(3, 1, 1), 5, domain_ids=DOMAINS)
    rows = rows_at(fit(plan(3, 1, 1), DOMAINS), 5, 0, 600)
    assert take(stream, 600) == np.argsort(DOMAINS, kind="stable")[rows].tolist()
    assert take(stream, 40, first=300) == take(stream, 600)[300:340]
    assert take(candidates(dataset(), plan(3, 1, 1), 6, domain_ids=DOMAINS), 600) != take(stream, 600)


def test_a_domain_without_weight_never_comes():
    drawn = take(candidates(dataset(), plan(1, 0, 1), 0, domain_ids=DOMAINS), 100)
    assert set(DOMAINS[drawn]) == {0, 2}


def test_domains_are_read_from_the_elements_once_or_not_needed():
    reads = []

    class Source:
        def __len__(self):
            return 30

        def __getitem__(self, index):
            reads.append(index)
            return {"text": f"element {index}", "domain_id": np.int32(DOMAINS[index])}

    stream = candidates(grain.MapDataset.source(Source()), plan(1, 1, 2), 0)
    assert sorted(reads) == list(range(30))
    expected = take(candidates(dataset(), plan(1, 1, 2), 0, domain_ids=DOMAINS), 20)
    assert [stream[i]["text"] for i in range(20)] == [f"element {i}" for i in expected]
    assert sorted(take(candidates(dataset(), plan(7), 0), 30)) == list(range(30))


def test_elements_of_low_priority_come_less():
    priorities = np.ones(30, np.float32)
    priorities[[1, 3]] = 0, 2
    drawn = Counter(take(candidates(dataset(), plan(1, 2, 1, priorities=priorities), 0, domain_ids=DOMAINS), 1200))
    assert [drawn[i] for i in (1, 3, 5)] == pytest.approx([0, 80, 40], abs=2)


def test_priorities_by_document():
    documents = np.stack([np.arange(30) // 10, np.full(30, -1)], 1)
    priorities = np.array([1, 0, 1], np.float32)
    for ids in (documents, documents[:, 0]):
        stream = candidates(dataset(), plan(1, 1, 1, priorities=priorities), 0, domain_ids=DOMAINS, document_ids=ids)
        drawn = take(stream, 300)
        assert set(drawn) == {*range(10), *range(20, 30)}


def test_a_plan_goes_on_where_the_one_before_was():
    """Over both plans together, every element of a domain comes once before any comes again."""
    first = fit(plan(1, 1, 1), DOMAINS)
    second = advance(first, 21, weights=np.array([0.0, 1.0, 0.0]))
    before = take(candidates(dataset(), first, 0, domain_ids=DOMAINS), 21)
    of_domain = [i for i in before if DOMAINS[i] == 1]
    after = take(candidates(dataset(), second, 0, domain_ids=DOMAINS), 15 - len(of_domain))
    assert sorted(of_domain + after) == np.flatnonzero(DOMAINS == 1).tolist()


def test_a_new_plan_alone_begins_its_passes_at_its_slot_in_another_order():
    streams = [candidates(dataset(), plan(1, first_slot=slot), 0, domain_ids=DOMAINS * 0) for slot in (0, 50, 100)]
    orders = [take(stream, 30) for stream in streams]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    priorities = np.where(np.arange(30) == 4, 0, 1).astype(np.float32)
    later = candidates(dataset(), plan(1, priorities=priorities, first_slot=50), 0)
    assert set(take(later, 60)) == set(range(30)) - {4}


def test_documents_follow_the_order_of_the_plan():
    order = np.argsort(DOMAINS, kind="stable")
    assert np.array_equal(element_documents(DOMAINS), order[:, None])
    assert np.array_equal(element_documents(DOMAINS, np.stack([DOMAINS, DOMAINS + 5], 1))[:, 1], DOMAINS[order] + 5)


def test_grain_batches_prefetches_slices_and_resumes_it():
    stream = candidates(dataset(), plan(1, 1, 2), 0, domain_ids=DOMAINS)
    expected = take(stream, 400)
    assert take(stream[100:], 20) == expected[100:120]
    batches = stream.batch(8, batch_fn=list).to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=16))
    iterator = iter(batches)
    read = [int(e.split()[1]) for batch in itertools.islice(iterator, 30) for e in batch]
    assert read == expected[:240]
    state = iterator.get_state()
    following = next(iterator)
    again = iter(batches)
    again.set_state(state)
    assert next(again) == following == [f"element {i}" for i in expected[240:248]]


def test_it_can_be_sent_to_another_process():
    source = candidates(dataset(), plan(1, 1, 2), 0, domain_ids=DOMAINS)
    assert take(pickle.loads(pickle.dumps(source)), 20) == take(source, 20)


THREE = plan(1, 1, 1, priorities=np.ones(3, np.float32))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"domain_ids": DOMAINS[:5]}, r"domain_ids: shape \[5\] for 30 elements"),
        ({"domain_ids": DOMAINS + 1}, "domain_ids: 1 to 3, but the plan has domains 0 to 2"),
        ({"domain_ids": DOMAINS - 1}, "domain_ids: -1 to 1"),
        ({}, "element 0 of the dataset has no 'domain_id': give domain_ids"),
        ({"domain_ids": DOMAINS % 2}, "domain 2 has no rows"),
        ({"domain_ids": DOMAINS, "plan": fit(plan(1, 1, 1), DOMAINS[:20])}, "the plan is for domains of .* elements"),
        (
            {
                "domain_ids": DOMAINS,
                "document_ids": DOMAINS[:4],
                "plan": plan(1, 1, 1, priorities=np.ones(3, np.float32)),
            },
            "document_ids: 4 of them for 30 elements",
        ),
        ({"domain_ids": DOMAINS, "plan": plan(1, 1, 1, priorities=np.ones(3, np.float32))}, "priorities: 3 values"),
        ({"domain_ids": DOMAINS, "elements": dataset([])}, "the dataset has 0 elements"),
        ({"domain_ids": DOMAINS, "elements": dataset().repeat()}, "candidates are drawn from a finite one"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, reason):
    arguments = {"elements": dataset(), "plan": plan(1, 1, 1), **arguments}
    with pytest.raises(UserError, match=reason):
        candidates(arguments.pop("elements"), arguments.pop("plan"), 0, **arguments)
