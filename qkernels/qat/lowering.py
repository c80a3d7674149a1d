"""Writes integer programs (see ``ops/int8_program.py``) for the parts of a graph that they can run."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from ..nn.fake_quantize import FakeQuantize
from .graph import MOVES, Graph, channels_of
from .norms import NORMS
from .operations import LAYERS, PRODUCTS, Operation
from .program_constants import Held, Made, Qparams, value_of


@dataclass
class Part:
    """A part of a graph as a program.

    Attributes:
        nodes: the part's nodes, in the graph's order.
        inputs, outputs: the nodes outside that it reads, and its nodes that are read outside.
        dims: how many dims each input must have; None: any.
        in_rows: whether all dims in front of the last are one: [..., C] is then run as [N, C].
        plan: the program's text.
        dicts, names: the dicts and keys of the program's constants, followed by those of ``qparams``. Two lists, since
            hundreds of constants are read at each call, and each further object that is looked at may lie outside the
            caches.
    """

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    dims: list[int | None]
    in_rows: bool
    plan: str = ""
    dicts: list[dict[str, Any]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    qparams: Qparams = field(default_factory=lambda: Qparams(()))

    def constants(self) -> list[Tensor]:
        return [*map(operator.getitem, self.dicts, self.names), *self.qparams.now()]


def parts_of(graph: Graph) -> list[Part]:
    """The largest parts that programs can run and that hold an integer layer and something else, in the graph's order.

    Nodes are in one part if edges connect them and no path between them leads through a node that no program runs.
    Linear layers that read one tensor are too, so that it is quantized once.
    """
    depth: dict[fx.Node, int] = {}
    first_reader: dict[fx.Node, fx.Node] = {}
    leader: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while leader[node] is not node:
            node = leader[node]
        return node

    for node in graph.graph.nodes:
        able = node in graph.operations
        sources = graph.sources_of(node)
        depth[node] = max((depth[s] + (s in graph.operations and not able) for s in sources), default=0)
        operation = graph.operations.get(node)
        if operation is not None and (operation.kind != "alias" or sources[0] in leader):  # else nothing is to be run
            leader[node] = node
            for source in operation.inputs:
                if source in leader and depth[source] == depth[node]:
                    leader[find(node)] = find(source)
                elif operation.kind == "linear":
                    leader[find(node)] = find(first_reader.setdefault(source, node))
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in leader:
        groups.setdefault(find(node), []).append(node)
    kept = [nodes for nodes in groups.values() if _is_worth_it(graph, nodes)]
    graph.keep({node for nodes in kept for node in nodes})
    graph.read_sizes_of_inputs()
    return [_part(graph, nodes) for nodes in kept]


def _is_worth_it(graph: Graph, nodes: list[fx.Node]) -> bool:
    """Whether a program can run the nodes, and has something to do."""
    operations = [graph.operations[node] for node in nodes]
    work = [operation for operation in operations if operation.kind != "alias"]
    if len(work) < 2 or not any(isinstance(operation.module, LAYERS) for operation in work):
        return False
    ranks = {graph.ranks.get(node) for node in (*nodes, *_inputs(graph, nodes))}
    return None not in ranks or ranks == {None}


def _inputs(graph: Graph, nodes: list[fx.Node]) -> list[fx.Node]:
    inside = set(nodes)
    return list(dict.fromkeys(s for node in nodes for s in graph.operations[node].inputs if s not in inside))


def _part(graph: Graph, nodes: list[fx.Node]) -> Part:
    inside, inputs = set(nodes), _inputs(graph, nodes)
    outputs = [node for node in nodes if any(_reads_outside(graph, user, inside) for user in node.users)]
    dims = [None if (rank := graph.ranks.get(node)) is None else rank + 2 for node in inputs]
    part = Part(nodes, inputs, outputs, dims, in_rows={graph.ranks.get(node) for node in nodes} == {None})
    _Writer(graph, part).write()
    return part


def _reads_outside(graph: Graph, user: fx.Node, inside: set[fx.Node]) -> bool:
    return user not in inside and (user in graph.read or graph.stays(user))


@dataclass
class _Need:
    """In which forms a node's result is read: floats, and codes of which quantizers."""

    floats: bool = False
    codes: dict[int, None] = field(default_factory=dict)  # in order


@dataclass
class _Group:
    """A product, sum or the like with what follows it alone: activations, and a residual that is added."""

    first: str | None = None
    residual: fx.Node | None = None
    second: str | None = None


class _Writer:
    """Writes the program of a part.

    Backwards it finds in which forms each result is needed, forwards it writes the steps that make them.
    """

    def __init__(self, graph: Graph, part: Part) -> None:
        self.graph, self.part = graph, part
        self.inside = set(part.nodes)
        self.users: dict[fx.Node, list[fx.Node]] = {node: [] for node in part.nodes}
        for node in part.nodes:
            for source in dict.fromkeys(graph.operations[node].inputs):
                if source in self.inside:
                    self.users[source].append(node)
        self.lines: list[tuple[str, dict[str, Any]]] = []
        self.header: list[tuple[str, dict[str, Any]]] = []
        self.quantizers: list[tuple[tuple[float, int, int, int], tuple[Any, Any]]] = []
        self.names: dict[tuple[fx.Node, int | None], str] = {}  # (node, quantizer or None for floats) -> value
        self.needs = {node: _Need() for node in (*part.nodes, *part.inputs)}
        self.groups: dict[fx.Node, _Group] = {}  # by their first node
        self.tail: dict[fx.Node, fx.Node] = {}  # first node -> last node
        self.head: dict[fx.Node, fx.Node] = {}  # any other node of a group -> its first node
        self.count = 0

    def write(self) -> None:
        self._group()
        self._demand()
        for i, node in enumerate(self.part.inputs):
            self.add("input", out=self._name(node, None), index=i)
            for q in self.needs[node].codes:
                self.add("quantize", out=self._name(node, q), x=self.names[node, None], q=q)
        for node in self.part.nodes:
            self._emit(node)
        for i, node in enumerate(self.part.outputs):
            options = {"channels_last": "input"} if (self.graph.ranks.get(node) or 0) >= 2 else {}
            self.add("output", x=self._floats(self._source(node)), index=i, **options)
        self._finish()

    def add(self, step: str, **options: Any) -> None:
        self.lines.append((step, options))

    def _source(self, node: fx.Node) -> fx.Node:
        """The node whose result this one's is: an alias stands for its input."""
        while node in self.inside and self.graph.operations[node].kind == "alias":
            node = self.graph.operations[node].inputs[0]
        return node

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        return [self._source(source) for source in self.graph.operations[node].inputs]

    def _values(self, node: fx.Node) -> list[fx.Node]:
        """The inputs of which a node reads more than their size."""
        inputs = self._inputs(node)
        return inputs[:-1] if self.graph.operations[node].has_like else inputs

    # --- which nodes one step computes ---

    def _readers(self, node: fx.Node) -> list[fx.Node] | None:
        """The nodes that read a result, aliases seen through; None: it is also read outside."""
        found: list[fx.Node] = []
        if node in self.part.outputs:
            return None
        for user in self.users[node]:
            if self.graph.operations[user].kind == "alias":
                further = self._readers(user)
                if further is None:
                    return None
                found += further
            else:
                found.append(user)
        return found

    def _only_reader(self, node: fx.Node, kind: str) -> fx.Node | None:
        readers = self._readers(node)
        if readers is None or len(readers) != 1:
            return None
        reader = readers[0]
        taken = reader in self.head
        return reader if self.graph.operations[reader].kind == kind and not taken else None

    def _group(self) -> None:
        for node in reversed(self.part.nodes):  # of two products that are added, the later one takes the sum
            operation = self.graph.operations[node]
            if operation.kind not in (*PRODUCTS, "binary", "batch_norm"):
                continue
            if node in self.head:
                continue
            group, last = _Group(), node
            self.groups[node] = group
            if operation.quantizer is None:
                last = self._take_activation(node, last, "first")
                if operation.kind in PRODUCTS:
                    last = self._take_sum(node, last)
            self.tail[node] = last

    def _take_activation(self, node: fx.Node, last: fx.Node, place: str) -> fx.Node:
        reader = self._only_reader(last, "activate")
        if reader is None:
            return last
        setattr(self.groups[node], place, self.graph.operations[reader].options["first"])
        self.head[reader] = node
        return reader

    def _take_sum(self, node: fx.Node, last: fx.Node) -> fx.Node:
        reader = self._only_reader(last, "binary")
        if reader is None:
            return last
        operation = self.graph.operations[reader]
        operands = self._inputs(reader)
        others = [operand for operand in operands if operand is not last]
        ranks = {self.graph.ranks.get(operand) for operand in operands}
        channels = {self.graph.channels.get(operand) for operand in operands}
        points = {operand in self.graph.points for operand in operands}
        fits = len(others) == 1 and len(ranks) == 1 and len(channels) == 1 and len(points) == 1
        if operation.options["kind"] != "add" or operation.quantizer is not None or not fits:
            return last
        group = self.groups[node]
        group.residual = others[0]
        # The sum may have begun a group of its own, with its activation.
        own = self.groups.pop(reader, None)
        self.head[reader] = node
        if own is None:
            return reader
        end = self.tail.pop(reader)
        if own.first is not None:
            group.second = own.first
            self.head[end] = node
        return end

    # --- in which forms results are needed ---

    def native(self, node: fx.Node) -> int | None:
        """The quantizer whose codes a result consists of."""
        operation = self.graph.operations.get(node) if node in self.inside else None
        if operation is None:
            return None
        if operation.quantizer is not None:
            return self._quantizer_of(operation.quantizer)
        if operation.kind in MOVES:
            found = {self.native(source) for source in self._values(node)}
            return found.pop() if len(found) == 1 else None
        return None

    def _need(self, node: fx.Node, q: int | None) -> None:
        if q is None:
            self.needs[node].floats = True
        else:
            self.needs[node].codes.setdefault(q)

    def _need_any(self, node: fx.Node) -> None:
        """Whatever form the result has anyway."""
        self._need(node, self.native(node))

    def _demand(self) -> None:
        for node in self.part.outputs:
            self._need_any(self._source(node))
        for node in reversed(self.part.nodes):
            operation, need = self.graph.operations[node], self.needs[node]
            if operation.kind == "alias":
                continue
            if operation.has_like:
                self._need_any(self._inputs(node)[-1])
            if node in self.head:
                # The group's result is this node's if it is the last; its first node asks for the inputs.
                head = self.head[node]
                group = self.groups[head]
                if self.tail[head] is node:
                    if group.residual is not None:
                        self._need_any(group.residual)
                    if self.graph.operations[head].kind not in PRODUCTS:
                        continue
                continue
            if operation.kind in PRODUCTS:
                self._need(self._inputs(node)[0], self._input_quantizer(operation))
                if node in self.tail and self.tail[node] is node and self.groups[node].residual is not None:
                    self._need_any(self.groups[node].residual)  # type: ignore[arg-type]
            elif operation.kind == "quantizer":
                self._need(self._inputs(node)[0], self.native(node))
            elif operation.kind in MOVES:
                for source in self._values(node):
                    for q in need.codes:
                        self._need(source, q)
                    if need.floats:
                        self._need_any(source) if self.native(node) is not None else self._need(source, None)
            else:
                for source in self._values(node):
                    self._need_any(source)

    def _input_quantizer(self, operation: Operation) -> int:
        layer: Any = operation.module
        zero_point = None if layer.input_zero_point is None else Held(layer._buffers, "input_zero_point")
        return self._quantizer((Held(layer._buffers, "input_scale"), zero_point), layer.quant_min, layer.quant_max)

    def _quantizer_of(self, quantizer: FakeQuantize) -> int:
        zero_point = None if quantizer.qparams()[1] is None else Made(quantizer, 1)
        return self._quantizer((Made(quantizer, 0), zero_point), quantizer.quant_min, quantizer.quant_max)

    def _quantizer(self, tensors: tuple[Any, Any], low: int, high: int) -> int:
        """The number of a quantizer. Those with equal values are one, as long as the values stay equal."""
        values = tuple(0 if t is None else value_of(t) for t in tensors)
        form = (*values, low, high)
        for number, (other, first) in enumerate(self.quantizers):
            if other == form:
                for a, b in zip(first, tensors, strict=True):
                    if a is not None and b is not None and a != b and ("equal", {"a": a, "b": b}) not in self.header:
                        self.header.append(("equal", {"a": a, "b": b}))
                if (first[1] is None) == (tensors[1] is None):
                    return number
        number = len(self.quantizers)
        self.quantizers.append((form, tensors))  # type: ignore[arg-type]
        options = {"id": number, "scale": tensors[0], "low": low, "high": high}
        if tensors[1] is not None:
            options["zero_point"] = tensors[1]
        self.header.append(("quantizer", options))
        return number

    # --- the steps ---

    def _name(self, node: fx.Node, q: int | None) -> str:
        name = f"{'f' if q is None else 'q'}{self.count}"
        self.count += 1
        self.names[node, q] = name
        return name

    def _floats(self, node: fx.Node) -> str:
        if (node, None) not in self.names:
            native = self.native(node)
            assert native is not None
            x = self.names[node, native]
            self.add("dequantize", out=self._name(node, None), x=x)
        return self.names[node, None]

    def _codes(self, node: fx.Node, q: int) -> str:
        if (node, q) not in self.names:
            native = self.native(node)
            if native is not None and (node, native) in self.names:
                x = self.names[node, native]
                self.add("requantize", codes=self._name(node, q), x=x, q=q)
            else:
                x = self._floats(node)
                self.add("quantize", out=self._name(node, q), x=x, q=q)
        return self.names[node, q]

    def _either(self, node: fx.Node) -> str:
        native = self.native(node)
        return self._floats(node) if native is None else self._codes(node, native)

    def _emit(self, node: fx.Node) -> None:
        operation = self.graph.operations[node]
        if operation.kind == "alias":
            return
        head = self.head.get(node, node)
        if head in self.tail:
            if self.tail[head] is node:
                self._emit_group(head, node)
            return
        if operation.kind == "quantizer":
            native = self.native(node)
            assert native is not None
            source = self._inputs(node)[0]
            self.names[node, native] = self._codes(source, native)
        elif operation.kind in MOVES:
            self._emit_move(node, operation)
        else:
            options = {key: value for key, value in operation.options.items() if key != "dims"}
            source = self._inputs(node)[0]
            of_codes = "activate", "avg_pool", "adaptive_avg_pool", "mean", *NORMS
            x = self._either(source) if operation.kind in of_codes else self._floats(source)
            self._emit_result(node, operation.kind, {"x": x, **options, **self._like(node)})

    def _like(self, node: fx.Node) -> dict[str, str]:
        return {"like": self._either(self._inputs(node)[-1])} if self.graph.operations[node].has_like else {}

    def _emit_result(self, node: fx.Node, step: str, options: dict[str, Any]) -> None:
        """A step whose result is stored in each form that is needed: at most floats and one kind of codes at once."""
        need, native = self.needs[node], self.native(node)
        codes = list(need.codes)
        if native is not None:
            codes = [native]
        stored: dict[str, Any] = {}
        if native is None and (need.floats or len(codes) != 1):
            stored["out"] = self._name(node, None)
        if codes:
            stored["codes"], stored["q"] = self._name(node, codes[0]), codes[0]
        self.add(step, **options, **stored)
        for q in need.codes:
            self._codes(node, q)

    def _emit_move(self, node: fx.Node, operation: Operation) -> None:
        need = self.needs[node]
        forms: list[int | None] = list(need.codes)
        if need.floats and self.native(node) is None:
            forms.append(None)
        elif need.floats or not forms:
            forms.append(self.native(node))
        for q in dict.fromkeys(forms):
            options = {
                key: value for key, value in operation.options.items() if key not in ("each", "chunks", "sizes", "at")
            }
            if operation.kind == "slice":
                options["begin"], options["end"] = self.graph.slice_of(node)
            sources = [self._floats(s) if q is None else self._codes(s, q) for s in self._values(node)]
            options["xs" if operation.kind == "cat" else "x"] = ",".join(sources)
            self.add(operation.kind, out=self._name(node, q), **options, **self._like(node))

    def _emit_group(self, head: fx.Node, tail: fx.Node) -> None:
        operation, group = self.graph.operations[head], self.groups[head]
        inputs = self._inputs(head)
        options: dict[str, Any] = dict(operation.options)
        if operation.kind in PRODUCTS:
            layer: Any = operation.module
            options["x"] = self._codes(inputs[0], self._input_quantizer(operation))
            options["data"], options["colsum"] = Held(layer._buffers, "data"), Held(layer._buffers, "colsum")
            options["scale"] = Held(layer._parameters, "scale")
            if layer.bias is not None:
                options["bias"] = Held(layer._parameters, "bias")
            options["in"], options["out_channels"] = channels_of(layer)
        elif operation.kind == "binary":
            options["a"], options["b"] = (self._either(source) for source in inputs)
        else:
            norm: Any = operation.module
            options["x"] = self._either(inputs[0])
            options["mean"], options["var"] = Held(norm._buffers, "running_mean"), Held(norm._buffers, "running_var")
            if norm.affine:
                options["weight"], options["bias"] = Held(norm._parameters, "weight"), Held(norm._parameters, "bias")
        if group.first is not None:
            options["first"] = group.first
        if group.residual is not None:
            options["residual"] = self._either(group.residual)
        if group.second is not None:
            options["second"] = group.second
        self._emit_result(tail, operation.kind, options)

    def _finish(self) -> None:
        """Numbers the constants and joins the lines."""
        places: dict[Any, int] = {}
        lines = [*self.header, *self.lines]
        constants = [v for _, options in lines for v in options.values() if isinstance(v, Held | Made)]
        for constant in (c for kind in (Held, Made) for c in constants if isinstance(c, kind)):
            if constant in places:
                continue
            places[constant] = len(places)
            if isinstance(constant, Held):
                self.part.dicts.append(constant.tensors)
                self.part.names.append(constant.name)
        self.part.qparams = Qparams([constant for constant in places if isinstance(constant, Made)])

        def text(value: Any) -> str:
            if isinstance(value, Held | Made):
                return str(places[value])
            if isinstance(value, tuple | list):
                return ",".join(map(str, value))
            return repr(value) if isinstance(value, float) else str(value)

        self.part.plan = "\n".join(
            " ".join([step, *(f"{key}={text(value)}" for key, value in options.items())]) for step, options in lines
        )
