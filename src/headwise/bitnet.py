"""BitNet b1.58: layers and models with weights of three values, trained so and packed in 2 bits.

Every linear map, and both matrices of every expert, takes its input normed (without parameters) and
in 8 bits, and has weights {-1, 0, 1} times one scale a matrix; gradients pass straight through to
weights in full precision. Routers, embeddings, norms and biases stay as they are.

**Source**: BitNet b1.58, arXiv 2402.17764; of MH-MoE and MoE, arXiv 2411.16205.
`headwise.ops.ternary` has the formulas.
"""

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from headwise.hf.auto import Routed
from headwise.hf.experts_interface import RoutedExperts
from headwise.hf.surgery import modules_of_layers, pack_layers
from headwise.nn.bitlinear import TernaryExperts
from headwise.nn.ternarize import TERNARY, become, pack_inside, ternary_kinds
from headwise.ops.fields import check


def ternarize(module: Any) -> Any:
    """Make the linear maps and experts inside a module ternary, in place, to train it so.

    Parameters stay the same objects under the same names; what reads them becomes another:
    nn.Linear a BitLinear (which is an nn.Linear), experts TernaryExperts.

    Args:
        module: Any torch module, such as MHMoE, MoE or MoHAttention; or what `headwise.convert`
            returned, of which the layers become ternary and the output layer does not.
            `headwise.convert(model, ternary=True)` does it for a transformers model from the start.

    Returns:
        The module.

    Raises:
        ValueError: If there is nothing to make ternary, a module inside has matrices and is none of
            nn.Linear and our experts (GPT-2's Conv1D, say), or the module is a transformers model
            that is not converted. It is then as it was.
    """
    check("module", module, nn.Module)
    inside = module.named_modules()
    known = TERNARY | {RoutedExperts: TernaryExperts}
    if isinstance(module, Routed):
        inside = modules_of_layers(module)
    elif isinstance(module, PreTrainedModel):
        raise ValueError(
            f"{type(module).__name__} is a transformers model, which must know of it to load "
            "again; use headwise.convert(model, ternary=True)"
        )
    kinds = ternary_kinds(inside, known)
    if not kinds:
        raise ValueError(
            f"{type(module).__name__} has no nn.Linear and no experts that are not ternary already"
        )
    become(kinds)
    _note(module, "trained")
    return module


def pack(model: Any) -> Any:
    """Pack what is ternary in 2 bits a weight, in place, for inference: 1/8 of bfloat16.

    Outputs stay the same bit for bit. The weights in full precision are gone, so that the model
    cannot learn any more; keep a copy, or what was saved, to go on training.

    Args:
        model: A module that is ternary, or has ternary layers inside.

    Returns:
        The model in eval mode, packed; of a single BitLinear, a new PackedLinear. A model of
        `headwise.convert` saves and loads as before.

    Raises:
        ValueError: If nothing is ternary or all is packed already. In training mode, a forward of
            the packed model raises it too.
    """
    check("model", model, nn.Module)
    if isinstance(model, Routed):
        if model.conversion.ternary != "trained":
            raise ValueError(
                f"the model's ternary is {model.conversion.ternary!r}; it must be 'trained' to be "
                "packed: use headwise.bitnet.ternarize, and train it"
            )
        pack_layers(model)
        packed: nn.Module = model
    else:
        packed = pack_inside(model)
    _note(packed, "packed")
    return packed.eval()


def _note(module: nn.Module, ternary: Any) -> None:
    """Let the config of a converted model say what the model is, to save and load it."""
    if isinstance(module, Routed):
        module.config.headwise = replace(module.conversion, ternary=ternary).to_dict()
