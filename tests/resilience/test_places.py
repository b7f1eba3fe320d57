"""Which places of a machine have a rank after some are lost, and after they work again."""

from megalm.resilience.places import Places


def any_from(least: int, wanted: int):
    return lambda places: min(places, wanted) if places >= least else 0


def lose_for_good(places: Places, *ranks: int) -> list[int]:
    places.lose(ranks, trained=True)
    return places.lose(ranks, trained=False)


def test_a_place_is_out_when_its_rank_was_lost_twice_and_trained_nothing_in_between():
    places = Places(4, 0, any_from(1, 4))
    assert places.lose([3], trained=True) == [] and places.active == [0, 1, 2, 3]
    assert places.lose([3], trained=True) == []
    assert places.lose([3], trained=False) == [3]
    assert places.active == [0, 1, 2] and places.is_short


def test_a_rank_that_is_lost_once_at_its_start_keeps_its_place():
    places = Places(2, 0, any_from(1, 2))
    assert places.lose([1], trained=False) == [] and places.lose([0], trained=False) == []
    assert places.lose([0], trained=False) == [0]


def test_ranks_are_numbered_anew_over_the_places_that_are_left():
    places = Places(4, 0, any_from(1, 4))
    assert lose_for_good(places, 0) == [0] and places.active == [1, 2, 3]
    assert lose_for_good(places, 0) == [1] and places.active == [2, 3]


def test_a_spare_takes_over_and_the_run_keeps_its_size():
    places = Places(2, 1, any_from(2, 2))
    assert lose_for_good(places, 0) == [0]
    assert places.active == [1, 2] and not places.is_short


def test_nothing_is_out_where_too_few_would_be_left():
    places = Places(2, 0, any_from(2, 2))
    assert lose_for_good(places, 1) == [] and places.active == [0, 1]


def test_the_layout_decides_how_many_of_those_left_have_a_rank():
    places = Places(4, 0, lambda places: places // 2 * 2)
    assert lose_for_good(places, 3) == [3] and places.active == [0, 1]
    assert lose_for_good(places, 0) == [0] and places.active == [1, 2]
    assert places.take_back([0]) is False and places.active == [1, 2]
    assert places.take_back([3]) is True and places.active == [0, 1, 2, 3]


def test_what_works_again_may_be_lost_once_before_it_is_out_again():
    places = Places(3, 0, any_from(1, 3))
    lose_for_good(places, 1, 2)
    assert places.active == [0]
    assert places.take_back([1]) and places.active == [0, 1] and places.out == [2]
    assert places.lose([1], trained=False) == []
