"""The masked model: what it may see, its loss worked by hand, converted, saved and loaded."""

import re

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel

from gradients import assert_checkpointing_changes_none
from headwise import MHMoEConfig, MoEConfig, MoHConfig, convert, record_routing
from headwise.hf import restore
from headwise.hf.auto import Routed
from headwise.models import MaskedConfig, MaskedModel

P, T, V, CODES = 9, 7, 31, 11
EXPERTS = {"expert_dim": 13, "glu": False, "activation": "gelu"}
CONVERSIONS = {
    "dense": None,
    "moe": {"mlp": MoEConfig(num_experts=5, top_k=1, **EXPERTS, normalize_top_k=False), "every": 2},
    "x_moe": {"mlp": MoEConfig(num_experts=5, top_k=2, router="cosine", **EXPERTS)},
    "mh_moe": {"mlp": MHMoEConfig(num_heads=3, num_experts=7, top_k=2, **EXPERTS), "every": 2},
    "moh": {"attention": MoHConfig(shared=2, active=4, router="two_stage", router_std=0.02)},
    "moh_mh_moe": {
        "attention": MoHConfig(router="query_norm", shared=2, active=4),
        "mlp": MHMoEConfig(num_heads=3, num_experts=7, top_k=2, **EXPERTS),
        "every": 3,
    },
}
ALL = pytest.mark.parametrize("name", CONVERSIONS)


def tiny(name: str = "dense") -> MaskedModel:
    torch.manual_seed(0)
    config = MaskedConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=6, intermediate_size=29,
        image_size=6, patch_size=2, num_channels=3, vocab_size=V, max_text_length=T + 3,
        codebook_size=CODES,
    )  # fmt: skip
    model = MaskedModel(config).eval()
    # As they are, tiny models attend almost evenly and say almost the same of everything.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
        model.masked_patch.normal_()
        model.codebook.normal_()
    conversion = CONVERSIONS[name]
    return model if conversion is None else convert(model, **conversion)


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    masked = torch.zeros(2, P, dtype=torch.bool)
    masked[:, [1, 5]] = True
    mask = torch.ones(2, P + T, dtype=torch.long)
    mask[0, -3:] = 0
    return {
        "pixel_values": torch.rand(2, 3, 6, 6, generator=generator) * 2 - 1,
        "input_ids": torch.randint(3, V, (2, T), generator=generator),
        "masked_patches": masked,
        "attention_mask": mask,
    }


def labels() -> torch.Tensor:
    """Two masked patches in each image, three masked tokens in all."""
    given = torch.full((2, P + T), -100)
    given[:, [1, 5]] = torch.tensor([[2, 3], [7, 10]])
    given[0, P + 2] = 30
    given[1, [P, P + 6]] = torch.tensor([4, 5])
    return given


def real_logits(model, given) -> list[torch.Tensor]:
    """Of every patch, and of the tokens that are not padding."""
    output = model(**given)
    real = given["attention_mask"][:, P:].bool()
    return [output.image_logits, *(x[r] for x, r in zip(output.text_logits, real, strict=True))]


@ALL
def test_outputs_do_not_depend_on_batch_mates(name):
    model, given = tiny(name), inputs()
    alone = [real_logits(model, {k: x[i : i + 1] for k, x in given.items()}) for i in range(2)]
    images, *texts = real_logits(model, given)
    assert_close(images, torch.cat([alone[0][0], alone[1][0]]))
    assert_close(texts, [alone[0][1], alone[1][1]])


@ALL
@pytest.mark.parametrize("side", ["left", "right"])
def test_outputs_do_not_depend_on_padding(name, side):
    model, given = tiny(name), inputs()
    want = real_logits(model, given)
    text, real = given["input_ids"], given["attention_mask"][:, P:]
    garbage, zeros = torch.full((2, 3), 17), torch.zeros(2, 3, dtype=torch.long)
    join = (lambda new, x: [new, x]) if side == "left" else (lambda new, x: [x, new])
    given["input_ids"] = torch.cat(join(garbage, text), dim=1)
    given["attention_mask"] = torch.cat([given["attention_mask"][:, :P], *join(zeros, real)], dim=1)
    assert_close(real_logits(model, given), want)


def test_what_padding_holds_does_not_matter():
    model, given = tiny(), inputs()
    want = real_logits(model, given)
    given["input_ids"][0, -3:] = 19
    assert_close(real_logits(model, given), want, rtol=0, atol=0)


def test_masked_patches_are_not_seen_and_others_are():
    model, given = tiny(), inputs()
    want = real_logits(model, given)
    pixels = given["pixel_values"]
    pixels[0, :, 0:2, 2:4] += 1  # patch 1: row 0, column 1
    assert_close(real_logits(model, given), want, rtol=0, atol=0)
    pixels[0, :, 0:2, 4:6] += 1  # patch 2
    images, text, _ = real_logits(model, given)
    # Attention is bidirectional: what stands before the patch changes too, in image and text.
    assert (images[0] - want[0][0]).abs().amin(0).amax() > 0
    assert not torch.isclose(images[0, 0], want[0][0, 0]).any()
    assert not torch.isclose(text[0], want[1][0]).any()
    assert torch.equal(images[1], want[0][1])


def test_every_position_and_modality_counts():
    model, given = tiny(), inputs()
    given["input_ids"][:] = 5
    given["pixel_values"][:] = 0.5
    output = model(**given)
    seen = output.image_logits[1][~given["masked_patches"][1]]
    for rows in (seen, output.text_logits[1]):
        assert not torch.isclose(rows[:-1], rows[1:]).all(-1).any()
    with torch.no_grad():
        model.modalities.weight[1] += 1
    assert not torch.allclose(model(**given).text_logits, output.text_logits)


def test_loss_is_the_mean_over_all_that_is_masked():
    model = tiny().double()
    given = inputs() | {"labels": labels()}
    output = model(**given)
    image, text = output.image_logits.log_softmax(-1), output.text_logits.log_softmax(-1)
    of_image = -torch.stack([image[0, 1, 2], image[0, 5, 3], image[1, 1, 7], image[1, 5, 10]])
    of_text = -torch.stack([text[0, 2, 30], text[1, 0, 4], text[1, 6, 5]])
    assert_close(output.loss, (of_image.sum() + of_text.sum()) / 7, check_dtype=False)
    assert_close(output.image_loss, of_image.mean(), check_dtype=False)
    assert_close(output.text_loss, of_text.mean(), check_dtype=False)


def test_a_modality_without_masks_has_no_loss_of_its_own():
    given = inputs() | {"labels": labels()}
    given["labels"][:, P:] = -100
    output = tiny()(**given)
    assert_close(output.loss, output.image_loss)
    assert output.text_loss.isnan()


@ALL
def test_gradients_of_parts_add_up_to_those_of_the_batch(name):
    """With num_items_in_batch, as Trainer accumulates; balance losses aside, they are the same."""
    model = tiny(name).double()  # in eval mode: without the balance losses
    given = inputs() | {"labels": labels()}
    given["pixel_values"] = given["pixel_values"].double()
    model(**given).loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for i in range(2):
        part = {k: x[i : i + 1] for k, x in given.items()}
        model(**part, num_items_in_batch=torch.tensor(7)).loss.backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_close(got, want)


@ALL
def test_a_step_reaches_every_parameter(name):
    model = tiny(name).train()
    ids = torch.randint(3, V, (16, T + 3))
    mask = torch.rand(16, P) < 0.5
    seen_labels = torch.cat([torch.randint(0, CODES, (16, P)), ids], dim=1)
    model(
        pixel_values=torch.rand(16, 3, 6, 6), input_ids=ids, masked_patches=mask, labels=seen_labels
    ).loss.backward()
    still = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # A bias of keys moves all scores of a query alike, which softmax does not see.
    assert {name for name in still if "k_proj.bias" not in name} == set()


@ALL
def test_balance_losses_join_in_training_and_padding_does_not_count(name):
    model = tiny(name)
    given = inputs() | {"labels": labels()}
    plain = model(**given).loss
    with record_routing(model) as routings:
        loss = model.train()(**given).loss
    if name == "dense":
        assert_close(loss, plain)
        return
    assert isinstance(model, Routed)
    assert_close(loss, plain + model.routing_loss(routings))
    for routing in routings.values():
        assert routing.mask.reshape(2, P + T, -1)[..., 0].equal(given["attention_mask"].bool())


@ALL
def test_it_saves_and_loads(name, tmp_path):
    model, given = tiny(name), inputs()
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert isinstance(again, MaskedModel)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MaskedConfig)
    assert torch.equal(again.codebook, model.codebook)
    assert_close(real_logits(again, given), real_logits(model, given), rtol=0, atol=0)


def test_convert_takes_a_saved_model_and_gives_it_back(tmp_path):
    model, given = tiny(), inputs()
    model.save_pretrained(tmp_path)
    all_on = MoHConfig(router="query_norm", shared=6, active=6)
    converted = convert(tmp_path, attention=all_on)
    want = real_logits(model, given)
    assert_close(real_logits(converted, given), want, rtol=0, atol=0)
    original = restore(converted)
    assert type(original) is MaskedModel
    assert_close(real_logits(original, given), want, rtol=0, atol=0)


def test_a_model_class_that_nobody_registered_is_named(tmp_path):
    tiny("moh").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace("RoutedMaskedModel", "RoutedMaskedModle"))
    with pytest.raises(ValueError, match="MaskedModle is not known"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["dense", "moh_mh_moe"])
def test_gradient_checkpointing_changes_no_gradient(name):
    assert_checkpointing_changes_none(
        lambda: tiny(name).train(), lambda model: model(**inputs(), labels=labels()).loss
    )


def test_it_runs_in_bfloat16():
    output = tiny("moh_mh_moe").bfloat16()(**inputs(), labels=labels())
    assert output.text_logits.dtype == output.image_logits.dtype == torch.bfloat16
    assert output.loss.isfinite()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": torch.zeros(2, 3, 8, 6)}, "shape [2, 3, 8, 6]; it must be [B, 3, 6, 6]"),
        ({"pixel_values": torch.zeros(2, 1, 6, 6)}, "shape [2, 1, 6, 6]; it must be [B, 3, 6, 6]"),
        ({"pixel_values": torch.zeros(2, 3, 6, 6).int()}, "pixel_values is torch.int32"),
        ({"input_ids": torch.zeros(2, 11, dtype=torch.long)}, "has 11 tokens; max_text_length"),
        ({"input_ids": torch.zeros(2, 5)}, "input_ids is torch.float32"),
        ({"input_ids": torch.zeros(5).long()}, "input_ids has shape [5]; it must be [2, T]"),
        ({"masked_patches": torch.zeros(2, P)}, "masked_patches is torch.float32"),
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask has shape [2, 3]"),
        ({"labels": torch.zeros(2, 3).long()}, "labels has shape [2, 3]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny()(**inputs() | changes)


def test_patches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="patch_size is 3; it must divide image_size = 8"):
        MaskedConfig(image_size=8, patch_size=3)
