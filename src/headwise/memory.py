"""What no memory here can hold, found out before anything is built."""

import psutil
import torch


def check_memory(least_bytes: float, what: str, **fields: object) -> None:
    """Refuse sizes of which a part alone needs more memory than the machine has.

    Args:
        least_bytes: What that part needs at least.
        what: The part, in words.
        fields: The sizes by name, for the error.

    Raises:
        ValueError: Naming the fields.
    """
    if least_bytes > _most_bytes():
        sizes = ", ".join(f"{name} is {value}" for name, value in fields.items())
        raise ValueError(
            f"{sizes}: {what} alone would need {least_bytes / 2**30:,.0f} GiB of memory, and there "
            f"are {_most_bytes() / 2**30:,.0f} GiB here; it must be less"
        )


def _most_bytes() -> int:
    """Of the machine's memory, or of a GPU's where that is larger."""
    gpus = [
        torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())
    ]
    return max(psutil.virtual_memory().total, *gpus, 0)
