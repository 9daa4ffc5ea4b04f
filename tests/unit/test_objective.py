"""The objective: which terms are added, with which weights, over which views, and what is told of them."""

from typing import Any

import pytest
import torch
from processes import SMALL
from torch import Tensor

from nc_dist.backbones import SmallResNetSpec
from nc_dist.config import PretrainRun
from nc_dist.data.augment import InputSpec
from nc_dist.data.mix import Cutmix, MixSpec, Mixup, NoMix
from nc_dist.data.stream import Batch
from nc_dist.engine import TorchSpec
from nc_dist.engine.torch_engine import TorchEngine
from nc_dist.errors import InputError
from nc_dist.heads import CosineClassifier, ETFClassifier
from nc_dist.loop import train_steps
from nc_dist.losses import (
    BCE,
    CosineSoftmax,
    CrossEntropy,
    FeatureNorm,
    Focal,
    KoLeo,
    LossSpec,
    RegulariserSpec,
    SupCon,
    WithinClass,
)
from nc_dist.model import Model, ModelSpec
from nc_dist.objective import Objective, each_view
from nc_dist.optim import SGD, Schedule
from nc_dist.outputs import Outputs
from nc_dist.pretrain_check import check_classifier, check_terms
from nc_dist.spec import Spec, load, validate
from nc_dist.world import World

RANDOM = torch.Generator().manual_seed(0)
FEATURES, EMBEDDING, LOGITS = (torch.randn(8, n, dtype=torch.float64, generator=RANDOM) for n in (6, 4, 3))
LABELS = torch.tensor([0, 1, 2, 0])
OUTPUTS = Outputs(FEATURES, EMBEDDING, LOGITS)
REGULARISERS = (KoLeo(weight=0.05), FeatureNorm(weight=0.01), WithinClass(weight=-2))


def objective(loss: LossSpec, *regularisers: RegulariserSpec, mix: MixSpec | None = None) -> Objective:
    schedule = Schedule(kind="constant", warmup=0)
    return Objective(loss, InputSpec(size=8), 2, 0, 0.1, schedule, 1, mix or NoMix(), regularisers)


def half(start: int) -> Outputs:
    return Outputs(*(part[start : start + 4] for part in OUTPUTS))  # type: ignore[index]


def added_up(made: Objective, outputs: Outputs, targets: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The terms that are not coupled and those that are, as the loop adds them up."""
    (apart, parts), (together, others) = (made.value(outputs, targets, coupled) for coupled in (False, True))
    return apart + together, dict(zip(made.names, (parts + others).tolist(), strict=True))


def test_a_loss_alone_is_the_loss() -> None:
    total, told = added_up(objective(CrossEntropy()), half(0), LABELS)
    assert total.equal(CrossEntropy()(half(0), LABELS)) and told == {"ce": float(total)}


def test_regularisers_are_added_by_their_weights_and_each_is_told_unweighted() -> None:
    total, told = added_up(objective(Focal(), *REGULARISERS), half(0), LABELS)
    loss, koleo, norm, within = (term(half(0), LABELS) for term in (Focal(), *REGULARISERS))
    torch.testing.assert_close(total, loss + 0.05 * koleo + 0.01 * norm - 2 * within, rtol=1e-12, atol=0)
    assert told == {
        "focal": float(loss),
        "koleo": float(koleo),
        "feature_norm": float(norm),
        "within_class": float(within),
        "within_class_left_out": 2,
    }


def test_coupled_terms_and_the_others_are_two_parts() -> None:
    made = objective(CrossEntropy(), *REGULARISERS)
    apart, parts = made.value(half(0), LABELS, coupled=False)
    together, others = made.value(half(0)._replace(logits_BK=None), LABELS, coupled=True)
    assert made.coupled and (parts != 0).tolist() == [True, False, True, False, False]
    assert (others != 0).tolist() == [False, True, False, True, True]
    expected = CrossEntropy()(half(0), LABELS) + 0.01 * FeatureNorm(weight=1)(half(0), LABELS)
    torch.testing.assert_close(apart, expected, rtol=1e-12, atol=0)
    assert not objective(CrossEntropy(), FeatureNorm(weight=1), KoLeo(weight=1, gathered=False)).coupled


def test_a_regulariser_sees_one_view_at_a_time_and_the_loss_both() -> None:
    total, told = added_up(objective(SupCon(), *REGULARISERS), OUTPUTS, LABELS.repeat(2))
    means = [(term(half(0), LABELS) + term(half(4), LABELS)) / 2 for term in REGULARISERS]
    loss = SupCon()(OUTPUTS, LABELS.repeat(2))
    weighted = sum(term.weight * mean for term, mean in zip(REGULARISERS, means, strict=True))
    torch.testing.assert_close(total, loss + weighted, rtol=1e-12, atol=0)
    assert list(told.values()) == pytest.approx([float(loss), *map(float, means), 0, 4], rel=1e-12)
    assert list(told)[-2:] == ["supcon_left_out", "within_class_left_out"]  # of two views each


def test_views_are_cut_out_of_view_major_rows() -> None:
    first, second = each_view(OUTPUTS._replace(logits_BK=None), 2)
    assert first.features_Bd.equal(FEATURES[:4]) and second.embedding_BE.equal(EMBEDDING[4:])
    assert first.logits_BK is None


@pytest.mark.parametrize("mix", [Mixup(), Cutmix()], ids=lambda mix: mix.kind)
def test_a_term_that_takes_no_probabilities_is_refused_beside_mixed_images(mix: MixSpec) -> None:
    objective(BCE(), KoLeo(weight=1), FeatureNorm(weight=1), mix=mix)
    words = rf"^data\.mix\.kind='{mix.kind}': regularisers: kind='within_class'.*data\.mix\.kind=none"
    with pytest.raises(InputError, match=words):
        objective(BCE(), KoLeo(weight=1), WithinClass(weight=1), mix=mix)


def test_a_step_tells_all_terms_and_what_was_left_out_over_the_global_batch() -> None:
    """Of two micro-batches with labels 0 1 2 and 0 3 3, class 0 is whole in the global batch alone."""
    torch.manual_seed(0)
    model = Model(ModelSpec(backbone=SmallResNetSpec(name="resnet8", width=2)), 0)
    engine = TorchEngine(model, TorchSpec(precision="fp64"), SGD(), World())
    batches = [
        Batch(torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8), torch.tensor(labels), torch.arange(3))
        for labels in ([0, 1, 2], [0, 3, 3])
    ]
    made = objective(SupCon(two_views=False), WithinClass(weight=1), FeatureNorm(weight=1))
    (step,) = train_steps(engine, [batches], made, World())
    told = step.metrics()
    assert told["train/supcon_left_out"] == told["train/within_class_left_out"] == 2
    added = told["train/supcon"] + told["train/within_class"] + told["train/feature_norm"]
    assert told["train/loss"] == pytest.approx(added, rel=1e-12)


def model(**classifier: Any) -> ModelSpec:
    return ModelSpec(backbone=SmallResNetSpec(name="resnet8"), **classifier)


def test_what_does_not_go_together_is_refused_before_a_run() -> None:
    twice = "regularisers=[{kind: koleo, weight: 1}, {kind: koleo, weight: 1, gathered: false}]"
    mixed = ["regularisers=[{kind: within_class, weight: 1}]", "data.mix.kind=mixup"]
    one, nearest = ["batch.global=1", "batch.micro=1"], "regularisers=[{kind: koleo, weight: 1, gathered: true}]"
    check_terms(load(PretrainRun, SMALL, [*one, "loss.kind=supcon"]))  # two views
    check_terms(load(PretrainRun, SMALL, [twice.replace("koleo", "feature_norm", 1), "data.mix.kind=mixup"]))
    for overrides, words in [
        ([twice], r"^regularisers: kind='koleo': given twice"),
        (mixed, r"^data\.mix\.kind='mixup': regularisers: kind='within_class'"),
        (["loss.kind=supcon", "data.mix.kind=mixup"], r"^data\.mix\.kind='mixup': loss\.kind='supcon'"),
        (["loss.kind=cosine_softmax"], r"^model\.classifier\.kind='linear': loss\.kind='cosine_softmax'"),
        ([*one, "loss={kind: supcon, two_views: false}"], r"^batch\.global=1: loss\.kind='supcon'.* at least 2"),
        ([*one, nearest], r"^batch\.global=1: regularisers: kind='koleo'"),
        (["batch.micro=1", nearest.replace("true", "false")], r"^batch\.micro=1: regularisers: kind='koleo'"),
    ]:
        with pytest.raises(InputError, match=words):
            check_terms(load(PretrainRun, SMALL, overrides))


def test_a_loss_of_cosines_without_a_cosine_classifier_is_refused_with_the_remedy() -> None:
    check_classifier(CosineSoftmax(), model(classifier=CosineClassifier()))
    check_classifier(CrossEntropy(), model(classifier=CosineClassifier()))
    check_classifier(CrossEntropy(), model())
    words = r"^model\.classifier\.kind='(linear|etf)': loss\.kind='cosine_softmax'.*set model\.classifier\.kind=cosine"
    for spec in (model(), model(classifier=ETFClassifier())):
        with pytest.raises(InputError, match=words):
            check_classifier(CosineSoftmax(), spec)


def test_a_classifier_that_the_loss_would_not_have_is_refused() -> None:
    check_classifier(SupCon(), model())
    with pytest.raises(InputError, match=r"^model\.classifier\.kind='etf': loss\.kind='supcon' has no classifier"):
        check_classifier(SupCon(), model(classifier=ETFClassifier()))


def test_all_kinds_are_chosen_by_name_and_a_wrong_one_is_told_the_others() -> None:
    class Run(Spec):
        loss: LossSpec
        regularisers: tuple[RegulariserSpec, ...] = ()

    losses = ["ce", "label_smoothing", "focal", "mse", "squared_error", "bce"]
    losses += ["cosine_softmax", "logit_norm", "logit_penalty", "supcon"]
    for kind in losses:
        assert validate(Run, {"loss": {"kind": kind}}, "x").loss.kind == kind
    for kind in ("koleo", "feature_norm", "within_class"):
        run = validate(Run, {"loss": {"kind": "ce"}, "regularisers": [{"kind": kind, "weight": -0.5}]}, "x")
        assert (run.regularisers[0].kind, run.regularisers[0].weight) == (kind, -0.5)
    with pytest.raises(InputError, match=r"loss\.kind='focals': unknown kind; did you mean 'focal'\?") as caught:
        validate(Run, {"loss": {"kind": "focals"}}, "x")
    assert all(kind in str(caught.value) for kind in losses)
