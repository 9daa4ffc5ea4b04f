"""Configuration: the `Spec` base, and `load(cls, file, overrides)`, which reports all errors at once.

Called by the command line for every journey; holds no knowledge of any of them.
"""

from __future__ import annotations

import copy
import difflib
import types
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from nc_dist.errors import InputError

Tree = dict[str, Any]
S = TypeVar("S", bound="Spec")


class Spec(BaseModel):
    """A validated, immutable piece of configuration; unknown keys are errors.

    Validation is lax on types on purpose: YAML 1.1 reads `1e-3` as a string, and lax mode mends it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True, allow_inf_nan=False
    )


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice: the first value would be dropped silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: list[Any] = []  # a key may be unhashable, which the base class refuses below
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int | str:
        """10:20 is text, as in YAML 1.2; YAML 1.1 reads it as 620, a time in seconds."""
        return node.value if ":" in node.value else super().construct_yaml_int(node)


_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:int", _UniqueKeyLoader.construct_int)


def load(cls: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """Read one YAML file, apply dotted `key=value` overrides, validate.

    Raises InputError that lists every error with file, key path, value, what is allowed and the nearest key.
    """
    return validate(cls, override(read_yaml(Path(path)), overrides), str(path))


def read_yaml(path: Path) -> Tree:
    """The mapping in a YAML file; InputError when it is missing, malformed or no mapping."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise InputError(f"{path}: no such file{hint}")
    try:
        tree = yaml.load(path.read_text(), _UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected keys and values, found {type(tree).__name__}")
    return tree


def override(tree: Tree, overrides: Sequence[str]) -> Tree:
    """A copy of `tree` with `a.b=value` applied; a changed `kind` starts its block anew.

    Kinds go first, so that the order on the command line does not matter.
    """
    pairs = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"override {text!r}: expected key=value, for example optim.lr=0.1")
        try:
            pairs.append((key.split("."), yaml.load(value, _UniqueKeyLoader)))
        except yaml.YAMLError:
            raise InputError(f"override {text!r}: {value!r} is not a YAML value") from None
    tree = copy.deepcopy(tree)
    for keys, value in sorted(pairs, key=lambda pair: pair[0][-1] != "kind"):
        set_key(tree, keys, value)
    return tree


def set_key(tree: Tree, keys: Sequence[str], value: Any) -> None:
    """Set one dotted key in place; see `override`."""
    parent, block, name = None, tree, ""
    for name_ in keys[:-1]:
        parent, name = block, name_
        if not isinstance(block.get(name), dict):
            block[name] = {}
        block = block[name]
    if keys[-1] == "kind" and block.get("kind") != value and parent is not None:
        parent[name] = {"kind": value}
    else:
        block[keys[-1]] = value


def validate(cls: type[S], tree: Tree, where: str) -> S:
    """`cls` made from `tree`; InputError lists every error, each beginning with `where` and the key path."""
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(cls, tree, detail) for detail in error.errors()]
        heading = f"{where}: {len(lines)} error{'s' if len(lines) > 1 else ''} in the configuration"
        raise InputError("\n".join([heading, *(f"  {where}: {line}" for line in lines)])) from None


def _explain(cls: type[BaseModel], tree: Tree, detail: ErrorDetails) -> str:
    keys = _key_path(tree, detail["loc"])
    path = ".".join(keys) or "(the whole file)"
    match detail["type"]:
        case "extra_forbidden":
            allowed = _fields(cls, tree, keys[:-1])
            near = difflib.get_close_matches(keys[-1], allowed, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            return f"{path}={detail['input']!r}: unknown key{hint} Allowed here: {', '.join(allowed)}"
        case "missing":
            return f"{path}: required key is missing"
        case "union_tag_invalid":
            context = detail.get("ctx", {})
            allowed = [name.strip(" '") for name in context["expected_tags"].split(",")]
            near = difflib.get_close_matches(str(context["tag"]), allowed, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            return f"{path}.kind={context['tag']!r}: unknown kind{hint} Allowed: {', '.join(allowed)}"
        case "union_tag_not_found":
            return f"{path}={detail['input']!r}: needs a block with the key 'kind'"
    return f"{path}={detail['input']!r}: {detail['msg'].removeprefix('Value error, ')}"


def _key_path(tree: Any, loc: Sequence[str | int]) -> list[str]:
    """Pydantic's location without the tags of unions that it puts between the keys."""
    keys: list[str] = []
    for item in loc:
        if isinstance(tree, dict) and item not in tree and tree.get("kind") == item:
            continue
        if isinstance(item, str) and tree is not None and not isinstance(tree, dict):
            continue
        keys.append(str(item))
        if isinstance(tree, dict):
            tree = tree.get(item)
        elif isinstance(tree, list) and isinstance(item, int) and item < len(tree):
            tree = tree[item]
        else:
            tree = None
    return keys


def _fields(cls: type[BaseModel], tree: Any, keys: Sequence[str]) -> list[str]:
    """The keys that the spec at the dotted path `keys` has."""
    model: type[BaseModel] | None = cls
    annotation: Any = None
    for key in keys:
        if isinstance(tree, list | tuple) and key.isdecimal():  # of list[X] or tuple[X, ...]
            tree, annotation = tree[int(key)], next(iter(get_args(annotation)), None)
        else:
            tree = tree.get(key) if isinstance(tree, dict) else None
            field = next((f for n, f in (model.model_fields if model else {}).items() if key in (n, f.alias)), None)
            annotation = field.annotation if field else None
        model = _model(annotation, tree) if annotation else None
    return [f.alias or name for name, f in model.model_fields.items()] if model else []


def _model(annotation: Any, tree: Any) -> type[BaseModel] | None:
    """The spec class behind an annotation; in a union, the one whose kind the tree names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) not in (Annotated, Union, types.UnionType):
        return None
    found = [model for arg in get_args(annotation) if (model := _model(arg, tree)) is not None]
    kind = tree.get("kind") if isinstance(tree, dict) else None
    tagged = [m for m in found if "kind" in m.model_fields and kind in get_args(m.model_fields["kind"].annotation)]
    return next(iter(tagged or found), None)


def dump(spec: Spec) -> str:
    """The resolved spec as YAML; reading it again gives an equal spec."""
    return yaml.safe_dump(spec.model_dump(mode="json", by_alias=True), sort_keys=False)
