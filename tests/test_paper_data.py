"""The data sets of the paper's experiments: small files of the published formats, written here and read back."""

import io
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from paper_repro.data import DATA, Leaves, afhq, cifar10, cifar100, imagenet64
from paper_repro.data.pickles import read_pickle

Bytes = NDArray[np.uint8]
READ = {10: cifar10, 100: cifar100}
LABEL = {10: "labels", 100: "fine_labels"}
FILES = {10: [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], 100: ["train", "test"]}
FOLDER = {10: "cifar-10-batches", 100: "cifar-100"}


def batch(seed: int, classes: int, width: int = 3072, count: int = 3) -> tuple[Bytes, list[int]]:
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (count, width), dtype=np.uint8), draw.integers(0, classes, count).tolist()


def python2(data: Bytes, labels: list[int], label: str) -> bytes:
    """What Python 2 writes at protocol 2, by hand: its str is U (short) or T (long), which Python 3 never writes."""

    def short(text: str) -> bytes:
        return b"U" + bytes([len(text)]) + text.encode()

    size = b"K%c" % len(data) + b"M" + int(data.shape[1]).to_bytes(2, "little") + b"\x86"
    state = b"(K\x03" + short("|") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
    dtype = b"cnumpy\ndtype\n" + short("u1") + b"K\x00K\x01\x87R" + state
    raw = b"T" + data.nbytes.to_bytes(4, "little") + data.tobytes()
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + short("b") + b"\x87R"
    array = empty + b"(K\x01" + size + dtype + b"\x89" + raw + b"tb"
    entries = short("data") + array + short(label) + b"](" + b"".join(b"K%c" % value for value in labels) + b"e"
    return b"\x80\x02}(" + entries + b"u."


def python3(protocol: int, keys: Callable[[str], Any] = str, module: bytes = b"numpy._core") -> Callable[..., bytes]:
    """Python 3's own pickles; the module's name can be replaced below protocol 4, which counts its bytes."""

    def write(data: Bytes, labels: list[int], label: str) -> bytes:
        content = pickle.dumps({keys("data"): data, keys(label): labels, keys("batch_label"): b"one of 5"}, protocol)
        assert b"numpy._core" in content
        return bytes(content.replace(b"numpy._core", module))

    return write


PICKLES: dict[str, Callable[[Bytes, list[int], str], bytes]] = {
    "Python 2": python2,
    "Python 3": python3(4),
    "Python 3 at protocol 2": python3(2),
    "old numpy": python3(3, module=b"numpy.core"),
    "bytes as keys": python3(2, str.encode, b"numpy.core"),
    "labels in an array": lambda data, labels, label: pickle.dumps({"data": data, label: np.array(labels)}, 4),
    "scalars": lambda data, labels, label: pickle.dumps({"data": data, label: list(np.array(labels))}, 4),
}


def packed(data: Bytes, labels: list[int], label: str) -> bytes:
    coarse = b"\x07" if label == "fine_labels" else b""
    return b"".join(coarse + bytes([value]) + row.tobytes() for row, value in zip(data, labels, strict=True))


def write(root: Path, classes: int, pack: Callable[[Bytes, list[int], str], bytes], form: str) -> Path:
    """A small set in `root`, and the path of its folder: one batch for each file, drawn from the file's number."""
    suffix = ".bin" if form == "binary" else ""
    short = {"python": "py", "binary": "bin"}[form] if classes == 10 else form
    folder = root / f"{FOLDER[classes]}-{short}"
    folder.mkdir(parents=True)
    for seed, name in enumerate(FILES[classes]):
        (folder / f"{name}{suffix}").write_bytes(pack(*batch(seed, classes), LABEL[classes]))
    return folder


def archived(folder: Path, classes: int, form: str) -> Path:
    path = folder.parent / f"cifar-{classes}-{form}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return path


def assert_read(root: Path, classes: int) -> None:
    """That training images are those of all files but the last, and the held-out ones those of the last."""
    expected = [batch(seed, classes) for seed in range(len(FILES[classes]))]
    data = READ[classes](root)
    images = [torch.from_numpy(pixels).view(-1, 3, 32, 32).float() / 127.5 - 1 for pixels, _ in expected]
    assert torch.equal(torch.cat(list(data.reference(4))), torch.cat(images[:-1]))
    assert data.train.labels.tolist() == [value for _, labels in expected[:-1] for value in labels]
    held_out, labels = data.held_out()
    assert torch.equal(held_out, images[-1]) and labels.tolist() == expected[-1][1]
    assert (data.img_size, data.in_channels, data.num_classes) == (32, 3, classes)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("pack", PICKLES.values(), ids=PICKLES)
def test_cifar_is_read_from_the_pickles_of_every_python_and_numpy(
    pack: Callable[..., bytes], classes: int, tmp_path: Path
) -> None:
    folder = write(tmp_path, classes, pack, "python")
    assert_read(tmp_path, classes)
    assert_read(folder, classes)


def test_the_pickles_by_hand_are_those_of_python_2() -> None:
    data, labels = batch(0, 10)
    value = pickle.loads(python2(data, labels, "labels"), encoding="latin1")
    assert (value["data"] == data).all() and value["labels"] == labels


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("form", ["python", "binary"])
def test_cifar_is_read_from_binary_files_and_archives(form: str, classes: int, tmp_path: Path) -> None:
    folder = write(tmp_path, classes, packed if form == "binary" else python2, form)
    assert_read(tmp_path, classes)
    archive = archived(folder, classes, form)
    assert_read(tmp_path, classes)
    assert_read(archive, classes)


class Runs:
    def __init__(self, function: Callable[..., object], argument: object) -> None:
        self.call = function, (argument,)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("function", [os.system, eval, exec, np.load, getattr], ids=lambda f: str(f.__name__))
def test_a_pickle_that_runs_a_function_is_refused_before_it_does(
    function: Callable[..., object], protocol: int, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    argument = f"touch {ran}" if function is os.system else f"open({str(ran)!r}, 'w')"
    content = pickle.dumps({"data": Runs(function, argument), "labels": [0]}, protocol)
    folder = write(tmp_path, 10, python2, "python")
    (folder / "data_batch_3").write_bytes(content)
    with pytest.raises(ValueError, match=rf"data_batch_3 .*names \w+(\.\w+)*\.{function.__name__}.*nothing was run"):
        cifar10(tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize(
    "value",
    [
        np.array([os.getcwd], dtype=object),
        np.array([None, None], dtype=object),
        np.zeros(2, dtype=[("a", "u1"), ("b", "O")]),
        np.array(["text"]),
    ],
    ids=["functions", "objects", "records", "text"],
)
def test_a_pickle_whose_arrays_hold_more_than_numbers_is_refused(value: NDArray[Any]) -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"it (holds an array of type|names)"):
        read_pickle(pickle.dumps({"data": value}, 4))


def test_arrays_of_every_kind_of_number_are_unpickled_as_they_were() -> None:
    arrays = {
        "columns": np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
        "floats": np.linspace(0, 1, 5),
        "flags": np.array([True, False]),
    }
    for protocol in (2, 3, 4):
        values = read_pickle(pickle.dumps(arrays, protocol))
        for name, array in arrays.items():
            np.testing.assert_array_equal(values[name], array, strict=True)


@pytest.mark.parametrize(("form", "pack"), [("python", python2), ("python", python3(4)), ("binary", packed)])
def test_a_truncated_file_of_cifar_is_refused_by_name(form: str, pack: Callable[..., bytes], tmp_path: Path) -> None:
    folder = write(tmp_path, 100, pack, form)
    path = next(folder.glob("train*"))
    content = path.read_bytes()
    for cut in (0, 1, 2, 20, 100, 137, 1000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=rf"{path.name} cannot be read .*expected CIFAR-100 as the University"):
            cifar100(tmp_path)


def test_a_truncated_archive_is_refused_by_name(tmp_path: Path) -> None:
    path = archived(write(tmp_path, 100, python2, "python"), 100, "python")
    content = path.read_bytes()
    for cut in (0, 1, 10, 100, len(content) // 3, len(content) // 2, len(content) * 9 // 10):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"cifar-100-python.tar.gz cannot be read .*expected CIFAR-100"):
            cifar100(tmp_path)


def test_an_archive_is_read_without_writing_anything(tmp_path: Path) -> None:
    archive = archived(write(tmp_path / "a" / "b", 100, python2, "python"), 100, "python")
    with tarfile.open(archive) as tar:
        members = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
        content = {name: file.read() for name, file in members.items() if file is not None}
    with tarfile.open(archive, "w:gz") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(f"../../{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert_read(archive, 100)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [archive]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": batch(0, 10)[0], "labels": [1, 2]}, "3 images and labels of shape"),
        ({"data": batch(0, 10)[0], "labels": [1, 2, 10]}, "labels go from 1 to 10, not within 0 to 9"),
        ({"data": batch(0, 10)[0], "labels": [1, 2, -1]}, "labels go from -1 to 2"),
        ({"data": batch(0, 10, 3000)[0], "labels": [1, 2, 3]}, r"uint8 of shape \(3, 3000\)"),
        ({"data": batch(0, 10)[0].astype(float), "labels": [1, 2, 3]}, "float64 of shape"),
        ({"data": batch(0, 10, count=0)[0], "labels": []}, "no images"),
        ({"data": batch(0, 10)[0], "fine_labels": [1, 2, 3]}, "no entry labels"),
        (["data"], "a list, not a dictionary"),
    ],
    ids=lambda value: value.replace(" ", "-")[:20] if isinstance(value, str) else "",
)
def test_a_pickle_of_the_wrong_shape_is_refused(content: object, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path, 10, python2, "python")
    (folder / "test_batch").write_bytes(pickle.dumps(content, 4))
    with pytest.raises(ValueError, match=f"test_batch cannot be read .*{message}.*expected CIFAR-10 as"):
        cifar10(tmp_path)


@pytest.mark.parametrize("form", ["python", "binary"])
def test_a_file_of_cifar_that_is_missing_is_named(form: str, tmp_path: Path) -> None:
    folder = write(tmp_path, 10, packed if form == "binary" else python2, form)
    next(folder.glob("data_batch_4*")).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{folder.name}/data_batch_4\S* does not exist: expected CIFAR-10"):
        cifar10(tmp_path)
    archived(folder, 10, form)
    with pytest.raises(ValueError, match=rf"cifar-10-{form}.tar.gz .*has no data_batch_4"):
        cifar10(tmp_path)


def test_parquet_files_without_the_package_datasets_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "plain_text").mkdir()
    for split in ("train", "test"):
        (tmp_path / "plain_text" / f"{split}-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"train-00000-of-00001.parquet .*needs the package datasets"):
        cifar10(tmp_path)


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_is_read_from_parquet_files(classes: int, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / {10: "plain_text", 100: "cifar100"}[classes]
    folder.mkdir()
    batches = [batch(seed, classes) for seed in range(len(FILES[classes]))]
    for split, part in (("train", batches[:-1]), ("test", batches[-1:])):
        for number, (pixels, labels) in enumerate(part):
            images = []
            for row in pixels:
                Image.fromarray(row.reshape(3, 32, 32).transpose(1, 2, 0)).save(file := io.BytesIO(), "PNG")
                images.append({"bytes": file.getvalue(), "path": None})
            table = pyarrow.table({"img": images, {10: "label", 100: "fine_label"}[classes]: labels})
            parquet.write_table(table, folder / f"{split}-{number:05}-of-{len(part):05}.parquet")
    assert_read(tmp_path, classes)
    next(folder.glob("test*")).write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"test-00000-of-00001.parquet cannot be read"):
        READ[classes](tmp_path)


def picture(seed: int, height: int, width: int) -> Image.Image:
    draw = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(draw).resize((width, height))


def animals(folder: Path, count: int, size: int = 256, suffix: str = "png") -> None:
    for seed, name in enumerate(("cat", "dog", "wild")):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            picture(100 * seed + number, size, size).save(folder / name / f"flickr_{number}.{suffix}")


@pytest.mark.parametrize("held_out", ["val", "test"])
@pytest.mark.parametrize("inside", ["afhq", "."])
def test_afhq_is_read_from_the_folders_of_its_splits(inside: str, held_out: str, tmp_path: Path) -> None:
    animals(tmp_path / inside / "train", 3)
    animals(tmp_path / inside / held_out, 1)
    data = afhq(tmp_path)
    images = torch.cat(list(data.reference(4)))
    assert images.shape == (9, 3, 256, 256) and (data.img_size, data.num_classes) == (256, 3)
    assert sorted(data.train.labels.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    stored = {name: [np.array(picture(100 * name + number, 256, 256)) for number in range(3)] for name in range(3)}
    pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    for image, label in zip(pixels, data.train.labels.tolist(), strict=True):
        assert any((image == other).all() for other in stored[label]), "not an image of its class, pixel for pixel"
    assert sorted(data.held_out()[1].tolist()) == [0, 1, 2]


def test_afhq_without_splits_holds_out_a_twentieth_that_stays_the_same_when_images_are_added(tmp_path: Path) -> None:
    def split() -> tuple[set[str], set[str]]:
        data: Any = afhq(tmp_path)
        train, test = (
            {f"{path.parent.name}/{path.name}" for path in part.images.paths} for part in (data.train, data.test)
        )
        assert not train & test
        return train, test

    for name in ("cat", "dog", "wild"):
        (tmp_path / "afhq" / name).mkdir(parents=True)
        for number in range(200):
            (tmp_path / "afhq" / name / f"{number}.jpg").touch()
    train, test = split()
    assert len(train) + len(test) == 600 and 15 <= len(test) <= 45
    assert {name.split("/")[0] for name in test} == {"cat", "dog", "wild"}
    for number in range(200, 300):
        (tmp_path / "afhq" / "dog" / f"{number}.jpg").touch()
    more_train, more_test = split()
    assert train < more_train and test < more_test


def test_the_first_images_of_a_folder_are_of_all_classes(tmp_path: Path) -> None:
    """Held out are the first 256 of each split: by name they would all be cats."""
    animals(tmp_path / "train", 20, size=1)
    animals(tmp_path / "test", 20, size=1)
    data = afhq(tmp_path)
    assert set(data.train.labels[:15].tolist()) == set(data.test.labels[:15].tolist()) == {0, 1, 2}


def test_larger_images_are_cut_to_a_square_and_scaled_down_and_smaller_ones_refused(tmp_path: Path) -> None:
    animals(tmp_path / "train", 1, suffix="jpg")
    animals(tmp_path / "val", 1)
    wide = np.zeros((512, 768, 3), np.uint8)
    wide[:, 128:640] = 255  # the square in the middle
    for path in (tmp_path / "train").glob("*/*"):
        Image.fromarray(wide).save(path, quality=100)
    (images,) = afhq(tmp_path).reference(3)
    assert images.shape == (3, 3, 256, 256) and images.min() > 0.8
    picture(0, 255, 300).convert("L").save(path)
    with pytest.raises(ValueError, match=f"{path} cannot be read .*300 x 255 pixels, fewer than 256.*expected AFHQ"):
        list(afhq(tmp_path).reference(3))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_damaged_image_is_refused_by_name(suffix: str, tmp_path: Path) -> None:
    animals(tmp_path / "train", 1, suffix=suffix)
    animals(tmp_path / "val", 1)
    path = next((tmp_path / "train" / "dog").iterdir())
    data, content = afhq(tmp_path), path.read_bytes()
    for cut in (0, 1, 10, 100, len(content) // 2, len(content) * 9 // 10):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=f"{path} cannot be read .*expected AFHQ as clovaai"):
            list(data.reference(3))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path} does not exist"):
        list(data.reference(3))


def test_folders_that_are_missing_or_empty_are_named(tmp_path: Path) -> None:
    animals(tmp_path / "train", 1, size=1)
    (tmp_path / "val" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"val/cat cannot be read .*no JPEG or PNG images"):
        afhq(tmp_path)
    animals(tmp_path / "test", 1, size=1)
    (tmp_path / "val" / "cat").rmdir()
    (tmp_path / "val").rmdir()
    for path in (tmp_path / "test" / "dog").iterdir():
        path.unlink()
    (tmp_path / "test" / "dog").rmdir()
    with pytest.raises(FileNotFoundError, match="test/dog does not exist: expected AFHQ"):
        afhq(tmp_path)


def write_arrays(path: Path, data: Any, labels: Any, **more: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    np.savez(path, data=data, labels=np.asarray(labels), **more)


def test_imagenet_is_read_from_arrays_whose_labels_begin_at_1(tmp_path: Path) -> None:
    parts = [batch(seed, 1000, 12288, count=2 + seed) for seed in range(3)]
    names = ("imagenet64/train_data_batch_1.npz", "imagenet64/train_data_batch_2.npz", "imagenet64/val_data.npz")
    for name, (pixels, labels) in zip(names, parts, strict=True):
        write_arrays(tmp_path / name, pixels, np.array(labels) + 1, mean=pixels.mean(0))
    data = imagenet64(tmp_path)
    images = [torch.from_numpy(pixels).view(-1, 3, 64, 64).float() / 127.5 - 1 for pixels, _ in parts]
    assert torch.equal(torch.cat(list(data.reference(2))), torch.cat(images[:2]))
    assert data.train.labels.tolist() == parts[0][1] + parts[1][1] and data.test.labels.tolist() == parts[2][1]
    assert torch.equal(data.held_out()[0], images[2]) and (data.img_size, data.num_classes) == (64, 1000)


def test_arrays_of_imagenet_that_are_damaged_or_of_the_wrong_shape_are_refused(tmp_path: Path) -> None:
    pixels, labels = batch(0, 1000, 12288)
    path = tmp_path / "train_data_batch_1.npz"
    write_arrays(path, pixels, np.array(labels) + 1)
    with pytest.raises(FileNotFoundError, match=r"val_data.npz does not exist: expected ImageNet at 64 x 64 as"):
        imagenet64(tmp_path)
    write_arrays(tmp_path / "val_data.npz", pixels, np.array(labels) + 1)
    content = path.read_bytes()
    for cut in (0, 1, 10, 1000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"train_data_batch_1.npz cannot be read .*expected ImageNet"):
            imagenet64(tmp_path)
    wrong: list[tuple[Any, Any, str]] = [
        (pixels, [1, 2], "3 images and labels of shape"),
        (pixels, [0, 1, 2], "labels go from -1 to 1"),
        (pixels, [1, 2, 1001], "labels go from 0 to 1000"),
        (pixels, 5, "labels have shape"),
        (pixels[:, :3072], [1, 2, 3], r"of shape \(3, 3072\)"),
        (pixels.astype(np.float32), [1, 2, 3], "float32"),
        (np.array([Runs(os.system, f"touch {tmp_path}/ran")]), [1], "allow_pickle=False"),
    ]
    for data, values, message in wrong:
        write_arrays(path, data, values)
        with pytest.raises(ValueError, match=f"train_data_batch_1.npz cannot be read .*{message}"):
            imagenet64(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_imagenet_is_read_from_folders_of_images(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for seed, name in enumerate(("n01440764", "n01443537")):
            (tmp_path / split / name).mkdir(parents=True)
            picture(seed, 64, 64).save(tmp_path / split / name / f"{name}_1.JPEG", quality=100)
    data = imagenet64(tmp_path)
    assert data.num_classes == 2 and sorted(data.train.labels.tolist()) == [0, 1]
    (images,) = data.reference(2)
    for image, label in zip(images, data.train.labels.tolist(), strict=True):
        stored = torch.from_numpy(np.array(picture(label, 64, 64))).permute(2, 0, 1).float() / 127.5 - 1
        assert (image - stored).abs().mean() < 0.05


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "afhq", "imagenet64"])
def test_a_set_of_files_says_what_it_expects_where_there_is_none(name: str, tmp_path: Path) -> None:
    publisher = {"c": "University of Toronto", "a": "clovaai", "i": "image-net.org"}[name[0]]
    with pytest.raises(ValueError, match=f"root is None: give the path .*{publisher}"):
        DATA[name]()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / 'none'} does not exist: expected .*{publisher}"):
        DATA[name](tmp_path / "none")
    with pytest.raises((FileNotFoundError, ValueError), match=f"{tmp_path}.* expected .*{publisher}"):
        DATA[name](tmp_path)


def test_batches_are_mirrored_half_of_the_time_and_keep_their_labels(tmp_path: Path) -> None:
    write(tmp_path, 10, python2, "python")
    data = cifar10(tmp_path)
    images, labels = data.batch(400, torch.Generator().manual_seed(0))
    assert images.dtype == torch.float32 and labels.dtype == torch.long and images.shape == (400, 3, 32, 32)
    (stored,) = data.reference(100)
    upright, mirrored = ((images[:, None] == either).flatten(2).all(2) for either in (stored, stored.flip(3)))
    assert (upright ^ mirrored).sum() == 400 and 160 < mirrored.sum() < 240
    assert torch.equal(labels, data.train.labels[(upright | mirrored).byte().argmax(1)])
    assert (upright | mirrored).any(0).all(), "an image was never drawn"


@pytest.mark.parametrize("name", ["digits", "photos", "photographs", "leaves"])
def test_a_set_that_is_drawn_has_the_same_reference_at_every_call_and_batch_size(name: str) -> None:
    data = DATA[name](None)
    shape = (data.in_channels, data.img_size, data.img_size)
    stream = data.reference(50)
    first = torch.cat([next(stream), next(stream)])
    assert first.shape == (100, *shape) and -1 <= first.min() < -0.9 and 0.9 < first.max() <= 1
    assert torch.equal(first[:60], next(data.reference(60)))
    seen = data.batch(100, torch.Generator().manual_seed(0))[0]
    assert not (first[:, None] == seen).flatten(2).all(2).any(), "training draws the reference itself"
    with pytest.raises(ValueError, match="batch_size is 0, expected 1 or more"):
        next(data.reference(0))


def test_the_reference_of_a_drawn_set_has_2048_images() -> None:
    assert [len(images) for images in DATA["photos"]().reference(1000)] == [1000, 1000, 48]


def test_leaves_have_the_statistics_of_natural_images() -> None:
    """A spectrum that falls about as the inverse square of the frequency; even regions between sharp edges."""
    images, labels = Leaves().batch(200, torch.Generator().manual_seed(0))
    assert labels is None and images.min() >= -1 and images.max() <= 1
    window = torch.hann_window(32)
    power = torch.fft.fft2((images - images.mean()) * window * window[:, None]).abs().square().mean((0, 1))
    radius = torch.cartesian_prod(*2 * [torch.fft.fftfreq(32) * 32]).norm(dim=1).round().view(32, 32)
    falling = np.polyfit(np.log(range(2, 13)), [power[radius == r].mean().log().item() for r in range(2, 13)], 1)[0]
    assert -2.7 < falling < -1.8
    steps = images.diff(dim=3)
    assert steps.pow(4).mean() / steps.square().mean().square() > 5, "noise of the same spectrum has 3"


def test_held_out_leaves_are_the_same_at_every_call_and_not_those_of_training() -> None:
    held_out, _ = Leaves().held_out()
    assert held_out.shape == (256, 3, 32, 32) and torch.equal(held_out, Leaves().held_out()[0])
    seen = Leaves().batch(20, torch.Generator().manual_seed(0))[0]
    assert not (held_out[:, None] == seen).flatten(2).all(2).any()


def test_importing_the_data_imports_none_of_the_packages_that_only_some_sets_need() -> None:
    unneeded = "{'PIL', 'datasets', 'skimage', 'sklearn'}"
    check = f"import sys, paper_repro.data; found = {unneeded} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", check], check=True)
