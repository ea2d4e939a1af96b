"""Losses, scores and ternary products refuse what they cannot take, in words."""

import pytest
import torch

import headwise
from headwise import MHMoE, balance_loss, bitnet, record_routing, router_z_loss
from headwise.nn import update_biases
from headwise.ops import scores, ternary
from headwise.ops.logits import router_logits
from headwise.ops.tensors import check_tensor

NO_TENSORS = (None, "x", -1, 1.5, [], {}, object())
COMPLEX = torch.zeros(2, 2, dtype=torch.complex64)
WHOLE = torch.zeros(2, 2, dtype=torch.long)

CALLS = {
    "weight": lambda wrong: ternary.quantize_weight(wrong),
    "x": lambda wrong: ternary.quantize_activations(wrong),
    "x of norm": lambda wrong: ternary.rms_norm(wrong),
    "levels": lambda wrong: ternary.pack(wrong),
    "packed": lambda wrong: ternary.unpack(wrong, 3, dtype=torch.float32),
    "x of product": lambda wrong: ternary.ternary_linear(
        wrong, ternary.quantize_weight(torch.randn(3, 5))
    ),
    "logits": lambda wrong: scores.affinities(wrong, "softmax"),
    "logits of sparsemax": lambda wrong: scores.sparsemax(wrong),
    "x of logits": lambda wrong: router_logits(wrong, torch.randn(3, 5)),
    "weight of logits": lambda wrong: router_logits(torch.randn(2, 5), wrong),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "wrong", [*NO_TENSORS, COMPLEX, WHOLE, torch.tensor(1.0)], ids=lambda x: type(x).__name__
)
@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_such_tensor_is_named(call, wrong):
    with pytest.raises(ValueError, match=f"^{call.split()[0]} "):
        CALLS[call](wrong)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [*NO_TENSORS, COMPLEX], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("routing", balance_loss),
        ("routing", router_z_loss),
        ("module", lambda wrong: update_biases(wrong, {})),
        ("model", lambda wrong: record_routing(wrong).__enter__()),
        ("module", bitnet.ternarize),
        ("model", bitnet.pack),
        ("weight", lambda wrong: ternary.ternary_linear(torch.randn(2, 5), wrong)),
    ],
)
def test_what_is_none_of_its_kind_is_named(field, call, wrong):
    with pytest.raises(ValueError, match=f"^{field} is .*; it must be a "):
        call(wrong)


@pytest.mark.usefixtures("unchecked")
def test_widths_that_do_not_fit_are_named():
    weight = ternary.quantize_weight(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"^x has shape \[2, 7\]; it must be \[\.\.\., 5\]"):
        ternary.ternary_linear(torch.randn(2, 7), weight)
    with pytest.raises(ValueError, match=r"^bias has shape \[2\]; it must be \[3\]"):
        ternary.ternary_linear(torch.randn(2, 5), weight, torch.randn(2))
    with pytest.raises(ValueError, match=r"^packed has shape \[2, 1\]; it must be \[\.\.\., 2\]"):
        ternary.unpack(torch.zeros(2, 1, dtype=torch.uint8), 5, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^size is -1; it must be at least 0"):
        ternary.unpack(torch.zeros(2, 1, dtype=torch.uint8), -1, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^scores is 'hard'; it must be one of"):
        scores.affinities(torch.randn(3), "hard")


def test_routings_of_another_layer_are_named():
    layer = MHMoE(15, num_heads=3, num_experts=7, top_k=2, expert_dim=11, bias_rate=0.1)
    other = MHMoE(15, num_heads=3, num_experts=5, top_k=2, expert_dim=11)
    _, routing = other(torch.randn(2, 3, 15))
    with pytest.raises(ValueError, match=r"^routings has 'gate'; the routers .* \['router'\]"):
        update_biases(layer, {"gate": routing})
    with pytest.raises(ValueError, match=r"^routings\['router'\] has 5 candidates; .* 7 experts"):
        headwise.nn.update_biases(layer, {"router": routing})


@pytest.mark.usefixtures("unchecked")
def test_a_tensor_is_asked_for_shape_kind_and_device():
    check_tensor("x", torch.zeros(2, 3), ("B", 3))
    check_tensor("x", torch.zeros(3), ("...", 3), like=torch.zeros(1, device="meta"))
    for x, kind, message in (
        (torch.zeros(3), "floating", r"has shape \[3\]; it must be \[B, 3\]"),
        (
            torch.zeros(2, 3),
            "whole",
            r"is torch\.float32; it must be an integer, as torch\.int64 is",
        ),
        (torch.zeros(2, 3), "torch.bool", r"is torch\.float32 \[2, 3\]; it must be torch\.bool"),
        (torch.zeros(2, 3), "torch.uint8", r"is torch\.float32; it must be torch\.uint8"),
        (torch.zeros(2, 3).bool(), "real", r"is torch\.bool; it must be of real numbers"),
        (torch.zeros(2, 3, device="meta"), "any", "is on meta; it must be on cpu"),
    ):
        with pytest.raises(ValueError, match=f"^x {message}"):
            check_tensor("x", x, ("B", 3), kind=kind, like=torch.zeros(1))
