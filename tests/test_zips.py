"""What the directory of a zip archive tells of its entries."""

from __future__ import annotations

import stat
import zipfile

import pytest

from ukbob_seg.zips import is_encrypted, is_special, leads_out, repeated_name


@pytest.mark.parametrize("name", ["/a", "\\a", "C:/a", "c:a", "../a", "a/../../b", "a\\..\\b", ".."])
def test_names_that_lead_out(name: str) -> None:
    assert leads_out(name)


@pytest.mark.parametrize("name", ["a", "a/b.json", "a..b/c", "..a/b", "a/b/", "ab:c", "."])
def test_names_that_stay(name: str) -> None:
    assert not leads_out(name)


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("a", 0, False),
        ("a", stat.S_IFREG, False),
        ("a", stat.S_IFDIR, True),
        ("a/", stat.S_IFDIR, False),
        ("a/", stat.S_IFREG, True),
        ("a", stat.S_IFLNK, True),
        ("a", stat.S_IFCHR, True),
        ("a", stat.S_IFIFO, True),
    ],
)
def test_what_is_no_file_or_folder(name: str, kind: int, expected: bool) -> None:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (kind | 0o644) << 16
    assert is_special(entry) is expected


def test_encryption_is_a_flag() -> None:
    entry = zipfile.ZipInfo("a")
    assert not is_encrypted(entry)
    entry.flag_bits = 0x801
    assert is_encrypted(entry)


def test_names_that_are_one_on_some_systems() -> None:
    entries = [zipfile.ZipInfo(name) for name in ("a", "b/", "c/d", "C/D")]
    assert repeated_name(entries) == "C/D"
    assert repeated_name(entries[:3]) is None
    assert repeated_name([zipfile.ZipInfo("b/"), zipfile.ZipInfo("B")]) == "B"
