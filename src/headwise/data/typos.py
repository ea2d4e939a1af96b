"""Text as it is typed in a hurry."""

import random
from collections.abc import Sequence

from tokenizers import Tokenizer

from headwise.data.text import tokenize
from headwise.data.token_files import Tokens

# Letters of a US keyboard, row by row; a key lies below the gap between two keys of the row above.
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
# From a key to those beside it: so many rows down, so many keys to the right.
_STEPS = {(0, -1), (0, 1), (-1, 0), (-1, 1), (1, -1), (1, 0)}


def mistype(text: str, share: float, *, seed: int) -> str:
    """The text with typing errors, the same ones for the same seed.

    Each of the letters a to z and A to Z is mistyped with probability `share`, in one of four ways
    that are equally likely: replaced by a letter that lies beside it on a US keyboard, doubled,
    left out, or swapped with the letter behind it (in one of the other three, where none or the
    same is behind it). What is no such letter stays. A letter that comes forward in a swap is not
    mistyped again.

    Args:
        text: Any text.
        share: Of the letters, 0 to 1.
        seed: Of the choice of letters and errors.

    Raises:
        ValueError: If the share does not lie in 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; it must lie in 0..1")
    generator = random.Random(seed)
    typed, at = [], 0
    while at < len(text):
        letter, behind = text[at], text[at + 1 : at + 2]
        at += 1
        if letter not in _BESIDE or generator.random() >= share:
            typed.append(letter)
            continue
        ways = [generator.choice(_BESIDE[letter]), 2 * letter, ""]
        swaps = behind in _BESIDE and behind != letter
        if swaps:
            ways.append(behind + letter)
        typed.append(generator.choice(ways))
        at += swaps and typed[-1] == behind + letter
    return "".join(typed)


def mistype_tokens(tokenizer: Tokenizer, tokens: Tokens, share: float, *, end: int) -> Tokens:
    """What the tokens say, mistyped by seed 0 and cut into tokens anew, with `end` at the end.

    Raises ValueError where `mistype` does.
    """
    text = tokenizer.decode(tokens.tolist())
    return tokenize(tokenizer, [mistype(text, share, seed=0)], end=end)


def check_typos(field: str, shares: Sequence[float]) -> None:
    """Raises ValueError unless each share leaves some letters as they are, but not all."""
    for share in shares:
        if not 0 < share < 1:
            raise ValueError(f"{field} is {share}; it must lie in 0..1, both left out")
        if shares.count(share) > 1:
            raise ValueError(f"{field} is {shares}; each entry may occur once")


def _beside() -> dict[str, str]:
    """The letters that lie beside each letter, in its row and in those above and below."""
    keys = {key: (row, i) for row, keys in enumerate(_ROWS) for i, key in enumerate(keys)}
    beside = {
        key: "".join(other for other, (r, i) in keys.items() if (r - row, i - column) in _STEPS)
        for key, (row, column) in keys.items()
    }
    return beside | {key.upper(): others.upper() for key, others in beside.items()}


_BESIDE = _beside()
