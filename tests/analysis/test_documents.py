"""Counts of each row of a batch, and of documents over many batches."""

import numpy as np
import pytest
import torch

from headwise.analysis.documents import DocumentMeter, count_rows
from headwise.analysis.measure import count_experts, count_heads
from headwise.ops import ExpertRouting, HeadRouting, route_tokens


def routed(on, mask=None):
    """Gates of rows [B][T][H]."""
    weights = torch.tensor(on, dtype=torch.float32)
    one = weights[..., :1]
    return HeadRouting(weights, one.long(), one, one, mask)


ON = [[[1, 0.7, 0], [1, 0, 0]], [[1, 0, 0.9], [1, 0.2, 0.9]]]


def test_heads_of_each_row_by_hand():
    counts, totals = count_rows(routed(ON))
    assert (counts.tolist(), totals.tolist()) == ([[2, 1, 0], [2, 1, 2]], [2, 2])
    mask = torch.tensor([[True, False], [False, False]])
    for routing in (routed(ON, mask), routed(ON).with_mask(mask)):
        counts, totals = count_rows(routing)
        assert (counts.tolist(), totals.tolist()) == ([[1, 1, 0], [0, 0, 0]], [1, 0])


@pytest.mark.parametrize("sub_tokens", [(), (3,)])
def test_rows_add_up_to_the_batch(sub_tokens):
    mask = torch.rand(5, 11, *[1 for _ in sub_tokens]) < 0.7
    experts = route_tokens(torch.randn(5, 11, *sub_tokens, 7), top_k=2)
    heads = routed((torch.rand(5, 11, 7) * (torch.rand(5, 11, 7) < 0.5)).tolist())
    of_heads = (heads, heads.with_mask(mask.flatten(1)))
    for routing in (experts, experts.with_mask(mask), *of_heads):
        count = count_experts if isinstance(routing, ExpertRouting) else count_heads
        counts, totals = count_rows(routing)
        whole = count(routing)
        assert counts.sum(0).tolist() == whole.counts.tolist()
        assert totals.sum() == whole.total
        for row in range(5):
            one = count(type(routing)(*(x if x is None else x[[row]] for x in routing)))
            assert (counts[row].tolist(), int(totals[row])) == (one.counts.tolist(), one.total)


def test_a_document_is_the_sum_of_its_rows():
    """Loads of a: 1/4 and 2/4 of a.py and b.py; of b: 3/4 and 1, by hand."""
    rows = {"a.py": [1, 0, 0, 0], "b.py": [1, 1, 0, 0], "c.py": [1, 1, 1, 0], "d.py": [1] * 4}
    half = {name: [[[x] for x in on[:2]], [[x] for x in on[2:]]] for name, on in rows.items()}
    meter = DocumentMeter()
    for part in (0, 1):  # a block of each file in each batch
        for domain, files in (("a", ["a.py", "b.py"]), ("b", ["c.py", "d.py"])):
            meter.add(domain, files, [routed([half[name][part] for name in files])])
    found = meter.difference()
    assert found.documents == {"a": 2, "b": 2}
    assert found.layers[0].effects == pytest.approx([50])
    assert found.over_all.statistic == pytest.approx(0.25**2)
    assert found.over_all.total == pytest.approx(np.var([0.25, 0.5, 0.75, 1]))


def test_rows_of_which_nothing_counts_are_no_documents():
    meter = DocumentMeter()
    for domain, row in (("a", 0), ("b", 1)):
        mask = torch.tensor([[row == 0], [row == 1]] * 2)
        meter.add(domain, range(4), [routed([[[1.0, row]]] * 4).with_mask(mask)])
    assert meter.difference().documents == {"a": 2, "b": 2}


def test_what_does_not_fit_is_refused():
    meter = DocumentMeter()
    with pytest.raises(ValueError, match="documents has 3 entries; the batch has 2 rows"):
        meter.add("a", ["x", "y", "z"], [routed(ON)])
    meter.add("a", ["x", "y"], [routed(ON)])
    with pytest.raises(ValueError, match=r"layers had \[3\] candidates and now have \[3, 3\]"):
        meter.add("a", ["x", "y"], [routed(ON), routed(ON)])
    assert meter.difference() is None
