"""Which of many things are taken, by hand."""

import numpy as np
import pytest

from headwise.data.sampling import halves, halves_of_classes, spread


@pytest.mark.parametrize(
    ("things", "most", "taken"), [(10, 4, [0, 3, 6, 9]), (3, 7, [0, 1, 2]), (5, 1, [0]), (0, 4, [])]
)
def test_a_few_lie_evenly(things, most, taken):
    assert spread(things, most).tolist() == taken


@pytest.mark.parametrize(
    ("sizes", "first", "second"),
    [
        # 11 goes to the second half; 7 to the first, 5 too (7 < 11), and 2 to the second (12 > 11).
        ([5, 2, 11, 7], [0, 3], [1, 2]),
        ([3, 3, 3], [1], [0, 2]),  # equal ones in their order, the second half before
        ([1, 1, 99], [0, 1], [2]),
        ([7], [], [0]),
        ([], [], []),
    ],
)
def test_halves_are_filled_with_the_largest_first(sizes, first, second):
    assert halves(sizes) == (first, second)


@pytest.mark.parametrize(
    ("classes", "first", "second"),
    [
        ([0, 0, 0, 0, 1, 1], [1, 3, 5], [0, 2, 4]),  # class by class
        ([0, 1, 0, 1], [2, 3], [0, 1]),  # in turns: every second one would be of one class
        ([2, 2, 0, 1, 0], [0, 4], [1, 2, 3]),
        ([1], [], [0]),
    ],
)
def test_halves_have_every_second_of_each_class(classes, first, second):
    found = halves_of_classes(np.array(classes))
    assert [half.tolist() for half in found] == [first, second]
