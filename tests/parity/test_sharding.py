"""Memory and traffic of a split model: by hand, and against models of transformers."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headwise.parity import Decoder, Sharding, count_parameters

TINY = Decoder(dim=6, num_layers=5, num_heads=3, num_kv_heads=3, mlp_dim=7, vocab_size=11)
LLAMA_8B = Decoder(
    dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, mlp_dim=14336, vocab_size=128256
)


def test_parameters_are_those_of_transformers():
    for decoder, billions in ((TINY, None), (LLAMA_8B, 8.03)):
        config = LlamaConfig(
            hidden_size=decoder.dim, num_hidden_layers=decoder.num_layers,
            num_attention_heads=decoder.num_heads, num_key_value_heads=decoder.num_kv_heads,
            intermediate_size=decoder.mlp_dim, vocab_size=decoder.vocab_size,
        )  # fmt: skip
        with torch.device("meta"):
            total, _ = count_parameters(LlamaForCausalLM(config))
        assert Sharding(decoder=decoder).parameters == total
        assert billions is None or round(total / 1e9, 2) == billions


def test_a_device_alone_sends_nothing_and_holds_everything():
    alone = Sharding(decoder=TINY)
    # A layer has 4·6·6 + 3·6·7 = 270 parameters, embeddings have 2·11·6 = 132, norms 11·6 = 66.
    assert alone.parameters == 5 * 270 + 132 + 66 == 1548
    assert alone.weight_bytes() == 2 * 1548
    assert alone.training_bytes() == 16 * 1548
    assert alone.cache_bytes(13) == 2 * 5 * 6 * 13 * 2
    assert alone.token_traffic() == alone.step_traffic(13) == 0


def test_three_devices_by_hand():
    split = Sharding(decoder=TINY, tp=3)
    assert split.parameters == (5 * 270 + 132) / 3 + 66 == 560
    assert split.cache_bytes(13) == 2 * 5 * 2 * 13 * 2
    # Two thirds of 5 layers of 3 lengths of 4 bytes.
    assert split.routing_traffic() == pytest.approx(2 / 3 * 5 * 3 * 4)
    # 11 sums of 6 values go around twice, 11 logits once.
    forward = 2 / 3 * (2 * 11 * 6 + 11)
    assert split.token_traffic() == pytest.approx(forward * 2 + 40)
    backward = 2 / 3 * (2 * 26 * 6)
    assert split.step_traffic(13) == pytest.approx(13 * ((forward + backward) * 4 + 2 * 40))


def test_three_by_seven_devices_by_hand():
    split = Sharding(decoder=TINY, tp=3, fsdp=7)
    gathered = (2 * 270 + 11 * 6) / 3
    assert split.training_bytes() == pytest.approx(4 * (4 * 560 / 7 + gathered))
    of_weights = 3 * 6 / 7 * 560 * 4
    of_tokens = Sharding(decoder=TINY, tp=3).step_traffic(13)
    assert split.step_traffic(13) == pytest.approx(of_tokens + of_weights)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sharding(decoder=TINY, tp=2), "tp is 2; it must divide the 3 key and value heads"),
        (lambda: Sharding(decoder=TINY, fsdp=0), "fsdp is 0; it must be at least 1"),
        (
            lambda: Decoder(**vars(TINY) | {"num_heads": 4, "num_kv_heads": 2}),
            "num_heads is 4; it must divide dim = 6",
        ),
        (
            lambda: Decoder(**vars(TINY) | {"num_kv_heads": 2}),
            "num_kv_heads is 2; it must divide num_heads = 3",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
