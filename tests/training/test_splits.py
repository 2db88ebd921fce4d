"""Splits: nnU-Net's folds, subjects kept together, users' own files honoured."""

import json

import pytest

from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.training.splits import choose_split, load_groups, load_or_make_splits, make_splits, take_subset

NAMES = [f"case_{i:03d}" for i in range(23)]
ALONE = {name: name for name in NAMES}


def test_folds_are_those_of_sklearn_and_nnunet():
    selection = pytest.importorskip("sklearn.model_selection")
    reference = selection.KFold(n_splits=5, shuffle=True, random_state=12345).split(NAMES)
    for split, (train, val) in zip(make_splits(NAMES, ALONE), reference, strict=True):
        assert split.train == tuple(NAMES[i] for i in train)
        assert split.val == tuple(NAMES[i] for i in val)


def test_folds_partition_the_cases():
    splits = make_splits(NAMES, ALONE)
    assert sorted(name for split in splits for name in split.val) == NAMES
    for split in splits:
        assert set(split.train) | set(split.val) == set(NAMES)
        assert not set(split.train) & set(split.val)


@pytest.mark.parametrize("scheme", ["5-fold", "80-10-10"])
def test_a_subject_stays_on_one_side(scheme):
    groups = {name: f"subject_{i // 3}" for i, name in enumerate(NAMES)}
    for split in make_splits(NAMES, groups, scheme):
        sides = [{groups[name] for name in side} for side in (split.train, split.val, split.test)]
        assert sides[0].isdisjoint(sides[1] | sides[2])
        assert sides[1].isdisjoint(sides[2])


def test_eighty_ten_ten():
    names = [f"c{i:03d}" for i in range(100)]
    (split,) = make_splits(names, {n: n for n in names}, "80-10-10")
    assert (len(split.train), len(split.val), len(split.test)) == (80, 10, 10)
    assert sorted(split.train + split.val + split.test) == names


def test_few_cases():
    assert len(make_splits(NAMES[:3], ALONE)) == 3
    with pytest.raises(ConfigError, match="fold 'all'"):
        make_splits(NAMES[:1], ALONE)
    assert choose_split(None, "all", NAMES[:1]).train == ("case_000",)


def test_written_once_then_honoured(tmp_path):
    made = load_or_make_splits(tmp_path, NAMES, ALONE)
    assert load_or_make_splits(tmp_path, NAMES, ALONE) == made
    (tmp_path / "splits.json").write_text(json.dumps([{"train": NAMES[:2], "val": NAMES[2:3]}]))
    (own,) = load_or_make_splits(tmp_path, NAMES, ALONE)
    assert own.train == tuple(NAMES[:2])
    with pytest.raises(ConfigError, match=r"fold must be 0\.\.0 or 'all', got '1'"):
        choose_split([own], "1", NAMES)


def test_nnunets_own_file_is_honoured(tmp_path):
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": NAMES[:5], "val": NAMES[5:6]}]))
    assert load_or_make_splits(tmp_path, NAMES, ALONE)[0].val == (NAMES[5],)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"train": ["nobody"], "val": [NAMES[0]]}], "unknown cases: nobody"),
        ([{"train": NAMES[:2], "val": NAMES[1:3]}], "in both train and val"),
        ([{"train": NAMES[:2], "val": []}], "needs training and validation"),
        ({"train": []}, "must hold a list"),
    ],
)
def test_unusable_splits_are_refused(tmp_path, content, message):
    (tmp_path / "splits.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=message):
        load_or_make_splits(tmp_path, NAMES, ALONE)


def test_a_users_split_may_not_share_a_subject(tmp_path):
    (tmp_path / "splits.json").write_text(json.dumps([{"train": NAMES[:2], "val": NAMES[2:3]}]))
    with pytest.raises(DatasetError, match="subject or case s in both"):
        load_or_make_splits(tmp_path, NAMES, {**ALONE, NAMES[0]: "s", NAMES[2]: "s"})


def test_groups_file(tmp_path):
    (tmp_path / "groups.csv").write_text("case,subject\ncase_000,a\ncase_001,a\nother,b\n")
    groups = load_groups(tmp_path / "groups.csv", NAMES)
    assert groups["case_000"] == groups["case_001"] == "a"
    assert groups["case_002"] == "case_002"
    (tmp_path / "bad.csv").write_text("id,person\n1,2\n")
    with pytest.raises(DatasetError, match="no column case, subject; it has id, person"):
        load_groups(tmp_path / "bad.csv", NAMES)
    untidy = tmp_path / "untidy.csv"
    untidy.write_text("\ufeffcase,subject\n case_000 , a\ncase_001,a\ncase_002,\ncase_003,\n", encoding="utf-8")
    groups = load_groups(untidy, NAMES)
    assert groups["case_000"] == groups["case_001"] == "a"
    untidy.write_text(untidy.read_text(encoding="utf-8").replace(",", ";"), encoding="utf-8")
    assert load_groups(untidy, NAMES) == groups
    assert groups["case_002"] != groups["case_003"]
    for content, message in (
        (b"case,subject\ncase_000.nii.gz,a\n", "names none of the"),
        (
            b"case,subject\ncase_000,a\ncase_000,b\n",
            "two things about case case_000: subject 'a' in line 2 and 'b' in line 3",
        ),
        (b"case,subject\ncase_000,J\xf6rg\n", "UTF-8"),
    ):
        untidy.write_bytes(content)
        with pytest.raises(DatasetError, match=message):
            load_groups(untidy, NAMES)


def test_kept_splits_are_commented(tmp_path, caplog):
    load_or_make_splits(tmp_path, NAMES, ALONE)
    more = [*NAMES, "late"]
    assert len(load_or_make_splits(tmp_path, more, {**ALONE, "late": "late"}, "80-10-10")) == 5
    assert "1 cases are in no fold" in caplog.text
    assert "80/10/10" in caplog.text
    for content in ("[]", '[{"train": [["a"]], "val": ["b"]}]'):
        (tmp_path / "splits.json").write_text(content)
        with pytest.raises(DatasetError, match="must hold a list"):
            load_or_make_splits(tmp_path, NAMES, ALONE)


def test_subsets_are_nested_and_seeded():
    ten, half = take_subset(NAMES, 0.1, seed=1), take_subset(NAMES, 0.5, seed=1)
    assert len(ten) == 2
    assert set(ten) < set(half)
    assert take_subset(NAMES, 0.5, seed=1) == half
    assert take_subset(NAMES, 0.5, seed=2) != half
    assert take_subset(NAMES, 1.0, seed=1) == tuple(NAMES)
