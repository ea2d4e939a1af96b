"""The papers' tables as comparisons: which models each of them trains."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, NamedTuple

from headwise.hf import MHMoEConfig, MoEConfig, MoHConfig
from headwise.nn import HeadBudget
from headwise.recipes.decoders import TextRun
from headwise.recipes.images import ImageRun
from headwise.recipes.layered import fine_grained_moe, mh_moe, sparse_moe
from headwise.recipes.text import domain_names
from headwise.training.comparison import Variant


class Study(NamedTuple):
    """A question and the models that answer it.

    Attributes:
        question: What the comparison is to tell.
        variants: The models, for a run of given sizes.
        equal_cost: Whether all are given the FLOPs per token of the first; otherwise all have MLPs
            of one width, and heads that are off make a model cheaper.
        axis: What `Variant.position` is; None where the models stand on no axis.
        subject: What the models are trained on: text, or images in recipe "vit" or "dit".
    """

    question: str
    variants: Callable[[Any], Sequence[Variant]]
    equal_cost: bool = True
    axis: str | None = None
    subject: Literal["text", "vit", "dit"] = "text"


DENSE = Variant(name="dense", label="dense")


def mixtures(run: TextRun, shared_expert_dim: int | None = None) -> list[Variant]:
    """The four mixtures of MH-MoE's tables, at the FLOPs and parameters of the sparse one."""
    shared = {"shared_expert_dim": shared_expert_dim}
    return [
        Variant(name="moe", label="sparse MoE", mlp=sparse_moe(run, **shared)),
        Variant(name="fine", label="fine-grained MoE", mlp=fine_grained_moe(run, **shared)),
        *(
            Variant(
                name=f"mh_moe_{h}",
                label=f"MH-MoE, {h} heads",
                mlp=mh_moe(run, heads=h, top_k=h, **shared),
            )
            for h in (2, 3)
        ),
    ]


def mhmoe_main(run: TextRun) -> list[Variant]:
    """Each mixture beside the model that has the same experts on for every token.

    The sparse mixture's is dense: one expert, as wide as the dense MLP. That of MH-MoE has as many
    experts as are chosen, and weighs them for each sub-token as MH-MoE does.
    """
    static = Variant(
        name="mh_moe_2_static",
        label="MH-MoE, 2 heads, always the same experts",
        mlp=mh_moe(run, heads=2, top_k=2, num_experts=2),
    )
    return [DENSE, *mixtures(run), static]


def mhmoe_shared_expert(run: TextRun) -> list[Variant]:
    return mixtures(run, shared_expert_dim=run.mlp_dim)


def mhmoe_bitnet(run: TextRun) -> list[Variant]:
    return [replace(variant, ternary=True) for variant in mhmoe_main(run)]


def mhmoe_layers(run: TextRun) -> list[Variant]:
    split = {
        "neither": ("neither layer", False, False),
        "head": ("head layer only", True, False),
        "merge": ("merge layer only", False, True),
        "both": ("both layers", True, True),
    }
    sparse, fine = sparse_moe(run), fine_grained_moe(run)
    whole = {
        "moe": ("sparse MoE", sparse),
        "moe_both": ("sparse MoE, both layers", _with_layers(sparse)),
        "fine": ("fine-grained MoE", fine),
        "fine_both": ("fine-grained MoE, both layers", _with_layers(fine)),
    }
    return [
        *(
            Variant(
                name=name,
                label=f"MH-MoE, {layers}",
                mlp=mh_moe(run, heads=2, top_k=2, head_layer=head, merge_layer=merge),
            )
            for name, (layers, head, merge) in split.items()
        ),
        *(Variant(name=name, label=label, mlp=mlp) for name, (label, mlp) in whole.items()),
    ]


def mhmoe_heads(run: TextRun) -> list[Variant]:
    return [
        Variant(name=f"h{h}", label=f"{h} heads", mlp=mh_moe(run, heads=h, top_k=2), position=h)
        for h in (1, 2, 3, 4, 6, 8, 12, 16)
    ]


def moh_components(run: TextRun) -> list[Variant]:
    return [
        DENSE,
        Variant(name="routed", label="routed heads only", attention=moh(run, shared=0)),
        Variant(
            name="shared",
            label="and shared heads",
            attention=moh(run, router="one_stage"),
        ),
        Variant(name="two_stage", label="and two-stage routing", attention=moh(run)),
        static_heads(run, _active(run)),
    ]


def moh_shared_share(run: TextRun) -> list[Variant]:
    active = _active(run)
    counts = dict.fromkeys(round(share * active) for share in (0.14, 0.29, 0.44, 0.59, 0.74))
    return [
        Variant(
            name=f"shared_{count}",
            label=f"{count} of {active} heads shared",
            attention=moh(run, shared=count, active=active),
            position=100 * count / active,
        )
        for count in counts
    ]


def moh_budget(run: TextRun) -> list[Variant]:
    heads = run.num_heads
    actives = dict.fromkeys(max(2, round(heads * quarters / 4)) for quarters in range(4, 0, -1))
    shared = {active: min(max(1, round(0.4 * active)), active - 1) for active in actives}
    return [
        DENSE,
        *(
            Variant(
                name=f"moh_{100 * active // heads}",
                label=f"MoH, {active} of {heads} heads",
                attention=moh(run, shared=shared[active], active=active),
                position=100 * active / heads,
                series="routed",
            )
            for active in actives
        ),
        *(static_heads(run, active) for active in actives if active < heads),
    ]


def static_heads(run: TextRun, count: int) -> Variant:
    """The control of a model that has so many heads on: the same ones for every token."""
    heads = run.num_heads
    return Variant(
        name=f"static_{100 * count // heads}",
        label=f"{count} of {heads} heads, always the same",
        num_heads=count,
        position=100 * count / heads,
        series="always the same",
    )


def image_budget(run: ImageRun) -> list[Variant]:
    return [run.dense(), *(run.routed(share) for share in (0.9, 0.75, 0.5))]


def dit_budget(run: ImageRun) -> list[Variant]:
    """The released code's start of routers, and one of them with that of other models of ours."""
    small = run.routed(0.75, router_std=0.02)
    name, label = f"{small.name}_small_routers", f"{small.label}, routers from 0.02"
    return [*image_budget(run), replace(small, name=name, label=label, series="from 0.02")]


def moh_heads_of_two_widths(run: TextRun) -> list[Variant]:
    """Equal heads, and heads of 4/3 and of 2/3 of their width in turn: as many channels in all."""
    width, heads = run.dim // run.num_heads, run.num_heads
    if width % 3 or heads % 2:
        raise ValueError(
            f"num_heads is {heads}; it must be even, and the width of a head, dim / num_heads = "
            f"{width}, a multiple of 3, so that there are heads of 4/3 and of 2/3 of it"
        )
    equal, two = (width,) * heads, (4 * width // 3, 2 * width // 3) * (heads // 2)
    return [
        Variant(name="dense", label="dense", head_dims=equal),
        Variant(name="dense_two_widths", label="dense, heads of two widths", head_dims=two),
        Variant(name="moh", label="MoH", attention=moh(run), head_dims=equal),
        Variant(
            name="moh_two_widths",
            label="MoH, heads of two widths",
            attention=moh(run),
            head_dims=two,
        ),
    ]


def moh_routing(run: TextRun) -> list[Variant]:
    return [
        Variant(
            name=f"{scores}_{mode}",
            label=f"{scores}, mode {mode}",
            attention=moh(run, scores=scores, mode=mode),
        )
        for scores in ("softmax", "sparsemax", "sigmoid")
        for mode in ("released", "paper")
    ]


def combined(run: TextRun) -> list[Variant]:
    heads, sparse, split = moh(run), sparse_moe(run), mh_moe(run, heads=2, top_k=2)
    return [
        DENSE,
        Variant(name="moh", label="MoH", attention=heads),
        Variant(name="moe", label="sparse MoE", mlp=sparse),
        Variant(name="moh_moe", label="MoH + sparse MoE", attention=heads, mlp=sparse),
        Variant(name="mh_moe", label="MH-MoE", mlp=split),
        Variant(name="moh_mh_moe", label="MoH + MH-MoE", attention=heads, mlp=split),
    ]


def one_at_a_time(run: TextRun) -> list[Variant]:
    """Dense, and each way to route beside what is dense."""
    return [v for v in combined(run) if v.name in ("dense", "moh", "moe", "mh_moe")]


def domains(run: TextRun) -> list[Variant]:
    names = domain_names(run.data)
    if len(names) < 2:
        raise ValueError(
            f"data is {run.data!r}, one domain; the study takes a directory with a subdirectory "
            "for each of two or more"
        )
    return [
        replace(
            variant,
            name=f"{variant.name}_{name}",
            label=f"{variant.label}, trained on {name}",
            train_on=(name,),
        )
        for name in names
        for variant in one_at_a_time(run)
    ]


def moh(run: TextRun, **changes: Any) -> MoHConfig:
    """Mixture-of-Head attention with three of four heads on, unless the changes say otherwise."""
    fields: dict[str, Any] = {
        "shared": 0.4,
        "active": 0.75,
        "balance_coefficient": run.balance_coefficient,
        "router": "two_stage",
        "router_std": 0.02,
    }
    return MoHConfig(**fields | changes)


def _active(run: TextRun) -> int:
    """How many heads `moh` has on."""
    return HeadBudget.resolve(run.num_heads, shared=0, active=0.75).active_heads


def _with_layers(mlp: MoEConfig) -> MHMoEConfig:
    """The mixture between a head and a merge layer, its tokens whole."""
    return MHMoEConfig(num_heads=1, **asdict(mlp))


STUDIES = {
    "mhmoe-main": Study("Do sub-tokens pay at equal FLOPs and parameters?", mhmoe_main),
    "mhmoe-shared-expert": Study("And beside an expert for all tokens?", mhmoe_shared_expert),
    "mhmoe-bitnet": Study("And with ternary weights?", mhmoe_bitnet),
    "mhmoe-layers": Study(
        "What do head and merge layer contribute?", mhmoe_layers, equal_cost=False
    ),
    "mhmoe-heads": Study(
        "How many heads should MH-MoE have? (the papers try 2 and 3)",
        mhmoe_heads,
        equal_cost=False,
        axis="heads of MH-MoE",
    ),
    "moh-components": Study(
        "What do shared heads and two-stage routing contribute?", moh_components, equal_cost=False
    ),
    "moh-shared-share": Study(
        "How many of the active heads should be shared?",
        moh_shared_share,
        equal_cost=False,
        axis="shared heads (% of those that are on)",
    ),
    "moh-budget": Study(
        "How far can heads be switched off? (the paper stops at half)",
        moh_budget,
        equal_cost=False,
        axis="heads on (%)",
    ),
    "moh-routing": Study(
        "Which scores and which formulas should route heads?", moh_routing, equal_cost=False
    ),
    "moh-heads-of-two-widths": Study(
        "Do heads of two widths do better than equal ones?",
        moh_heads_of_two_widths,
        equal_cost=False,
    ),
    "vit-budget": Study(
        "How far can heads of an image classifier be switched off?",
        image_budget,
        equal_cost=False,
        axis="heads on (%)",
        subject="vit",
    ),
    "dit-budget": Study(
        "And of a diffusion transformer? (the paper stops at 75 %)",
        dit_budget,
        equal_cost=False,
        axis="heads on (%)",
        subject="dit",
    ),
    "combined": Study("Do MoH and MH-MoE add up in one model?", combined),
    "domains": Study("What does a model know of text of another kind?", domains),
    "noise": Study("How do routed models take typing errors?", one_at_a_time),
}
