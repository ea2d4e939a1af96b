"""Mixtures of equal cost: the paper's tables to the unit, real layers, both directions."""

import pytest
import torch

from headwise import MHMoE, MoE
from headwise.parity import Mixture, count_flops, match_mh_moe, match_sparse_moe

PAPER = (768, 8, 1, 2048)  # d, E0, k0, f0 of the paper's sparse MoE
FLOPS = 9_437_184  # of a token, of every row of the paper's table


def layer_of(mixture: Mixture) -> MoE:
    """The layer of these sizes, without memory."""
    sizes = {
        "num_experts": mixture.num_experts, "top_k": mixture.top_k,
        "expert_dim": mixture.expert_dim, "glu": mixture.glu,
    }  # fmt: skip
    with torch.device("meta"):
        if mixture.heads is None:
            return MoE(mixture.dim, **sizes)
        return MHMoE(mixture.dim, num_heads=mixture.heads, **sizes)


def cost(layer: MoE) -> tuple[float, int]:
    """FLOPs of a token, and parameters, without the router's."""
    flops = count_flops(layer, sequence_length=1)
    weights = [p.numel() for name, p in layer.named_parameters() if "router" not in name]
    return sum(v for name, v in flops.items() if name != "router"), sum(weights)


@pytest.mark.parametrize(
    ("heads", "f", "exact", "e", "parameters", "note"),
    [
        (2, 768, 41 + 1 / 3, 40, 36_569_088, "41.3333 rounded to 40, the nearest multiple of 8"),
        (3, 512, 93.0, 96, 38_928_384, "93 rounded to 96, the nearest multiple of 8"),
    ],
)
def test_the_papers_table_to_the_unit(heads, f, exact, e, parameters, note):
    match = match_sparse_moe(*PAPER, heads=heads, experts_multiple_of=8)
    assert (match.exact_expert_dim, match.exact_num_experts) == (f, exact)
    assert match.found == Mixture(768, e, heads, f, heads)
    assert (match.expert_dim, match.num_experts) == (f, e)
    assert (match.flops, match.parameters) == (FLOPS, parameters)
    assert match.rounded == (f"num_experts {note}",)
    assert (match.given.flops, match.given.parameters) == (FLOPS, 37_748_736)
    assert match.parameter_ratio == parameters / 37_748_736
    assert match.flops_ratio == 1
    assert cost(layer_of(match.found)) == (FLOPS, parameters)
    assert cost(layer_of(match.given)) == (FLOPS, 37_748_736)


def test_whole_numbers_of_experts_are_the_default():
    match = match_sparse_moe(*PAPER, heads=2)
    assert match.num_experts == 41
    assert match.rounded == ("num_experts 41.3333 rounded to 41",)
    assert match_sparse_moe(*PAPER, heads=3).rounded == ()


def test_default_top_k_is_heads_times_the_sparse_moes():
    assert match_sparse_moe(*PAPER, heads=3) == match_sparse_moe(*PAPER, heads=3, top_k_mh=3)


def test_two_matrix_experts_follow_equation_8():
    d, f0, k0 = 768, 3072, 2
    match = match_sparse_moe(d, 8, k0, f0, heads=2, top_k_mh=2, glu=False, multiple_of=1)
    assert match.expert_dim == (k0 * f0 - d) / 2
    assert match.flops_ratio == 1


@pytest.mark.parametrize("glu", [True, False])
@pytest.mark.parametrize(("d", "e0", "k0", "f0", "h"), [(768, 8, 1, 2048, 2), (96, 4, 2, 161, 3)])
def test_ratios_are_those_of_the_layers(glu, d, e0, k0, f0, h):
    match = match_sparse_moe(d, e0, k0, f0, heads=h, glu=glu)
    (flops, parameters), (sparse_flops, sparse_parameters) = (
        cost(layer_of(mixture)) for mixture in (match.found, match.given)
    )
    assert match.flops_ratio == flops / sparse_flops
    assert match.parameter_ratio == parameters / sparse_parameters
    # f is a multiple of 8, E whole: both are off by half of that at most.
    matrices = 3 if glu else 2
    assert abs(flops - sparse_flops) <= 2 * matrices * d * h * k0 * 4
    assert abs(parameters - sparse_parameters) <= matrices * (d // h) * match.expert_dim / 2


@pytest.mark.parametrize("glu", [True, False])
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("sparse", [PAPER, (96, 5, 2, 168)], ids=str)
def test_there_and_back_again(sparse, heads, glu):
    there = match_sparse_moe(*sparse, heads=heads, glu=glu, multiple_of=1)
    mh = there.found
    sizes = (mh.dim, mh.num_experts, mh.top_k, mh.expert_dim)
    back = match_mh_moe(*sizes, heads=heads, top_k_sparse=sparse[2], glu=glu)
    assert back.given == mh
    assert back.found == there.given
    # What rounding lost on the way there is what is missing on the way back.
    f0 = sparse[3]
    assert back.exact_expert_dim == pytest.approx(f0 * there.flops_ratio)
    assert back.exact_num_experts * back.expert_dim == pytest.approx(
        sparse[1] * f0 * there.parameter_ratio
    )
    assert back.flops_ratio == pytest.approx(1 / there.flops_ratio)


def test_a_sparse_moe_for_the_papers_row_by_hand():
    match = match_mh_moe(768, 40, 2, 768, heads=2, top_k_sparse=2)
    # f0 = (2·768 + 512) / 2;  E0 = (768·40/2 + 512) / 1024
    assert (match.exact_expert_dim, match.exact_num_experts) == (1024, 15.5)
    assert match.found == Mixture(768, 16, 2, 1024)
    assert match.rounded == ("num_experts 15.5 rounded to 16",)
    assert cost(layer_of(match.found)) == (FLOPS, 37_748_736)


def test_what_bounds_a_rounded_number_is_said():
    match = match_sparse_moe(768, 8, 1, 513, heads=2)
    assert match.rounded[0] == (
        "expert_dim 0.5 rounded to 8, the nearest multiple of 8 that is at least 1"
    )
    # f = (5·202 - 10) / 5 and E = (202·5 - 10) / 200; of the multiples of 4, 4 is nearer than 8.
    match = match_sparse_moe(15, 5, 5, 202, heads=1, experts_multiple_of=4)
    assert (match.exact_num_experts, match.num_experts) == (5, 8)
    assert match.rounded[-1].endswith(
        "5 rounded to 8, the nearest multiple of 4 that is at least 5"
    )


@pytest.mark.parametrize(("glu", "least"), [(True, 512), (False, 768)])
def test_no_positive_width_is_refused(glu, least):
    with pytest.raises(ValueError, match=rf"expert_dim is {least}.* must exceed {least}$"):
        match_sparse_moe(768, 8, 1, least, heads=2, glu=glu)
    assert match_sparse_moe(768, 8, 1, least + 1, heads=2, glu=glu).expert_dim == 8


def test_fewer_experts_than_top_k_are_refused():
    # f = 1/2 becomes 64: parameters for two hundredths of an expert.
    with pytest.raises(ValueError, match=r"top_k_mh is 2; at an expert_dim .* lower top_k_mh or"):
        match_sparse_moe(768, 1, 1, 513, heads=2, multiple_of=64)
    # f0 = 2·6144 + 512; E0 = (6144·2/3 + 512) / f0 = 0.36.
    with pytest.raises(ValueError, match=r"num_experts is 2; .* raise it to heads · top_k = 6 or"):
        match_mh_moe(768, 2, 2, 6144, heads=3)
    assert match_mh_moe(768, 6, 2, 6144, heads=3).exact_num_experts == 1


COUNTS = ("dim", "num_experts", "top_k", "expert_dim")
OPTIONS = ("heads", "multiple_of", "experts_multiple_of")


@pytest.mark.parametrize("value", [0, -2, 2.0, True, "2"])
@pytest.mark.parametrize(
    ("solve", "field"),
    [(solve, field) for solve in (match_sparse_moe, match_mh_moe) for field in COUNTS + OPTIONS]
    + [(match_sparse_moe, "top_k_mh"), (match_mh_moe, "top_k_sparse")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_counts_are_checked_by_name(solve, field, value):
    sizes = dict(zip(COUNTS, PAPER, strict=True)) | {"heads": 2} | {field: value}
    with pytest.raises(ValueError, match=rf"^{field} is {value!r}; it must be (an int of )?at"):
        solve(**sizes)


@pytest.mark.parametrize("solve", [match_sparse_moe, match_mh_moe])
def test_what_does_not_fit_together_is_refused(solve):
    with pytest.raises(ValueError, match=r"^heads is 5; it must divide dim = 768$"):
        solve(*PAPER, heads=5)
    with pytest.raises(ValueError, match=r"^top_k is 9; it must lie in 1\.\.8 \(num_experts\)$"):
        solve(768, 8, 9, 2048, heads=2)
