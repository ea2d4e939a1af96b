import pytest

from headwise.data.sampling import spread


@pytest.mark.parametrize(
    ("things", "most", "taken"), [(10, 4, [0, 3, 6, 9]), (3, 7, [0, 1, 2]), (5, 1, [0]), (0, 4, [])]
)
def test_a_few_lie_evenly(things, most, taken):
    assert spread(things, most).tolist() == taken
