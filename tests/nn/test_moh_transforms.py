"""MoHAttention under torch.func, on the meta device and differentiated twice."""

import pytest
import torch
from dense_moh import HEADS, B, D, S, T, angles, dense, layer_of, tokens
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from headwise import MoHAttention, MoHConfig, balance_loss, convert
from tiny import llama

# torch's own: vmap of what has no rule for batches, and the tracing that func uses.
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),
]
ROUTERS = pytest.mark.parametrize("router", ["two_stage", "query_norm"])
IMPLS = ("reference", "dense", "gathered", "native", "auto")
# Even widths, which the kernels in C++ want.
SIZES = {"num_heads": 5, "shared_heads": 2, "active_heads": 3, "head_dim": 6, "causal": True}


def narrow(router, impl, **options):
    return MoHAttention(14, **SIZES, router=router, impl=impl, **options)


def loss_of(layer, parameters, x):
    y, routing = functional_call(layer, parameters, (x,))
    return y.square().sum() + balance_loss(routing)


@ROUTERS
@pytest.mark.parametrize("impl", ["reference", "dense", "auto"])
def test_func_grad_and_gradients_of_each_sample(impl, router):
    layer, x = narrow(router, impl), torch.randn(B, T, 14)
    parameters = dict(layer.named_parameters())
    want = torch.autograd.grad(loss_of(layer, parameters, x), list(parameters.values()))
    got = grad(lambda p: loss_of(layer, p, x))({k: p.detach() for k, p in parameters.items()})
    assert_close(list(got.values()), list(want), rtol=1e-4, atol=1e-5)
    if impl == "reference":
        return
    each = vmap(grad(lambda p, x: loss_of(layer, p, x[None])), in_dims=(None, 0))(parameters, x)
    for b in range(B):
        loss = loss_of(layer, parameters, x[b : b + 1])
        want = torch.autograd.grad(loss, list(parameters.values()))
        assert_close([g[b] for g in each.values()], list(want), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("native_kernels")
@ROUTERS
@pytest.mark.parametrize("tokens", [T, 131])
@pytest.mark.parametrize("impl", ["dense", "gathered", "native", "auto"])
@pytest.mark.parametrize("gradients", [True, False])
def test_vmap_over_inputs_and_modules(gradients, impl, tokens, router):
    layers = [narrow(router, impl) for _ in range(3)]
    x = torch.randn(3, B, tokens, 14)
    with torch.set_grad_enabled(gradients):
        got = vmap(lambda x: layers[0](x)[0])(x)
        assert_close(got, torch.stack([layers[0](part)[0] for part in x]), rtol=1e-4, atol=1e-5)
        parameters, buffers = stack_module_state(layers)
        got = vmap(lambda p, b, x: functional_call(layers[0], (p, b), (x,))[0])(
            parameters, buffers, x
        )
        want = torch.stack([layer(part)[0] for layer, part in zip(layers, x, strict=True)])
        assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_vmap_of_the_loops_is_refused():
    layer = narrow("two_stage", "reference")
    with pytest.raises(ValueError, match=r"impl is 'reference', which torch\.vmap cannot map"):
        vmap(lambda x: layer(x)[0])(torch.randn(3, B, T, 14))


@ROUTERS
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("training", [True, False])
def test_shapes_on_the_meta_device(training, impl, router):
    options = {"qk_norm": True, "window": 5, "layer_idx": 0}
    layer = narrow(router, impl, **options).to("meta").train(training)
    x = torch.empty(B, T, 14, device="meta")
    rotary = tuple(part.to("meta") for part in angles(6))
    mask = torch.empty(B, T, device="meta", dtype=torch.bool)
    bias = torch.empty(T, T, device="meta")
    with torch.set_grad_enabled(training):
        y, routing = layer(x, mask, rotary=rotary, attn_mask=bias)
    assert y.is_meta
    assert y.shape == x.shape
    assert routing.weights.shape == (B, T, 5)
    if training:
        (y.sum() + routing.probabilities.sum()).backward()
        assert all(p.grad is None or p.grad.is_meta for p in layer.parameters())
    crossing = MoHAttention(14, **HEADS, context_dim=11, router=router, impl=impl).to("meta")
    assert crossing(x, context=torch.empty(B, S, 11, device="meta"))[0].shape == x.shape


@ROUTERS
@pytest.mark.parametrize("training", [True, False])
def test_a_converted_model_on_the_meta_device(training, router):
    model = convert(llama(), attention=MoHConfig(router=router)).to("meta").train(training)
    ids = torch.empty(B, T, dtype=torch.long, device="meta")
    output = model(ids, labels=ids)
    assert output.logits.shape == (B, T, model.config.vocab_size)
    assert output.loss.is_meta


def twice(y, inputs):
    """Gradients of a gradient's size."""
    first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)


@ROUTERS
@pytest.mark.parametrize("kv_heads", [5, 1])
@pytest.mark.parametrize("given", ["nothing", "padding", "bias", "window", "context"])
@pytest.mark.parametrize("impl", ["reference", "dense", "gathered", "auto"])
def test_gradients_have_gradients(impl, given, kv_heads, router):
    causal, window = given not in ("bias", "context"), 3 if given == "window" else None
    layer = layer_of(impl=impl, router=router, num_kv_heads=kv_heads, causal=causal, window=window)
    x, bias, context = tokens(B, T, D), tokens(1, T, T), tokens(B, S, D)
    seen = torch.ones(T, T, dtype=torch.bool).tril().triu(-2 if window else -T)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :3] = given != "padding"
    of_layer, of_dense = {
        "nothing": ({}, {"seen": seen}),
        "window": ({}, {"seen": seen}),
        "padding": ({"mask": mask}, {"mask": mask, "seen": seen & mask[:, None, None]}),
        "bias": ({"attn_mask": bias}, {"bias": bias}),
        "context": ({"context": context}, {"context": context}),
    }[given]
    inputs = [x, *layer.q_proj.parameters(), layer.k_proj.weight, *layer.v_proj.parameters()]
    inputs += [*layer.router.parameters(), *(v for v in of_layer.values() if v.requires_grad)]
    with sdpa_kernel(SDPBackend.MATH):
        y, _ = layer(x, **of_layer)
        got = twice(y[mask], inputs)
    want = twice(dense(layer, x, **of_dense)[0][mask], inputs)
    assert_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("native_kernels")
@ROUTERS
@pytest.mark.parametrize("window", [None, 3])
def test_gradients_have_gradients_with_the_kernels_in_cpp(window, router):
    """Of a layer and of its router, whichever backend torch prefers."""
    options = HEADS | {"active_heads": 4, "causal": True, "window": window, "router": router}
    exact = layer_of(**options)
    layer = MoHAttention(D, **options, impl="native")
    layer.load_state_dict(exact.state_dict())
    x = tokens(B, T, D)
    seen = torch.ones(T, T, dtype=torch.bool).tril().triu(-2 if window else -T)
    want = twice(dense(exact, x, seen=seen)[0], [x, *exact.router.parameters()])
    narrow = x.detach().float().requires_grad_()
    got = twice(layer(narrow)[0], [narrow, *layer.router.parameters()])
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours.double() / theirs.std(), theirs / theirs.std(), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("native_kernels")
def test_a_gradient_with_a_graph_is_the_gradient():
    layer = MoHAttention(14, **SIZES, impl="native")
    x = torch.randn(B, T, 14, requires_grad=True)
    weights = [x, *layer.parameters()]
    y, routing = layer(x)
    loss = y.square().sum() + balance_loss(routing)
    kernels = torch.autograd.grad(loss, weights, retain_graph=True)
    again = torch.autograd.grad(loss, weights, create_graph=True)
    assert_close(again, kernels, rtol=1e-4, atol=1e-5)
