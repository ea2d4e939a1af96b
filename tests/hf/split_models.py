"""What a converted model says as a whole and split over processes: run in each of them."""

import json
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from headwise import load, record_routing, replay_routing

# Four rows of seven tokens, of a vocabulary of 31.
IDS = 3 + torch.randperm(28, generator=torch.Generator().manual_seed(1)).view(4, 7)


def compare(rank: int, root: Path, layouts: dict[str, dict], models: dict[str, list[str]]) -> None:
    """By how much each model in its layouts differs from itself as a whole, into a file a rank."""
    found = {}
    for name, of_model in models.items():
        for layout in of_model:
            try:
                found[f"{name}, {layout}"] = _differences(root / name, **layouts[layout])
            except ValueError as error:
                found[f"{name}, {layout}"] = str(error)
    (root / f"found-{rank}.json").write_text(json.dumps(found))


def _differences(path: Path, **options: object) -> dict[str, float]:
    """By how much the model differs from itself as a whole; of each kind of values the most."""
    sizes = {name: x for name, x in options.items() if name != "experts_implementation"}
    others = {name: x for name, x in options.items() if name not in sizes}
    config = DistributedConfig(**sizes)
    whole = load(path, **others)
    split = load(path, distributed_config=config, **others)
    # Every row of processes has a part of the batch.
    parts = IDS.chunk(config.dp_size)
    mine = distributed.get_rank() // config.tp_size
    found = {"parts": sum(isinstance(p, DTensor) for p in split.parameters())}
    with torch.no_grad(), record_routing(whole) as selection, record_routing(split) as routings:
        found["outputs"] = apart(whole(parts[mine]).logits, split(parts[mine]).logits)
    found["routers"] = len(routings)
    for router, routing in routings.items():
        assert torch.equal(routing.indices, selection[router].indices)
        found["outputs"] = max(found["outputs"], apart(routing.weights, selection[router].weights))
    if config.dp_size == 1:
        with torch.no_grad(), replay_routing(split, dict(selection)):
            found["outputs"] = max(found["outputs"], apart(whole(IDS).logits, split(IDS).logits))
    found |= compare_training(whole, split, parts, mine)
    saved = path.parent / "saved" / path.name
    split.save_pretrained(saved)
    distributed.barrier()
    again, before = load(saved).state_dict(), load(path).state_dict()
    assert again.keys() == before.keys()
    found["saved"] = max(apart(again[name], before[name]) for name in before)
    distributed.barrier()
    return found


def compare_training(
    whole: torch.nn.Module, split: torch.nn.Module, parts: tuple, mine: int
) -> dict[str, float]:
    """A backward pass: of the whole model over all parts of a batch, of the split over one each."""
    losses = [_loss(whole, part) for part in parts]
    (sum(losses) / len(parts)).backward()
    loss = _loss(split, parts[mine])
    loss.backward()
    of_whole, of_split = _gradients(whole), _gradients(split)
    assert of_whole.keys() == of_split.keys()
    gradients = max(apart(of_whole[name], of_split[name]) for name in of_whole)
    return {"loss": apart(losses[mine], loss), "gradients": gradients}


def _loss(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model.train()(ids, labels=ids).loss


def _gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    named = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    return {name: whole_of(gradient) for name, gradient in named}


def whole_of(x: Tensor) -> Tensor:
    """A tensor that may be split over processes, whole; all of them must come here."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, of values about as large as 1."""
    return ((a - b).abs().max() / a.abs().max().clamp_min(1)).item()
