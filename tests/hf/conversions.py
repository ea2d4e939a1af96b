"""What the tests of this folder convert models to."""

from headwise import MHMoEConfig, MoEConfig, MoHConfig

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
