"""How a layer uses its heads: which domains switch each of them on, and whether by chance."""

from typing import NamedTuple

from headwise.analysis.records import HeadLoads


class HeadUse(NamedTuple):
    """One head of one layer. What was not tested is None.

    Attributes:
        layer, head: Where.
        shared: Whether it is always on.
        loads: For each domain, the share of tokens for which it is on, 0..1.
        effect: The highest of the loads minus the lowest, in percentage points.
        p_value: Of the head, corrected for the number of heads of the model.
        layer_p_value: Of its layer, not corrected for the number of layers.
        model_p_value: Of all layers.
    """

    layer: int
    head: int
    shared: bool
    loads: dict[str, float]
    effect: float | None
    p_value: float | None
    layer_p_value: float | None
    model_p_value: float | None


def head_use(heads: HeadLoads) -> list[HeadUse]:
    """One entry for each layer and head; how p-values are had, says `permutation_test`."""
    tested = heads.difference
    uses = []
    for layer, shared in enumerate(heads.shared_heads):
        of_layer = tested.layers[layer] if tested else None
        loads = {domain: layers[layer] for domain, layers in heads.by_domain.items()}
        for head, of_head in enumerate(zip(*loads.values(), strict=True)):
            uses.append(
                HeadUse(
                    layer=layer,
                    head=head,
                    shared=head in shared,
                    loads=dict(zip(loads, of_head, strict=True)),
                    effect=of_layer.effects[head] if of_layer else None,
                    p_value=of_layer.p_values[head] if of_layer else None,
                    layer_p_value=of_layer.p_value if of_layer else None,
                    model_p_value=tested.over_all.p_value if tested else None,
                )
            )
    return uses
