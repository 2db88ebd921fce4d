"""Cases that cannot be predicted: told, without loss of the others, unless nothing can go on."""

import errno
import gzip
import struct

import pytest
from threshold_network import many_cases, predictor_of

from ukbob_seg.errors import DatasetError
from ukbob_seg.inference.predict import predict
from ukbob_seg.inference.settings import PredictionSettings


@pytest.mark.parametrize("overlap", [False, True])
def test_cases_that_cannot_be_read_are_told_after_all_others_are_predicted(tmp_path, overlap, caplog):
    many_cases(tmp_path / "in", 6)
    for number in (2, 4):
        (tmp_path / "in" / f"case_{number}_0000.nii.gz").write_bytes(b"broken")
    predictor = predictor_of(PredictionSettings(overlap=overlap))
    with pytest.raises(DatasetError, match=r"2 of 6 cases could not .* case case_2: .*case_2_0000.* \(also case_4"):
        predict(predictor, tmp_path / "in", tmp_path / "out", quiet=True)
    assert {record.getMessage()[:11] for record in caplog.records} >= {"case case_2", "case case_4"}
    names = {path.name for path in (tmp_path / "out").glob("*.nii.gz")}
    assert names == {f"case_{number}.nii.gz" for number in (0, 1, 3, 5)}
    assert not any(path.name.startswith(".") for path in (tmp_path / "out").iterdir())
    with pytest.raises(DatasetError, match=r"case_2_0000") as alone:  # of one case nothing else is to be said
        predict(predictor, tmp_path / "in" / "case_2_0000.nii.gz", tmp_path / "alone", quiet=True)
    assert "of 1 cases" not in str(alone.value)
    many_cases(tmp_path / "in", 5)
    predict(predictor, tmp_path / "in", tmp_path / "out", resume=True, quiet=True)
    assert sum(path.name.endswith(".nii.gz") for path in (tmp_path / "out").iterdir()) == 6


def test_no_case_that_can_be_read_and_a_header_that_promises_too_much(tmp_path):
    """A damaged header is the fault of the case, also where no memory could hold what it says."""
    many_cases(tmp_path / "in", 2)
    for path in (tmp_path / "in").iterdir():
        content = bytearray(gzip.decompress(path.read_bytes()))
        content[42:48] = struct.pack("<3h", 30000, 30000, 30000)  # dim of NIfTI
        path.write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(
        DatasetError, match=r"2 of 2 cases could not be predicted: .*\(also case_1.*; mend what is wrong"
    ):
        predict(predictor_of(PredictionSettings()), tmp_path / "in", tmp_path / "out", quiet=True)


def test_a_full_disk_ends_all_cases(tmp_path, monkeypatch):
    many_cases(tmp_path / "in", 4)
    begun = []

    def full(_, images, *__):
        begun.append(images)
        raise DatasetError("cannot write") from OSError(errno.ENOSPC, "No space left on device")

    predictor = predictor_of(PredictionSettings(overlap=False))
    monkeypatch.setattr(type(predictor), "predict_case", full)
    with pytest.raises(DatasetError, match="cannot write"):
        predict(predictor, tmp_path / "in", tmp_path / "out", quiet=True)
    assert len(begun) == 1
