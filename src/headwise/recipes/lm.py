"""Language models at equal cost: dense, MoH, sparse MoE, MH-MoE, and MoH with MH-MoE."""

from dataclasses import dataclass

from headwise.hf import MoHConfig
from headwise.nn import ActiveBudget, Budget, HeadBudget
from headwise.recipes.decoders import TextRun
from headwise.recipes.layered import mh_moe, sparse_moe
from headwise.recipes.text import read
from headwise.training.comparison import Variant

__all__ = ["LanguageModelRun", "read"]


@dataclass(frozen=True, kw_only=True)
class LanguageModelRun(TextRun):
    """Five models at equal FLOPs per token: dense, moh, moe, mh_moe, moh_mh_moe.

    The defaults are the demo.

    Attributes:
        shared_heads: MoH: heads always on, a count or a share of num_heads.
        active_heads: MoH: heads on for a token, shared ones included, a count or a share.
        mh_heads: MH-MoE: sub-tokens of a token.
        mh_top_k: MH-MoE: experts that a sub-token goes to.
    """

    shared_heads: Budget = 0.4
    active_heads: ActiveBudget = 0.75
    mh_heads: int = 2
    mh_top_k: int = 2
    speed_contexts: tuple[int, ...] = (4096, 16384)

    def __post_init__(self) -> None:
        HeadBudget.resolve(self.num_heads, shared=self.shared_heads, active=self.active_heads)
        super().__post_init__()

    @property
    def recipe(self) -> str:
        return "lm"

    @property
    def title(self) -> str:
        return "Language models at equal FLOPs per token"

    def variants(self) -> list[Variant]:
        """Dense first: the others are given its cost."""
        attention = MoHConfig(
            shared=self.shared_heads,
            active=self.active_heads,
            balance_coefficient=self.balance_coefficient,
            router="two_stage",
            router_std=0.02,
        )
        sparse = sparse_moe(self)
        split = mh_moe(self, heads=self.mh_heads, top_k=self.mh_top_k)
        return [
            Variant(name="dense", label="dense"),
            Variant(name="moh", label="MoH", attention=attention),
            Variant(name="moe", label="sparse MoE", mlp=sparse),
            Variant(name="mh_moe", label="MH-MoE", mlp=split),
            Variant(name="moh_mh_moe", label="MoH + MH-MoE", attention=attention, mlp=split),
        ]
