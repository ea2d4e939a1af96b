"""Language models at equal cost: dense, MoH, sparse MoE, MH-MoE, and MoH with MH-MoE."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from headwise.hf import MHMoEConfig, MoEConfig, MoHConfig, convert
from headwise.nn import Budget, HeadBudget
from headwise.ops.choice import check_choice
from headwise.parity import count_flops, match_sparse_moe

ModelName = Literal["dense", "moh", "moe", "mh_moe", "moh_mh_moe"]

LABELS: dict[str, str] = {
    "dense": "dense",
    "moh": "MoH",
    "moe": "sparse MoE",
    "mh_moe": "MH-MoE",
    "moh_mh_moe": "MoH + MH-MoE",
}


@dataclass(frozen=True, kw_only=True)
class LanguageModelRun:
    """A complete run: text, models, training, and where the results go. The defaults are the demo.

    Attributes:
        output: Directory of the run.
        data: Text: None for what every Python carries, a file, a directory, a dataset's name.
        models: Which models to train, at equal FLOPs per token.
        seeds: Each model is trained once with each.
        dim: Width of the models.
        num_layers: Layers.
        num_heads: Attention heads of a layer.
        mlp_dim: Hidden width of the dense model's MLPs, and of a sparse MoE's experts.
        vocab_size: Entries of the tokenizer that is trained on the text.
        sequence_length: Tokens that a model sees at once.
        shared_heads: MoH: heads always on, a count or a share of num_heads.
        active_heads: MoH: heads on for a token, shared ones included, a count or a share.
        num_experts: Experts of the sparse MoE; MH-MoE's number follows from equal parameters.
        top_k: Experts that a token of the sparse MoE goes to.
        mh_heads: MH-MoE: sub-tokens of a token.
        mh_top_k: MH-MoE: experts that a sub-token goes to.
        every: Experts replace the MLP of every `every`-th layer.
        balance_coefficient: Factor of the balance losses.
        steps: Optimizer steps.
        batch_size: Sequences of a step, over all processes.
        learning_rate: Peak, reached after warmup_steps, cosine to a tenth of it.
        warmup_steps: Steps of linear warmup.
        weight_decay: Of AdamW.
        precision: "fp32", or "bf16" for autocast.
        domain_exponent: A domain of n tokens is drawn with weight n**domain_exponent.
        eval_blocks_per_file: Blocks of a held-out file that count, spread over it.
        log_every: Steps between two points of the training curve.
        eval_every: Steps between two points of the validation curve.
        save_every: Steps between two checkpoints.
        sample_prompt: What the best model continues in the report.
        report_to: Trackers of transformers' Trainer: tensorboard, trackio, wandb, …
        resume: Go on with the run in `output`.
        overwrite: Delete the run in `output` and start anew.
    """

    output: Path = Path("runs/lm")
    data: str | None = None
    models: tuple[ModelName, ...] = get_args(ModelName)
    seeds: tuple[int, ...] = (0,)
    dim: int = 128
    num_layers: int = 4
    num_heads: int = 8
    mlp_dim: int = 344
    vocab_size: int = 4096
    sequence_length: int = 256
    shared_heads: Budget = 0.4
    active_heads: Budget = 0.75
    num_experts: int = 8
    top_k: int = 1
    mh_heads: int = 2
    mh_top_k: int = 2
    every: int = 2
    balance_coefficient: float = 0.01
    steps: int = 400
    batch_size: int = 8
    learning_rate: float = 3e-3
    warmup_steps: int = 40
    weight_decay: float = 0.1
    precision: Literal["fp32", "bf16"] = "fp32"
    domain_exponent: float = 0.5
    eval_blocks_per_file: int = 4
    log_every: int = 10
    eval_every: int = 100
    save_every: int = 100
    sample_prompt: str = "def "
    report_to: tuple[str, ...] = field(default=())
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.models or not self.seeds:
            raise ValueError("models and seeds must each hold at least one entry")
        for field_name in ("models", "seeds"):
            values = getattr(self, field_name)
            if len(set(values)) < len(values):
                raise ValueError(f"{field_name} is {values}; each entry may occur once")
        check_choice("precision", self.precision, Literal["fp32", "bf16"])
        for name in ("dim", "num_layers", "num_heads", "mlp_dim", "steps", "batch_size"):
            _check_at_least(1, name, getattr(self, name))
        for name in ("every", "log_every", "eval_every", "save_every", "eval_blocks_per_file"):
            _check_at_least(1, name, getattr(self, name))
        _check_at_least(2, "sequence_length", self.sequence_length)
        _check_at_least(257, "vocab_size", self.vocab_size)  # every byte, and the end of a text
        _check_at_least(0, "warmup_steps", self.warmup_steps)
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"num_heads is {self.num_heads}; dim = {self.dim} must be an even multiple of it"
            )
        if self.mh_heads < 1 or self.dim % self.mh_heads:
            raise ValueError(f"mh_heads is {self.mh_heads}; it must divide dim = {self.dim}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay is {self.weight_decay}; it must be at least 0")
        if not 0 <= self.domain_exponent <= 1:
            raise ValueError(f"domain_exponent is {self.domain_exponent}; it must lie in 0..1")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite are both set; choose one")
        HeadBudget.resolve(self.num_heads, shared=self.shared_heads, active=self.active_heads)
        for name in self.models:
            check_choice("models", name, ModelName)
            self.attention(name), self.mixture(name)

    def attention(self, name: str) -> MoHConfig | None:
        """What convert makes of the attention of that model."""
        if name not in ("moh", "moh_mh_moe"):
            return None
        return MoHConfig(
            shared=self.shared_heads,
            active=self.active_heads,
            balance_coefficient=self.balance_coefficient,
        )

    def mixture(self, name: str) -> MoEConfig | None:
        """What convert puts for MLPs of that model: experts of equal FLOPs and parameters."""
        if name == "moe":
            return MoEConfig(
                num_experts=self.num_experts,
                top_k=self.top_k,
                expert_dim=self.mlp_dim,
                normalize_top_k=self.top_k > 1,  # of a single choice the weight would always be 1
                balance_coefficient=self.balance_coefficient,
            )
        if name not in ("mh_moe", "moh_mh_moe"):
            return None
        match = match_sparse_moe(
            self.dim,
            self.num_experts,
            self.top_k,
            self.mlp_dim,
            heads=self.mh_heads,
            top_k_mh=self.mh_top_k,
        )
        return MHMoEConfig(
            num_heads=self.mh_heads,
            num_experts=match.num_experts,
            top_k=self.mh_top_k,
            expert_dim=match.expert_dim,
            normalize_top_k=self.mh_top_k > 1,
            balance_coefficient=self.balance_coefficient,
        )


def lm() -> LanguageModelRun:
    """Five small models on the text that every Python carries, in minutes on 2 cores."""
    return LanguageModelRun()


def build_model(run: LanguageModelRun, name: str, *, vocab_size: int, seed: int) -> PreTrainedModel:
    """The model of that name, with the dense model's FLOPs per token.

    Routers cost a little, heads that are off save a little: the dense MLPs that are left take up
    the difference, to the next multiple of 8 of their width.
    """
    target = _flops(run, _assemble(run, "dense", run.mlp_dim, vocab_size))
    flops = {
        width: _flops(run, _assemble(run, name, width, vocab_size))
        for width in (run.mlp_dim, run.mlp_dim + 8)
    }
    per_8 = flops[run.mlp_dim + 8] - flops[run.mlp_dim]
    missing = target - flops[run.mlp_dim]
    width = run.mlp_dim + (8 * round(missing / per_8) if per_8 else 0)
    if width < 8:
        raise ValueError(f"mlp_dim is {run.mlp_dim}, too small for {name} to cost what dense does")
    torch.manual_seed(seed)
    return _assemble(run, name, width, vocab_size, device="cpu")


def _assemble(
    run: LanguageModelRun, name: str, mlp_dim: int, vocab_size: int, *, device: str = "meta"
) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=run.dim,
        intermediate_size=mlp_dim,
        num_hidden_layers=run.num_layers,
        num_attention_heads=run.num_heads,
        max_position_embeddings=run.sequence_length,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    attention, mixture = run.attention(name), run.mixture(name)
    with torch.device(device):
        model = LlamaForCausalLM(config)
        if attention is None and mixture is None:
            return model
        return convert(model, attention=attention, mlp=mixture, every=run.every)


def _flops(run: LanguageModelRun, model: PreTrainedModel) -> float:
    return sum(count_flops(model, sequence_length=run.sequence_length).values())


def _check_at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
