"""load_released of MoH-DiT: the golden, checkpoints as they are published, and what is refused."""

import argparse
import json
import re
from collections import Counter
from fractions import Fraction

import pytest
import torch
from safetensors.torch import save_file
from test_released import TOLERANCE, assert_near, golden

from headwise import load_released
from headwise.models import DiT, DiTConfig

# Of the released constructor; no layer is like another.
SIZES = {
    "input_size": 6, "in_channels": 1, "hidden_size": 12, "depth": 3, "num_heads": [2, 3, 5],
    "num_classes": 7, "moh": True, "shared_head": [2, 1, 2], "routed_head": [0, 1, 2],
    "head_dim": 3,
}  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    """Random ones, by the released names."""
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (12, 1, 2, 2), "x_embedder.proj.bias": (12,),
        "t_embedder.mlp.0.weight": (12, 256), "t_embedder.mlp.0.bias": (12,),
        "t_embedder.mlp.2.weight": (12, 12), "t_embedder.mlp.2.bias": (12,),
        "y_embedder.embedding_table.weight": (8, 12), "pos_embed": (1, 9, 12),
        "final_layer.linear.weight": (8, 12), "final_layer.linear.bias": (8,),
        "final_layer.adaLN_modulation.1.weight": (24, 12),
        "final_layer.adaLN_modulation.1.bias": (24,),
    }  # fmt: skip
    routers = [{"wg_1": 2}, {"wg": 2, "wg_0": 2}, {"wg": 3, "wg_0": 2, "wg_1": 2}]
    for i, (heads, maps) in enumerate(zip(SIZES["num_heads"], routers, strict=True)):
        linear = {
            "attn.qkv": (9 * heads, 12), "attn.proj": (12, 3 * heads), "mlp.fc1": (48, 12),
            "mlp.fc2": (12, 48), "adaLN_modulation.1": (72, 12),
        }  # fmt: skip
        for name, (rows, columns) in linear.items():
            shapes[f"blocks.{i}.{name}.weight"] = (rows, columns)
            shapes[f"blocks.{i}.{name}.bias"] = (rows,)
        shapes |= {f"blocks.{i}.attn.{name}.weight": (rows, 12) for name, rows in maps.items()}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dit_equals_the_released_code(dtype):
    parameters, given, metadata = golden("moh_dit_small", dtype)
    model = load_released("moh_dit", parameters, config=json.loads(metadata["config"]))
    assert isinstance(model, DiT)
    assert not model.training
    x, t, y = given["x"], given["t"], given["y"]
    with torch.no_grad():
        output = model(x, t, y)
        assert output.dtype == dtype
        assert_near(output, given["out"])
        assert_near(model.forward_with_cfg(x, t, y, 1.5), given["out_cfg"])


def test_every_tensor_arrives_whole():
    given = tensors()
    model = load_released("moh_dit", given, config=SIZES)
    want = Counter(round(v, 5) for tensor in given.values() for v in tensor.flatten().tolist())
    assert want == Counter(round(v, 5) for p in model.parameters() for v in p.flatten().tolist())


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "checkpoint.pt"])
def test_files_give_what_their_tensors_give(name, tmp_path):
    given = tensors()
    if name.endswith("safetensors"):
        save_file(given, tmp_path / name)
    elif name.startswith("weights"):
        torch.save(given, tmp_path / name)
    else:
        # As the released code writes it: the command line is in it too.
        trained = {key: tensor + 1 for key, tensor in given.items()}
        arguments = argparse.Namespace(model="MoH-DiT-S/2-90", epochs=1400)
        torch.save({"model": trained, "ema": given, "opt": {}, "args": arguments}, tmp_path / name)
    want = load_released("moh_dit", given, config=SIZES).state_dict()
    got = load_released("moh_dit", tmp_path / name, config=SIZES).state_dict()
    assert all(torch.equal(got[key], want[key]) for key in want)
    if name.startswith("checkpoint"):
        # Without averages, what was trained.
        trained = load_released("moh_dit", {"model": given}, config=SIZES).state_dict()
        assert all(torch.equal(trained[key], want[key]) for key in want)


def test_files_that_hold_more_than_tensors_are_refused(tmp_path):
    torch.save({"model": tensors(), "share": Fraction(1, 2)}, tmp_path / "odd.pth")
    with pytest.raises(
        ValueError, match=r"odd\.pth is no checkpoint of PyTorch, is broken, or holds more"
    ):
        load_released("moh_dit", tmp_path / "odd.pth", config=SIZES)


def test_every_missing_tensor_is_an_error():
    for name in tensors():
        given = tensors()
        del given[name]
        with pytest.raises(ValueError, match=r"moh_dit: .*missing: "):
            load_released("moh_dit", given, config=SIZES)


def test_weights_of_another_preset_say_what_differs():
    with pytest.raises(ValueError, match="moh_dit: the tensors do not fit the config") as error:
        load_released("moh_dit", tensors(), preset="moh-dit-test")
    message = str(error.value)
    assert "size mismatch: positions [1, 9, 12], not [1, 16, 96], patch_embedding.weight" in message
    assert re.search(r"missing: blocks\.0\.attention\.router\.routed\.weight \[4, 96\], ", message)
    assert re.search(r"and \d+ more", message)
    assert len(message) < 1000
    with pytest.raises(ValueError, match=r"left over: surplus \[3\]$"):
        load_released("moh_dit", tensors() | {"surplus": torch.zeros(3)}, config=SIZES)


def test_presets_by_name_dense_ones_too():
    model = DiT(DiTConfig.preset("dit-test", num_labels=1000))
    with pytest.raises(ValueError, match="unknown preset 'moh-dit-tset'; did you mean 'moh-dit-te"):
        load_released("moh_dit", {}, preset="moh-dit-tset")
    with pytest.raises(ValueError, match=r"config is None; .* or preset, a name"):
        load_released("moh_dit", {})
    with pytest.raises(ValueError, match=r"preset is 'dit-s' and config is \{\}; one must be None"):
        load_released("moh_dit", {}, preset="dit-s", config={})
    with pytest.raises(ValueError, match="preset is 3; it must be a string"):
        load_released("moh_dit", {}, preset=3)
    with pytest.raises(ValueError, match=r"config is 'dit-s'; .* or preset, a name"):
        load_released("moh_dit", {}, config="dit-s")
    assert model.config.budgets == (None,) * 4
    dense = {k: v for k, v in tensors().items() if ".wg" not in k}
    assert isinstance(load_released("moh_dit", dense, config=SIZES | {"moh": False}), DiT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 3}, "unknown field of config 'num_layers'"),
        ({"routed_head": [0, 1]}, "active_heads has 2 entries"),
        ({"routed_head": [0, 3, 2]}, r"active_heads is 4; it must lie in 1\.\.3"),
    ],
)
def test_configs_that_do_not_fit_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        load_released("moh_dit", tensors(), config=SIZES | changes)


def written(content: object, path) -> str:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.safetensors", None, r"source is .*none\.safetensors, where there is no file"),
        ("", None, "where there is no file"),
        ("text.safetensors", b"no weights", r"is no safetensors file \(a checkpoint of PyTorch"),
        ("text.pth", b"no weights", r"text\.pth is no checkpoint of PyTorch"),
        ("empty.pth", b"", r"empty\.pth is no checkpoint of PyTorch"),
        ("list.pth", [torch.ones(2)], "list.pth holds a list; it must hold tensors by name"),
        ("odd.pth", {"state_dict": {}, "epoch": 3}, "a dict under 'state_dict'; there must be"),
        ("few.pth", tensors() | {"x_embedder.proj.weight": torch.tensor(2.0)}, "too few dimensi"),
        ("whole.pth", {k: t.long() for k, t in tensors().items()}, "torch.int64; it must be float"),
    ],
)
def test_what_holds_no_weights_is_refused(name, content, message, tmp_path):
    path = str(tmp_path / name) if content is None else written(content, tmp_path / name)
    with pytest.raises(ValueError, match=message) as error:
        load_released("moh_dit", path, config=SIZES)
    assert "\n" not in str(error.value)
