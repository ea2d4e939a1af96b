"""Tensor parallelism is refused by name: a process has too few heads to route."""

import pytest
import torch
from conversions import QUERY_NORM, TWO_STAGE
from torch import distributed
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

from headwise import convert
from tiny import SIZES

ROUTERS = {"query_norm": QUERY_NORM, "two_stage": TWO_STAGE}
REFUSED = r"cannot be tensor-parallel: .*FSDP"


@pytest.mark.parametrize(
    "options",
    [
        {"tp_plan": "auto"},
        {"tp_size": 2},
        {"distributed_config": DistributedConfig(tp_size=2)},
        {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=2)},
    ],
    ids=str,
)
def test_a_converted_model_is_not_loaded_in_parts(tiny, tmp_path, options):
    convert(tiny(), attention=ROUTERS["query_norm"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=REFUSED):
        AutoModelForCausalLM.from_pretrained(tmp_path, **options)


def split_in_two(rank, router):
    """In each of two processes: half the heads of each layer."""
    mesh = distributed.init_device_mesh("cpu", (2,))
    config = LlamaConfig(**SIZES, num_key_value_heads=2)
    plan = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ColwiseParallel())
    plan["o_proj"] = RowwiseParallel()
    dense, routed = LlamaForCausalLM(config), LlamaForCausalLM(config)
    convert(routed, attention=ROUTERS[router])
    for model in (dense, routed):
        parallelize_module(model.model.layers[0].self_attn, mesh, plan)
    with pytest.raises(ValueError, match=r"is tensor-parallel and cannot be converted"):
        convert(dense, attention=ROUTERS[router])
    ids = torch.arange(5)[None]
    assert dense(ids).logits.isfinite().all()
    with pytest.raises(ValueError, match=f"has 3 heads here.*routes 6.*{REFUSED}"):
        routed(ids)
    distributed.barrier()


@pytest.mark.parametrize("router", ROUTERS)
def test_heads_that_are_split_over_processes_are_refused(two_processes, router):
    two_processes(split_in_two, router)
