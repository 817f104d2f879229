from __future__ import annotations

from tests.fuzz.conftest import Chance, make_chances


def test_a_seed_gives_the_same_choices_again():
    assert Chance("3-5").random() == Chance("3-5").random() != Chance("3-6").random()
    assert repr(Chance("3-5")) == "Chance('3-5')"


def test_a_number_goes_on_until_the_time_is_over_and_a_case_stands_alone():
    assert [chance.name for chance in make_chances("3", 0)] == ["3-0"]
    assert [chance.name for chance in make_chances("3-17", 60)] == ["3-17"]
    chances = make_chances("0", 60)
    assert [next(chances).name for _ in range(3)] == ["0-0", "0-1", "0-2"]
