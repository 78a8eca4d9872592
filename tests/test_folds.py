import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from custom.evaluation.splits.folds import few_shot, split_folds

RECORDS = [
    {"patient": f"p{index // 2:02d}", "image": f"scan{index:02d}.nii.gz"} for index in range(46)
]  # 23 patients


def patients(records) -> set[str]:
    return {record["patient"] for record in records}


def test_every_patient_is_held_back_once_with_all_scans():
    folds = split_folds(RECORDS)
    assert len(folds) == 5
    assert sorted(record["image"] for fold in folds for record in fold) == [
        record["image"] for record in RECORDS
    ]
    assert sorted(len(patients(fold)) for fold in folds) == [4, 4, 5, 5, 5]
    assert set.union(*map(patients, folds)) == patients(RECORDS)  # 4 + 4 + 5 + 5 + 5 of 23: nobody twice


@settings(deadline=None)
@given(st.permutations(RECORDS), st.integers(0, 3))
def test_order_of_the_list_does_not_matter(shuffled, seed):
    assert split_folds(shuffled, 4, seed) == split_folds(RECORDS, 4, seed)
    assert few_shot(shuffled, 5, seed) == few_shot(RECORDS, 5, seed)


def test_another_seed_is_another_deal():
    assert split_folds(RECORDS, seed=0) != split_folds(RECORDS, seed=1)
    assert few_shot(RECORDS, 5, seed=0) != few_shot(RECORDS, 5, seed=1)


def test_the_deal_is_the_same_on_every_machine():
    letters = [{"patient": letter} for letter in "abcdefgh"]
    # sorted("abcdefgh", key=lambda p: hashlib.sha256(f"folds 0\0{p}".encode()).hexdigest())[::2]
    assert patients(split_folds(letters, 2)[0]) == set("abef")
    # sorted("abcdefgh", key=lambda p: hashlib.sha256(f"few-shot 0\0{p}".encode()).hexdigest())[:3]
    assert patients(few_shot(letters, 3)) == set("bgh")


@settings(deadline=None)
@given(st.integers(1, 23), st.integers(1, 23), st.integers(0, 5))
def test_smaller_subsets_are_part_of_larger_ones(first, second, seed):
    small, large = sorted((first, second))
    assert patients(few_shot(RECORDS, small, seed)) <= patients(few_shot(RECORDS, large, seed))
    assert len(patients(few_shot(RECORDS, small, seed))) == small


@pytest.mark.parametrize("share, count", [(0.01, 1), (0.05, 1), (0.1, 2), (0.2, 5), (0.5, 12), (1.0, 23)])
def test_a_share_is_rounded_to_whole_patients_and_never_none(share, count):
    chosen = few_shot(RECORDS, share)
    assert len(patients(chosen)) == count
    assert len(chosen) == 2 * count  # both scans of each
    assert chosen == few_shot(RECORDS, count)


@pytest.mark.parametrize("amount", [0, -1, 24, 0.0, 1.5, -0.1, float("nan"), True, "10%"])
def test_amounts_out_of_range_are_refused(amount):
    with pytest.raises(ValueError, match=r"amount|share|Share|Cannot choose"):
        few_shot(RECORDS, amount)


def test_ten_percent_written_as_ten_is_explained():
    with pytest.raises(ValueError, match=r"got 10.0; 10 % is 0.1, ten patients are 10"):
        few_shot(RECORDS, 10.0)


def test_impossible_deals_are_refused():
    with pytest.raises(ValueError, match=r"23 patient\(s\) into 24 folds"):
        split_folds(RECORDS, 24)
    with pytest.raises(ValueError, match="into 1 folds"):
        split_folds(RECORDS, 1)
    for nameless in ({"image": "a.nii.gz"}, {"patient": None}, {"patient": ""}):
        with pytest.raises(ValueError, match="Record 46 names no patient"):
            split_folds([*RECORDS, nameless])
