"""Routing: scores become gates. Pure functions, float32 or wider, ties to the lowest index."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from headwise.ops.choice import check_choice
from headwise.ops.dtypes import widened
from headwise.ops.fields import Index, check
from headwise.ops.gates import arrange_gates
from headwise.ops.gpu import runs_triton
from headwise.ops.gradients import is_plain, learns
from headwise.ops.native import routing as native
from headwise.ops.scores import HeadScores, TokenScores, affinities, log_affinities
from headwise.ops.stages import two_stage_gates
from headwise.ops.tensors import check_operands, check_tensor
from headwise.ops.top_k import check_top_k, choice_of, multi_hot

HeadMode = Literal["released", "paper"]


class HeadRouting(NamedTuple):
    """What a router of attention heads decided, for every token.

    Losses, statistics and plots are functions of it. The candidates are the R *routed* heads, or
    groups of them (`route_groups`), whose heads all have the group's gate.

    Attributes:
        weights: The gates of all H heads, [..., H]; exactly 0 where a head is off.
        indices: The K chosen candidates, best first, [..., K]; -1 for padding, and where sparsemax
            leaves fewer than K.
        probabilities: The router's scores over the R candidates, [..., R], summing to 1.
        logits: What the probabilities were made from, [..., R].
        mask: True where a token counts, [...]; None where all do.
    """

    weights: Float[Tensor, "*batch H"]
    indices: Int[Tensor, "*batch K"]
    probabilities: Float[Tensor, "*batch R"]
    logits: Float[Tensor, "*batch R"]
    mask: Bool[Tensor, "*batch"] | None = None

    # Not by _replace: torch.compile before 2.13 cannot return what that makes.
    def with_weights(self, weights: Float[Tensor, "*batch H"]) -> "HeadRouting":
        """The same routing with other gates."""
        return HeadRouting(weights, self.indices, self.probabilities, self.logits, self.mask)

    def with_mask(self, mask: Bool[Tensor, "*batch"] | None) -> "HeadRouting":
        """The same routing with padding (mask False) switched off and left out of the count."""
        return self if mask is None else HeadRouting(*_switched_off(self, mask))


class ExpertRouting(NamedTuple):
    """What a router of tokens (or sub-tokens) to experts decided. The candidates are E experts.

    Attributes:
        weights: The weight of each choice, [..., K]; 0 for padding.
        indices: The K chosen experts, best first, [..., K]; -1 for padding.
        probabilities: The router's scores over the E experts, [..., E], summing to 1.
        logits: What the probabilities were made from, [..., E].
        mask: True where a token counts, [...]; None where all do.
    """

    weights: Float[Tensor, "*batch K"]
    indices: Int[Tensor, "*batch K"]
    probabilities: Float[Tensor, "*batch E"]
    logits: Float[Tensor, "*batch E"]
    mask: Bool[Tensor, "*batch"] | None = None

    def with_mask(self, mask: Bool[Tensor, "*batch"] | None) -> "ExpertRouting":
        """The same routing with padding (mask False) sent nowhere and left out of the count."""
        return self if mask is None else ExpertRouting(*_switched_off(self, mask))


Routing = HeadRouting | ExpertRouting

# So that a program of torch.export whose output holds one can be saved.
for _kind in (HeadRouting, ExpertRouting):
    _register_namedtuple(_kind, serialized_type_name=f"headwise.ops.{_kind.__name__}")


def _switched_off(routing: Routing, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of a routing in which padding has weight 0 and index -1."""
    mask = mask.expand(routing.indices.shape[:-1])
    padding = ~mask.unsqueeze(-1)
    return (
        routing.weights.masked_fill(padding, 0),
        routing.indices.masked_fill(padding, -1),
        routing.probabilities,
        routing.logits,
        mask,
    )


# Not in the call: torch.compile before 2.13 breaks a graph where types are joined.
_SHARED_HEADS: Any = Index | Sequence[Index]
# Of the kernels for queries, which mark shared heads in an integer of 64 bits.
_MOST_HEADS = 62


def route_heads(
    shared_logits: Float[Tensor, "*batch shared"],
    routed_logits: Float[Tensor, "*batch routed"],
    stage_logits: Float[Tensor, "*batch 2"] | None,
    *,
    top_k: int,
    mode: HeadMode = "released",
    scores: HeadScores = "softmax",
    indices: Int[Tensor, "..."] | None = None,
) -> HeadRouting:
    """Two-stage routing of attention heads: shared heads always on, the best `top_k` others too.

    With s = softmax(shared_logits), p = scores(routed_logits), m the multi-hot of top-k(p) and
    [a1, a2] = softmax(stage_logits), the gate of a token is

        paper:     [a1·s,           a2·p·m]
        released:  [2·a1·s·shared,  2·a2·top_k·p·m / sum(p·m)]

    A group that is empty leaves the factor of the other at 1. In mode "released" all gates that are
    on are 1 when the softmaxes are even, and with top_k = 1 the routed weight is constantly 1, so
    that only the balance loss trains that router.

    **Source**: MoH, arXiv 2410.11842, Eq. 5 and 6; mode "released": its code, commit 2cefd57.
    scores "sparsemax": arXiv 1602.02068; "sigmoid": as experts in DeepSeek-V3, arXiv 2412.19437.
    **Deviates**: the released code computes the gate in the model's dtype and leaves ties open.
    Other scores than softmax are an extension.

    Args:
        shared_logits: Scores of the shared heads, [..., shared]; shared may be 0.
        routed_logits: Scores of the other heads, [..., routed]; routed may be 0.
        stage_logits: Scores of the two groups, [..., 2]; needed where both groups exist.
        top_k: Routed heads that a token keeps, 0 to routed.
        mode: "released" (what the released weights need) or "paper".
        scores: What p is: "softmax"; "sparsemax", of which many are exactly 0, so that a token may
            keep fewer than top_k heads; or "sigmoid", each head for itself.
        indices: The choice, where it was made before (`headwise.replay_routing`); -1 for none.

    Returns:
        A HeadRouting with weights [..., shared + routed]; shared + top_k of them are on (fewer only
        where a score is 0: sparsemax's, or one that underflows). For sigmoids the probabilities
        are p / sum(p).

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, top_k is out of range, mode or scores
            is unknown or stage_logits is missing.

    Example (worked by hand): logits 0 for two shared heads, ln 3 and 0 for two routed ones, stage
    logits 0, top_k 1: paper gives [1/4, 1/4, 3/8, 0], released gives [1, 1, 1, 0].
    """
    check_choice("mode", mode, HeadMode)
    check_choice("scores", scores, HeadScores)
    logits = {
        "shared_logits": (shared_logits, "... shared"),
        "routed_logits": (routed_logits, "... routed"),
    }
    stages = {} if stage_logits is None else {"stage_logits": (stage_logits, "... stages")}
    sizes = check_operands({**logits, **stages}, sizes={"stages": 2})
    num_shared, num_routed = sizes["shared"], sizes["routed"]
    check_top_k(top_k, num_routed, lowest=0)
    if num_shared > 0 and num_routed > 0 and stage_logits is None:
        raise ValueError("stage_logits is None; with shared and routed heads it must be given")
    routed_logits = widened(routed_logits)
    compute = None
    if scores == "softmax" and indices is None:
        compute = _two_stages_in_one_kernel(routed_logits, shared_logits, stage_logits)
    if compute is not None:
        stage = None if stage_logits is None else widened(stage_logits)
        paper = mode == "paper"
        weights, best, p = compute(widened(shared_logits), routed_logits, stage, top_k, paper)
        return HeadRouting(weights, best, p, routed_logits)
    p, probabilities = affinities(routed_logits, scores)
    chosen, which = choice_of(p, top_k, indices)
    gates = two_stage_gates(shared_logits, p, stage_logits, which, paper=mode == "paper")
    if scores == "sparsemax" and indices is None:
        chosen = chosen.masked_fill(p.gather(-1, chosen) == 0, -1)
    return HeadRouting(gates, chosen, probabilities, routed_logits)


def route_heads_by_query_norm(
    q: Float[Tensor, "B T H C"],
    *,
    shared_heads: int | Sequence[int],
    top_k: int,
    scale_by_std: bool = True,
    indices: Int[Tensor, "..."] | None = None,
) -> HeadRouting:
    """Routing without parameters: a token keeps the heads whose queries are longest.

        z_i = ||q_i||_2 over the routed heads,   z := z / std(z) if scale_by_std
        p = softmax(z),   gate = 1 for shared heads and top-k(z), 0 for the others

    The gradient is straight-through: dL/dp_i := dL/dgate_i. A rotation keeps the norm, so q may
    be taken before or after rotary embeddings.

    **Source**: MoH, arXiv 2410.11842, section 4.4, Eq. 9 and 10; scale_by_std: its LLaMA code.
    **Deviates**: float32 whatever the model's dtype; where all norms are equal the std counts as 1
    (NaN in the released code); a head that is off computes nothing, so its gate has no gradient.

    Args:
        q: Queries of all heads.
        shared_heads: Heads that are always on: how many, 0 to H, which are the first ones then; or
            which, ascending.
        top_k: Heads that a token keeps of the others.
        scale_by_std: Divide by the (unbiased) standard deviation over the routed heads.
        indices: The choice, where it was made before; -1 for none.

    Returns:
        A HeadRouting with weights [B, T, H] of exactly 0 and 1; its indices count the routed heads.

    Raises:
        ValueError: If q has another shape or dtype, or shared_heads or top_k is out of range.
    """
    check("shared_heads", shared_heads, _SHARED_HEADS)
    check("scale_by_std", scale_by_std, bool)
    num_heads = check_operands({"q": (q, "B T H C")})["H"]
    shared = _which_shared(shared_heads, num_heads)
    check_top_k(top_k, num_heads - len(shared), lowest=0)
    compute = None
    if indices is None and len(shared) < num_heads <= _MOST_HEADS:
        if native.has_kernel_for_queries(q) and is_plain(q):
            compute = native.query_norm_routing
        elif _in_one_kernel(q):
            from headwise.ops.triton_routing import query_norm_routing as compute
    if compute is not None:
        return HeadRouting(*compute(q, list(shared), top_k, scale_by_std))
    first = list(shared) == list(range(len(shared)))
    routed = q[..., len(shared) :, :] if first else _without(q, shared, dim=-2)
    norms = torch.linalg.vector_norm(widened(routed), dim=-1)
    choice = choice_of(norms, top_k, indices)
    logits = norms / _guarded_std(norms) if scale_by_std and norms.shape[-1] > 1 else norms
    return _straight_through(shared, logits, choice, logits.softmax(-1))


def route_heads_by_scores(
    scores: Float[Tensor, "*batch R"],
    *,
    shared_heads: int | Sequence[int],
    top_k: int,
    gain: Float[Tensor, " H"] | None = None,
    indices: Int[Tensor, "..."] | None = None,
) -> HeadRouting:
    """A token keeps the heads of the largest scores, each with a gate that is the same for all.

        p = softmax(scores),   gate_h = gain_h for shared heads and top-k(scores), 0 for the others

    The gradient is straight-through, dL/dp_i := gain_i dL/dgate_i.

    Args:
        scores: Of the routed heads, [..., R].
        shared_heads: Heads that are always on, beside these: how many, which are the first ones
            then; or which of all of them, ascending.
        top_k: Routed heads that a token keeps, 0 to R.
        gain: Of all heads, [shared + R]; None for 1.
        indices: The choice, where it was made before; -1 for none.

    Returns:
        A HeadRouting with weights [..., shared + R], exactly 0 where a head is off.

    Raises:
        ValueError: If scores is no floating tensor, gain has another shape, or shared_heads or
            top_k is out of range.

    Example (worked by hand): scores ln 2, 0 and ln 3 with one shared head and top_k 2 give the
    gates [1, 1, 0, 1] and the probabilities [1/3, 1/6, 1/2].
    """
    num_routed = check_operands({"scores": (scores, "... R")})["R"]
    check("shared_heads", shared_heads, _SHARED_HEADS)
    num_shared = shared_heads if isinstance(shared_heads, int) else len(shared_heads)
    shared = _which_shared(shared_heads, num_shared + num_routed)
    num_heads = num_shared + num_routed
    if gain is not None:
        check_tensor("gain", gain, (num_heads,), like=scores)
    check_top_k(top_k, num_routed, lowest=0)
    scores = widened(scores)
    plain = indices is None and is_plain(scores, scores if gain is None else gain)
    if plain and num_heads <= _MOST_HEADS and native.has_kernel(scores):
        return HeadRouting(*native.routing_by_scores(scores, gain, list(shared), top_k), scores)
    compute = _two_stages_in_one_kernel(scores) if plain else None
    if compute is not None:
        _, best, probabilities = compute(scores[..., :0], scores, None, top_k, False)
        choice = best, best
    else:
        choice, probabilities = choice_of(scores, top_k, indices), scores.softmax(-1)
    routing = _straight_through(shared, scores, choice, probabilities)
    return routing if gain is None else routing.with_weights(routing.weights * gain)


def _straight_through(
    shared: Sequence[int], logits: Tensor, choice: tuple[Tensor, Tensor], probabilities: Tensor
) -> HeadRouting:
    """Gates of 1 for shared and chosen heads, with the gradients of the probabilities."""
    hard = multi_hot(choice[1], probabilities)
    if learns(probabilities):
        # p - p.detach() is exactly 0, so the gate is exactly 0 or 1 and still carries p's gradient.
        hard = hard + (probabilities - probabilities.detach())
    gates = arrange_gates(shared, hard.new_ones(*hard.shape[:-1], len(shared)), hard)
    return HeadRouting(gates, choice[0], probabilities, logits)


def route_tokens(
    logits: Float[Tensor, "*batch E"],
    *,
    top_k: int,
    normalize: bool = True,
    scores: TokenScores = "softmax",
    bias: Float[Tensor, " E"] | None = None,
    indices: Int[Tensor, "..."] | None = None,
) -> ExpertRouting:
    """Routing of tokens (or sub-tokens) to experts: the `top_k` best of p = scores(logits).

    **Source**: MH-MoE, arXiv 2404.15045, Eq. 2 and 3. Its weights are raw p; `normalize` divides
    them by their sum over the chosen, as arXiv 2411.16205 and most sparse MoE do. scores "sigmoid":
    DeepSeek-V3, arXiv 2412.19437, section 2.1.2; bias: arXiv 2408.15664, Eq. 3.

    Args:
        logits: Scores over the E experts, [..., E].
        top_k: Experts that a token goes to, 1 to E.
        normalize: Let the weights of a token sum to 1.
        scores: "softmax", or "sigmoid" of each logit for itself.
        bias: Added to p for the choice of the experts, never to their weights, [E].
        indices: The choice, where it was made before (`headwise.replay_routing`); -1 for none.

    Returns:
        An ExpertRouting with weights and indices [..., top_k]. For sigmoids the probabilities are
        p / sum(p).

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, top_k is out of range or scores is
            unknown.

    Example (worked by hand): logits ln 1, ln 2, ln 5 with top_k 2 choose experts 2 and 1 with
    weights 5/8 and 2/8 raw, 5/7 and 2/7 normalised. Their sigmoids are 1/2, 2/3 and 5/6: the same
    choice with weights 5/6 and 2/3 raw, 5/9 and 4/9 normalised.
    """
    check_choice("scores", scores, TokenScores)
    check("normalize", normalize, bool)
    biases = {} if bias is None else {"bias": (bias, "E")}
    sizes = check_operands({"logits": (logits, "... E"), **biases})
    logits = widened(logits)
    check_top_k(top_k, sizes["E"], lowest=1)
    if scores == "softmax" and bias is None and indices is None and _in_one_kernel(logits):
        from headwise.ops.triton_routing import token_routing

        return ExpertRouting(*token_routing(logits, top_k, normalize), logits)
    p, probabilities = affinities(logits, scores)
    biased = p if bias is None else p.detach() + bias
    chosen, which = choice_of(biased, top_k, indices)
    weights = p.gather(-1, which)
    if normalize and scores == "softmax" and bias is None and indices is None:
        weights = weights / weights.sum(-1, keepdim=True)
    elif normalize:
        # All that a bias or an earlier choice took may have underflowed to 0; logarithms have not.
        logs = log_affinities(logits, scores).gather(-1, which)
        weights = logs.masked_fill(chosen < 0, torch.finfo(logs.dtype).min).softmax(-1)
    if indices is not None:
        weights = weights.masked_fill(chosen < 0, 0)
    return ExpertRouting(weights, chosen, probabilities, logits)


def _two_stages_in_one_kernel(routed_logits: Tensor, *others: Tensor | None) -> Any:
    """What computes the gates of `route_heads` with softmax for these, if a kernel does."""
    if native.has_kernel(routed_logits):
        return native.gates
    if _in_one_kernel(routed_logits, *others):
        from headwise.ops.triton_routing import two_stage_routing

        return two_stage_routing
    return None


def _in_one_kernel(*tensors: Tensor | None) -> bool:
    """Whether a Triton kernel routes by these: on a GPU, where nothing learns."""
    given = [x for x in tensors if x is not None]
    narrow = all(runs_triton(x) and x.dtype != torch.float64 for x in given)
    return narrow and is_plain(*given)


def _which_shared(shared_heads: int | Sequence[int], num_heads: int) -> Sequence[int]:
    shared = range(shared_heads) if isinstance(shared_heads, int) else shared_heads
    if not set(range(num_heads)).issuperset(shared) or list(shared) != sorted(set(shared)):
        raise ValueError(
            f"shared_heads is {shared_heads}; it must lie in 0..{num_heads}, or name such heads in "
            "ascending order"
        )
    return shared


def _without(x: Tensor, heads: Sequence[int], dim: int) -> Tensor:
    return torch.stack([part for h, part in enumerate(x.unbind(dim)) if h not in heads], dim=dim)


def _guarded_std(norms: Tensor) -> Tensor:
    """The deviation over the heads, or 1 where it is nothing but rounding."""
    std = norms.std(-1, keepdim=True)
    rounding = 4 * torch.finfo(norms.dtype).eps * norms.detach().amax(-1, keepdim=True)
    return torch.where(std > rounding, std, 1)
