"""What each device holds and sends where a model with routed heads is split, by formula."""

from dataclasses import dataclass

from headwise.ops.fields import Count, check_fields

_ROUTING_BYTES = 4  # scores and gates travel in float32


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The sizes of a decoder as Llama is one: gated MLPs, keys shared by query heads, no biases.

        parameters:  2·V·D + L·(2·D·H·C + 2·D·G·C + 3·D·F) + (2·L + 1)·D      C = D / H

    Attributes:
        dim: D, width of the tokens.
        num_layers: L.
        num_heads: H, query heads; divides dim.
        num_kv_heads: G, heads of keys and values; divides num_heads.
        mlp_dim: F, hidden width of the MLPs.
        vocab_size: V; input and output embeddings are two matrices.

    Raises:
        ValueError: If a size is no int or below 1, or heads do not divide.
    """

    dim: Count
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    mlp_dim: Count
    vocab_size: Count

    def __post_init__(self) -> None:
        check_fields(self)
        for name, divides, whole in (
            ("num_heads", self.num_heads, "dim"),
            ("num_kv_heads", self.num_kv_heads, "num_heads"),
        ):
            if getattr(self, whole) % divides:
                raise ValueError(
                    f"{name} is {divides}; it must divide {whole} = {getattr(self, whole)}"
                )

    @property
    def kv_dim(self) -> int:
        """G·C, the keys of a token in a layer; its values are as many."""
        return self.num_kv_heads * self.dim // self.num_heads

    @property
    def layer_matrices(self) -> int:
        """The parameters of a layer without its norms."""
        return self.dim * (2 * self.dim + 2 * self.kv_dim + 3 * self.mlp_dim)

    @property
    def matrices(self) -> int:
        """The parameters that tensor parallelism splits: all but those of norms."""
        return 2 * self.vocab_size * self.dim + self.num_layers * self.layer_matrices

    @property
    def norms(self) -> int:
        """The parameters that each process of tensor parallelism has."""
        return (2 * self.num_layers + 1) * self.dim


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """A decoder with routed heads on tp · fsdp devices, split by transformers' plans.

    tp devices share the heads, the MLPs and the vocabulary, and read the same batch. fsdp such
    groups share all weights, gradients and the state of Adam, and read a batch each. Each of
    a ring of n devices sends 2·(n - 1)/n times what is reduced over it, and (n - 1)/n times what is
    gathered, or reduced and scattered.

    Routers are left out: of one that learns each device holds (H + 2)·D parameters a layer.

    Attributes:
        decoder: The model.
        tp: Devices that share its heads; divides its heads.
        fsdp: Groups that share its weights in training.

    Raises:
        ValueError: If a size is no int or below 1, or tp does not divide the heads.
    """

    decoder: Decoder
    tp: Count = 1
    fsdp: Count = 1

    def __post_init__(self) -> None:
        check_fields(self)
        heads, kv_heads = self.decoder.num_heads, self.decoder.num_kv_heads
        if kv_heads % self.tp:
            raise ValueError(
                f"tp is {self.tp}; it must divide the {kv_heads} key and value heads (and so the "
                f"{heads} query heads)"
            )

    @property
    def parameters(self) -> float:
        """The parameters that a device computes with, where fsdp has gathered them."""
        return self.decoder.matrices / self.tp + self.decoder.norms

    def weight_bytes(self, bytes_each: int = 2) -> float:
        """The weights on a device for inference, which FSDP is not for."""
        return bytes_each * self.parameters

    def cache_bytes(self, tokens: Count, bytes_each: int = 2) -> float:
        """Keys and values of so many tokens on a device: 2·L·G·C/tp of each token.

        They do not depend on routing: any later token may switch on any head.
        """
        return 2 * self.decoder.num_layers * self.decoder.kv_dim / self.tp * tokens * bytes_each

    def training_bytes(self, bytes_each: int = 4) -> float:
        """Weights, gradients and both moments of Adam on a device, and what is gathered at a time.

        4 · parameters / fsdp, and with fsdp above 1 two layers, and the output embedding, which
        stays for the backward pass. Activations come on top.
        """
        decoder = self.decoder
        gathered = 2 * decoder.layer_matrices + decoder.vocab_size * decoder.dim
        held = 4 * self.parameters / self.fsdp + (self.fsdp > 1) * gathered / self.tp
        return bytes_each * held

    def routing_traffic(self) -> float:
        """Bytes that a device sends in a forward for routers by query norm: H lengths a layer.

        Routers that read the tokens decide alike on every device and send nothing. In a backward
        pass the gradients of the gates travel, which are as many.
        """
        values = self.decoder.num_layers * self.decoder.num_heads
        return _share(self.tp) * values * _ROUTING_BYTES

    def token_traffic(self, bytes_each: int = 2) -> float:
        """Bytes that a device sends for a token in a forward: 2·L + 1 sums of D values, the logits.

        The sums are those behind attention and MLP of each layer and behind the embedding. What
        routers by query norm send is in it.
        """
        decoder = self.decoder
        sums = 2 * (2 * decoder.num_layers + 1) * decoder.dim
        return _share(self.tp) * (sums + decoder.vocab_size) * bytes_each + self.routing_traffic()

    def step_traffic(self, tokens: Count, bytes_each: int = 4) -> float:
        """Bytes that a device sends in a training step of so many tokens in each of fsdp batches.

        For each token a forward and in the backward pass 5·L + 1 sums of D gradients: of what each
        of five matrices of a layer reads, and the output embedding. And once, whatever the number
        of tokens, the weights are gathered for forward and backward, and gradients scattered.
        """
        decoder = self.decoder
        sums = 2 * (5 * decoder.num_layers + 1) * decoder.dim
        backward = _share(self.tp) * sums * bytes_each + self.routing_traffic()
        of_tokens = tokens * (self.token_traffic(bytes_each) + backward)
        return of_tokens + 3 * _share(self.fsdp) * self.parameters * bytes_each


def _share(devices: int) -> float:
    """Of what all devices of a ring have, the share of the others."""
    return (devices - 1) / devices
