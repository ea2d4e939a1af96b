"""Routers fitted to a text: better than query norms, for every family; what they refuse."""

import copy
import math
import re
from dataclasses import replace

import pytest
import torch
import transformers
from conversions import FAMILIES, TEXT, tiny_dit
from torch.testing import assert_close

from headwise import MoHConfig, convert, fit, load, record_routing, restore
from tiny import llama

FITTED = MoHConfig(router="fitted", active=4)
STEPS = 150


def batch(family, generator, size=32):
    """Texts that repeat themselves after 3 to 6 tokens; or noise with one patch that is lit."""
    if family == "ViT":
        images = 0.3 * torch.randn(size, 3, 10, 10, generator=generator)
        where = torch.randint(7, (size,), generator=generator)
        for image, place in zip(images, where.tolist(), strict=True):
            image[:, 2 * (place // 5) :, 2 * (place % 5) :][:, :2, :2] += 1
        return {"pixel_values": images, "labels": where}
    periods = torch.randint(3, 7, (size, 1), generator=generator)
    tokens = torch.randint(4, 31, (size, 6), generator=generator)
    ids = tokens.gather(1, torch.arange(24) % periods)
    if family != "BERT":
        return {"input_ids": ids, "labels": ids}
    hidden = torch.rand(ids.shape, generator=generator) < 0.2
    return {"input_ids": ids.masked_fill(hidden, 3), "labels": ids.masked_fill(~hidden, -100)}


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request):
    """A model of each family that has learned something, and its name."""
    config, kind, sizes = FAMILIES[request.param]
    # A ViT stays long on plateaus where no head matters: on which, differs between processors.
    steps, rate, seed = (300, 3e-3, 1) if request.param == "ViT" else (STEPS, 1e-2, 0)
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch(request.param, generator)).loss.backward()
        optimizer.step()
    return model.eval(), request.param


def text(family, count=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [batch(family, generator) for _ in range(count)]


def loss(model, batches):
    with torch.no_grad():
        return sum(model(**given).loss.item() for given in batches) / len(batches)


def test_it_loses_less_than_by_query_norm_on_text_of_its_kind(trained):
    model, family = trained
    held_out = text(family, seed=2)
    heads = {
        "by query norm": MoHConfig(router="query_norm", shared=0, active=3),
        "fitted": fit(model, text(family), replace(FITTED, active=3)),
    }
    lost = {
        name: loss(convert(copy.deepcopy(model), attention=attention), held_out)
        for name, attention in heads.items()
    }
    dense = loss(model, held_out)
    assert dense < lost["fitted"] < lost["by query norm"]


def test_with_all_heads_on_it_is_the_original_bit_for_bit(trained):
    model, family = trained
    given = text(family, 1)[0]
    same = copy.deepcopy(model)
    same.set_attn_implementation("sdpa")
    converted = convert(copy.deepcopy(model), attention=fit(model, text(family), ALL_ON))
    with torch.no_grad():
        assert torch.equal(converted(**given).logits, same(**given).logits)


ALL_ON = replace(FITTED, active=6)


def test_it_saves_and_loads_and_goes_back(trained, tmp_path):
    model, family = trained
    given = text(family, 1)[0]
    converted = convert(copy.deepcopy(model), attention=fit(model, text(family), FITTED))
    converted.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.conversion == converted.conversion
    with torch.no_grad():
        assert torch.equal(again(**given).logits, converted(**given).logits)
        assert torch.equal(restore(again)(**given).logits, restore(converted)(**given).logits)


def test_the_model_stays_as_it_was(trained):
    model, family = trained
    before = copy.deepcopy(model)
    model.train()
    model.requires_grad_(False)
    fit(model, text(family), FITTED)
    assert model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.eval().requires_grad_(True)
    assert model.config.to_dict() == before.config.to_dict()
    assert model.config._attn_implementation == before.config._attn_implementation
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    assert not any(any(pair) for pair in hooks)
    assert [name for name, _ in model.named_modules()] == [n for n, _ in before.named_modules()]
    assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)


def test_without_labels_what_counts_is_the_length_of_what_heads_add():
    model = llama().eval()
    batches = [{"input_ids": torch.randint(31, (4, 16))} for _ in range(6)]
    heads = fit(model, batches, FITTED, allocate="alike")
    assert heads.config.active == 4
    converted = convert(copy.deepcopy(model), attention=heads)
    seen = {}
    attention = model.model.layers[0].self_attn
    attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(z=args[0]))
    with torch.no_grad(), record_routing(converted) as routings:
        model(**batches[0])
        converted(**batches[0])
    by_head = seen["z"].unflatten(-1, (6, 4))
    weight = attention.o_proj.weight.unflatten(1, (6, 4))
    lengths = torch.einsum("bthc,dhc->bthd", by_head, weight).norm(dim=-1)
    first = next(iter(routings.values()))
    kept = (lengths * (first.weights != 0)).sum() / lengths.sum()
    by_chance = 4 / 6
    best = lengths.topk(4, dim=-1).values.sum() / lengths.sum()
    assert by_chance < kept <= best
    assert kept > (by_chance + best) / 2


def test_contributions_are_in_the_norm_of_the_losses_gradients():
    """A head on which the loss does not depend is off, however long what it adds."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**TEXT | {"num_hidden_layers": 1})
    ).eval()
    with torch.no_grad():
        # Head 2 adds the same to all channels, which every LayerNorm takes away again.
        model.transformer.h[0].attn.c_proj.weight[8:12] = 10.0
    ids = torch.randint(31, (6, 4, 16))
    config = replace(FITTED, active=5)
    by_loss = fit(model, [{"input_ids": x, "labels": x} for x in ids], config)
    by_length = fit(model, [{"input_ids": x} for x in ids], config, allocate="alike")
    for attention, is_off in ((by_loss, 1), (by_length, 0)):
        converted = convert(copy.deepcopy(model), attention=attention)
        with record_routing(converted) as routings, torch.no_grad():
            converted(ids[0])
        (routing,) = routings.values()
        assert (routing.weights[..., 2] == 0).float().mean() == is_off


def test_padding_is_not_fitted_to():
    model = llama().eval()
    ids = [torch.randint(1, 31, (4, 16)) for _ in range(6)]
    alone = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]
    padded = [
        {
            "input_ids": torch.cat([x, torch.zeros(4, 5, dtype=torch.long)], 1),
            "attention_mask": torch.cat([torch.ones(4, 16), torch.zeros(4, 5)], 1).long(),
            "labels": torch.cat([x, torch.full((4, 5), -100)], 1),
        }
        for x in ids
    ]
    one, other = (fit(model, batches, FITTED) for batches in (alone, padded))
    assert one.config == other.config
    assert_close(one.routers, other.routers, rtol=1e-3, atol=1e-4)


def test_budgets_differ_by_layer_and_groups_stay_whole():
    model = llama(num_key_value_heads=3, num_hidden_layers=4).eval()
    with torch.no_grad():
        for layer in (0, 2):
            model.model.layers[layer].self_attn.o_proj.weight.mul_(10)
    ids = [torch.randint(31, (4, 16)) for _ in range(6)]
    batches = [{"input_ids": x, "labels": x} for x in ids]
    config = replace(FITTED, route_groups=True)
    heads = fit(model, batches, config)
    assert sum(heads.config.active) == 16
    assert heads.config.active[0] + heads.config.active[2] > 8
    converted = convert(copy.deepcopy(model), attention=heads)
    with record_routing(converted) as routings, torch.no_grad():
        converted(ids[0])
    for routing, active in zip(routings.values(), heads.config.active, strict=True):
        by_group = (routing.weights != 0).unflatten(-1, (3, 2))
        assert (by_group.all(-1) == by_group.any(-1)).all()
        assert (by_group.sum((-1, -2)) == active).all()
    with_shared = fit(model, batches, replace(FITTED, shared=2, active=0.5))
    assert sum(with_shared.config.active) == 12
    assert min(with_shared.config.active) > 2


def test_only_some_layers():
    model = llama(num_hidden_layers=3).eval()
    batches = [{"input_ids": x, "labels": x} for x in torch.randint(31, (6, 4, 16))]
    heads = fit(model, batches, FITTED, layers=[2, 0])
    assert list(heads.routers) == [0, 2]
    assert heads.config.active[0] + heads.config.active[2] == 8
    converted = convert(copy.deepcopy(model), attention=heads)
    assert converted.conversion.layers == (0, 2)
    with pytest.raises(ValueError, match=r"fitted to layers \[0, 2\]; .* not \[1\]"):
        convert(copy.deepcopy(model), attention=heads, layers=[1])


def test_a_router_that_was_fitted_learns():
    model = llama().eval()
    batches = [{"input_ids": x, "labels": x} for x in torch.randint(31, (6, 4, 16))]
    converted = convert(model, attention=fit(model, batches, FITTED)).train()
    converted(**batches[0]).loss.backward()
    gradients = [
        parameter.grad for name, parameter in converted.named_parameters() if "router" in name
    ]
    assert len(gradients) % 3 == 0
    assert gradients
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


def test_of_bfloat16_it_chooses_as_of_float32():
    model = llama().eval()
    batches = [{"input_ids": x, "labels": x} for x in torch.randint(31, (6, 4, 16))]
    chosen = []
    for dtype in (torch.float32, torch.bfloat16):
        one = copy.deepcopy(model).to(dtype)
        converted = convert(one, attention=fit(one, batches, FITTED, allocate="alike"))
        with record_routing(converted) as routings, torch.no_grad():
            converted(batches[0]["input_ids"])
        chosen.append(torch.stack([r.weights for r in routings.values()]) != 0)
    assert (chosen[0] == chosen[1]).float().mean() > 0.9


def test_a_model_of_diffusers():
    dit = tiny_dit()
    generator = torch.Generator().manual_seed(0)

    def given():
        return {
            "hidden_states": torch.randn(4, 2, 8, 8, generator=generator),
            "timestep": torch.randint(1000, (4,), generator=generator),
            "class_labels": torch.randint(10, (4,), generator=generator),
        }

    with torch.no_grad():
        # As it is, what attention adds is multiplied by nearly 0.
        for parameter in dit.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    batches = [given() for _ in range(24)]
    config = MoHConfig(router="fitted", active=2)
    heads = fit(dit, batches, config, allocate="alike")
    with pytest.raises(ValueError, match="batches have no labels"):
        fit(dit, batches, config)
    errors = {}
    for name, attention in (("fitted", heads), ("norm", MoHConfig(shared=0, active=2))):
        converted = convert(copy.deepcopy(dit), attention=attention)
        with torch.no_grad():
            other = given()
            errors[name] = (converted(**other).sample - dit(**other).sample).square().mean()
    assert errors["fitted"] < errors["norm"]


def refuses(message, **changes):
    model = llama().eval()
    ids = torch.randint(31, (6, 4, 16))
    batches = [{"input_ids": x, "labels": x} for x in ids]
    given = {"model": model, "batches": batches, "config": FITTED} | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(**given)


def test_what_it_refuses():
    ids = torch.randint(31, (1, 30))
    short = [{"input_ids": ids, "labels": ids}] * 2
    few = "batches hold 60 tokens to fit to; a score has 25 weights, so at least 100"
    refuses(few, batches=short)
    refuses("batches is empty", batches=[])
    refuses("must be 2 or more", batches=short[:1])
    refuses("allocate is 'loss', and batches have no labels", batches=[{"input_ids": ids}] * 4)
    some = [{"input_ids": ids, "labels": ids}, {"input_ids": ids}] * 4
    refuses("no labels in a dict", batches=some, allocate="alike")
    refuses("config is None; it must be a MoHConfig", config=None)
    refuses("router is 'query_norm'", config=MoHConfig())
    refuses("allocate is 'evenly'", allocate="evenly")
    masked = [short[0], {"input_ids": ids, "labels": torch.full_like(ids, -100)}]
    refuses("batches[1] has labels that are all -100", batches=masked)
    refuses("cannot read batches[0] (input_ids [1, 30], labels [1, 30])", batches=[
        {"input_ids": ids + 31, "labels": ids}, short[0],
    ])  # fmt: skip
    refuses("batches[0] (inputs [1, 30])", batches=[{"inputs": ids}] * 2, allocate="alike")
    each = "active has a budget for each layer, which allocate 'alike' takes"
    refuses(each, config=replace(FITTED, active=[3, 4]))
    refuses("active is 7; it must lie in 1..6", config=replace(FITTED, active=7))
    refuses("at least 1 of 6 must be active", config=replace(FITTED, active=0.05))
    alone = replace(FITTED, active=0.09)
    refuses("active is 0.09, which leaves 1 routed heads or groups to 2 layers", config=alone)
    for model in (torch.nn.Linear(1, 1), "a name"):
        refuses("it must be a model of transformers or diffusers", model=model)
    refuses("layers has 5; the model has 2 layers", layers=[5])
    model = llama()
    convert(model, attention=MoHConfig())
    refuses("is converted already; fit the original", model=model)
    with pytest.raises(ValueError, match="scores is 'sigmoid'; with router 'fitted'"):
        replace(FITTED, scores="sigmoid")
    with pytest.raises(ValueError, match=r"give what headwise.fit\("):
        convert(llama(), attention=FITTED)


def test_routers_of_another_model_are_refused_and_nothing_changes():
    batches = [{"input_ids": x, "labels": x} for x in torch.randint(31, (6, 4, 16))]
    heads = fit(llama().eval(), batches, FITTED, allocate="alike")
    other = llama(hidden_size=48)
    before = [name for name, _ in other.named_modules()]
    with pytest.raises(ValueError, match="attention was fitted to another model: in layer 0"):
        convert(other, attention=heads)
    assert [name for name, _ in other.named_modules()] == before


def test_a_head_that_adds_nothing_at_all_does_no_harm():
    model = llama().eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, :4] = 0
    batches = [{"input_ids": x, "labels": x} for x in torch.randint(31, (6, 4, 16))]
    converted = convert(copy.deepcopy(model), attention=fit(model, batches, FITTED))
    with record_routing(converted) as routings, torch.no_grad():
        difference = converted(**batches[0]).loss - model(**batches[0]).loss
    assert math.isfinite(difference)
    assert abs(difference) < 0.1
    routed = [r for r in routings.values() if (r.weights == 0).any()]
    assert all((r.weights[..., 0] == 0).all() for r in routed)
