"""The order of samples depends on seed and position alone."""

from quantune.data.order import sample_index, step_indices


def test_every_epoch_visits_every_sample_once_in_an_order_of_its_own():
    count, batch = 10, 4
    stream = [index for step in range(15) for index in step_indices(step, batch, count, 1, True)]
    epochs = [stream[start : start + count] for start in range(0, len(stream), count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_the_order_is_a_pure_function_of_its_arguments():
    later = step_indices(1000, 4, 37, 5, True)
    step_indices(3, 4, 37, 6, True)
    assert step_indices(1000, 4, 37, 5, True) == later
    assert step_indices(1000, 4, 37, 6, True) != later


def test_the_order_is_the_same_in_every_version():
    assert step_indices(0, 10, 10, 42, True) == [3, 7, 1, 5, 6, 8, 2, 4, 9, 0]


def test_without_shuffling_the_order_is_that_of_the_files():
    assert step_indices(2, 4, 10, 0, False) == [8, 9, 0, 1]


def test_the_shares_of_any_number_of_ranks_make_the_same_step():
    whole = step_indices(7, 8, 37, 5, True)
    for world_size in (1, 2, 4, 8):
        share = 8 // world_size
        positions = [range(7 * 8 + rank * share, 7 * 8 + (rank + 1) * share) for rank in range(world_size)]
        assert [sample_index(position, 37, 5, True) for part in positions for position in part] == whole
