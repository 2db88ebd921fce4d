"""Archives that are damaged, hostile or not for here: one sentence, and nothing in the results folder."""

import hashlib
import json
import stat
import struct
import warnings
import zipfile

import pytest
import torch
from portable_models import NAME, SWIN, make_model, roots_of
from safetensors.torch import save

from ukbob_seg import export_model, import_model
from ukbob_seg.cli.import_model import main as import_command
from ukbob_seg.errors import CheckpointError, ConfigError
from ukbob_seg.portable import archive as archive_module
from ukbob_seg.portable import importing

MODEL = "3d_fullres__portable_models.Small"
WEIGHTS = f"{MODEL}/fold_0/weights.safetensors"


@pytest.fixture
def good(tmp_path):
    """A good archive."""
    return export_model(make_model(roots_of(tmp_path), folds=("0",)), tmp_path / "good.zip", quiet=True).file


def _members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _write(path, members, sign=True, extra=(), **head):
    """Write an archive, by default with a manifest that fits its members; ``extra`` is written beside them."""
    manifest = {**json.loads(members["manifest.json"]), **head}
    if sign:
        manifest["members"] = {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in members.items() if name != "manifest.json"
        }  # fmt: skip
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of names that stand twice
        for name, content in {**members, "manifest.json": json.dumps(manifest).encode()}.items():
            archive.writestr(name, content)
        for entry, content in extra:
            archive.writestr(entry, content)
    return path


def _refused(path, results, said, error=CheckpointError):
    """The message, in one line, and that nothing was written."""
    with pytest.raises(error, match=said) as caught:
        import_model(path, results, quiet=True)
    assert "\n" not in str(caught.value)
    assert not results.exists() or not any(results.iterdir())


def test_the_good_one_is_taken(tmp_path, good):
    """Written anew like the bad ones, so that they are refused for what is bad about them; folders do no harm."""
    path = _write(tmp_path / "new.zip", _members(good), extra=[(f"{MODEL}/", b"")])
    folder = import_model(path, tmp_path / "results", quiet=True).folders[0]
    assert (folder / "fold_0" / "checkpoint_best.pt").is_file()


@pytest.mark.parametrize("name", [
    "../../evil.json", "/etc/evil.json", f"{MODEL}/../../../evil.json", "C:/evil.json", "a\\..\\evil.json",
    "a//evil.json", "./evil.json", f"{MODEL}/.hidden", "evil.json.", f"{MODEL}/fold_0/\x1b[2Jevil", "../evil/",
])  # fmt: skip
def test_names_that_lead_elsewhere(tmp_path, good, name):
    path = _write(tmp_path / "bad.zip", _members(good), extra=[(name, b"" if name.endswith("/") else b"{}")])
    _refused(path, tmp_path / "results", r"would lie outside of the model's folder")
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFDIR])
def test_links_and_devices(tmp_path, good, kind):
    entry = zipfile.ZipInfo(f"{MODEL}/link.json")
    entry.create_system, entry.external_attr = 3, (kind | 0o777) << 16
    path = _write(tmp_path / "bad.zip", _members(good), extra=[(entry, b"/etc/passwd")])
    _refused(path, tmp_path / "results", r"link.json' is a link or another special file")


def test_a_folder_that_is_a_link(tmp_path, good):
    entry = zipfile.ZipInfo(f"{MODEL}/")
    entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    path = _write(tmp_path / "bad.zip", _members(good), extra=[(entry, b"/etc")])
    _refused(path, tmp_path / "results", r"is no folder, as its name says")


@pytest.mark.parametrize("name", ["README.md", "readme.MD"])
def test_a_member_twice(tmp_path, good, name):
    path = _write(tmp_path / "bad.zip", _members(good), extra=[(name, b"other")])
    _refused(path, tmp_path / "results", r"has the member .* twice")


def test_bombs(tmp_path, good):
    members = _members(good)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        with archive.open(f"{MODEL}/fold_0/network.onnx", "w") as member:
            for _ in range(80):
                member.write(bytes(2**20))
    _refused(tmp_path / "bomb.zip", tmp_path / "results", r"bytes unpack to 8\d,\d{3},\d{3}, as no model's do")


def test_too_much_text(tmp_path, good, monkeypatch):
    monkeypatch.setattr(archive_module, "MOST_TEXT", 1000)
    _refused(good, tmp_path / "results", r"its member '.*' unpacks to [\d,]+ bytes of text")


def test_too_many_members(tmp_path, good, monkeypatch):
    monkeypatch.setattr(archive_module, "MOST_MEMBERS", 3)
    _refused(good, tmp_path / "results", r"has 7 members, a model at most 3")


def test_a_size_that_is_a_lie(tmp_path, good):
    """The table of contents says less than what is unpacked."""
    content = bytearray(good.read_bytes())
    for marker, at in ((b"PK\x01\x02", 24),):
        start = content.index(marker)
        name = content[start + 46 : start + 46 + 20]
        assert name.startswith(b"3d_fullres")
        content[start + at : start + at + 4] = struct.pack("<I", 5)
    (tmp_path / "bad.zip").write_bytes(content)
    _refused(tmp_path / "bad.zip", tmp_path / "results", r"is damaged")


@pytest.mark.parametrize("name", [WEIGHTS, "model_card.json", f"{MODEL}/plans.json"])
def test_a_wrong_checksum(tmp_path, good, name):
    members = _members(good)
    changed = bytearray(members[name])
    changed[-3] ^= 1
    path = _write(tmp_path / "bad.zip", {**members, name: bytes(changed)}, sign=False)
    _refused(
        path, tmp_path / "results", rf"{name.split('/')[-1]} has not the checksum of the manifest; get the file again"
    )


def test_bytes_that_flipped_on_the_way(tmp_path, good):
    content = bytearray(good.read_bytes())
    content[content.index(b"first.weight") + 600] ^= 1
    (tmp_path / "bad.zip").write_bytes(content)
    _refused(tmp_path / "bad.zip", tmp_path / "results", r"damaged: .*weights\.safetensors cannot be unpacked .*CRC")


def test_half_a_file(tmp_path, good):
    (tmp_path / "bad.zip").write_bytes(good.read_bytes()[:-100])
    _refused(tmp_path / "bad.zip", tmp_path / "results", r"no zip file, or a damaged one")


@pytest.mark.parametrize("name", [WEIGHTS, "model_card.json", "README.md", f"{MODEL}/dataset.json"])
@pytest.mark.parametrize("sign", [False, True])
def test_a_missing_member(tmp_path, good, name, sign):
    members = _members(good)
    del members[name]
    path = _write(tmp_path / "bad.zip", members, sign)
    _refused(path, tmp_path / "results", rf"(is damaged: it )?lacks {name}")


def test_no_folds(tmp_path, good):
    members = {name: content for name, content in _members(good).items() if "/fold_0/" not in name}
    _refused(_write(tmp_path / "bad.zip", members), tmp_path / "results", r"has no valid folds \(found: none\)")


def test_a_member_that_nobody_announced(tmp_path, good):
    path = _write(tmp_path / "bad.zip", _members(good), extra=[("more.json", b"{}")])
    _refused(path, tmp_path / "results", r"more\.json is not in the list")


def test_a_member_of_no_known_kind(tmp_path, good):
    path = _write(tmp_path / "bad.zip", {**_members(good), f"{MODEL}/fold_0/run.py": b"print()"})
    _refused(path, tmp_path / "results", r"run\.py is no part of a model")


def test_a_later_version(tmp_path, good):
    path = _write(tmp_path / "bad.zip", _members(good), format_version=2, ukbob_seg="9.0")
    _refused(path, tmp_path / "results", r"has format 2, made by ukbob_seg 9\.0; .*reads format 1: update it")


@pytest.mark.parametrize(("head", "said"), [
    ({"format": "something"}, r"holds no model of this package"),
    ({"format_version": "1"}, r"no valid list of members"),
    ({"dataset": "Dataset006_../../x"}, r"is not named DatasetXXX_Name"),
    ({"dataset": "Dataset007_Other"}, r"is of 'Dataset006_Carried', not of Dataset007_Other"),
    ({"dataset": None}, r"is not named DatasetXXX_Name"),
    ({"checkpoint": "latest"}, r"neither best nor final"),
    ({"models": ["../x"]}, r"are no list of names"),
    ({"models": []}, r"are no list of names"),
    ({"models": [MODEL, "3d_lowres__x"]}, r"3d_lowres__x has no valid folds"),
])  # fmt: skip
def test_manifests(tmp_path, good, head, said):
    _refused(_write(tmp_path / "bad.zip", _members(good), **head), tmp_path / "results", said)


def test_a_zip_file_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("hello.txt", "hello")
    _refused(tmp_path / "other.zip", tmp_path / "results", r"holds no model: it lacks manifest\.json")
    (tmp_path / "text.zip").write_text("hello")
    _refused(tmp_path / "text.zip", tmp_path / "results", r"is no zip file")
    _refused(tmp_path / "none.zip", tmp_path / "results", r"does not exist")


DEEP = b"[" * 100_000


@pytest.mark.parametrize(("member", "content", "said"), [
    (f"{MODEL}/plans.json", DEEP, r"plans\.json in .* is no valid JSON"),
    (f"{MODEL}/plans.json", b"9" * 10_000, r"plans\.json in .* is no valid JSON"),
    (f"{MODEL}/plans.json", b"\xff\xfe", r"plans\.json in .* is no valid JSON"),
    (f"{MODEL}/plans.json", b"[1]", r"is refused"),
    (f"{MODEL}/plans.json", b"{}", r"missing entry dataset"),
    (f"{MODEL}/dataset.json", b"{}", r"dataset\.json lacks channel_names"),
    (f"{MODEL}/dataset.json", b"[]", r"must hold an object"),
    (f"{MODEL}/fold_0/model.json", b"{}", r"is not described as a model has to be"),
    (f"{MODEL}/fold_0/model.json", b"3", r"is not described as a model has to be"),
    (f"{MODEL}/postprocessing.json", b'{"largest_component": ["liver"]}', r"must have a list 'largest_component'"),
    (f"{MODEL}/postprocessing.json", b"[]", r"is not described as a model has to be"),
    ("bounds.json", b'{"organs": 3}', r"bounds\.json in .* is not a bounds file"),
    ("model_card.json", b"[]", r"model_card\.json is no card of a model"),
    ("model_card.json", b"{}", r"model_card\.json is no card of a model"),
    ("README.md", b"\xff", r"README\.md is no text"),
    (WEIGHTS, b"PK\x03\x04 not these", r"no safetensors file, or a damaged one"),
    (WEIGHTS, struct.pack("<Q", 2**40) + b"{}", r"no safetensors file, or a damaged one"),
])  # fmt: skip
def test_members_of_nonsense(tmp_path, good, member, content, said):
    _refused(_write(tmp_path / "bad.zip", {**_members(good), member: content}), tmp_path / "results", said)


@pytest.mark.parametrize(("change", "said"), [
    ({"fold": "1"}, r"fold 0 of .* calls itself '1'"),
    ({"network": "portable_models:Other"}, r"is a model of '3d_fullres' and 'portable_models:Other'"),
    ({"configuration": "4d"}, r"is a model of '4d' and"),
    ({"head": "linear"}, r"has head 'linear'"),
    ({"mirror_axes": [7]}, r"axes \(7,\) to flip"),
    ({"arguments": [1]}, r"is refused: the arguments of|is not described"),
    ({"later_entry": 1}, r"is not described as a model has to be"),
])  # fmt: skip
def test_descriptions_that_do_not_fit(tmp_path, good, change, said):
    members = _members(good)
    member = f"{MODEL}/fold_0/model.json"
    members[member] = json.dumps({**json.loads(members[member]), **change}).encode()
    _refused(_write(tmp_path / "bad.zip", members), tmp_path / "results", said)


@pytest.mark.parametrize("change", [
    {"licence": 3}, {"models": {MODEL: {}}}, {"data": None}, {"citation": 3},
])  # fmt: skip
def test_cards_that_could_not_be_written_again(tmp_path, good, change):
    members = _members(good)
    members["model_card.json"] = json.dumps({**json.loads(members["model_card.json"]), **change}).encode()
    _refused(_write(tmp_path / "bad.zip", members), tmp_path / "results", r"model_card\.json is no card of a model")


def test_a_card_without_a_fold(tmp_path, good):
    members = _members(good)
    card = json.loads(members["model_card.json"])
    card["models"][MODEL]["folds"] = {}
    members["model_card.json"] = json.dumps(card).encode()
    _refused(_write(tmp_path / "bad.zip", members), tmp_path / "results", r"is not described as a model has to be")


@pytest.mark.parametrize("arguments", [{"feature_size": "x"}, {"depths": None}, {"num_heads": [0, 0, 0, 0]}])
def test_arguments_that_build_nothing(tmp_path, arguments):
    members = _swin(tmp_path)
    member = "3d_fullres__swin_unetr/fold_0/model.json"
    members[member] = json.dumps({**json.loads(members[member]), "arguments": {**SWIN, **arguments}}).encode()
    _refused(_write(tmp_path / "bad.zip", members), tmp_path / "results", r"network (.swin_unetr. )?cannot be built")


def _swin(tmp_path):
    folder = make_model(roots_of(tmp_path), network="swin_unetr", folds=("0",), arguments=SWIN, patch=(32, 32, 64))
    return _members(export_model(folder, tmp_path / "swin.zip", quiet=True).file)


def test_weights_of_another_network(tmp_path):
    members = _swin(tmp_path)
    member = "3d_fullres__swin_unetr/fold_0/weights.safetensors"
    bad = _write(tmp_path / "bad.zip", {**members, member: save({"out.weight": torch.zeros(3)})})
    _refused(bad, tmp_path / "results", r"weights\.safetensors in .* of another network: \d+ weights missing, 1 unexp")


def test_a_network_of_absurd_size_is_refused_without_making_it(tmp_path):
    """Its first layer alone would take some 100 TiB."""
    members = _swin(tmp_path)
    member = "3d_fullres__swin_unetr/fold_0/model.json"
    huge = {**json.loads(members[member]), "arguments": {"feature_size": 12 * 10**5}}
    bad = _write(tmp_path / "bad.zip", {**members, member: json.dumps(huge).encode()})
    _refused(bad, tmp_path / "results", r"is of another network: .* of another shape")


def test_a_cascade_without_its_first_stage(tmp_path):
    roots = roots_of(tmp_path)
    make_model(roots, configuration="3d_lowres")
    folder = make_model(roots, configuration="3d_cascade_fullres")
    members = _members(export_model(folder, tmp_path / "good.zip", quiet=True).file)
    kept = {name: content for name, content in members.items() if not name.startswith("3d_lowres")}
    bad = _write(tmp_path / "bad.zip", kept, models=["3d_cascade_fullres__portable_models.Small"])
    _refused(bad, tmp_path / "results", r"is the second stage of a cascade, and 3d_lowres__.* is not there")


def test_what_is_there_is_not_replaced_unless_told(tmp_path, good, capsys):
    results = tmp_path / "results"
    folder = import_model(good, results, quiet=True).folders[0]
    (folder / "mine.txt").write_text("mine")
    assert import_command([str(good), "--results", str(results)]) == 2
    assert "already exists; replace it with --overwrite" in capsys.readouterr().err
    assert (folder / "mine.txt").is_file()
    assert import_command([str(good), "--results", str(results), "--overwrite"]) == 0
    assert not (folder / "mine.txt").exists()
    assert (folder / "fold_0" / "checkpoint_best.pt").is_file()
    assert sorted(path.name for path in results.iterdir()) == [NAME]


def test_another_dataset_of_the_same_id(tmp_path, good):
    results = tmp_path / "results"
    (results / "Dataset006_Mine").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"results of Dataset006_Mine, and the model is of Dataset006_Carried"):
        import_model(good, results, overwrite=True, quiet=True)
    assert [path.name for path in results.iterdir()] == ["Dataset006_Mine"]


def test_an_interrupt_leaves_nothing(tmp_path, good, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(importing, "_write_texts", interrupt)  # when the folds are written
    results = tmp_path / "results"
    assert import_command([str(good), "--results", str(results)]) == 130
    assert capsys.readouterr().err.endswith("interrupted; nothing was written\n")
    assert not any(results.iterdir())


def test_a_failure_half_way_leaves_all_as_it_was(tmp_path, monkeypatch):
    roots = roots_of(tmp_path)
    make_model(roots, configuration="3d_lowres", folds=("0",))
    folder = make_model(roots, configuration="3d_cascade_fullres", folds=("0",))
    export_model(folder, tmp_path / "good.zip", quiet=True)
    results = tmp_path / "results"
    rename = importing.Path.rename

    def fail(path, target):
        if path.name.startswith("3d_cascade"):  # placed last; its old folder has the name replaced-...
            raise OSError(28, "No space left on device")
        return rename(path, target)

    for already_there in (False, True):
        if already_there:
            for model in import_model(tmp_path / "good.zip", results, quiet=True).folders:
                (model / "mine.txt").write_text("mine")
        before = sorted(results.rglob("*")) if already_there else []
        with monkeypatch.context() as patch:
            patch.setattr(importing.Path, "rename", fail)
            with pytest.raises(Exception, match="No space left on device; check permissions and free disk space"):
                import_model(tmp_path / "good.zip", results, overwrite=True, quiet=True)
        assert sorted(results.rglob("*")) == before


def test_exports_are_not_replaced_unless_told(tmp_path, good):
    folder = make_model(roots_of(tmp_path), folds=("0",))
    before = good.read_bytes()
    with pytest.raises(ConfigError, match=r"already exists; replace it with --overwrite"):
        export_model(folder, good, quiet=True)
    with pytest.raises(ConfigError, match=r"must end in \.zip"):
        export_model(folder, tmp_path / "model.tar", quiet=True)
    assert good.read_bytes() == before
