"""Making the linear maps and experts inside a module ternary, and packing them."""

from collections.abc import Iterable, Mapping

from torch import nn

from headwise.nn.bitlinear import BitLinear, PackedExperts, PackedLinear, TernaryExperts
from headwise.nn.experts import Experts
from headwise.nn.projections import OutputProjection, QueryProjection
from headwise.nn.routers import Router, ScoreMap

TERNARY: dict[type, type] = {
    nn.Linear: BitLinear,
    QueryProjection: BitLinear,
    OutputProjection: BitLinear,
    Experts: TernaryExperts,
}
PACKED: dict[type, type] = {BitLinear: PackedLinear, TernaryExperts: PackedExperts}
_IN_FULL_PRECISION = (Router, ScoreMap, nn.Embedding)


def ternary_kinds(
    modules: Iterable[tuple[str, nn.Module]], known: Mapping[type, type] = TERNARY
) -> dict[nn.Module, type]:
    """Those of the named modules that can become ternary, and the type that each becomes.

    Routers and embeddings stay in full precision; vectors (norms, biases) do too.

    Args:
        modules: By name.
        known: What becomes of a type.
    """
    kinds: dict[nn.Module, type] = {}
    for name, module in modules:
        kind = known.get(type(module))
        if kind is not None:
            _check_forward(name, module)
            kinds[module] = kind
        elif not (type(module) in PACKED or isinstance(module, _IN_FULL_PRECISION)):
            _check_no_matrix(name, module)
    return kinds


def become(kinds: dict[nn.Module, type]) -> None:
    """Change the types of the modules; parameters, their names and hooks stay."""
    for module, kind in kinds.items():
        module.__class__ = kind


def pack_inside(module: nn.Module) -> nn.Module:
    """The module with all ternary layers inside packed, in place; of a ternary layer, a new one."""
    places = [
        (name, m) for name, m in module.named_modules(remove_duplicate=False) if type(m) in PACKED
    ]
    if not places:
        raise ValueError(f"{type(module).__name__} has no ternary layer to pack; ternarize it")
    for name, layer in places:
        _check_forward(name, layer)
    packed = {layer: PACKED[type(layer)](layer).train(layer.training) for _, layer in places}
    if module in packed:
        return packed[module]
    for name, layer in places:
        module.set_submodule(name, packed[layer])
    return module


def _check_forward(name: str, module: nn.Module) -> None:
    # accelerate keeps the old forward on the module, where it would win over the new type's.
    if "forward" in vars(module):
        raise ValueError(
            f"{name or type(module).__name__} has a forward of its own, as device_map gives it; "
            "do this to the model without device_map, save it, and load that with device_map"
        )


def _check_no_matrix(name: str, module: nn.Module) -> None:
    matrices = [n for n, p in module.named_parameters(recurse=False) if p.ndim > 1]
    if matrices:
        kinds = ", ".join(kind.__name__ for kind in TERNARY)
        raise ValueError(
            f"{name or 'the module'} is a {type(module).__name__} with {', '.join(matrices)}, "
            f"which cannot be made ternary; what can is {kinds}"
        )
