"""The training loss of a converted model: the model's own and the weighted balance losses."""

from dataclasses import replace

import pytest
import torch
from conversions import LEARNED, MH_MOE, TWO_STAGE
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForMaskedImageModeling,
)

from headwise import MoHConfig, balance_loss, convert, record_routing, router_z_loss
from headwise.hf.checkpointing import checkpoint_activations
from tiny import SIZES

BETA, ALPHA, ZETA = 0.3, 0.7, 0.11
MLP = replace(MH_MOE, balance_coefficient=ALPHA, z_loss_coefficient=ZETA)


@pytest.fixture(params=["two_stage", "one_stage", "query_norm"])
def model(request, tiny):
    attention = replace(TWO_STAGE, router=request.param, balance_coefficient=BETA)
    return convert(tiny(num_hidden_layers=3), attention=attention, mlp=MLP, every=2)


def routing_share(model, ids, **kwargs):
    """β · mean balance of attentions + mean of α · balance + ζ · z-loss of the experts."""
    with record_routing(model) as routings:
        model(input_ids=ids, **kwargs)
    heads = [balance_loss(r) for name, r in routings.items() if "self_attn" in name]
    experts = [r for name, r in routings.items() if "mlp" in name]
    assert (len(heads), len(experts)) == (3, 1)
    return (
        BETA * sum(heads) / 3 + ALPHA * balance_loss(experts[0]) + ZETA * router_z_loss(experts[0])
    )


def test_training_loss_is_evaluation_loss_plus_balance(model, ids):
    evaluation = model.eval()(input_ids=ids, labels=ids).loss
    logits = model(ids).logits
    plain = cross_entropy(logits[:, :-1].flatten(end_dim=1), ids[:, 1:].flatten())
    assert_close(evaluation, plain)
    share = routing_share(model, ids)
    assert share > 0.5
    assert_close(model.train()(input_ids=ids, labels=ids).loss, evaluation + share)


@pytest.mark.parametrize("form", ["scaled", "plain", "first_choice"])
def test_the_balance_of_experts_is_of_the_form_that_is_asked_for(tiny, ids, form):
    mlp = replace(MLP, balance_form=form, balance_scope="all", z_loss_coefficient=0)
    model = convert(tiny(), mlp=mlp)
    with record_routing(model) as routings:
        evaluation = model(input_ids=ids, labels=ids).loss
    balances = [balance_loss(routing, form=form) for routing in routings.values()]
    loss = model.train()(input_ids=ids, labels=ids).loss
    assert_close(loss, evaluation + ALPHA * sum(balances) / 2)


def test_padding_does_not_count_in_the_balance(model, ids, attention_mask):
    labels = ids.masked_fill(attention_mask == 0, -100)
    inputs = {"attention_mask": attention_mask, "labels": labels}
    evaluation = model.eval()(input_ids=ids, **inputs).loss
    share = routing_share(model, ids, attention_mask=attention_mask)
    assert not torch.isclose(share, routing_share(model, ids))
    assert_close(model.train()(input_ids=ids, **inputs).loss, evaluation + share)


def test_without_labels_training_gives_the_same_logits(model, ids):
    logits = model.eval()(ids).logits
    with record_routing(model):
        output = model.train()(ids)
    assert output.loss is None
    assert torch.equal(output.logits, logits)


def test_a_tuple_has_the_loss_first(model, ids):
    loss = model.train()(input_ids=ids, labels=ids).loss
    assert torch.equal(model(input_ids=ids, labels=ids, return_dict=False)[0], loss)


def test_positional_labels_have_the_balance_too(model, ids):
    loss = model.train()(input_ids=ids, labels=ids).loss
    # LlamaForCausalLM.forward(input_ids, attention_mask, position_ids, past, embeds, labels).
    assert_close(model(ids, None, None, None, None, ids).loss, loss)


def test_every_router_is_trained(model, ids):
    model.train()(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_accumulated_micro_batches_weigh_by_their_targets(model, ids):
    """Both losses of a micro batch are its share n_i / N of the whole batch's N targets."""
    labels = ids.clone()
    labels[0, :4] = -100
    items = (labels[:, 1:] != -100).sum()
    model.train()
    total = sum(
        model(input_ids=ids[[i]], labels=labels[[i]], num_items_in_batch=items).loss
        for i in range(2)
    )
    with torch.no_grad():
        logits = model(ids).logits
    plain = cross_entropy(logits[:, :-1].flatten(end_dim=1), labels[:, 1:].flatten())
    shares = [routing_share(model, ids[[i]]) for i in range(2)]
    assert items == 9
    assert_close(total, plain + 3 / 9 * shares[0] + 6 / 9 * shares[1])


def test_two_equal_micro_batches_give_the_gradient_of_the_whole(model, ids):
    twice = ids[[0, 0]]
    model.train()(input_ids=twice, labels=twice).loss.backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for _ in range(2):
        model(
            input_ids=ids[:1], labels=ids[:1], num_items_in_batch=torch.tensor(12)
        ).loss.backward()
    assert_close([p.grad for p in model.parameters()], whole, rtol=1e-4, atol=1e-5)


def test_a_coefficient_of_zero_leaves_the_loss_alone(tiny, ids):
    model = convert(tiny(), attention=replace(LEARNED, balance_coefficient=0))
    evaluation = model(input_ids=ids, labels=ids).loss
    assert_close(model.train()(input_ids=ids, labels=ids).loss, evaluation)


def test_a_layer_that_routes_nothing_adds_nothing(tiny, ids):
    model = convert(tiny(), attention=replace(LEARNED, shared=1.0, active=1.0))
    evaluation = model(input_ids=ids, labels=ids).loss
    loss = model.train()(input_ids=ids, labels=ids).loss
    assert_close(loss, evaluation)
    loss.backward()


def test_all_heads_on_by_query_norm_trains(tiny, ids):
    model = convert(tiny(), attention=MoHConfig(active=1.0, router="query_norm"))
    evaluation = model(input_ids=ids, labels=ids).loss
    # Where nothing is left to choose the balance is constant: each routed head's share is 1.
    balance = 0.01 * model.model.layers[0].self_attn.router.budget.routed_heads
    assert_close(model.train()(input_ids=ids, labels=ids).loss, evaluation + balance)


VIT = {
    "hidden_size": 24, "intermediate_size": 29, "num_hidden_layers": 2, "num_attention_heads": 6,
    "image_size": 10, "patch_size": 2, "encoder_stride": 2,
}  # fmt: skip
TARGETS = {
    "question answering": (
        lambda: BertForQuestionAnswering(BertConfig(**SIZES)),
        lambda ids: {
            "input_ids": ids,
            "start_positions": torch.tensor([1, 3]),
            "end_positions": torch.tensor([2, 5]),
        },
    ),
    "masked image modelling": (
        lambda: ViTForMaskedImageModeling(ViTConfig(**VIT)),
        lambda _: {
            "pixel_values": torch.linspace(-1, 1, 600).view(2, 3, 10, 10),
            "bool_masked_pos": torch.arange(50).view(2, 25) % 3 == 0,
        },
    ),
}


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize(("build", "inputs"), TARGETS.values(), ids=TARGETS)
def test_what_is_not_called_labels_has_the_balance_too(ids, build, inputs, as_tuple):
    model = convert(build().eval(), attention=replace(TWO_STAGE, balance_coefficient=BETA))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    given = inputs(ids)
    with record_routing(model) as routings:
        evaluation = model(**given).loss
    share = BETA * sum(map(balance_loss, routings.values())) / 2
    loss = model.train()(**given, return_dict=not as_tuple)[0]
    assert_close(loss, evaluation + share)


WARNING = r"computes no loss.*nothing balances.*record_routing.*routing_loss.*balance_coefficient 0"


def test_training_without_labels_warns_once_and_in_time(model, ids):
    with pytest.warns(UserWarning, match=WARNING):
        model.train()(ids).logits.sum().backward()
    model(ids)


def test_a_loss_that_was_computed_before_hides_no_missing_one(model, ids):
    model.train()(ids, labels=ids).loss.backward()
    with pytest.warns(UserWarning, match=WARNING):
        model(ids)


def test_who_adds_the_balance_is_not_warned(model, ids):
    model.train()
    with record_routing(model) as routings:
        model(ids)
    assert_close(model.routing_loss(routings), routing_share(model, ids))


def test_where_nothing_is_trained_or_balanced_nobody_is_warned(model, tiny, ids):
    model(ids)
    with torch.no_grad():
        model.train()(ids)
    attention = replace(LEARNED, balance_coefficient=0)
    experts = replace(MLP, balance_coefficient=0, z_loss_coefficient=0)
    convert(tiny(), attention=attention, mlp=experts).train()(ids)
    with pytest.warns(UserWarning, match="update_biases"):
        convert(tiny(), mlp=replace(experts, bias_rate=0.1)).train()(ids)
    convert(tiny(), ternary=True).train()(ids)


@pytest.mark.parametrize("how", ["label_smoothing_factor", "compute_loss_func"])
def test_a_trainer_that_keeps_the_labels_to_itself_warns(model, ids, tmp_path, how):
    def loss_of(outputs, labels, num_items_in_batch=None):
        return cross_entropy(outputs.logits.flatten(end_dim=1), labels.flatten())

    options = {"label_smoothing_factor": 0.1} if how == "label_smoothing_factor" else {}
    arguments = TrainingArguments(
        tmp_path, max_steps=2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        **options,
    )  # fmt: skip
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        compute_loss_func=None if options else loss_of,
    )
    with pytest.warns(UserWarning, match=WARNING) as told:
        trainer.train()
    assert len([w for w in told if "nothing balances" in str(w.message)]) == 1


def test_a_forward_that_somebody_puts_in_the_place_of_the_models_has_the_balance_too(model, ids):
    """As TRL does to compute the loss in chunks."""

    def forward(input_ids, labels):
        hidden = model.model(input_ids).last_hidden_state
        return cross_entropy(model.lm_head(hidden).flatten(end_dim=1), labels.flatten())

    expected = forward(ids, ids) + routing_share(model, ids)
    model.train().forward = forward
    assert_close(model(ids, ids), expected)
    assert_close(model(input_ids=ids, labels=ids), expected)


def test_layers_that_are_computed_again_are_no_reason_to_warn(model, ids):
    checkpoint_activations(model.train())
    model(ids, labels=ids).loss.backward()
