"""What makes two configurations the same."""

from typing import Any

import pytest

from nc_dist.config import PretrainRun
from nc_dist.identity import differences, hash_file, hash_text, spec_hash
from nc_dist.spec import override, validate

Tree = dict[str, Any]


def dumped(tree: Tree, *overrides: str) -> Tree:
    run = validate(PretrainRun, override(tree, overrides), "run.yaml")
    return run.model_dump(mode="json", by_alias=True)


def test_placement_does_not_change_the_hash_and_everything_else_does(tree: Tree) -> None:
    """Every leaf of a whole run is changed, one at a time."""
    run = dumped(tree, "launch.gpus=1", "data.test=digits:test")
    plain = spec_hash(run)

    def leaves(block: Tree, path: str = "") -> list[tuple[Tree, str, str]]:
        found = []
        for key, value in block.items():
            name = f"{path}.{key}".lstrip(".")
            found += leaves(value, name) if isinstance(value, dict) else [(block, key, name)]
        return found

    without_effect = set()
    for block, key, name in leaves(run):
        old, block[key] = block[key], "something else"
        if spec_hash(run) == plain:
            without_effect.add(name)
        block[key] = old
    launch = {f"launch.{key}" for key in ("workers", "cpus", "gpus", "retries", "hang_s")}
    reading = {f"data.{key}" for key in ("workers", "bad_samples", "shard_cache_gb", "download", "log_samples")}
    kept = {"keep", "keep_epochs", "upload", "max_skipped", "profile.steps"}
    assert without_effect == {"out", "log_every"} | kept | reading | launch


def test_the_order_of_keys_does_not_change_the_hash(tree: Tree) -> None:
    assert spec_hash(dict(reversed(tree.items()))) == spec_hash(tree)


def test_differences_are_one_line_a_key_without_placement(tree: Tree) -> None:
    old, new = dumped(tree), dumped(tree, "out=elsewhere", "launch.workers=8", "optim.lr=0.5", "seed=3")
    assert differences(old, new) == ["optim.lr: 0.001 -> 0.5", "seed: 0 -> 3"]
    assert differences(old, dumped(tree, "out=elsewhere")) == []


def test_two_trees_of_another_hash_always_have_a_difference() -> None:
    old, new = {"a": 1}, {"a": 1, "b": None}
    assert spec_hash(old) != spec_hash(new)
    assert differences(old, new) == ["b: absent -> None"]
    assert differences({"a": [1]}, {"a": [2]}) == ["a: [1] -> [2]"]


@pytest.mark.parametrize("parts", [("ab", ""), ("a", "b"), ("b", "a"), ("ab",)])
def test_hash_text_keeps_parts_apart_and_in_order(parts: tuple[str, ...]) -> None:
    others = {("ab", ""), ("a", "b"), ("b", "a"), ("ab",)} - {parts}
    assert hash_text(*parts) not in {hash_text(*other) for other in others}


def test_hash_file_is_sha256(tmp_path: Any) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert hash_file(tmp_path / "f").startswith("ba7816bf8f01cfea")
