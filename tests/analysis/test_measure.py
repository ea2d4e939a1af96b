import math

import pytest
import torch

from headwise.analysis import (
    LoadMeter,
    count_experts,
    count_heads,
    heads_on,
    load_distance,
    load_entropy,
    unused_share,
)
from headwise.ops import (
    ExpertRouting,
    HeadRouting,
    route_heads,
    route_heads_by_query_norm,
    route_tokens,
)


def heads_routing(gates):
    """One shared head and two routed ones, of which each token keeps one."""
    weights = torch.tensor(gates)
    routed = weights[..., 1:]
    return HeadRouting(weights, routed.argmax(-1, keepdim=True), routed.softmax(-1), routed)


def experts_routing(indices, num_experts):
    indices = torch.tensor(indices)
    probabilities = torch.full((*indices.shape[:-1], num_experts), 1 / num_experts)
    return ExpertRouting(indices.float(), indices, probabilities, probabilities.log())


def test_head_load_by_hand():
    gates = [[[1.0, 0.7, 0.0], [1.0, 0.4, 0.0], [1.0, 0.0, 0.9], [1.0, 0.2, 0.0]]]
    routing = heads_routing(gates)
    assert count_heads(routing).load().tolist() == [1, 3 / 4, 1 / 4]
    masked = routing.with_mask(torch.tensor([[True, True, True, False]]))
    assert count_heads(masked).load().tolist() == pytest.approx([1, 2 / 3, 1 / 3])
    # A mask that was set without switching the padding off counts just as well.
    assert torch.equal(
        count_heads(routing._replace(mask=masked.mask)).load(), count_heads(masked).load()
    )


@pytest.mark.parametrize("learned", [True, False])
def test_head_loads_sum_to_the_heads_on(learned):
    if learned:
        routing = route_heads(
            torch.randn(2, 7, 3), torch.randn(2, 7, 5), torch.randn(2, 7, 2), top_k=3
        )
    else:
        routing = route_heads_by_query_norm(torch.randn(2, 7, 8, 5), shared_heads=3, top_k=3)
    load = count_heads(routing).load()
    assert load[:3].tolist() == [1, 1, 1]
    assert float(load.sum()) == pytest.approx(6)


def test_expert_load_by_hand():
    routing = experts_routing([[[0, 1], [2, 1], [0, 1]]], 5)
    assert count_experts(routing).load().tolist() == pytest.approx([2 / 6, 3 / 6, 1 / 6, 0, 0])
    masked = routing.with_mask(torch.tensor([[True, False, True]]))
    assert count_experts(masked).load().tolist() == [1 / 2, 1 / 2, 0, 0, 0]


def test_sub_tokens_count_like_tokens():
    routing = experts_routing([[[[0], [0]], [[0], [2]], [[3], [3]]]], 4)
    masked = routing.with_mask(torch.tensor([[[True], [True], [False]]]))
    assert masked.indices.shape == (1, 3, 2, 1)
    assert count_experts(masked).load().tolist() == [3 / 4, 0, 1 / 4, 0]
    assert count_experts(masked).total == 4


def test_only_padding_loads_nobody():
    nobody = torch.zeros(1, 3, dtype=torch.bool)
    routing = route_tokens(torch.randn(1, 3, 5), top_k=2).with_mask(nobody)
    assert count_experts(routing).load().tolist() == [0] * 5
    heads = route_heads_by_query_norm(torch.randn(1, 3, 5, 2), shared_heads=1, top_k=2)
    assert count_heads(heads.with_mask(nobody)).load().tolist() == [0] * 5


def test_heads_on():
    routing = heads_routing([[[1.0, 0.7, 0.0], [1.0, 0.0, 0.9], [1.0, 0.2, 0.0]]])
    masked = routing.with_mask(torch.tensor([[True, True, False]]))
    assert heads_on(masked) == [[0, 1], [0, 2], []]
    with pytest.raises(ValueError, match=r"\[2, 3, 3\]"):
        heads_on(routing._replace(weights=routing.weights.expand(2, 3, 3)))


def test_entropy_by_hand():
    assert load_entropy([0.25] * 4) == pytest.approx(1)
    assert load_entropy([0, 3, 0]) == 0
    # p = [1/2, 1/4, 1/4]: 1.5 ln 2 / ln 3, whatever the scale.
    assert load_entropy(torch.tensor([1.0, 0.5, 0.5])) == pytest.approx(
        1.5 * math.log(2) / math.log(3)
    )
    assert load_entropy([0.6]) == 1
    with pytest.raises(ValueError, match="sums to 0"):
        load_entropy([0, 0])


def test_distance_by_hand():
    assert load_distance([0.5, 0.5], [1, 1]) == 0
    assert load_distance([1, 0], [0, 3]) == 1
    assert load_distance([3, 1], [1, 3]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="2 and 3"):
        load_distance([1, 1], [1, 1, 1])


def test_unused_share():
    assert unused_share([0.5, 0.0, 0.5, 0.0]) == 0.5
    assert unused_share(torch.tensor([1e-30, 1.0])) == 0
    assert unused_share([]) == 0


def test_meter_counts_tokens_and_not_batches():
    meter = LoadMeter(count_heads)
    one = heads_routing([[[1.0, 0.7, 0.0]]])
    three = heads_routing([[[1.0, 0.0, 0.7]] * 3])
    meter.add("code", [one, three])
    meter.add("code", [three, three])
    meter.add("prose", [one, one])
    # The mean of the two batches would be 1/2.
    assert meter.by_domain()["code"][0] == [1, 1 / 4, 3 / 4]
    assert meter.by_domain()["prose"] == [[1, 1, 0], [1, 1, 0]]


def test_meter_equals_one_large_forward():
    routing = route_tokens(torch.randn(1, 11, 3, 7), top_k=2)
    parts = [ExpertRouting(*[part[:, a:b] for part in routing[:4]]) for a, b in ((0, 2), (2, 11))]
    meter = LoadMeter(count_experts)
    for part in parts:
        meter.add("all", [part])
    assert meter.by_domain() == {"all": [count_experts(routing).load().tolist()]}


def test_meter_refuses_another_model():
    meter = LoadMeter(count_experts)
    meter.add("code", [experts_routing([[0, 1]], 3)])
    with pytest.raises(ValueError, match="had 1 layers and now has 2"):
        meter.add("code", [experts_routing([[0, 1]], 3)] * 2)
    with pytest.raises(ValueError, match="3 and 5 candidates"):
        meter.add("code", [experts_routing([[0, 1]], 5)])


def test_a_routing_of_the_other_kind_is_refused():
    heads = route_heads(torch.randn(1, 3, 2), torch.randn(1, 3, 5), torch.randn(1, 3, 2), top_k=2)
    experts = route_tokens(torch.randn(1, 3, 7), top_k=2)
    for function in (count_heads, heads_on):
        with pytest.raises(ValueError, match=r"routing is ExpertRouting.* must be a HeadRouting"):
            function(experts)
    with pytest.raises(ValueError, match=r"routing is HeadRouting.* must be an ExpertRouting"):
        count_experts(heads)
