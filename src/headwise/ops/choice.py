"""Names to choose from: one check and one message for all of them."""

from typing import Any, get_args


def check_choice(field: str, value: object, choices: Any) -> None:
    """Refuse what the Literal `choices` does not hold.

    Raises:
        ValueError: Naming the field, the value and the choices.
    """
    if value not in get_args(choices):
        known = ", ".join(map(repr, get_args(choices)))
        raise ValueError(f"{field} is {value!r}; it must be one of {known}")
