"""The weights a backbone starts from: found wherever they are said to be, reported in full, refused unless they fit."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from servers import Fault, http_server
from torch import Tensor, nn

from nc_dist.backbones import BackboneSpec, SmallResNetSpec, TimmSpec, TorchvisionSpec
from nc_dist.data.augment import InputSpec
from nc_dist.errors import InputError
from nc_dist.heads import MLPHead
from nc_dist.initial_weights import noted, report, start_from
from nc_dist.model import Model, ModelSpec, export
from nc_dist.weights import weights_identity

SMALL: dict[str, Any] = {"name": "resnet8", "width": 2}


@pytest.fixture(autouse=True)
def nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of this test alone, and no way out."""
    import huggingface_hub.constants

    monkeypatch.setenv("NC_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NC_DIST_FETCH_ATTEMPTS", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def published(seed: int = 1) -> nn.Module:
    """A net as its authors have it: with a classifier, and trained statistics."""
    torch.manual_seed(seed)
    net = SmallResNetSpec(**SMALL).build().net
    net.fc = nn.Linear(8, 10)
    for value in net.state_dict().values():
        value.add_(0.1 if value.is_floating_point() else 1)
    return net


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def started(spec: BackboneSpec, out: Path) -> dict[str, Tensor]:
    """The state dict of a backbone after it was started from the spec's weights, which `report` left alone."""
    torch.manual_seed(0)
    backbone = spec.build()
    before = copy.deepcopy(backbone.state_dict())
    foretold = report(spec)
    assert all(value.equal(before[name]) for name, value in backbone.state_dict().items())
    start_from(spec, backbone, out, leads=True)
    assert noted(out) == {
        "from": spec.weights,
        "report": foretold,
        "identity": weights_identity(backbone.net.state_dict()),
    }
    return backbone.net.state_dict()


def is_of(state: dict[str, Tensor], net: nn.Module) -> bool:
    """Whether all tensors are the net's, whose classifier is left out."""
    theirs = net.state_dict()
    return len(state) > 10 and all(value.equal(theirs[name]) for name, value in state.items())


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "module.model."])
def test_a_file_is_read_its_prefix_stripped_and_its_classifier_named(
    name: str, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, path = published(), tmp_path / name
    state = prefixed(net.state_dict(), prefix)
    save_file(state, path) if name.endswith("safetensors") else torch.save({"state_dict": state}, path)
    assert is_of(started(SmallResNetSpec(**SMALL, weights=str(path)), tmp_path), net)
    stripped = f"; prefix '{prefix}' stripped" if prefix else ""
    classifier = f"{prefix}fc"
    assert capsys.readouterr().out == (
        f"weights: {path}: 54 of 54 tensors{stripped}; 2 of the file not used: {classifier} (2); "
        f"the classifier {classifier} of the file is not taken\n"
    )


def test_a_net_wrapped_for_many_gpus_is_read_as_it_was_saved(tmp_path: Path) -> None:
    net = published()
    torch.save(nn.DataParallel(net).state_dict(), tmp_path / "w.pth")
    assert is_of(started(SmallResNetSpec(**SMALL, weights=str(tmp_path / "w.pth")), tmp_path), net)


class Attacked(nn.Module):
    """A net as libraries for robust training wrap it: normaliser, net, and an attacker that holds the net again."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.normalizer = nn.Module()
        self.normalizer.register_buffer("new_mean", torch.zeros(3, 1, 1))
        self.normalizer.register_buffer("new_std", torch.ones(3, 1, 1))
        self.model = net
        self.attacker = nn.Module()
        self.attacker.normalize, self.attacker.model = self.normalizer, net


def test_a_robust_nets_checkpoint_is_read_and_all_that_is_not_used_is_named(tmp_path: Path) -> None:
    net, spec = published(), SmallResNetSpec(**SMALL, weights=str(tmp_path / "robust.pt"))
    model = nn.DataParallel(Attacked(net)).state_dict()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9).state_dict()
    torch.save({"model": model, "optimizer": optimizer, "epoch": 90, "amp": None, "nat_prec1": 61.5}, spec.weights)
    assert is_of(started(spec, tmp_path), net)
    told = noted(tmp_path)["report"]  # type: ignore[index]
    assert "54 of 54 tensors; prefix 'module.model.' stripped; 62 of the file not used: " in told
    for part in ("module.normalizer (2)", "module.model.fc (2)", "module.attacker (58)"):
        assert part in told
    assert told.endswith("the classifier module.model.fc of the file is not taken")


@pytest.mark.parametrize("inside", ["", "export"])
def test_a_run_of_ours_is_started_from_without_its_head_and_classifier(inside: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    source = Model(ModelSpec(backbone=SmallResNetSpec(**SMALL), head=MLPHead(output=4)), 5)
    export(source, tmp_path / "run/export", InputSpec(), [], {})
    spec = SmallResNetSpec(**SMALL, weights=str(tmp_path / "run" / inside))
    assert is_of(started(spec, tmp_path), source.backbone.net)
    assert noted(tmp_path)["report"].endswith(": 54 of 54 tensors")  # type: ignore[index]
    with pytest.raises(InputError, match=r"model.backbone.weights=.*: does not fit the model.*have another shape"):
        report(SmallResNetSpec(name="resnet8", width=3, weights=spec.weights))
    with pytest.raises(InputError, match="no exported model"):
        report(SmallResNetSpec(**SMALL, weights=str(tmp_path)))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "www").mkdir()
    torch.save(published().state_dict(), tmp_path / "www/w.pth")
    with http_server(tmp_path / "www") as server:
        yield server


def test_a_url_is_downloaded_once_and_kept(server: Any, tmp_path: Path) -> None:
    spec = SmallResNetSpec(**SMALL, weights=f"{server.url}/w.pth")
    for _ in range(2):
        assert is_of(started(spec, tmp_path), published())
    assert len(server.gets("w.pth")) == 1
    [kept] = (tmp_path / "cache/weights").glob("*.pth")
    assert kept.read_bytes() == (tmp_path / "www/w.pth").read_bytes()


def test_half_a_download_is_not_kept(server: Any, tmp_path: Path) -> None:
    server.faults["w.pth"] = iter([Fault(cut=1000)])
    spec = SmallResNetSpec(**SMALL, weights=f"{server.url}/w.pth")
    with pytest.raises(InputError, match="weights: cannot be downloaded here .*w.pth.* give its path"):
        report(spec)
    assert not list((tmp_path / "cache/weights").glob("*.pth"))
    assert is_of(started(spec, tmp_path), published())


def test_a_url_that_nobody_answers_is_a_clear_error() -> None:
    with pytest.raises(InputError, match=r"cannot be downloaded here \(http://127.0.0.1:9/w.pth: .*network.*path"):
        report(SmallResNetSpec(**SMALL, weights="http://127.0.0.1:9/w.pth"))


@pytest.mark.parametrize("tag", ["IMAGENET1K_V1", "DEFAULT", True])
def test_torchvisions_published_weights_come_from_its_cache(tag: Any, tmp_path: Path) -> None:
    net = torchvision.models.mobilenet_v3_small()
    url = torchvision.models.MobileNet_V3_Small_Weights.IMAGENET1K_V1.url
    (tmp_path / "torch/hub/checkpoints").mkdir(parents=True)
    torch.save(net.state_dict(), tmp_path / "torch/hub/checkpoints" / url.rpartition("/")[2])
    spec = TorchvisionSpec.model_validate({"name": "mobilenet_v3_small", "stem": "small", "weights": tag})
    assert is_of(started(spec, tmp_path), net)
    assert noted(tmp_path)["report"].endswith("the classifier classifier.3 of the file is not taken")  # type: ignore[index]


def in_timms_cache(hub: Path, name: str, seed: int) -> nn.Module:
    """A net whose state dict lies where timm looks for the published one of this name and tag."""
    folder, revision = hub / f"models--timm--{name}", "0" * 40
    (folder / f"snapshots/{revision}").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(revision)
    torch.manual_seed(seed)
    net: nn.Module = timm.create_model(name)
    save_file(net.state_dict(), folder / f"snapshots/{revision}/model.safetensors")
    return net


def test_timms_published_weights_come_from_its_cache_each_under_its_tag(tmp_path: Path) -> None:
    name = "mobilenetv4_conv_small"
    nets = {
        tag: in_timms_cache(tmp_path / "hub", f"{name}.{tag}", i)
        for i, tag in enumerate(("e2400_r224_in1k", "e1200_r224_in1k"))
    }
    for tag, net in (*nets.items(), (True, nets["e2400_r224_in1k"])):
        spec = TimmSpec.model_validate({"name": name, "weights": tag})
        assert is_of(started(spec, tmp_path), net), tag
    tagged = TimmSpec.model_validate({"name": f"{name}.e1200_r224_in1k", "weights": True})
    assert is_of(started(tagged, tmp_path), nets["e1200_r224_in1k"])


def test_timm_fits_position_embeddings_to_another_image_size(tmp_path: Path) -> None:
    theirs = in_timms_cache(tmp_path / "hub", "test_vit.r160_in1k", 0).state_dict()
    fitted = started(TimmSpec(name="test_vit", weights="r160_in1k", args={"img_size": 64}), tmp_path)
    assert fitted["pos_embed"].shape == (1, 17, 64) != theirs["pos_embed"].shape
    assert fitted["blocks.0.attn.qkv.weight"].equal(theirs["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    "spec, said",
    [
        (TorchvisionSpec(name="resnet18", weights="DEFAULT"), "resnet18 cannot be downloaded here .*weights=FILE"),
        (TimmSpec(name="test_vit", weights="r160_in1k"), "test_vit cannot be downloaded here .*weights=FILE"),
        (TorchvisionSpec(name="resnet18", weights="V9"), "neither a file.*URL; resnet18 has IMAGENET1K_V1, DEFAULT"),
        (TimmSpec(name="test_vit", weights="a1"), "neither a file.*; test_vit has r160_in1k, DEFAULT"),
        (
            SmallResNetSpec(**SMALL, weights="no.pth"),
            "neither a file.*resnet8 has no published weights",
        ),
        (SmallResNetSpec(**SMALL, weights="DEFAULT"), ": resnet8 has no published weights"),
    ],
)
def test_weights_that_cannot_be_had_are_an_error_with_the_remedy(spec: BackboneSpec, said: str) -> None:
    with pytest.raises(InputError, match=f"model.backbone.weights={spec.weights}.*{said}"):
        report(spec)


def test_a_small_stem_does_not_take_the_weights_of_a_large_one_in_silence(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pth")
    spec = TorchvisionSpec(name="resnet18", stem="small", weights=str(tmp_path / "w.pth"))
    with pytest.raises(InputError, match=r"1 have another shape: conv1.weight \(64, 3, 7, 7\) for \(64, 3, 3, 3\)"):
        report(spec)


def test_without_weights_nothing_is_read_said_or_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = SmallResNetSpec(**SMALL)
    start_from(spec, spec.build(), tmp_path, leads=True)
    assert report(spec) is None and noted(tmp_path) is None and not capsys.readouterr().out


def test_ranks_that_do_not_lead_load_and_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = published()
    torch.save(net.state_dict(), tmp_path / "w.pth")
    spec = SmallResNetSpec(**SMALL, weights=str(tmp_path / "w.pth"))
    backbone = spec.build()
    start_from(spec, backbone, tmp_path, leads=False)
    assert is_of(backbone.net.state_dict(), net) and noted(tmp_path) is None and not capsys.readouterr().out
