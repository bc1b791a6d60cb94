from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgeqdm.emit.integrity import MANIFEST, check_files, path_faults, seal_manifest
from edgeqdm.errors import EdgeqdmError, UnsupportedError, VerifyError
from edgeqdm.ir.codec import dump_record, parse_record
from edgeqdm.ir.package import UNSEALED, Artifact, Manifest
from edgeqdm.testing.manifests import tiny_manifest

FILES = {"model.onnx": b"", "plan.json": b"{}\n", "runtime/run.py": b"pass\n", "weights.bin": b""}
WEIGHTS = np.arange(12, dtype=np.float32).reshape(3, 4)


def manifest_of(files: dict[str, Artifact]) -> Manifest:
    return tiny_manifest(files=files)


def external_tensor(**changes: Any) -> TensorProto:
    """`WEIGHTS` stored in weights.bin; a change to None drops that entry."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3, 4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.dims[:] = changes.pop("dims", [3, 4])
    tensor.data_type = changes.pop("data_type", TensorProto.FLOAT)
    for key, value in ({"location": "weights.bin", "offset": 16, "length": 48} | changes).items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def model_with(*tensors: TensorProto) -> bytes:
    graph = helper.make_graph([], "g", [], [], initializer=tensors)
    return bytes(helper.make_model(graph).SerializeToString())


def write_package(folder: Path, **changes: bytes) -> Path:
    contents = FILES | {
        "model.onnx": model_with(external_tensor()),
        "weights.bin": bytes(16) + WEIGHTS.tobytes(),
    }
    contents |= {name.replace("__", "."): data for name, data in changes.items()}
    files = {}
    for relative, data in contents.items():
        path = folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        files[relative] = Artifact(
            sha256=hashlib.sha256(data).hexdigest(), size=len(data), role="model"
        )
    (folder / "manifest.json").write_bytes(seal_manifest(manifest_of(files)))
    return folder


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return write_package(tmp_path / "package")


def fault(package: Path) -> str:
    with pytest.raises(VerifyError) as caught:
        check_files(package)
    assert caught.value.exit_code == 8
    assert caught.value.code.startswith("EQ-8")
    assert str(caught.value).isprintable()
    return caught.value.message


def edit_manifest(package: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = package / "manifest.json"
    document = json.loads(path.read_bytes())
    edit(document)
    changed = parse_record(json.dumps(document).encode(), Manifest, name=MANIFEST)
    path.write_bytes(seal_manifest(changed))


def test_an_untouched_package_gives_its_manifest_and_stays_as_it_is(package: Path) -> None:
    before = {p: p.stat() for p in package.rglob("*")}
    assert set(check_files(package).files) == set(FILES)
    after = {p: p.stat() for p in package.rglob("*")}
    assert after.keys() == before.keys()
    assert all(after[p].st_mtime_ns == before[p].st_mtime_ns for p in before)


def test_a_package_can_be_reached_through_a_link(package: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(package)
    assert check_files(tmp_path / "latest") == check_files(package)


def flip_byte(package: Path) -> None:
    data = bytearray((package / "weights.bin").read_bytes())
    data[20] ^= 1
    (package / "weights.bin").write_bytes(data)


def append_byte(package: Path) -> None:
    with (package / "plan.json").open("ab") as file:
        file.write(b"\n")


def replace_by_fifo(package: Path) -> None:
    (package / "plan.json").unlink()
    os.mkfifo(package / "plan.json")


def replace_by_link(package: Path) -> None:
    (package / "plan.json").rename(package.parent / "outside.json")
    (package / "plan.json").symlink_to("../outside.json")


def edit_hash(package: Path) -> None:
    edit_manifest(package, lambda m: m["files"]["plan.json"].update(sha256="0" * 64))


def edit_size(package: Path) -> None:
    edit_manifest(package, lambda m: m["files"]["plan.json"].update(size=4))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (flip_byte, '"weights.bin": content differs'),
        (append_byte, '"plan.json": 4 bytes, the manifest says 3'),
        (edit_hash, '"plan.json": content differs'),
        (edit_size, '"plan.json": 3 bytes, the manifest says 4'),
        (lambda p: (p / "plan.json").unlink(), '"plan.json": missing'),
        (lambda p: (p / "runtime/run.py").unlink(), '"runtime": empty folder'),
        (lambda p: (p / "new.txt").touch(), '"new.txt": not in the manifest'),
        (lambda p: (p / ".hidden").touch(), '".hidden": not in the manifest'),
        (lambda p: (p / os.fsdecode(b"\xff\n")).touch(), '"\\udcff\\n": not in the manifest'),
        (lambda p: (p / "plan.json").rename(p / "Plan.json"), '"Plan.json": not in the manifest'),
        (lambda p: (p / "empty/inner").mkdir(parents=True), '"empty/inner": empty folder'),
        (lambda p: (p / "loop").symlink_to("."), '"loop": a symbolic link'),
        (lambda p: os.link(p / "plan.json", p.parent / "twin"), '"plan.json": hard link, 2 names'),
        (lambda p: os.link(p / "manifest.json", p.parent / "twin"), '"manifest.json": hard link'),
        (replace_by_link, '"plan.json": a symbolic link'),
        (replace_by_fifo, '"plan.json": a FIFO'),
    ],
)
def test_every_damage_is_named(
    damage: Callable[[Path], object], expected: str, package: Path
) -> None:
    damage(package)
    assert expected in fault(package)


def test_all_faults_are_reported_at_once(package: Path) -> None:
    for damage in (flip_byte, append_byte, lambda p: (p / "new.txt").touch()):
        damage(package)
    message = fault(package)
    assert message.startswith("3 faults: ")
    assert all(name in message for name in ("weights.bin", "plan.json", "new.txt"))


def test_many_faults_are_counted_after_the_first_ten(package: Path) -> None:
    for index in range(25):
        (package / f"new{index:02}").touch()
    message = fault(package)
    assert message.startswith("25 faults: ")
    assert "new09" in message
    assert "new10" not in message
    assert message.endswith("and 15 more")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("../secret", "`..`"),
        ("a/../../secret", "`..`"),
        ("/etc/passwd", "absolute"),
        ("a\\b", "may hold"),
        ("./plan.json", "`.`"),
        ("a//b", "empty"),
        ("a/", "empty"),
        ("", "may hold"),
        ("cafe\u0301", "may hold"),
        ("a b", "may hold"),
        ("nul\0", "may hold"),
        ("x\n", "may hold"),
        ("x" * 201, "at most 200"),
        ("Plan.json", "case only"),
        ("Runtime/other.py", "case only"),
        ("manifest.json", "lists itself"),
    ],
)
def test_a_bad_path_in_the_manifest_is_named_and_never_opened(
    path: str, expected: str, package: Path
) -> None:
    # Opening this FIFO would block for ever.
    os.mkfifo(package.parent / "secret")
    entry = {"sha256": "0" * 64, "size": 0, "role": "model"}
    edit_manifest(package, lambda m: m["files"].update({path: entry}))
    assert expected in fault(package)


def test_paths_that_are_allowed_have_no_fault() -> None:
    assert path_faults(["a", "b/c.onnx", "b/d-e_F.9", ".x", "a..b", "x" * 200]) == []


@given(st.text(max_size=12) | st.text("./\\aA", max_size=6))
def test_a_path_without_fault_stays_inside_its_folder(path: str) -> None:
    if not path_faults([path]):
        assert os.path.normpath(f"/p/{path}") == f"/p/{path}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b"[]", "format a list of 0"),
        (b"{}", "format null"),
        (b'{"format": "a", "format": "a"}', "duplicate key"),
        (b'{"format": "other", "edgeqdm_version": "9.1"}', 'made by edgeqdm "9.1"'),
        (b'{"format": "edgeqdm-package"}', "Field required"),
    ],
)
def test_a_broken_manifest_is_refused(content: bytes, expected: str, package: Path) -> None:
    (package / "manifest.json").write_bytes(content)
    assert expected in fault(package)


def test_a_newer_package_names_the_edgeqdm_that_made_it(package: Path) -> None:
    path = package / "manifest.json"
    newer = {"schema_version": 2, "edgeqdm_version": "9.1", "novel": 1}
    path.write_text(json.dumps(json.loads(path.read_bytes()) | newer))
    assert 'made by a newer edgeqdm ("9.1")' in fault(package)


def test_a_duplicate_path_in_the_manifest_is_refused(package: Path) -> None:
    path = package / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"weights.bin": {', b'"plan.json": {'))
    assert "duplicate key" in fault(package)


@pytest.mark.parametrize("mask", [0x01, 0x02, 0x04, 0x10, 0x20, 0x80, 0xFF])
def test_no_changed_byte_of_the_manifest_goes_unseen(mask: int, tmp_path: Path) -> None:
    package = write_package(tmp_path / "p")
    path = package / MANIFEST
    sealed = path.read_bytes()
    for index in range(mask % 3, len(sealed), 3):
        changed = bytearray(sealed)
        changed[index] ^= mask
        path.write_bytes(changed)
        fault(package)
    path.write_bytes(sealed)
    check_files(package)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"2026-01-01", b"2026-01-02"),
        (b'"0.1.0"', b'"0.1.1"'),
        (b"\n", b"\r\n"),
        (b"\n}\n", b"\n}"),
        (b"tiny", b"t\\u0069ny"),
    ],
)
def test_what_no_other_check_covers_is_sealed(old: bytes, new: bytes, package: Path) -> None:
    path = package / MANIFEST
    path.write_bytes(path.read_bytes().replace(old, new))
    assert fault(package) == "1 fault: manifest.json has been changed"


def test_a_changed_manifest_is_named_beside_every_bad_file(package: Path) -> None:
    path = package / MANIFEST
    path.write_bytes(path.read_bytes() + b"\n")
    for damage in (flip_byte, append_byte):
        damage(package)
    message = fault(package)
    assert message.startswith("3 faults: manifest.json has been changed; ")
    assert all(name in message for name in ("weights.bin", "plan.json"))


def test_the_seal_is_the_hash_of_the_manifest_with_the_seal_made_zeros(package: Path) -> None:
    data = (package / MANIFEST).read_bytes()
    manifest = check_files(package)
    unsealed = manifest.model_copy(update={"manifest_sha256": UNSEALED})
    assert manifest.manifest_sha256 == hashlib.sha256(dump_record(unsealed)).hexdigest()
    assert data == dump_record(manifest) == seal_manifest(manifest)


def test_a_seal_that_occurs_twice_is_refused(package: Path) -> None:
    path = package / MANIFEST
    document = json.loads(path.read_bytes())
    # Zeros in both places hash to a digest that, put into both, fits if no one counts.
    document["manifest_sha256"] = document["plan_sha256"] = "a" * 64
    text = json.dumps(document)
    blank = text.replace("a" * 64, UNSEALED).encode()
    path.write_text(text.replace("a" * 64, hashlib.sha256(blank).hexdigest()))
    assert fault(package) == "1 fault: manifest.json has been changed"


def test_names_like_the_seal_elsewhere_do_not_mislead_it(package: Path) -> None:
    lookalike = f'\n "manifest_sha256": "{UNSEALED}'
    versions = {"manifest_sha256": UNSEALED, lookalike: lookalike}
    manifest = check_files(package).model_copy(update={"library_versions": versions})
    (package / MANIFEST).write_bytes(seal_manifest(manifest))
    assert check_files(package).library_versions == versions


def manifest_as_link(package: Path) -> None:
    (package / "manifest.json").rename(package.parent / "manifest.json")
    (package / "manifest.json").symlink_to("../manifest.json")


def manifest_as_folder(package: Path) -> None:
    (package / "manifest.json").unlink()
    (package / "manifest.json").mkdir()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
        (manifest_as_link, "a symbolic link"),
        (manifest_as_folder, "no manifest.json"),
        (lambda p: p.rename(p.parent / "elsewhere"), "No such file"),
    ],
)
def test_what_has_no_manifest_is_no_package(
    damage: Callable[[Path], object], expected: str, package: Path
) -> None:
    damage(package)
    assert expected in fault(package)


def test_a_file_is_no_package(package: Path) -> None:
    assert "Not a directory" in fault(package / "plan.json")


@given(st.data())
def test_no_changed_byte_of_a_listed_file_goes_unseen(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    package = write_package(tmp_path_factory.mktemp("p"))
    path = package / data.draw(st.sampled_from(["model.onnx", "weights.bin", "plan.json"]))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    assert f'"{path.name}": content differs' in fault(package)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"location": "../secret.bin"}, "`..`"),
        ({"location": "a/../../secret.bin"}, "`..`"),
        ({"location": "/etc/passwd"}, "absolute"),
        ({"location": "..\\secret.bin"}, "may hold"),
        ({"location": "*/_ORT_MEM_ADDR_/*"}, "may hold"),
        ({"location": None}, "may hold"),
        ({"location": "other.bin"}, '"other.bin", which the manifest does not list'),
        ({"location": "manifest.json"}, "which the manifest does not list"),
        ({"offset": -4}, "impossible offset"),
        ({"offset": "0x10"}, "impossible offset"),
        ({"offset": ""}, "impossible offset"),
        ({"offset": 17}, "up to byte 65 of 64"),
        ({"offset": 2**59}, "up to byte 576460752303423536 of 64"),
        ({"offset": 2**62}, "impossible offset"),
        ({"length": -1}, "impossible offset"),
        ({"length": 2**40}, "needs 48"),
        ({"length": 44}, "needs 48"),
        ({"length": None, "offset": 20}, "up to byte 68 of 64"),
        ({"dims": [3, -4]}, "negative dimension in [3, -4]"),
        ({"dims": [-3, -4]}, "negative dimension"),
        ({"dims": [2**32, 2**32]}, "needs 73786976294838206464"),
        ({"dims": [2**62] * 32}, "needs "),
        ({"dims": [2**62] * 33}, "33 dimensions"),
        ({"dims": [2**62] * 10**5}, "100000 dimensions"),
        ({"data_type": TensorProto.STRING}, "no fixed size"),
        ({"data_type": 99}, "no fixed size"),
    ],
)
def test_external_data_must_lie_inside_a_listed_file(
    changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    # The target exists: it is refused for where it is, not because it cannot be found.
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    package = write_package(tmp_path / "p", model__onnx=model_with(external_tensor(**changes)))
    message = fault(package)
    assert '"model.onnx": tensor "w": ' in message
    assert expected in message


def test_external_data_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    model = model_with(external_tensor()).replace(b"weights.bin", b"weights.bi\xff")
    package = write_package(tmp_path / "p", model__onnx=model)
    assert "UTF-8" in fault(package)


def test_external_data_with_equal_keys_is_refused(tmp_path: Path) -> None:
    tensor = external_tensor()
    tensor.external_data.add(key="offset", value="0")
    package = write_package(tmp_path / "p", model__onnx=model_with(tensor))
    assert "duplicate key" in fault(package)


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_external_data_that_is_a_link_is_refused(
    link: Callable[[Path, Path], None], package: Path
) -> None:
    target = package.parent / "secret.bin"
    (package / "weights.bin").rename(target)
    link(target, package / "weights.bin")
    assert '"weights.bin": ' in fault(package)


def in_subgraph(tensor: TensorProto) -> bytes:
    branch = helper.make_graph([], "branch", [], [], initializer=[tensor])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    return bytes(helper.make_model(helper.make_graph([node], "g", [], [])).SerializeToString())


def in_attribute(tensor: TensorProto) -> bytes:
    node = helper.make_node("Constant", [], ["y"], value=tensor)
    return bytes(helper.make_model(helper.make_graph([node], "g", [], [])).SerializeToString())


def in_function(tensor: TensorProto) -> bytes:
    node = helper.make_node("Constant", [], ["y"], value=tensor)
    opset = [helper.make_opsetid("", 21)]
    function = helper.make_function("d", "f", [], ["y"], [node], opset)
    graph = helper.make_graph([], "g", [], [])
    return bytes(helper.make_model(graph, functions=[function]).SerializeToString())


def in_sparse_values(tensor: TensorProto) -> bytes:
    indices = numpy_helper.from_array(np.array([0], dtype=np.int64))
    sparse = helper.make_sparse_tensor(tensor, indices, [12])
    graph = helper.make_graph([], "g", [], [], sparse_initializer=[sparse])
    return bytes(helper.make_model(graph).SerializeToString())


@pytest.mark.parametrize("hide", [in_subgraph, in_attribute, in_function, in_sparse_values])
def test_external_data_is_found_wherever_it_hides(
    hide: Callable[[TensorProto], bytes], tmp_path: Path
) -> None:
    good = write_package(tmp_path / "good", model__onnx=hide(external_tensor()))
    check_files(good)
    hidden = hide(external_tensor(location="../secret.bin"))
    assert "`..`" in fault(write_package(tmp_path / "bad", model__onnx=hidden))


@pytest.mark.parametrize(
    ("dims", "data_type"), [([3, -4], TensorProto.FLOAT), ([2**32, 2**32], TensorProto.FLOAT)]
)
def test_the_shape_of_data_inside_the_model_is_checked_too(
    dims: list[int], data_type: int, tmp_path: Path
) -> None:
    tensor = TensorProto(name="w", data_type=data_type, dims=dims, raw_data=bytes(48))
    assert 'tensor "w"' in fault(write_package(tmp_path / "p", model__onnx=model_with(tensor)))


SIZED_TYPES = sorted(set(TensorProto.DataType.keys()) - {"UNDEFINED", "STRING"})


@pytest.mark.parametrize("data_type", SIZED_TYPES)
def test_the_size_of_every_type_agrees_with_onnx(data_type: str, tmp_path: Path) -> None:
    number = TensorProto.DataType.Value(data_type)
    array = np.zeros(5, dtype=helper.tensor_dtype_to_np_dtype(number))
    tensor = numpy_helper.from_array(array, "w")
    assert tensor.data_type == number
    check_files(write_package(tmp_path / "p", model__onnx=model_with(tensor)))


def test_a_truncated_model_with_a_matching_hash_is_refused(tmp_path: Path) -> None:
    whole = model_with(external_tensor())
    unreadable = 0
    for percent in range(1, 100):
        cut = whole[: len(whole) * percent // 100]
        package = write_package(tmp_path / str(percent), model__onnx=cut)
        # A cut between two fields is a shorter valid model; it must not crash, and no more.
        try:
            check_files(package)
        except VerifyError as problem:
            unreadable += "not a readable ONNX model" in problem.message
    assert unreadable > 90


def test_a_model_below_a_folder_finds_its_data_there(tmp_path: Path) -> None:
    weights = bytes(16) + WEIGHTS.tobytes()
    model = model_with(external_tensor())
    package = write_package(tmp_path / "p", **{"m/model.onnx": model, "m/weights.bin": weights})
    check_files(package)
    (package / "m/model.onnx").write_bytes(b"")
    assert "m/model.onnx" in fault(package)


def test_our_external_data_is_what_onnx_itself_reads(package: Path) -> None:
    check_files(package)
    loaded = onnx.load(package / "model.onnx")
    np.testing.assert_array_equal(numpy_helper.to_array(loaded.graph.initializer[0]), WEIGHTS)


def test_without_onnx_a_package_that_needs_it_says_so(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UnsupportedError, match=r"edgeqdm\[onnxruntime\]"):
        check_files(package)


def test_without_onnx_a_package_without_models_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = write_package(tmp_path / "p")
    (package / "model.onnx").unlink()
    edit_manifest(package, lambda m: m["files"].pop("model.onnx"))
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "model.onnx" not in check_files(package).files


@given(st.binary(max_size=40))
def test_any_bytes_as_a_manifest_raise_one_of_our_errors(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    package = write_package(tmp_path_factory.mktemp("p"))
    (package / "manifest.json").write_bytes(data)
    with pytest.raises(EdgeqdmError):
        check_files(package)
