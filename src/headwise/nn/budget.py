"""How many heads a layer has, shares and switches on: counts or shares, checked once."""

import math
from dataclasses import dataclass
from typing import Annotated

from headwise.ops.fields import Count, Index, Range, check, check_fields

Budget = Annotated[int, Range(0)] | Annotated[float, Range(0, 1)]
ActiveBudget = Annotated[int, Range(1)] | Annotated[float, Range(above=0, most=1)]
# Which heads are shared, instead of how many of the first ones.
Heads = tuple[Index, ...]


@dataclass(frozen=True)
class HeadBudget:
    """The heads of one attention layer, and the groups of them that are on or off together.

    All counts are of query heads. A router chooses among groups; unless `num_groups` is given to
    `resolve`, each head is a group of its own.

    Attributes:
        num_heads: All heads.
        shared_heads: Heads that are always on; the first ones unless `named_shared` names them.
        active_heads: Heads that a token switches on, shared ones included.
        rounded: What was rounded on the way from shares to counts, for people to read.
        heads_per_group: Heads of a group; divides the three counts.
        named_shared: The shared heads, ascending, where they are not the first ones.
    """

    num_heads: Count
    shared_heads: Index
    active_heads: Count
    rounded: tuple[str, ...] = ()
    heads_per_group: Count = 1
    named_shared: Heads = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.shared_heads <= self.active_heads <= self.num_heads:
            raise ValueError(
                f"shared_heads is {self.shared_heads}, active_heads {self.active_heads} and "
                f"num_heads {self.num_heads}; none may exceed the next"
            )
        for field in ("num_heads", "shared_heads", "active_heads"):
            if (count := getattr(self, field)) % self.heads_per_group:
                raise ValueError(
                    f"heads_per_group is {self.heads_per_group}; it must divide {field} = {count}"
                )
        _checked_heads("named_shared", self.named_shared, self.num_heads, self.heads_per_group)
        if self.named_shared and len(self.named_shared) != self.shared_heads:
            raise ValueError(
                f"named_shared is {list(self.named_shared)}; it must name shared_heads = "
                f"{self.shared_heads}"
            )

    @classmethod
    def resolve(
        cls,
        num_heads: int,
        *,
        shared: Budget | Heads,
        active: ActiveBudget,
        num_groups: int | None = None,
        names: tuple[str, str] = ("shared_heads", "active_heads"),
    ) -> "HeadBudget":
        """Counts (int) stay, shares of num_heads (float, 0 to 1) round to the nearest count.

        Args:
            num_heads: All heads.
            shared: Heads that are always on: a count or a share (then the first ones), or which.
            active: Heads that a token switches on, shared ones included, a count or a share.
            num_groups: Equal groups of successive heads that are on or off together: counts must
                be whole groups, shares round to whole groups. Default: each head by itself.
            names: What errors and notes call `shared` and `active`: the caller's fields.

        Raises:
            ValueError: If a count or share is out of range, shared exceeds active, nothing is
                active, heads remain that no token could ever switch on, num_groups does not divide
                num_heads or a count is not of whole groups.
        """
        of_shared, of_active = names
        check("num_heads", num_heads, Count)
        check("num_groups", num_groups, Count | None)
        check(of_shared, shared, Budget | Heads)
        check(of_active, active, ActiveBudget)
        num_groups = num_heads if num_groups is None else num_groups
        if num_heads % num_groups:
            raise ValueError(f"num_groups is {num_groups}; it must divide num_heads = {num_heads}")
        size = num_heads // num_groups
        named_shared: Heads = ()
        if isinstance(shared, tuple):
            named_shared = _checked_heads(of_shared, shared, num_heads, size)
            shared = len(shared)
        shared_heads, shared_note = _count(of_shared, shared, num_heads, size, least=0)
        active_heads, active_note = _count(of_active, active, num_heads, size, least=size)
        if active_heads < 1:
            raise ValueError(
                f"{of_active} is {active}; at least {size} of {num_heads} must be active"
            )
        if shared_heads > active_heads:
            raise ValueError(
                f"{of_shared} is {shared_heads}, more than {of_active} = {active_heads}, which "
                f"counts shared heads too; lower {of_shared} or raise {of_active}"
            )
        if shared_heads == active_heads < num_heads:
            raise ValueError(
                f"{of_shared} equals {of_active} = {active_heads}, so no token could ever use "
                f"{num_heads - active_heads} of the {num_heads} heads; lower {of_shared} or "
                f"raise {of_active}"
            )
        notes = tuple(note for note in (shared_note, active_note) if note)
        return cls(num_heads, shared_heads, active_heads, notes, size, named_shared)

    @property
    def num_groups(self) -> int:
        """All groups, shared ones included."""
        return self.num_heads // self.heads_per_group

    @property
    def routed_heads(self) -> int:
        """Heads that the router chooses from."""
        return self.num_heads - self.shared_heads

    @property
    def top_k(self) -> int:
        """Routed heads that a token keeps."""
        return self.active_heads - self.shared_heads

    @property
    def which_shared(self) -> Heads:
        """The heads that are always on, ascending."""
        return self.named_shared or tuple(range(self.shared_heads))

    @property
    def shared_groups(self) -> Heads:
        """Groups that are always on."""
        first_of_each = self.which_shared[:: self.heads_per_group]
        return tuple(head // self.heads_per_group for head in first_of_each)

    @property
    def candidates(self) -> Heads:
        """The groups that the router chooses from."""
        shared = self.shared_groups
        return tuple(group for group in range(self.num_groups) if group not in shared)

    @property
    def routed_groups(self) -> int:
        """Groups that the router chooses from: its candidates."""
        return self.routed_heads // self.heads_per_group

    @property
    def kept_groups(self) -> int:
        """Routed groups that a token keeps: the router's top k."""
        return self.top_k // self.heads_per_group

    @property
    def active_share(self) -> float:
        """Active heads over all heads."""
        return self.active_heads / self.num_heads

    def __str__(self) -> str:
        groups = f" in groups of {self.heads_per_group}" if self.heads_per_group > 1 else ""
        which = f" {list(self.named_shared)}" if self.named_shared else ""
        counts = (
            f"heads={self.num_heads}{groups}: {self.shared_heads} shared{which} + "
            f"{self.top_k} of {self.routed_heads} routed = {self.active_heads} active"
        )
        return f"{counts} ({'; '.join(self.rounded)})" if self.rounded else counts


def _checked_heads(field: str, heads: Heads, num_heads: int, size: int) -> Heads:
    """The shared heads, or () where they are the first ones anyway."""
    ascending = tuple(sorted(set(heads)))
    if ascending != heads or not set(range(num_heads)).issuperset(heads):
        raise ValueError(
            f"{field} is {list(heads)}; heads of 0..{num_heads - 1} must be named once each, "
            "in ascending order"
        )
    groups = {head // size for head in heads}
    if len(heads) != size * len(groups):
        raise ValueError(
            f"{field} is {list(heads)}; whole groups of {size} successive heads are routed, "
            "so each head's group must be named whole"
        )
    return () if heads == tuple(range(len(heads))) else heads


def _count(field: str, value: Budget, num_heads: int, size: int, *, least: int) -> tuple[int, str]:
    """The count of heads, of whole groups of that size, and what was rounded."""
    if isinstance(value, int):
        if not least <= value <= num_heads:
            raise ValueError(f"{field} is {value}; it must lie in {least}..{num_heads} (num_heads)")
        if value % size:
            raise ValueError(
                f"{field} is {value}; whole groups of {size} heads are routed, so it must be a "
                f"multiple of {size}, such as {value + size - value % size}"
            )
        return value, ""
    exact = value * num_heads
    count = size * math.floor(exact / size + 0.5)
    # 0.7 * 10 is 7.000000000000001: that is whole, not rounded.
    note = (
        ""
        if math.isclose(exact, count, abs_tol=1e-6)
        else (f"{field} {value:g} of {num_heads} = {exact:.4g} rounded to {count}")
    )
    return count, note
