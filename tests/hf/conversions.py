"""What the tests of this folder convert models to, and the sizes of those that they build."""

from headwise import MHMoEConfig, MoEConfig, MoHConfig

SIZES = {
    "vocab_size": 31, "hidden_size": 24, "intermediate_size": 29, "num_hidden_layers": 2,
    "num_attention_heads": 6,
}  # fmt: skip
LEARNED = MoHConfig(router="two_stage", router_std=0.02)
TWO_STAGE = MoHConfig(shared=2, active=4, router="two_stage", router_std=0.02)
QUERY_NORM = MoHConfig(shared=2, active=4, router="query_norm")
GROUPS = MoHConfig(
    shared=0, active=3, mode="paper", route_groups=True, router="two_stage", router_std=0.02
)
ALL_ON = MoHConfig(shared=6, active=6, router="query_norm")
EXPERTS = {"num_experts": 7, "top_k": 2, "expert_dim": 11}
MOE = MoEConfig(**EXPERTS)
MH_MOE = MHMoEConfig(num_heads=3, **EXPERTS)
