"""Models that are split over two and four processes say and learn what they do as a whole."""

import json

import pytest
import torch
from conversions import GROUPED, GROUPS, QUERY_NORM, TWO_STAGE
from split_models import IDS, compare, compare_training
from test_output_gates import converted
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import (
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    Phi3ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.distributed import DistributedConfig

from headwise import MHMoEConfig, MoEConfig, MoHConfig, convert, fit, load, restore
from headwise.hf import parallelism
from headwise.nn.routers import Router
from processes import run_in

pytest.importorskip("transformers.distributed.mixin", reason="transformers splits otherwise")

LAYOUTS = {
    "TP 2": {"tp_size": 2},
    "FSDP 2": {"fsdp_size": 2},
    "TP 2, EP 2": {"tp_size": 2, "ep_size": 2},
    "TP 2, EP 2 by all_reduce": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
    "TP 2, EP 2 of eager experts": {
        "tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce",
        "experts_implementation": "eager",
    },
    "FSDP 2, EP 2": {"fsdp_size": 2, "ep_size": 2},
    "TP 4": {"tp_size": 4},
    "TP 2, FSDP 2": {"tp_size": 2, "fsdp_size": 2},
    "TP 2, FSDP 2, EP 4": {"tp_size": 2, "fsdp_size": 2, "ep_size": 4},
}  # fmt: skip
EXPERTS = {"num_experts": 8, "top_k": 3, "expert_dim": 11}
MOE = MoEConfig(**EXPERTS, shared_expert_dim=5)
MH_MOE = MHMoEConfig(**EXPERTS, num_heads=3, glu=False)
BY_NORM = MoHConfig(shared=2, active=5, router="query_norm")
MANY = {"num_attention_heads": 8, "num_key_value_heads": 4}
# How each model is converted, and in which layouts it is tried.
OF_TWO = {
    "two_stage": (LlamaForCausalLM, {}, {"attention": TWO_STAGE}, ["TP 2", "FSDP 2"]),
    "groups": (LlamaForCausalLM, {}, {"attention": GROUPS}, ["TP 2"]),
    "query_norm": (Qwen3ForCausalLM, {}, {"attention": QUERY_NORM}, ["TP 2"]),
    "fused heads": (GPTNeoXForCausalLM, {}, {"attention": TWO_STAGE}, ["TP 2"]),
    "gathered heads": (Phi3ForCausalLM, {}, {"attention": QUERY_NORM}, ["TP 2"]),
    "moe": (
        LlamaForCausalLM, {}, {"mlp": MOE},
        ["TP 2", "TP 2, EP 2", "TP 2, EP 2 by all_reduce", "TP 2, EP 2 of eager experts"],
    ),
    "mh_moe": (
        LlamaForCausalLM, {}, {"attention": QUERY_NORM, "mlp": MH_MOE, "every": 2},
        ["TP 2", "TP 2, EP 2", "FSDP 2, EP 2"],
    ),
    "odd heads": (
        LlamaForCausalLM, {"num_key_value_heads": 3}, {"attention": TWO_STAGE}, ["TP 2"],
    ),
    "odd experts": (
        LlamaForCausalLM, {}, {"mlp": MoEConfig(num_experts=7, top_k=2, expert_dim=11)},
        ["TP 2, EP 2"],
    ),
    "cosine": (
        LlamaForCausalLM, {}, {"mlp": MoEConfig(**EXPERTS, router="cosine")}, ["FSDP 2"],
    ),
    "ternary": (LlamaForCausalLM, {}, {"attention": TWO_STAGE, "ternary": True}, ["TP 2"]),
}  # fmt: skip
OF_FOUR = {
    "many heads": (
        LlamaForCausalLM, MANY, {"attention": BY_NORM, "mlp": MOE},
        ["TP 4", "TP 2, FSDP 2", "TP 2, FSDP 2, EP 4"],
    ),
    "two groups": (LlamaForCausalLM, {}, {"attention": TWO_STAGE}, ["TP 4"]),
}  # fmt: skip
REFUSED = {"odd heads", "odd experts", "cosine", "ternary", "two groups"}


def tiny(kind, **changes):
    torch.manual_seed(0)
    model = kind(kind.config_class(**GROUPED | {"num_hidden_layers": 2} | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Otherwise heads hardly differ, and rounding would choose among them.
            if "_proj" in name or "query_key_value" in name:
                parameter.mul_(10)
            if "q_norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def compared(root, processes, cases, more=None):
    """What each process found of each model in each layout."""
    layouts = {name: case[-1] for name, case in cases.items()}
    for name, (kind, sizes, conversion, _) in cases.items():
        convert(tiny(kind, **sizes), **conversion).save_pretrained(root / name)
    for name, model in (more or {}).items():
        model.save_pretrained(root / name)
        layouts[name] = ["TP 2"]
    run_in(processes, f"file://{root / 'store'}", compare, root, LAYOUTS, layouts)
    return [json.loads((root / f"found-{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    original = tiny(LlamaForCausalLM)
    config = MoHConfig(active=4, router="fitted")
    batches = [{"input_ids": torch.randint(3, 31, (4, 11))} for _ in range(7)]
    more = {
        "fitted": convert(original, attention=fit(original, batches, config, allocate="alike")),
        "gates of queries": converted("Qwen3.5", 0.5),
        "gates": converted("Laguna", 0.5),
    }
    return compared(tmp_path_factory.mktemp("two"), 2, OF_TWO, more)


@pytest.fixture(scope="module")
def of_four(tmp_path_factory):
    return compared(tmp_path_factory.mktemp("four"), 4, OF_FOUR)


def named(cases):
    allowed = {name: case for name, case in cases.items() if name not in REFUSED}
    return [f"{name}, {layout}" for name, case in allowed.items() for layout in case[-1]]


SPLIT = [("of_two", name) for name in named(OF_TWO)]
SPLIT += [("of_two", f"{name}, TP 2") for name in ("fitted", "gates of queries", "gates")]
SPLIT += [("of_four", name) for name in named(OF_FOUR)]


@pytest.mark.parametrize(("processes", "case"), SPLIT, ids=[name for _, name in SPLIT])
def test_a_split_model_equals_the_whole_one(request, processes, case):
    """Outputs, routings over all heads, replayed choices, losses, gradients, saved weights."""
    for found in request.getfixturevalue(processes):
        assert not isinstance(found[case], str), found[case]
        assert found[case].pop("parts") > 0
        assert found[case].pop("routers") > 0
        assert found[case].pop("saved") == 0
        assert all(difference < 1e-5 for difference in found[case].values()), found[case]


@pytest.mark.parametrize(
    ("processes", "case", "message"),
    [
        ("of_two", "odd heads, TP 2", "tp_size is 2; it must divide the 3 key and value heads of "),
        ("of_four", "two groups, TP 4", "tp_size is 4; it must divide the 6 query heads of "),
        ("of_two", "odd experts, TP 2, EP 2", "Cannot evenly shard 7 experts across 2"),
        ("of_two", "cosine, FSDP 2", "fully_shard doesn't support scalar parameters"),
        ("of_two", "ternary, TP 2", "tp_size is 2; a ternary model cannot be tensor-parallel"),
    ],
)
def test_a_model_that_cannot_be_split_so_is_refused(request, processes, case, message):
    for found in request.getfixturevalue(processes):
        assert message in found[case]


def split_by_torch(rank, path):
    """In each of two processes: what torch alone splits, and what must not be split before."""
    mesh = distributed.init_device_mesh("cpu", (2,))
    plan = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ColwiseParallel())
    plan["o_proj"] = RowwiseParallel()
    dense, routed = tiny(LlamaForCausalLM), load(path)
    for model in (dense, routed):
        for layer in model.model.layers:
            parallelize_module(layer.self_attn, mesh, plan)
    found = compare_training(load(path), routed, (IDS,), 0)
    assert max(found.values()) < 1e-5
    with pytest.raises(ValueError, match="is tensor-parallel and cannot be converted: do that in"):
        convert(dense, attention=TWO_STAGE)
    with pytest.raises(ValueError, match="is tensor-parallel and cannot be restored: do that in"):
        restore(routed)
    keep_in_bfloat16(path, mesh, rank)
    distributed.barrier()


def keep_in_bfloat16(path, mesh, rank):
    """FSDP2 by torch: the model in bfloat16, its routers in float32."""

    def loaded():
        model = load(path, dtype=torch.bfloat16)
        return model, [module.float() for module in model.modules() if isinstance(module, Router)]

    model, routers = loaded()
    for module in (*routers, *model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    found = compare_training(loaded()[0], model, IDS.chunk(2), rank)
    assert found == {"loss": 0, "gradients": 0}
    assert {p.dtype for p in routers[0].parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "options",
    [{"tp_plan": "auto"}, {"tp_size": 2}, {"distributed_config": DistributedConfig(tp_size=2)}],
    ids=str,
)
def test_an_older_transformers_splits_nothing(monkeypatch, tmp_path, options):
    convert(tiny(LlamaForCausalLM), attention=TWO_STAGE).save_pretrained(tmp_path)
    monkeypatch.setattr(parallelism, "_HAS_PLANS", False)
    with pytest.raises(ValueError, match=r"which cannot split a converted model; 5.23 can"):
        load(tmp_path, **options)
    convert(tiny(LlamaForCausalLM), mlp=MOE)


def test_heads_that_are_missing_are_refused():
    model = convert(tiny(LlamaForCausalLM), attention=TWO_STAGE)
    model.model.layers[0].self_attn.q_proj = nn.Linear(24, 8)
    with pytest.raises(ValueError, match="has 2 heads here, and its router routes 6; heads must"):
        model(IDS)


def count_what_travels(rank, path):
    """In each of two processes: how often something is summed and gathered over them."""
    model = load(path, distributed_config=DistributedConfig(tp_size=2))
    layers = len(model.model.layers)

    def counts(run):
        with CommDebugMode() as found:
            result = run()
        named = {str(op): count for op, count in found.get_comm_counts().items()}
        of = {
            kind: sum(n for op, n in named.items() if kind in op) for kind in ("reduce", "gather")
        }
        return result, (of["reduce"], of["gather"])

    with torch.no_grad():
        _, forward = counts(lambda: model(IDS))
    assert forward == (2 * layers + 1, layers + 1)
    loss, forward = counts(lambda: model.train()(IDS, labels=IDS).loss)
    assert forward == (2 * layers + 1, layers + 1)
    assert counts(loss.backward)[1] == (5 * layers + 1, layers)


def test_as_much_travels_as_parity_says(two_processes, tmp_path):
    """The sums and gatherings of `headwise.parity.Sharding`, lengths of queries among them."""
    convert(tiny(LlamaForCausalLM), attention=QUERY_NORM).save_pretrained(tmp_path / "model")
    two_processes(count_what_travels, tmp_path / "model")


def test_torch_splits_a_model_too(two_processes, tmp_path):
    convert(tiny(LlamaForCausalLM), attention=TWO_STAGE).save_pretrained(tmp_path / "model")
    two_processes(split_by_torch, tmp_path / "model")
