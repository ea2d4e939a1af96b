"""What a trained model is worth: perplexity file by file, hits, and who does the work."""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwise.analysis.documents import DocumentMeter
from headwise.analysis.experts import count_overlap
from headwise.analysis.measure import LoadMeter, count_experts, count_heads, heads_on
from headwise.analysis.records import ExpertLoads, HeadLoads, RoutedText
from headwise.data.sampling import spread
from headwise.data.token_files import Tokens
from headwise.hf import record_routing
from headwise.nn import HeadRouter
from headwise.ops import ExpertRouting, HeadRouting, Routing
from headwise.progress import followed


class FileLoss(NamedTuple):
    """Summed negative log-likelihood of a file's tokens, in nats."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean."""
        return float(np.exp(self.nats / self.tokens))


class Perplexity(NamedTuple):
    """Of a domain: over all its tokens, and the quartiles of its files."""

    value: float
    quartile_1: float
    quartile_3: float


def perplexity(losses: list[FileLoss]) -> Perplexity:
    """Perplexity over all tokens of the files, with the spread over the files."""
    total = FileLoss(sum(x.nats for x in losses), sum(x.tokens for x in losses))
    low, high = np.quantile([x.perplexity for x in losses], [0.25, 0.75])
    return Perplexity(total.perplexity, float(low), float(high))


class RoutingStatistics:
    """Collects what a model's heads and experts do, domain by domain."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.heads = LoadMeter(count_heads)
        self.experts = LoadMeter(count_experts)
        self.overlaps = LoadMeter(count_overlap)
        self.heads_by_document = DocumentMeter()
        self.experts_by_document = DocumentMeter()

    def add(
        self,
        domain: str,
        routings: dict[str, Routing],
        documents: Sequence[Hashable] | None = None,
    ) -> None:
        """Count the routings of one forward.

        Args:
            domain: Where its texts or images are from.
            routings: What `record_routing` collected.
            documents: Of each row of the batch, the file or the image that it is from, by which
                domains are compared beyond chance; None leaves that out.
        """
        heads, experts = _heads_and_experts(routings)
        if heads:
            self.heads.add(domain, heads.values())
        if experts:
            self.experts.add(domain, experts.values())
            self.overlaps.add(domain, experts.values())
            self._expert_layers = [_layer(name) for name in experts]
            self._top_k = next(iter(experts.values())).indices.shape[-1]
        if heads and documents is not None:
            self.heads_by_document.add(domain, documents, heads.values())
        if experts and documents is not None:
            self.experts_by_document.add(domain, documents, experts.values())

    def head_loads(self) -> HeadLoads | None:
        """None for a model whose heads are not routed."""
        if not (loads := self.heads.by_domain()):
            return None
        routers = [m for m in self.model.modules() if isinstance(m, HeadRouter)]
        shared = [list(router.budget.which_shared) for router in routers]
        return HeadLoads(shared, loads, self.heads_by_document.difference())

    def expert_loads(self) -> ExpertLoads | None:
        """None for a model without experts."""
        counts, overlaps = self.experts.counts(), self.overlaps.counts()
        if not counts:
            return None
        return ExpertLoads(
            self._expert_layers,
            self.experts.by_domain(),
            top_k=self._top_k,
            assignments={domain: [c.total for c in layers] for domain, layers in counts.items()},
            overlap={domain: [c.share() for c in layers] for domain, layers in overlaps.items()},
            difference=self.experts_by_document.difference(),
        )


@torch.no_grad()
def file_losses(
    model: PreTrainedModel,
    files: dict[str, Tokens],
    *,
    sequence_length: int,
    max_blocks: int,
    batch_size: int = 8,
    observe: Callable[[dict[str, Routing], list[str]], None] = lambda *_: None,
) -> list[FileLoss]:
    """Loss of each file over at most `max_blocks` blocks, spread evenly over the file.

    Args:
        model: Any causal language model; it is put into eval mode.
        files: Tokens by file name; files of fewer than 2 tokens are left out.
        sequence_length: Tokens of a block; each block is read on its own.
        max_blocks: Blocks of a file.
        batch_size: Blocks at a time; the result does not depend on it.
        observe: Called with the routings of every forward and, of each row of its batch, the name
            of the file.
    """
    model.eval()
    blocks = [
        (file, block)
        for file, tokens in enumerate(files.values())
        for block in _spread(tokens, sequence_length, max_blocks)
    ]
    names, sums = list(files), np.zeros((len(files), 2))
    with record_routing(model) as routings:
        starts = range(0, len(blocks), batch_size)
        for start in followed(starts, "held-out text", total=len(starts)):
            batch = blocks[start : start + batch_size]
            nats = _token_losses(model, [block for _, block in batch])
            for (file, block), row in zip(batch, nats, strict=True):
                sums[file] += (row.sum().item(), len(block) - 1)
            observe(routings, [names[file] for file, _ in batch])
    return [FileLoss(nats, int(tokens)) for nats, tokens in sums if tokens > 0]


def count_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How many labels are the best of the logits, and among the best five, [2]."""
    best = logits.topk(min(5, logits.shape[-1])).indices == labels.unsqueeze(-1)
    return torch.stack([best[..., 0].sum(), best.sum()]).cpu()


@torch.no_grad()
def routed_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, domain: str, tokens: Tokens
) -> RoutedText:
    """A passage with the heads that are on for each of its tokens."""
    ids = torch.from_numpy(tokens.astype(np.int64)).to(model.device)
    with record_routing(model) as routings:
        model(ids.unsqueeze(0))
    heads, _ = _heads_and_experts(routings)
    return RoutedText(
        domain=domain,
        tokens=[tokenizer.decode([i]) for i in tokens.tolist()],
        heads_on=[heads_on(routing) for routing in heads.values()],
    )


def _token_losses(model: PreTrainedModel, blocks: list[Tokens]) -> Tensor:
    longest = max(len(block) for block in blocks)
    ids = torch.zeros(len(blocks), longest, dtype=torch.long)
    real = torch.zeros(len(blocks), longest, dtype=torch.bool)
    for row, block in enumerate(blocks):
        ids[row, : len(block)] = torch.from_numpy(block.astype(np.int64))
        real[row, : len(block)] = True
    ids, real = ids.to(model.device), real.to(model.device)
    logits = model(input_ids=ids, attention_mask=real.long()).logits[:, :-1].float()
    nats = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return nats.masked_fill(~real[:, 1:], 0)


def _spread(tokens: Tokens, length: int, max_blocks: int) -> list[Tokens]:
    blocks = [tokens[i : i + length] for i in range(0, len(tokens), length)]
    blocks = [block for block in blocks if len(block) > 1]
    return [blocks[i] for i in spread(len(blocks), max_blocks)]


def _heads_and_experts(
    routings: dict[str, Routing],
) -> tuple[dict[str, HeadRouting], dict[str, ExpertRouting]]:
    heads = {name: r for name, r in routings.items() if isinstance(r, HeadRouting)}
    return heads, {name: r for name, r in routings.items() if isinstance(r, ExpertRouting)}


def _layer(router_name: str) -> int:
    return next(int(part) for part in router_name.split(".") if part.isdigit())
