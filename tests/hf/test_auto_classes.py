"""Any Auto class loads a converted model, with its own head or another, also without our import."""

import json
import subprocess
import sys

import pytest
import torch
from conversions import EAGER, MH_MOE, QUERY_NORM, TWO_STAGE
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from damage import edit_json, edit_weights
from headwise import convert, hf, load, record_routing
from headwise.hf import RoutedLlamaForCausalLM
from tiny import LINES, SIZES, llama, tokenizer

BOTH = {"attention": TWO_STAGE, "mlp": MH_MOE}


@pytest.fixture
def directory(tiny, tmp_path):
    convert(tiny(), **BOTH).save_pretrained(tmp_path)
    return tmp_path


def run(program, *arguments):
    """What a process prints in which nothing was imported yet."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.works_with("transformers", "`trust_remote_code=True` where headwise is never imported")
def test_a_process_that_never_imported_headwise_loads_it(directory, tiny, ids):
    program = """
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
print(type(AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(model(torch.tensor([[3, 5, 7, 11]])).logits.sum().item())
"""
    done = run(program, directory)
    assert done.returncode == 0, done.stderr
    config, total = done.stdout.split()
    assert config == "RoutedLlamaConfig"
    logits = load(directory)(torch.tensor([[3, 5, 7, 11]])).logits
    assert float(total) == pytest.approx(logits.sum().item(), rel=1e-5)


def test_without_the_package_transformers_says_to_install_it(directory):
    program = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "headwise":
            raise ModuleNotFoundError("No module named 'headwise'")
sys.meta_path.insert(0, Missing())
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
"""
    done = run(program, directory)
    assert done.returncode
    assert "Run `pip install headwise`" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("conversion", [{"attention": QUERY_NORM}, {"mlp": MH_MOE}])
@pytest.mark.parametrize(
    "options", [{}, {"attn_implementation": "sdpa"}, EAGER, EAGER | {"dtype": "float32"}]
)
def test_a_class_of_transformers_does_not_load_it_as_a_dense_model(
    tiny, tmp_path, conversion, options
):
    convert(tiny(), **conversion).save_pretrained(tmp_path)
    with pytest.raises(
        StrictDataclassError, match=r"load it by headwise\.load, or an Auto class with trust"
    ):
        LlamaForCausalLM.from_pretrained(tmp_path, **options)
    with pytest.raises(StrictDataclassError, match=r"load it by headwise\.load"):
        LlamaConfig.from_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"load it by headwise\.load"):
        LlamaForCausalLM.from_pretrained(tmp_path, config=config)
    with pytest.raises(ValueError, match=r"load it by headwise\.load"):
        LlamaForCausalLM(config)
    given = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    assert type(given) is type(load(tmp_path))


def test_the_class_can_be_named(directory, ids):
    model = RoutedLlamaForCausalLM.from_pretrained(pretrained_model_name_or_path=directory)
    assert torch.equal(model(ids).logits, load(directory)(ids).logits)
    with pytest.raises(AttributeError, match="RoutedNoSuchModel"):
        _ = hf.RoutedNoSuchModel


def test_saved_again_it_explains_itself_again(directory, tmp_path):
    load(directory).save_pretrained(tmp_path / "again")
    for name in ("config.json", "modeling_headwise.py"):
        assert (tmp_path / "again" / name).read_text() == (directory / name).read_text()


def test_a_directory_of_an_older_version_loads_and_is_saved_as_of_this(directory, tmp_path, ids):
    before = load(directory)(ids).logits

    def as_before(fields):
        del fields["auto_map"]
        fields["initializer_range"] = fields.pop("base_initializer_range")

    edit_json(directory / "config.json", as_before)
    (directory / "modeling_headwise.py").unlink()
    model = load(directory)
    assert torch.equal(model(ids).logits, before)
    model.save_pretrained(tmp_path / "again")
    fields = json.loads((tmp_path / "again" / "config.json").read_text())
    assert fields["auto_map"]["AutoModelForCausalLM"] == "modeling_headwise.RoutedLlamaForCausalLM"


HEADS = [AutoModelForSequenceClassification, AutoModelForTokenClassification]


@pytest.mark.works_with("transformers", "every Auto class, with another head")
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, *HEADS])
def test_a_converted_model_loads_with_another_head_and_again(directory, ids, tmp_path, auto):
    model = auto.from_pretrained(directory)
    with record_routing(model) as routings:
        hidden = model(ids, output_hidden_states=True).hidden_states[-1]
    expected = load(directory)(ids, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(hidden, expected)
    assert len(routings) == 4
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert type(again) is type(model)
    assert torch.equal(again(ids)[0], model(ids)[0])


@pytest.mark.parametrize("auto", HEADS)
def test_a_model_with_another_head_trains_its_routers_once(directory, ids, auto):
    model = auto.from_pretrained(directory, num_labels=3, pad_token_id=0).train()
    for dropout in (m for m in model.modules() if isinstance(m, torch.nn.Dropout)):
        dropout.p = 0.0
    labels = torch.tensor([0, 2]) if auto is HEADS[0] else ids % 3
    with record_routing(model) as routings:
        loss = model(ids, labels=labels).loss
    balance = model.routing_loss(routings)
    torch.testing.assert_close(loss - balance, model.eval()(ids, labels=labels).loss)


def test_converted_with_a_head_of_a_task_it_loads_again(tmp_path, ids):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, pad_token_id=0, num_labels=3)
    model = convert(LlamaForSequenceClassification(config).eval(), **BOTH)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.state_dict().keys() == model.state_dict().keys()


def test_bert_with_another_head(tmp_path, ids):
    torch.manual_seed(0)
    convert(BertForMaskedLM(BertConfig(**SIZES)), attention=TWO_STAGE).save_pretrained(tmp_path)
    expected = load(tmp_path)(ids, output_hidden_states=True).hidden_states[-1]
    for auto in (AutoModel, *HEADS):
        model = auto.from_pretrained(tmp_path)
        assert torch.equal(model(ids, output_hidden_states=True).hidden_states[-1], expected)
    model.save_pretrained(tmp_path / "tokens")
    back = AutoModelForMaskedLM.from_pretrained(tmp_path / "tokens")
    assert torch.equal(back.bert(ids)[0], model.bert(ids)[0])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("model.layers.1.self_attn.router.routed.weight"), "missing_keys.*routed"),
        (lambda w: w.pop("model.norm.weight"), r"missing_keys.*norm\.weight"),
        (lambda w: w.update(surplus=torch.zeros(3)), "unexpected_keys.*surplus"),
    ],
)
@pytest.mark.parametrize("auto", [AutoModel, *HEADS])
def test_only_heads_may_be_missing(directory, auto, edit, message):
    edit_weights(directory, edit)
    with pytest.raises(ValueError, match=message):
        auto.from_pretrained(directory)


def test_a_classifier_loads_for_other_classes_where_that_is_asked_for(tmp_path, ids):
    torch.manual_seed(0)
    original = BertForSequenceClassification(BertConfig(num_labels=3, **SIZES))
    convert(original, attention=TWO_STAGE).save_pretrained(tmp_path)
    auto = AutoModelForSequenceClassification
    with pytest.raises(ValueError, match=r"mismatched_keys: classifier\.bias \[3\], not \[5\]"):
        auto.from_pretrained(tmp_path, num_labels=5)
    model = auto.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert model(ids).logits.shape == (2, 5)
    assert torch.equal(model.bert(ids)[0], load(tmp_path).bert(ids)[0])
    edit_weights(tmp_path, lambda w: w.pop("bert.pooler.dense.bias"))
    with pytest.raises(ValueError, match=r"missing_keys: bert\.pooler\.dense\.bias"):
        auto.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)


def test_a_config_alone(directory):
    config = AutoConfig.from_pretrained(directory)
    assert type(config).__name__ == "RoutedLlamaConfig"
    assert type(AutoModelForCausalLM.from_config(config)) is type(load(directory))
    assert config.auto_map["AutoModelForCausalLM"].endswith(".RoutedLlamaForCausalLM")


@pytest.mark.works_with("lm-eval", "scores a directory that it trusts")
def test_lm_eval_scores_it_without_our_import(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    words = tokenizer(LINES)
    dense = llama(vocab_size=len(words)).eval()
    convert(dense, attention=TWO_STAGE).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    program = """
import sys
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
model = HFLM(pretrained=sys.argv[1], trust_remote_code=True, device="cpu")
ask = Instance("loglikelihood", {}, ("line", " 3"), 0)
print(model.loglikelihood([ask], disable_tqdm=True)[0][0])
"""
    done = run(program, tmp_path)
    assert done.returncode == 0, done.stderr
    context, rest = (words(text).input_ids for text in ("line", " 3"))
    with torch.no_grad():
        logits = load(tmp_path)(torch.tensor([context + rest])).logits[0].log_softmax(-1)
    expected = sum(logits[len(context) + i - 1, token].item() for i, token in enumerate(rest))
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, abs=1e-4)
