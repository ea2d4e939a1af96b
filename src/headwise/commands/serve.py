"""`headwise serve`: a saved model behind the API of OpenAI, by the server of transformers."""

from pathlib import Path
from typing import Annotated

import torch
import tyro
from huggingface_hub.constants import HF_HUB_CACHE
from transformers.utils.import_utils import is_serve_available

from headwise.commands.generate import tokenizer_beside
from headwise.hf.batching import check_supported
from headwise.loading import load_config
from headwise.ops.fields import Count, check
from headwise.parsing import called

_PORTS = 65535
# Of the machine's memory, for keys and values where the model is on a CPU. transformers would take
# more than half of it, which is right for a card's.
_SHARE_OF_MEMORY = 0.25


def main(argv: list[str]) -> None:
    """Run the command."""
    called(serve, argv, "headwise serve")


def serve(
    directory: Annotated[Path, tyro.conf.Positional],
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
) -> None:
    """Serve a language model, converted or not, at an address that OpenAI's clients understand.

    Requests are batched continuously: they join and leave while others are under way. Their keys
    and values get most of a GPU's free memory, or on a CPU a quarter of the machine's.

    Args:
        directory: Directory of the model, with its tokenizer.
        host: Address to listen at; the default is this machine alone.
        port: Port to listen at, up to 65535.
        device: cpu, cuda, or auto.

    Raises:
        ValueError: If the directory holds no language model, or no tokenizer, or what serves is
            not installed or too old.
    """
    check("port", port, Count)
    if port > _PORTS:
        raise ValueError(f"port is {port}; it must be at most {_PORTS}")
    load_config(directory, "language model")
    tokenizer = tokenizer_beside(directory)
    if not is_serve_available():
        raise ValueError(
            "what serves models is not installed; the extra serve has it: "
            "`pip install 'headwise[serve]'`"
        )
    check_supported()
    from transformers.cli.serve import Serve

    on_cpu = device == "cpu" or (device == "auto" and not torch.accelerator.is_available())
    # The server lists what is kept from the hub, and answers with an error where nothing ever was.
    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    print(
        f"http://{host}:{port}/v1 serves the model {str(directory)!r}; Ctrl-C ends it", flush=True
    )
    if tokenizer.chat_template is None:
        print(
            "its tokenizer has no chat template: it answers /v1/completions, no chats", flush=True
        )
    Serve(
        force_model=str(directory),
        continuous_batching=True,
        device=device,
        host=host,
        port=port,
        cb_use_cuda_graph=False,
        cb_max_memory_percent=_SHARE_OF_MEMORY if on_cpu else None,
    )
