"""Any model opened for measuring: what it gives is what independent hooks see in the net's own forward.

The references are nets made here, by torchvision or timm, with the seed that a random subject has.
"""

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from nc_dist.backbones import SmallResNetSpec
from nc_dist.data.augment import InputChange, InputSpec
from nc_dist.errors import InputError
from nc_dist.heads import MLPHead, NoHead
from nc_dist.model import Model, ModelSpec, export
from nc_dist.subject import Subject, open_subject, subject_paths
from nc_dist.subject_hooks import layout, observer

Pool = Callable[[Tensor], Tensor]


def maps(z: Tensor) -> Tensor:
    return z.flatten(2).mean(2)


def maps_channels_last(z: Tensor) -> Tensor:
    return z.flatten(1, 2).mean(1)


def class_token(z: Tensor) -> Tensor:
    return z[:, 0]


def tokens(z: Tensor) -> Tensor:
    return z.mean(1)


class Case(NamedTuple):
    name: str
    size: int
    blocks: list[str]
    pool: Pool
    classifier: str | None
    made: dict[str, Any] = {}


def numbered(stem: str, n: int) -> list[str]:
    return [f"{stem}{i}" for i in range(n)]


RESNET18 = [f"layer{stage}.{i}" for stage in (1, 2, 3, 4) for i in (0, 1)]
VIT_B = numbered("encoder.layers.encoder_layer_", 12)
INCEPTION = ["3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"]
CASES = [
    Case("torchvision:resnet18", 64, RESNET18, maps, "fc"),
    Case("torchvision:vit_b_16", 32, VIT_B, class_token, "heads.head", {"image_size": 32}),
    Case("torchvision:convnext_tiny", 64, numbered("features.", 8), maps, "classifier.2"),
    Case("torchvision:mobilenet_v3_small", 64, numbered("features.", 13), maps, "classifier.3"),
    Case("torchvision:swin_t", 64, numbered("features.", 8), maps_channels_last, "head"),
    Case("torchvision:squeezenet1_1", 64, numbered("features.", 13), maps, None),
    Case(
        "torchvision:googlenet",
        64,
        ["conv1", "conv2", "conv3", *(f"inception{part}" for part in INCEPTION)],
        maps,
        "fc",
        {"aux_logits": False, "init_weights": False},
    ),
    Case("timm:resnet10t", 64, [f"layer{i}.0" for i in (1, 2, 3, 4)], maps, "fc"),
    Case("timm:vit_tiny_patch16_224", 32, numbered("blocks.", 12), class_token, "head", {"img_size": 32}),
    Case("timm:convnext_atto", 64, numbered("stages.", 4), maps, "head.fc"),
    Case("timm:regnetx_002", 64, ["stem", "s1", "s2", "s3", "s4"], maps, "head.fc"),
    Case("timm:resmlp_12_224", 32, numbered("blocks.", 12), tokens, "head", {"img_size": 32}),
    Case("timm:vit_small_patch14_dinov2", 28, numbered("blocks.", 12), class_token, None, {"img_size": 28}),
]


def reference(case: Case) -> nn.Module:
    """The net as its own library makes it."""
    zoo, _, name = case.name.partition(":")
    torch.manual_seed(0)
    if zoo == "timm":
        return timm.create_model(name, **case.made).eval()
    return torchvision.models.get_model(name, **case.made).eval()


def hook_counts(module: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]


class Runs:
    """How often the convolutions and linear layers of a module have run since."""

    def __init__(self, module: nn.Module) -> None:
        self.counts: Counter[int] = Counter()
        layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        for i, layer in enumerate(layers):
            layer.register_forward_hook(lambda module, inputs, out, i=i: self.counts.update([i]))


class Opened(NamedTuple):
    case: Case
    subject: Subject
    net: nn.Module


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def opened(request: pytest.FixtureRequest) -> Iterator[Opened]:
    case = request.param
    before = torch.get_rng_state()
    subject = open_subject(case.name, input=InputChange(size=case.size))
    assert torch.get_rng_state().equal(before), "opening draws from the process's own random numbers"
    yield Opened(case, subject, reference(case))


@torch.no_grad()
def test_every_block_embedding_and_logits_are_what_own_hooks_see_and_one_forward_gives_them(opened: Opened) -> None:
    case, subject, net = opened
    x = torch.randn(2, 3, case.size, case.size)
    seen: dict[str, Tensor] = {}

    def keep(name: str, pool: Pool) -> Any:
        return lambda module, inputs, out: seen.__setitem__(name, pool(out.clone()))

    handles = [net.get_submodule(name).register_forward_hook(keep(name, case.pool)) for name in case.blocks]
    if case.classifier:
        head = net.get_submodule(case.classifier)
        handles.append(head.register_forward_pre_hook(lambda module, inputs: seen.__setitem__("embedding", inputs[0])))
    output = net(x)
    for handle in handles:
        handle.remove()
    hooks, runs, expected_runs = hook_counts(subject.module), Runs(subject.module), Runs(net)
    net(x)
    names = [block.name for block in subject.blocks]
    outputs, features = subject.observe(x, names)
    assert runs.counts.total() == expected_runs.counts.total()
    for module in subject.module.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module._forward_hooks.clear()
    assert hook_counts(subject.module) == hooks == [0] * len(hooks)

    assert names == case.blocks and list(features) == names
    for block in subject.blocks:
        assert features[block.name].shape == (2, block.dim)
        assert block.pooling == ("cls" if case.pool is class_token else "average")
        torch.testing.assert_close(features[block.name], seen[block.name])
    if case.name == "timm:vit_small_patch14_dinov2":  # has no classifier: its output is the embedding
        assert outputs.logits_BK is None and outputs.embedding_BE.equal(output)
    else:
        assert outputs.logits_BK is not None
        torch.testing.assert_close(outputs.logits_BK, output)
        torch.testing.assert_close(outputs.embedding_BE, seen["embedding"] if case.classifier else seen[names[-1]])
    assert subject.headless and outputs.features_Bd is outputs.embedding_BE
    assert outputs.embedding_BE.shape == (2, subject.embedding_dim) and subject.dim == subject.embedding_dim


@torch.no_grad()
def test_the_classifier_acts_on_the_embedding(opened: Opened) -> None:
    case, subject, _ = opened
    if case.classifier is None:
        assert subject.classifier is None
        return
    outputs, features = subject.observe(torch.randn(2, 3, case.size, case.size), [])
    assert subject.classifier is not None and features == {}
    torch.testing.assert_close(subject.classifier(outputs.embedding_BE), outputs.logits_BK)


def test_a_subject_tells_what_it_is(opened: Opened) -> None:
    case, subject, net = opened
    assert subject.about["model"] == case.name and subject.about["weights"] == "random, seed 0"
    assert subject.about["parameters"] == sum(p.numel() for p in net.parameters())
    assert subject.step is None and not subject.module.training


def test_an_unknown_block_lists_those_there_are_and_leaves_no_hook(opened: Opened) -> None:
    case, subject, _ = opened
    with pytest.raises(ValueError, match=f"block='nowhere': no such block; .*{case.blocks[0]}, {case.blocks[1]}"):
        subject.observe(torch.zeros(1, 3, case.size, case.size), ["nowhere"])
    assert not any(hook_counts(subject.module))


class Ends(nn.Module):
    """A toy net of the given blocks in a trunk, with a linear classifier after its mean."""

    def __init__(self, blocks: list[nn.Module], width: int, pool: Pool = maps) -> None:
        super().__init__()
        self.trunk, self.pool, self.fc = nn.Sequential(*blocks), pool, nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.trunk(x)))  # type: ignore[no-any-return]


class Permuted(nn.Sequential):
    """A convolution whose output has its channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2) if x.shape[1] != 3 else x).permute(0, 2, 3, 1)


@torch.no_grad()
def test_an_activation_as_wide_as_high_as_deep_is_read_as_the_other_blocks_are() -> None:
    first = Ends([nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), nn.Sequential(nn.Conv2d(8, 5, 3, padding=1))], 5)
    last = Ends([Permuted(nn.Conv2d(3, 8, 1)), Permuted(nn.Conv2d(8, 5, 1))], 5, maps_channels_last)
    for net, pool in ((first, maps), (last, maps_channels_last)):
        seen = layout(net.eval(), 8)  # block 0 gives (1, 8, 8, 8)
        assert [place.block.dim for place in seen.places] == [8, 5]
        x = torch.randn(2, 3, 8, 8)
        features = observer(net, seen, True)(x, ["trunk.0"])[1]["trunk.0"]
        torch.testing.assert_close(features, pool(net.trunk[0](x)))


@torch.no_grad()
def test_features_are_taken_before_what_follows_works_in_place() -> None:
    net = Ends([nn.Sequential(nn.Conv2d(3, 4, 1)), nn.ReLU(inplace=True)], 4).eval()
    x = torch.randn(2, 3, 4, 4)
    _, features = observer(net, layout(net, 4), True)(x, ["trunk.0"])
    torch.testing.assert_close(features["trunk.0"], maps(net.trunk[0](x)))
    assert (features["trunk.0"] < 0).any()


@torch.no_grad()
def test_hooks_are_gone_after_a_forward_that_fails() -> None:
    net = Ends([nn.Sequential(nn.Conv2d(3, 4, 1))], 4).eval()
    observe = observer(net, layout(net, 4), True)
    with pytest.raises(RuntimeError):
        observe(torch.zeros(1, 2, 4, 4), ["trunk.0"])
    assert not any(hook_counts(net))


def test_a_net_of_plain_layers_has_each_of_them_as_a_block() -> None:
    net = Ends([nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 1)], 6).eval()
    assert [(p.block.name, p.block.dim) for p in layout(net, 4).places] == [
        ("trunk.0", 4),
        ("trunk.1", 4),
        ("trunk.2", 6),
    ]


class Plain(nn.Module):
    """No blocks, and a classifier that is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return maps(self.conv(x))


def test_a_net_without_blocks_and_linear_classifier_is_refused() -> None:
    with pytest.raises(ValueError, match="neither blocks nor a linear classifier"):
        layout(Plain().eval(), 4)


def test_what_runs_twice_is_no_block() -> None:
    shared = nn.Sequential(nn.Conv2d(3, 3, 1))
    assert [p.block.name for p in layout(Ends([shared, nn.Sequential(shared)], 3).eval(), 4).places] == ["trunk.1"]


class Tokens(nn.Module):
    """Four places behind `extra` tokens, through two blocks."""

    def __init__(self, extra: int, **about: Any) -> None:
        super().__init__()
        self.extra = extra
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3)) for _ in range(2)))
        self.head = nn.Linear(3, 5)
        for name, value in about.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        places = nn.functional.avg_pool2d(x, 2).flatten(2).mT
        return self.head(self.blocks(torch.cat([places[:, : self.extra] + 1, places], 1)).mean(1))  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize(
    "extra, about, pool",
    [
        (1, {"cls_token": torch.zeros(1)}, lambda z: z[:, 0]),
        (1, {"cls_token": torch.zeros(1), "global_pool": "token"}, lambda z: z[:, 0]),
        (1, {"cls_token": torch.zeros(1), "global_pool": "avg"}, lambda z: z[:, 1:].mean(1)),
        (2, {"cls_token": None, "num_prefix_tokens": 2, "global_pool": "avg"}, lambda z: z[:, 2:].mean(1)),
        (0, {"cls_token": torch.zeros(1)}, lambda z: z.mean(1)),  # it joins the tokens later, as in CaiT
        (0, {}, lambda z: z.mean(1)),
    ],
)
def test_tokens_are_pooled_as_the_net_does(extra: int, about: dict[str, Any], pool: Pool) -> None:
    net, x = Tokens(extra, **about).eval(), torch.randn(3, 3, 4, 4)
    seen: list[Tensor] = []
    handle = net.blocks[0].register_forward_hook(lambda module, inputs, out: seen.append(pool(out)))
    net(x)
    handle.remove()
    _, features = observer(net, layout(net, 4), True)(x, ["blocks.0"])
    torch.testing.assert_close(features["blocks.0"], seen[0])


def small(head: Any = None, classes: int = 5, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model(ModelSpec(backbone=SmallResNetSpec(name="resnet8", width=4), head=head or NoHead()), classes).eval()


@torch.no_grad()
def test_a_run_folder_gives_its_model_head_and_input(tmp_path: Path) -> None:
    for head in (None, MLPHead(output=6)):
        model = small(head)
        export(model, tmp_path / "run/export", InputSpec(size=8, crop=0.5), list("abcde"), {})
        for place in (tmp_path / "run", tmp_path / "run/export"):
            subject = open_subject(str(place))
            assert subject.input == InputSpec(size=8, crop=0.5) and subject.step is None
            assert subject.headless == (head is None)
            assert (subject.dim, subject.embedding_dim) == (16, 6 if head else 16)
            assert [block.name for block in subject.blocks] == ["layer1.0", "layer2.0", "layer3.0"]
            x = torch.randn(2, 3, 8, 8)
            outputs, features = subject.observe(x, ["layer2.0"])
            for ours, theirs in zip(outputs, model(x), strict=True):
                assert ours is not None and theirs is not None and ours.equal(theirs)
            assert features["layer2.0"].equal(model.features(x, ["layer2.0"])["layer2.0"])
            assert subject.classifier is not None and subject.classifier(outputs.embedding_BE).equal(outputs.logits_BK)
            assert open_subject(str(place), input=InputChange(size=16)).input.size == 16


def checkpoints(folder: Path, steps: list[int]) -> Path:
    for step in steps:
        export(small(seed=step), folder / f"step_{step}/export", InputSpec(size=8), [], {})
        (folder / f"step_{step}/manifest.json").write_text("{}")
    return folder


def test_a_pattern_gives_the_checkpoints_by_step_without_links_and_unfinished_ones(tmp_path: Path) -> None:
    folder = checkpoints(tmp_path, [10, 2, 100])
    (folder / "step_7.partial").mkdir()
    (folder / "best").symlink_to("step_2")
    (folder / "step_last").symlink_to("step_100")
    expected = [str(folder / f"step_{step}") for step in (2, 10, 100)]
    for pattern in ("step_*", "*", "step_[0-9]*"):
        assert subject_paths(str(folder / pattern)) == expected
    assert subject_paths(str(folder / "step_*/export")) == [f"{path}/export" for path in expected]
    for pattern in ("step_*", "step_*/export"):
        subjects = [open_subject(path) for path in subject_paths(str(folder / pattern))]
        assert [subject.step for subject in subjects] == [2, 10, 100]
        assert len({subject.identity for subject in subjects}) == 3
    assert open_subject(str(folder / "best")).step == 2


def test_a_plain_name_is_itself_and_a_pattern_that_fits_nothing_is_refused(tmp_path: Path) -> None:
    for name in ("runs/x", "torchvision:resnet18", str(tmp_path)):
        assert subject_paths(name) == [name]
    with pytest.raises(InputError, match=r"step_\*: no folder matches this pattern; looked in /"):
        subject_paths(str(tmp_path / "step_*"))


def test_checkpoints_without_an_export_are_refused_before_any_is_measured(tmp_path: Path) -> None:
    folder = checkpoints(tmp_path, [2, 10])
    shutil.rmtree(folder / "step_10/export")
    with pytest.raises(InputError, match=r"step_10: a checkpoint that holds only what resuming needs"):
        subject_paths(str(folder / "step_*"))
    with pytest.raises(InputError, match="run again so that its checkpoints hold one"):
        open_subject(str(folder / "step_10"))


def save(tensors: dict[str, Tensor], path: Path, prefix: str = "", without: str = "nothing.") -> str:
    torch.save({"state_dict": {prefix + k: v for k, v in tensors.items() if not k.startswith(without)}}, path)
    return str(path)


FITTED = [
    ("torchvision:resnet18", {}, "fc"),
    ("torchvision:mobilenet_v3_small", {}, "classifier.3"),
    ("timm:resnet10t", {}, "fc"),
    ("timm:vit_tiny_patch16_224", {"img_size": 32}, "head"),
]


@torch.no_grad()
@pytest.mark.parametrize("name, made, classifier", FITTED, ids=[name for name, *_ in FITTED])
def test_a_file_fills_a_named_net_with_or_without_classifier_of_any_size(
    name: str, made: dict[str, Any], classifier: str, tmp_path: Path
) -> None:
    torch.manual_seed(9)
    zoo, _, short = name.partition(":")
    make = timm.create_model if zoo == "timm" else torchvision.models.get_model
    net, x = make(short, num_classes=7, **made).eval(), torch.randn(2, 3, 32, 32)
    file, input = tmp_path / "w.pth", InputChange(size=32)
    whole = open_subject(name, save(net.state_dict(), file, "module.encoder_q."), input)
    assert whole.classifier is not None and whole.classifier.out_features == 7
    outputs, _ = whole.observe(x, [])
    assert outputs.logits_BK is not None
    torch.testing.assert_close(outputs.logits_BK, net(x))
    assert whole.about["weights"] == str(file) and "prefix 'module.encoder_q.' stripped" in whole.about["match"]

    headless = open_subject(name, save(net.state_dict(), file, without=classifier), input)
    again, _ = headless.observe(x, [])
    assert headless.classifier is None and again.logits_BK is None and again.embedding_BE.equal(outputs.embedding_BE)
    assert (
        headless.about["match"].endswith("; no classifier") and f"of {len(net.state_dict())} t" in whole.about["match"]
    )
    assert headless.identity != whole.identity
    assert open_subject(name, str(file), input, seed=5).identity == headless.identity


def test_a_file_that_does_not_fit_names_model_file_and_tensors(tmp_path: Path) -> None:
    net = torchvision.models.resnet18()
    file = save(net.state_dict(), tmp_path / "w.pth")
    with pytest.raises(
        InputError, match=r"model=torchvision:resnet34, weights=.*w.pth: does not fit .* are missing: l"
    ):
        open_subject("torchvision:resnet34", file, InputChange(size=32))
    with pytest.raises(InputError, match=r"have another shape: layer1.0.conv1.weight \(64, 64, 3, 3\) for"):
        open_subject("torchvision:resnet50", file, InputChange(size=32))
    deeper = save(torchvision.models.resnet34().state_dict(), tmp_path / "w34.pth")
    with pytest.raises(InputError, match=r"w34.pth: .* larger net, 96 of its tensors have no place: layer1.2.conv1"):
        open_subject("torchvision:resnet18", deeper, InputChange(size=32))


def test_the_classes_have_the_names_that_an_export_tells(tmp_path: Path) -> None:
    for names, expected in ((list("abcde"), tuple("abcde")), (list("abcd"), None), ([], None)):
        export(small(), tmp_path / "export", InputSpec(size=8), names, {})
        assert open_subject(str(tmp_path)).class_names == expected
    export(small(classes=0), tmp_path / "export", InputSpec(size=8), list("abcde"), {})
    headless = open_subject(str(tmp_path))
    assert headless.classifier is None and headless.class_names is None


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_the_classes_have_the_names_of_a_tag_of_torchvision_if_they_are_as_many(name: str, tmp_path: Path) -> None:
    published = torchvision.models.get_model_weights(name).DEFAULT
    make, input = torchvision.models.get_model, InputChange(size=32)
    file = save(make(name).state_dict(), tmp_path / "w.pth")
    for tag in (published.name, "DEFAULT"):
        found = open_subject(f"torchvision:{name}/{tag}", file, input).class_names
        assert found == tuple(published.meta["categories"]) and found[0] == "tench"
    assert open_subject(f"torchvision:{name}", file, input).class_names is None
    few = save(make(name, num_classes=7).state_dict(), tmp_path / "w.pth")
    assert open_subject(f"torchvision:{name}/DEFAULT", few, input).class_names is None
    none = save(make(name).state_dict(), tmp_path / "w.pth", without={"resnet18": "fc."}.get(name, "classifier.3."))
    assert open_subject(f"torchvision:{name}/DEFAULT", none, input).class_names is None


def test_a_tag_with_a_file_says_what_the_file_is_for_and_nothing_is_downloaded(tmp_path: Path) -> None:
    file = save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pth")
    subject = open_subject("torchvision:resnet18/IMAGENET1K_V1", file)
    assert subject.input == InputSpec(size=224, crop=224 / 256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    many = timm.create_model("vit_tiny_patch16_224.augreg_in21k")
    subject = open_subject("timm:vit_tiny_patch16_224/augreg_in21k", save(many.state_dict(), tmp_path / "t.pth"))
    assert subject.input == InputSpec(
        size=224, crop=0.9, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic"
    )
    assert subject.about["made_for"]["interpolation"] == "bicubic"
    assert subject.classifier is not None and subject.classifier.out_features == 21843


@torch.no_grad()
def test_published_weights_of_torchvision_are_taken_from_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    tag = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    net = torchvision.models.resnet18().eval()
    torch.save(net.state_dict(), tmp_path / "hub/checkpoints" / tag.url.rpartition("/")[2])
    for name in ("IMAGENET1K_V1", "DEFAULT"):
        subject = open_subject(f"torchvision:resnet18/{name}")
        assert subject.about["weights"] == "IMAGENET1K_V1" and subject.input.size == 224
        x = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(subject.observe(x, [])[0].logits_BK, net(x))


@torch.no_grad()
def test_a_published_file_gives_what_its_download_gives_also_where_the_net_rescales_its_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = torchvision.models.GoogLeNet_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    published = torchvision.models.googlenet(init_weights=False)  # with its auxiliary classifiers
    torch.save(published.state_dict(), tmp_path / "hub/checkpoints" / name)
    x = torch.randn(1, 3, 64, 64)
    given = str(tmp_path / "hub/checkpoints" / name)
    one, two, plain = (
        open_subject(f"torchvision:googlenet{tag}", weights, InputChange(size=64)).observe(x, [])[0].embedding_BE
        for tag, weights in (("/DEFAULT", None), ("/DEFAULT", given), ("", given))
    )
    assert one.equal(two) and not one.equal(plain)


@torch.no_grad()
def test_published_weights_of_timm_are_taken_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder, revision = tmp_path / "models--timm--resnet10t.c3_in1k", "0" * 40
    (folder / f"snapshots/{revision}").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(revision)
    net = timm.create_model("resnet10t").eval()
    save_file(net.state_dict(), folder / f"snapshots/{revision}/model.safetensors")
    for name in ("timm:resnet10t/c3_in1k", "timm:resnet10t.c3_in1k", "timm:resnet10t/DEFAULT"):
        subject = open_subject(name)
        assert subject.about["weights"] == "c3_in1k"
        assert (subject.input.size, subject.input.crop) == (224, 0.95)  # timm's size for evaluation
        x = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(subject.observe(x, [])[0].logits_BK, net(x))


@pytest.mark.parametrize("name", ["torchvision:resnet18/IMAGENET1K_V1", "timm:resnet10t/c3_in1k"])
def test_a_download_that_fails_says_where_to_get_the_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(InputError, match=rf"{name}: .*cannot be downloaded here.*https://.*model={name} weights=FILE"):
        open_subject(name)


def test_the_identity_is_that_of_the_weights_whichever_way_they_come(tmp_path: Path) -> None:
    named = open_subject("torchvision:resnet18", input=InputChange(size=32))
    assert isinstance(named.module, Model)
    export(named.module, tmp_path / "run/export", InputSpec(size=32), [], {})
    file = save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pth")
    assert open_subject(str(tmp_path / "run")).identity == named.identity
    assert open_subject("torchvision:resnet18", seed=0).identity == named.identity
    assert open_subject("torchvision:resnet18", seed=1).identity != named.identity
    assert open_subject("torchvision:resnet18", file).identity != named.identity


@pytest.mark.parametrize(
    "name, said",
    [
        ("torchvision:resnet51", r"torchvision has no model 'resnet51'; did you mean resnet50"),
        ("torchvision:resnet18/V9", r"resnet18/V9: its weights are IMAGENET1K_V1 and DEFAULT"),
        ("timm:resnet10x", r"timm has no model 'resnet10x'; did you mean resnet10t"),
        ("timm:resnet10t/a1", r"resnet10t/a1: its weights are c3_in1k and DEFAULT"),
        ("torchvison:resnet18", r"no such folder; did you mean torchvision:resnet18"),
        ("resnet18", r"no such folder; did you mean .*Expected a run or export folder, torchvision:NAME"),
        ("runs/none", r"model=runs/none: no such folder"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_ones(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        open_subject(name)


def test_a_wrong_folder_name_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "cifar_supcon").mkdir()
    with pytest.raises(InputError, match=r"no such folder; did you mean .*cifar_supcon"):
        open_subject(str(tmp_path / "cifar_supcom"))
    with pytest.raises(InputError, match="no exported model .* finish the run first"):
        open_subject(str(tmp_path / "cifar_supcon"))


def test_files_and_folders_in_the_wrong_place_are_refused(tmp_path: Path) -> None:
    checkpoints(tmp_path, [1])
    (tmp_path / "w.pth").write_bytes(b"")
    with pytest.raises(InputError, match="w.pth: a file; name the net it is for"):
        open_subject(str(tmp_path / "w.pth"))
    with pytest.raises(InputError, match="has its own; weights go with torchvision: and timm: names"):
        open_subject(str(tmp_path / "step_1"), weights="w.pth")


@pytest.mark.parametrize("name", ["torchvision:vit_b_16", "torchvision:alexnet"])
def test_images_of_a_size_that_the_net_does_not_take_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="input.size=20"):
        open_subject(name, input=InputChange(size=20))


def test_without_timm_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"timm is not installed; pip install 'nc-dist\[timm\]'"):
        open_subject("timm:resnet10t")
