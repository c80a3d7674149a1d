"""QConfig: which layers are quantized, and how."""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..nn.qat_classes import QUANTIZABLE
from ..nn.quantizer_rules import RULES, nearest
from .config_json import plain, rules_of, spec_of
from .spec import QSpec, check_keys

Overrides = Mapping[str, Any]
Rule = tuple[str | type[nn.Module], Overrides | None]
FIELDS = ("weight", "input", "output", "residual")
ADAPTERS = ("base", "sum")
KINDS = (*FIELDS, "hidden", "cell", "memory", "attention")  # of tensors, in rules


@dataclass(frozen=True, repr=False)
class QConfig:
    """What ``prepare`` does to the layers of a model (``qkernels.nn.QAT_CLASSES`` lists their kinds).

    Args:
        weight, input, output: the spec of that tensor in every layer; None leaves the tensor in float.
        residual: the spec for tensors between layers: sums and concatenations of activations and the inputs of average
            pools, in the forward of any module that torch.fx can trace, and the results of ``qk.nn.Add``, ``qk.nn.Cat``
            and torch's FloatFunctional. None leaves them in float. ``prepare`` says more.
        rules: pairs (pattern, overrides), of which the last that matches a layer decides. A pattern is a glob on the
            module name (``"layer1.*"``), a module type, or a glob on the full names of parameters that matches no
            module (``"*.experts.gate_up_proj"``). Overrides are None (leave it in float) or a dict that gives kinds of
            tensors a QSpec, None, or a dict of the fields to change: ``("fc", {"weight": {"bits": 4}})``. The kinds are
            those above and

            - "hidden", "cell": the states of recurrent layers;
            - "memory": key and value of an attention whose query is another tensor (by default as "input" in the cross
              attention of nn.TransformerDecoderLayer and where kdim or vdim differ from embed_dim, else in float);
            - "attention": what goes into the attention's products: queries, keys and values (by default in float in an
              nn.MultiheadAttention, as "input" in a ``qk.nn.ScaledDotProductAttention``).

            A parameter that a rule names is quantized wherever it is read; it takes "weight" alone. A rule that names a
            subclass of Linear or a convolution by its type also takes layers that ``prepare`` would leave in float
            because it cannot tell what their own forward computes. Modules of other classes take "input" and "output",
            from a rule that gives their very name or class: the first floating tensor that they get and return.
        adapters: what is quantized in a layer with low-rank adapters (LoRA): a module with two children or parameters
            ``lora_A`` and ``lora_B``, in capital letters or not, as in PEFT and torchtune.

            - "base": the layer that they adapt (``base_layer``, or the module's own weight). The adapters train in
              float, and so they stay after ``convert``; only a rule that gives the very name of a layer in them
              quantizes it. Other adapters, such as ``base(x) + scale * b(a(x))`` in a module of the user's, are layers
              like any other: rules such as ``("*.a", None)`` leave them in float.
            - "sum": weight + scaling·B·A, as one weight. ``convert`` makes one integer layer of it, without adapters,
              in the place of the module that held them. In training a dropout in front of the adapters does not act.
              Rules for the layer take the name of that module or of its ``base_layer``. Adapters that cannot be summed
              (of an Embedding, DoRA, a grouped convolution) stay as in "base"; ``prepare`` names them.

    Raises:
        TypeError: a field has another type.
        ValueError: an unknown name or key, or a value out of range.
    """

    weight: QSpec | None = field(default_factory=QSpec)
    input: QSpec | None = field(default_factory=lambda: QSpec(symmetric=False))
    output: QSpec | None = None
    residual: QSpec | None = None
    rules: Sequence[tuple[str | type[nn.Module], Overrides | None]] = ()
    adapters: str = "base"

    def __post_init__(self) -> None:
        for key in FIELDS:
            spec = getattr(self, key)
            if spec is not None and not isinstance(spec, QSpec):
                raise TypeError(f"{key}: got {spec!r}; accepted: {_spec_like(spec)}, None")
        if self.adapters not in ADAPTERS:
            raise ValueError(
                f"adapters: got {self.adapters!r}; accepted: {', '.join(map(repr, ADAPTERS))}"
                + nearest(self.adapters, ADAPTERS)
            )
        if isinstance(self.rules, str | Mapping) or not isinstance(self.rules, Sequence):
            raise TypeError(f"rules: got {self.rules!r}; accepted: a list of (name glob or module type, overrides)")
        for index, rule in enumerate(self.rules):
            where = f"rules[{index}]"
            if not (isinstance(rule, tuple | list) and len(rule) == 2):
                raise TypeError(f"{where}: got {rule!r}; accepted: a pair (name glob or module type, overrides)")
            pattern, overrides = rule
            if not (isinstance(pattern, str) or (inspect.isclass(pattern) and issubclass(pattern, nn.Module))):
                raise TypeError(f"{where}: got {pattern!r} as its pattern; accepted: a name glob, a subclass of Module")
            if overrides is None:
                continue
            if not isinstance(overrides, Mapping):
                raise TypeError(
                    f"{where}: got {overrides!r} as its overrides; accepted: None, a dict with 'weight' and/or 'input'"
                )
            check_keys(where, overrides, KINDS)
            for key in overrides:
                try:
                    _override(getattr(self, key, None), overrides, key)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{where}, {error}") from None
        object.__setattr__(self, "rules", tuple(tuple(rule) for rule in self.rules))  # equal to what repr and JSON give

    def __repr__(self) -> str:
        """Python that makes an equal config, where torch and the names of qkernels are imported."""
        rules = ", ".join(f"({_shown(pattern)}, {_shown(overrides)})" for pattern, overrides in self.rules)
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in FIELDS)
        adapters = "" if self.adapters == "base" else f", adapters={self.adapters!r}"
        return f"QConfig({fields}, rules=[{rules}]{adapters})"

    def to_json(self) -> str:
        """The config as JSON, of which ``from_json`` makes an equal one; it raises nothing.

        Granularities are written by their class and fields, module types by their module and name.
        """
        fields: dict[str, Any] = {name: plain(getattr(self, name)) for name in FIELDS}
        fields["rules"] = [[plain(pattern), plain(overrides)] for pattern, overrides in self.rules]
        if self.adapters != "base":
            fields["adapters"] = self.adapters
        return json.dumps(fields, indent=2)

    @classmethod
    def from_json(cls, text: str) -> QConfig:
        """The config that ``to_json`` wrote.

        Raises:
            ValueError: no JSON, an unknown key, or a module type whose module is not imported.
            TypeError, ValueError: as QConfig itself, for what the fields hold.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"text: got no JSON ({error}); accepted: what to_json returns") from None
        if not isinstance(fields, dict):
            raise ValueError(f"text: got a {type(fields).__name__}; accepted: what to_json returns")
        check_keys("text", fields, (*FIELDS, "rules", "adapters"))
        rules = rules_of(fields.pop("rules", []))
        return cls(**{key: spec_of(value) for key, value in fields.items()}, rules=rules)

    def specs(self, name: str, module: nn.Module, like: Mapping[str, str] | None = None) -> dict[str, QSpec | None]:
        """The spec of each kind of tensor in the layer called ``name``.

        like: kind -> the kind whose spec it takes, and a rule changes, where it has none of its own.
        """
        specs: dict[str, QSpec | None] = {kind: getattr(self, kind, None) for kind in KINDS}
        rule = self.rule_of(name, module)
        if rule is not None and rule[1] is None:
            return dict.fromkeys(KINDS)
        overrides: Overrides = {} if rule is None or rule[1] is None else rule[1]
        specs = {kind: _override(spec, overrides, kind) for kind, spec in specs.items()}
        for kind, other in (like or {}).items():
            if other:
                specs[kind] = _override(specs[other], overrides, kind)
        return specs

    def asks_for(self, kind: str, name: str, module: nn.Module) -> bool:
        """Whether the rule that decides names this kind of tensor."""
        rule = self.rule_of(name, module)
        return rule is not None and rule[1] is not None and kind in rule[1]

    def names_type_of(self, name: str, module: nn.Module) -> bool:
        """Whether the rule that decides names by its type a subclass of a layer that can be quantized."""
        rule = self.rule_of(name, module)
        return (
            rule is not None
            and rule[1] is not None
            and isinstance(rule[0], type)
            and issubclass(rule[0], QUANTIZABLE)
            and rule[0] not in QUANTIZABLE
        )

    def rule_of(self, name: str, module: nn.Module) -> Rule | None:
        """The rule that decides for a module; None: the fields of the config do."""
        return next((rule for rule in reversed(self.rules) if matches(rule[0], name, module)), None)

    def parameter_specs(self, model: nn.Module) -> dict[str, QSpec | None]:
        """Full names of the parameters that rules name, with their specs; None: a rule leaves them in float."""
        modules = dict(model.named_modules())
        found: dict[str, QSpec | None] = {}
        for pattern, overrides in self.rules:
            if not isinstance(pattern, str) or any(fnmatch.fnmatchcase(name, pattern) for name in modules):
                continue
            for name, parameter in model.named_parameters(remove_duplicate=False):
                exact = name == pattern
                if not fnmatch.fnmatchcase(name, pattern) or not (exact or parameter.dim() > 1):
                    continue
                if overrides is None:
                    found[name] = None
                    continue
                extra = [kind for kind in overrides if kind != "weight"]
                if extra:
                    raise ValueError(
                        f"rules: {pattern!r} matches the parameter {name!r} and gives {extra[0]!r}; accepted: 'weight'"
                    )
                found[name] = _override(self.weight, overrides, "weight")
        return found

    def idle_rules(self, modules: Mapping[str, nn.Module], parameters: Iterable[str]) -> list[str | type[nn.Module]]:
        """The patterns that match none of these modules and parameters."""
        names = list(parameters)
        return [
            pattern
            for pattern, _ in self.rules
            if not any(matches(pattern, name, module) for name, module in modules.items())
            and not (isinstance(pattern, str) and any(fnmatch.fnmatchcase(name, pattern) for name in names))
        ]


def matches(pattern: str | type[nn.Module], name: str, module: nn.Module) -> bool:
    return fnmatch.fnmatchcase(name, pattern) if isinstance(pattern, str) else isinstance(module, pattern)


def _shown(value: Any) -> str:
    if not isinstance(value, type):
        return repr(value)
    public = getattr(nn, value.__name__, None) is value
    return f"torch.nn.{value.__name__}" if public else f"{value.__module__}.{value.__qualname__}"


def _override(spec: QSpec | None, overrides: Overrides, key: str) -> QSpec | None:
    change = overrides.get(key, spec)
    if change is None or isinstance(change, QSpec):
        return change
    if not isinstance(change, Mapping):
        raise TypeError(f"{key}: got {change!r}; accepted: {_spec_like(change)}, None, a dict of QSpec's fields")
    check_keys(key, change, [f.name for f in dataclasses.fields(QSpec)])
    spec = QSpec() if spec is None else spec
    rule = RULES.get(change.get("quantizer", spec.quantizer))
    if rule is not None and "quantizer" in change:  # another quantizer has its own defaults
        symmetric = spec.symmetric if spec.symmetric in rule.symmetric else None
        straight_through = spec.straight_through if spec.straight_through in rule.straight_through else None
        change = {"symmetric": symmetric, "straight_through": straight_through, **change}
    return dataclasses.replace(spec, **change)


def _spec_like(value: Any) -> str:
    """How to write the spec that a bare value was meant for."""
    if isinstance(value, int) and not isinstance(value, bool) and 2 <= value <= 8:
        return f"a QSpec such as QSpec(bits={value})"
    return "a QSpec such as QSpec(bits=8)"
