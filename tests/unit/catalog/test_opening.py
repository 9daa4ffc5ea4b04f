"""What a text may name: described sets, a user's own YAML, sets of torchvision, shards, folders."""

import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import MAKERS, dtd, md5, picture

from nc_dist.data import shards
from nc_dist.data.catalog import is_available, name_and_split, names, open_set, open_source
from nc_dist.data.catalog.published import open_or_published
from nc_dist.data.catalog.torchvision_sets import DatasetSource
from nc_dist.data.reading import Reading
from nc_dist.data.shards.source import ShardSource
from nc_dist.data.source import ArraySource, Chosen, FolderSource
from nc_dist.errors import InputError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data root."""
    monkeypatch.setenv("NC_DIST_DATA", str(tmp_path / "root"))
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def birds(root: Path, tmp_path: Path) -> Path:
    """A user's own description, of two folders with 10 and 4 images of two classes."""
    for part, n in (("train", 10), ("test", 4)):
        for i in range(n):
            picture(root / f"birds/{part}/{'kite' if i % 2 else 'owl'}/{i}.png", i)
    path = tmp_path / "birds.yaml"
    path.write_text("reader: {kind: folder, paths: {train: birds/train, test: birds/test}}\nmetric: mean_per_class\n")
    return path


def serve(folder: Path) -> tuple[ThreadingHTTPServer, list[str]]:
    """A server of the files in a folder, and the paths that were asked for."""
    asked: list[str] = []

    class Files(SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(folder))  # type: ignore[arg-type]

        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, asked


@pytest.fixture
def dtd_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Where torchvision finds a small DTD for download; gives the paths that it asks for."""
    import tarfile

    from torchvision.datasets import DTD

    dtd(tmp_path / "published", monkeypatch)
    (tmp_path / "served").mkdir()
    archive = tmp_path / "served/dtd-r1.0.1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "published/dtd/dtd", "dtd")
    server, asked = serve(tmp_path / "served")
    monkeypatch.setattr(DTD, "_URL", f"http://127.0.0.1:{server.server_port}/{archive.name}")
    monkeypatch.setattr(DTD, "_MD5", md5(archive))
    yield asked
    server.shutdown()
    server.server_close()


def test_a_path_is_shards_or_an_image_folder(image_folder: Path, built: Path) -> None:
    assert isinstance(open_source(str(built)), ShardSource)
    assert isinstance(open_source(str(image_folder)), FolderSource)


def test_a_url_is_shards(built: Path) -> None:
    server, _ = serve(built)
    try:
        remote, local = open_source(f"http://127.0.0.1:{server.server_port}/"), open_source(str(built))
        assert isinstance(remote, ShardSource) and remote.identity() == local.identity()
        assert remote.read(3).equal(local.read(3))
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("name", ["digts", "nonsense/folder", "nonsense:train"])
def test_an_unknown_name_lists_the_catalogue(name: str) -> None:
    with pytest.raises(InputError, match="no such folder, and no catalogued set.*aircraft, caltech101, cars"):
        open_source(name)


def test_an_almost_right_name_is_suggested() -> None:
    with pytest.raises(InputError, match="did you mean 'digits'"):
        open_source("digts:train")


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(InputError, match="digits:valid: no such split; digits has train, val, fit, trainval, test"):
        open_source("digits:valid")


def test_a_missing_catalogue_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_folder: Path) -> None:
    monkeypatch.setattr("nc_dist.data.catalog.places.BESIDE", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="configs/datasets is missing here and beside the package"):
        open_source("digits")
    assert len(open_source(str(image_folder)).labels) == 15
    (tmp_path / "configs/datasets").mkdir(parents=True)
    (tmp_path / "configs/datasets/mine.yaml").write_text("reader: {kind: digits}")
    assert names() == ["mine"] and len(open_source("mine:test").labels) == 359


def test_a_users_own_description_has_all_splits(birds: Path) -> None:
    sizes = {s: len(open_source(f"{birds}:{s}").labels) for s in ("train", "val", "fit", "trainval", "test")}
    assert sizes == {"train": 10, "val": 2, "fit": 8, "trainval": 10, "test": 4}
    assert open_set(f"{birds}:train").metric == open_set(str(birds)).metric == "mean_per_class"
    assert open_source(str(birds), "test").class_names == ["kite", "owl"]
    assert open_set(str(birds), "val").notes() == []


@pytest.mark.parametrize(
    "text, said",
    [
        ("reader: {kind: folder, paths: {train: a}}", "the reader has the parts train; needed are all, or train and"),
        ("reader: {kind: foler, paths: {all: a}}", "unknown kind; did you mean 'folder'"),
        ("reader: {kind: digits}\nmetrik: top1", "unknown key; did you mean 'metric'"),
        ("reader: {kind: digits}\nmetric: map", "metric='map'"),
        ("reader: {kind: digits}\nsamples: {tran: 3}", "no such split: tran"),
        (
            "reader: {kind: torchvision, name: Food102, args: {all: {}}}",
            "no data set 'Food102'; did you mean 'Food101'",
        ),
        ("reader: {kind: torchvision, name: LSUN, args: {all: {}}}", "refused, as torchvision's LSUN unpickles"),
        ("reader: {kind: torchvision, name: utils, args: {all: {}}}", "no data set 'utils'"),
        ("reader: {kind: torchvision, name: DTD, args: {all: {splt: a}}}", "TypeError.*splt"),
        ("reader: {kind: folder, paths: {all: nowhere}}", "nowhere: no such folder"),
        ("reader: {kind: shards, locations: {all: nowhere}}", "nowhere"),
    ],
)
def test_a_wrong_description_is_refused(root: Path, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=said):
        open_source(f"{tmp_path}/x.yaml:train")


def test_a_description_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="birds.yaml: no such file"):
        open_source(f"{tmp_path}/birds.yaml:train")


def test_shards_with_a_description_are_cut_and_joined_without_a_copy(root: Path, tmp_path: Path) -> None:
    digits = open_source("digits:train")
    for part, positions in (("train", np.arange(200)), ("val", np.arange(200, 260)), ("test", np.arange(260, 300))):
        list(shards.build(digits, root / "d" / part, samples_per_shard=32, positions=positions))
    head = "reader: {kind: shards, locations: {train: d/train, test: d/test"
    (tmp_path / "cut.yaml").write_text(head + "}}")
    (tmp_path / "official.yaml").write_text(head + ", val: d/val}}")
    whole, fit, val = (open_source(f"{tmp_path}/cut.yaml:{s}") for s in ("train", "fit", "val"))
    assert isinstance(fit, Chosen) and isinstance(whole, ShardSource)
    keys = [{source.key(i) for i in range(len(source.labels))} for source in (whole, fit, val)]
    assert keys[0] == keys[1] | keys[2] and not keys[1] & keys[2]
    assert sum(fit.shard_sizes) == len(fit.labels) and len(fit.shard_sizes) == len(whole.shard_sizes) == 7
    position = next(i for i in range(200) if whole.key(i) == fit.key(5))
    assert fit.read(5).equal(whole.read(position)) and fit.name(5) == whole.name(position)
    both = open_source(f"{tmp_path}/official.yaml:trainval", reading=Reading(decoder="fast"))
    assert both.decoder == "fast" and len(both.labels) == 260 and sum(both.shard_sizes) == 260
    held = {both.key(i) for i in range(260)}
    assert len(held) == 260 and {key[2:] for key in held if key.startswith("0/")} == keys[0]
    assert both.identity() != whole.identity()
    assert all(int(both.labels[i]) == int(digits.labels[int(both.key(i)[2:10])]) for i in range(260))


@pytest.mark.parametrize("name", ["digits:val", "dtd:trainval", "eurosat:fit"])
def test_every_kind_of_source_carries_the_decoder(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name[:3] != "dig":
        MAKERS[name.partition(":")[0]](root, monkeypatch)
    assert open_source(name).decoder == "torchvision"
    assert open_source(name, reading=Reading(decoder="fast")).decoder == "fast"


def test_names_keep_their_colons_and_paths() -> None:
    assert name_and_split("dtd:test") == ("dtd", "test") and name_and_split("dtd") == ("dtd", None)
    assert name_and_split("my/birds.yaml:val") == ("my/birds.yaml", "val")
    for text in ("http://127.0.0.1:80/x", "s3://bucket/x", "torchvision:DTD?split=val", "/a:b/c"):
        assert name_and_split(text) == (text, None)
    assert open_set("digits").metric == "top1"


# --- any set of torchvision ------------------------------------------------------------------------------------------


def test_a_set_of_torchvision_without_a_description_is_opened_with_its_arguments(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = MAKERS["aircraft"](root, monkeypatch)
    source = open_source("torchvision:FGVCAircraft?split=val&annotation_level=variant")
    assert isinstance(source, FolderSource) and len(source.labels) == len(expected["val"])
    assert source.identity() == open_source("aircraft:val").identity()
    with pytest.raises(InputError, match="split=vall: .*ValueError.*vall"):
        open_source("torchvision:FGVCAircraft?split=vall")
    with pytest.raises(InputError, match="expected are arguments as key=value"):
        open_source("torchvision:FGVCAircraft?val")
    MAKERS["cifar10"](root, monkeypatch)
    arrays = open_source("torchvision:CIFAR10?train=false")
    assert isinstance(arrays, ArraySource) and arrays.identity() == open_source("cifar10:test").identity()


def test_any_other_set_is_read_through_its_own_items() -> None:
    text = "torchvision:FakeData?size=7&num_classes=3&random_offset=5"
    source = open_source(text)
    assert isinstance(source, DatasetSource) and source.labels.dtype == np.int64
    from torchvision.datasets import FakeData

    for i, (image, label) in enumerate(FakeData(size=7, num_classes=3, random_offset=5)):
        assert source.labels[i] == label
        assert source.read(i).equal(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        if i == 6:
            break
    assert source.class_names == [str(k) for k in range(source.labels.max() + 1)]
    assert source.identity() == open_source(text).identity() != open_source(text.replace("=5", "=6")).identity()
    assert source.name(2) == f"{text}: sample '000002'"


def test_a_set_whose_labels_are_no_whole_numbers_is_refused(root: Path) -> None:
    for i in range(2):
        picture(root / f"leftImg8bit/train/x/{i}_leftImg8bit.png", i)
        picture(root / f"gtFine/train/x/{i}_gtFine_instanceIds.png", i)
    with pytest.raises(InputError, match="not a set of images with one whole number each as label"):
        open_source("torchvision:Cityscapes?target_type=instance")


# --- what is missing -------------------------------------------------------------------------------------------------


def test_a_missing_set_is_downloaded_once_by_however_many_open_it(
    root: Path, tmp_path: Path, dtd_server: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(open_source("dtd:test").labels) == 18
    asked_once = len(dtd_server)
    monkeypatch.setenv("NC_DIST_DATA", str(tmp_path / "another"))
    opened: list[int] = []
    threads = [threading.Thread(target=lambda: opened.append(len(open_source("dtd:train").labels))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert opened == [18] * 3 and len(dtd_server) == 2 * asked_once > 0
    assert not list(root.glob("*.partial"))


def test_a_set_of_which_a_part_is_there_is_never_downloaded(root: Path, dtd_server: list[str]) -> None:
    (root / "dtd/dtd/images").mkdir(parents=True)
    with pytest.raises(InputError, match="dtd:train: .*root lacks dtd/dtd/labels .*torchvision's DTD wants it"):
        open_source("dtd:train")
    assert dtd_server == []


def test_nothing_is_downloaded_where_that_is_not_wanted_nor_for_a_plan_of_another_cluster(
    root: Path, dtd_server: list[str]
) -> None:
    with pytest.raises(InputError, match="dtd:train: .*lacks dtd/dtd/images, dtd/dtd/labels, and data.download=false"):
        open_source("dtd:train", reading=Reading(download=False))
    assert len(open_or_published("dtd:train", "train", Reading()).source.labels) == 1880
    assert dtd_server == []


def test_a_failed_download_leaves_nothing_that_looks_like_the_set(
    root: Path, dtd_server: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import DTD

    monkeypatch.setattr(DTD, "_MD5", "0" * 32)
    assert not is_available("dtd")
    with pytest.raises(InputError, match="dtd:train: .*lacks dtd/dtd/images, dtd/dtd/labels"):
        open_source("dtd:train")
    assert not (root / "dtd").exists() and dtd_server


def test_a_set_that_cannot_be_downloaded_says_what_is_missing(root: Path) -> None:
    with pytest.raises(
        InputError, match=r"cars:test: .*root lacks stanford_cars/devkit, stanford_cars/cars_test .*broken.*https://"
    ):
        open_source("cars:test")
    with pytest.raises(InputError, match=r"imagenet:train: .*imagenet/train: no such folder"):
        open_source("imagenet:train")
    with pytest.raises(InputError, match="imagenet-1k-wds/train"):
        open_source("imagenet_wds:train")


def test_a_folder_with_the_name_of_a_set_must_be_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"write digits:train or \./digits"):
        open_source("digits")
    assert len(open_source("digits:train").labels) == 1438


@pytest.mark.parametrize("text", ["a/train-000.tar", "https://127.0.0.1:1/train-{000..007}.tar"])
def test_tars_without_a_manifest_are_sent_to_the_index(text: str) -> None:
    with pytest.raises(InputError, match="make their manifest with: nc-dist shards index"):
        open_source(text)
