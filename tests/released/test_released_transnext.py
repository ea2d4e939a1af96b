"""load_released of MoH-ViT and TransNeXt: the golden, files of every kind, what does not fit."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from test_released import TOLERANCE, assert_near, golden

from headwise import load_released, record_routing
from headwise.models import TransNeXtForImageClassification

SIZES = {
    "img_size": 28, "patch_size": 2, "embed_dims": [10, 18], "num_heads": [2, 3], "depths": [1, 2],
    "mlp_ratios": [3, 2], "sr_ratios": [3, 1], "window_size": [5, None], "num_classes": 7,
    "shared_head": [2, 1], "routed_head": [0, 1],
}  # fmt: skip


def released_tensors(config: dict, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random tensors by the names and in the shapes of the released code."""
    shapes = {}
    channels = 3
    for i, dim in enumerate(config["embed_dims"]):
        heads, side = config["num_heads"][i], 3 if i else 2 * config["patch_size"] - 1
        shapes[f"patch_embed{i + 1}.proj.weight"] = (dim, channels, side, side)
        shapes |= dict.fromkeys((f"patch_embed{i + 1}.proj.bias", f"norm{i + 1}.weight"), (dim,))
        shapes |= dict.fromkeys((f"patch_embed{i + 1}.norm.{s}" for s in WEIGHTS), (dim,))
        shapes[f"norm{i + 1}.bias"] = (dim,)
        for j in range(config["depths"][i]):
            hidden = 2 * int(dim * config["mlp_ratios"][i]) // 3
            block = of_block(dim, heads, hidden, config["window_size"][i])
            if "shared_head" in config:
                block |= of_router(dim, heads, config["shared_head"][i], config["routed_head"][i])
            shapes |= {f"block{i + 1}.{j}.{name}": shape for name, shape in block.items()}
        channels = dim
    shapes |= {"head.weight": (config["num_classes"], channels)}
    shapes |= {"head.bias": (config["num_classes"],)}
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


WEIGHTS = ("weight", "bias")


def of_block(dim: int, heads: int, hidden: int, window: int | None) -> dict[str, tuple[int, ...]]:
    width = dim // heads
    linear = {
        "attn.proj": (dim, dim), "attn.cpb_fc1": (512, 2), "attn.cpb_fc2": (heads, 512),
        "mlp.fc1": (2 * hidden, dim), "mlp.fc2": (dim, hidden),
        "mlp.dwconv.dwconv": (hidden, 1, 3, 3),
    }  # fmt: skip
    linear |= {"attn.qkv": (3 * dim, dim)} if window is None else {
        "attn.q": (dim, dim), "attn.kv": (2 * dim, dim), "attn.sr": (dim, dim, 1, 1),
    }  # fmt: skip
    shapes = {f"{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    norms = ("norm1", "norm2") if window is None else ("norm1", "norm2", "attn.norm")
    shapes |= {f"{norm}.{suffix}": (dim,) for norm in norms for suffix in WEIGHTS}
    shapes |= {"attn.temperature": (heads, 1, 1), "attn.query_embedding": (heads, 1, width)}
    if window is not None:
        shapes["attn.relative_pos_bias_local"] = (heads, window**2)
        shapes["attn.learnable_tokens"] = (heads, width, window**2)
        shapes["attn.learnable_bias"] = (heads, 1, window**2)
    return shapes


def of_router(dim: int, heads: int, shared: int, kept: int) -> dict[str, tuple[int, ...]]:
    shapes = {"attn.wg_1.weight": (shared, dim)} if shared > 1 else {}
    if kept:
        shapes |= {"attn.wg.weight": (heads - shared, dim), "attn.wg_0.weight": (2, dim)}
    return shapes


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_transnext_equals_the_released_code(dtype):
    parameters, tensors, metadata = golden("moh_transnext_small", dtype)
    config = json.loads(metadata["config"])
    model = load_released("moh_transnext", parameters, config=config)
    assert isinstance(model, TransNeXtForImageClassification)
    assert not model.training
    with torch.no_grad(), record_routing(model) as routings:
        output = model(tensors["x"], output_hidden_states=True)
    assert_near(output.hidden_states[-1].mean((2, 3)), tensors["features"])
    assert_near(output.logits, tensors["logits"])
    on = [(r.weights != 0).sum(-1).unique().tolist() for r in routings.values()]
    budgets = zip(config["shared_head"], config["routed_head"], config["depths"], strict=True)
    assert on == [[shared + kept] for shared, kept, depth in budgets for _ in range(depth)]


@pytest.mark.parametrize("file", ["released.safetensors", "released.pth", "wrapped.pth"])
def test_files_give_what_their_tensors_give(file, tmp_path):
    tensors = released_tensors(SIZES, torch.float64)
    x = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    want = load_released("moh_transnext", tensors, config=SIZES)(x).logits
    save = {"released.safetensors": save_file, "released.pth": torch.save}.get(file)
    if save is None:
        torch.save({"model": tensors, "epoch": 3}, tmp_path / file)
    else:
        save(tensors, tmp_path / file)
    got = load_released("moh_transnext", tmp_path / file, config=SIZES)(x).logits
    assert got.dtype == torch.float64
    assert torch.equal(got, want)


def test_without_routed_heads_it_is_dense():
    routers = ("shared_head", "routed_head")
    config = {name: value for name, value in SIZES.items() if name not in routers}
    model = load_released("moh_transnext", released_tensors(config), config=config)
    with record_routing(model) as routings:
        assert model(torch.randn(1, 3, 28, 28)).logits.isfinite().all()
    assert routings == {}


PRESET = {
    "img_size": 224, "patch_size": 4, "embed_dims": [72, 144, 288, 576], "depths": [5, 5, 22, 5],
    "num_heads": [3, 6, 12, 24], "mlp_ratios": [8, 8, 4, 4], "window_size": [3, 3, 3, None],
    "num_classes": 1000, "shared_head": [3, 6, 3, 8], "routed_head": [0, 0, 6, 12],
}  # fmt: skip


def test_weights_of_another_preset_are_told_apart():
    tensors = released_tensors(PRESET)
    model = load_released("moh_transnext", tensors, preset="moh-vit-s-80")
    assert model.config.drop_path_rate == 0.45
    # The last stage's five blocks have two routers' maps that differ.
    place = r"backbone\.stages\.3\.blocks\.0\.attention\.router\.shared\.weight"
    message = rf"moh_transnext: .*size mismatch: {place} \[8, 576\], not \[4, 576\].* 7 more"
    with pytest.raises(ValueError, match=message):
        load_released("moh_transnext", tensors, preset="moh-vit-s-75")
    with pytest.raises(ValueError, match=r"left over: .*router.* and 88 more"):
        load_released("moh_transnext", tensors, preset="transnext-small")


def test_every_tensor_is_accounted_for():
    tensors = released_tensors(SIZES)
    for name in tensors:
        less = {n: t for n, t in tensors.items() if n != name}
        with pytest.raises(ValueError, match=r"moh_transnext: .* missing: "):
            load_released("moh_transnext", less, config=SIZES)
    for name in ("relative_pos_index1", "block1.0.attn.surplus", "block9.0.attn.q.weight"):
        with pytest.raises(ValueError, match=r"moh_transnext: .*left over: "):
            load_released("moh_transnext", tensors | {name: torch.zeros(3)}, config=SIZES)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"preset": "moh-vit-s-57"}, "unknown preset 'moh-vit-s-57'; did you mean 'moh-vit-s-75'?"),
        (None, "config is None; 'moh_transnext' needs a dict of its sizes (num_heads, …) or p"),
        (SIZES | {"layers": 3}, "unknown field of config 'layers'"),
        ({"img_size": 28}, "missing 5 required keyword-only arguments: 'patch_size'"),
        (SIZES | {"routed_head": None}, "active_heads is None; give both"),
        (SIZES | {"routed_head": [0]}, "active_heads has 1 entries"),
        (
            SIZES | {"sr_ratios": [3, 2], "window_size": [5, 3]},
            "window_size is [5, 3]; all windows must be of one size",
        ),
    ],
)
def test_configs_that_do_not_fit_are_errors(config, message):
    given = config if config and "preset" in config else {"config": config}
    with pytest.raises(ValueError, match=re.escape(message)):
        load_released("moh_transnext", released_tensors(SIZES), **given)
