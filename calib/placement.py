"""Where a runtime wants QDQ pairs: a target's table, and what becomes of a graph by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from calib.granularity import PerTensor
from calib.graph import Kind, Model, Use
from calib.prepare import QUANTIZABLE_OPS, is_constant

Grid = Literal["any", "asymmetric", "signed"]
Bias = Literal["add", "int32", "float"]

# The inputs of other operators that are no data: a shape, axes, padding.
_DATA_INPUTS = {"Add": 2, "Mul": 2, "Sum": 2, "Concat": None}


@dataclass(frozen=True, slots=True)
class Target:
    """A runtime: what it runs in integers, and the pairs it wants for that.

    Args:
        name: as ``--target`` gives it.
        runtime: what messages call it.
        weight_bits, activation_bits: the widths it has integer kernels for; empty for all.
        alone_bits: widths of weights where activations stay float; empty for all.
        grid: of activations: unsigned with a zero point, signed and symmetric, or as the rules say.
        bias: an Add behind the layer, int32 at s_x·s_w, or float as it was.
        layers: weighted operators that are quantized.
        no_kernel: those of ``layers`` that run in float between pairs, for want of a kernel.
        joined: other operators that run in integers, of which all inputs get a pair as soon as
            one has it.
        moved: operators that pass values on: input and output share one grid.
        one_grid: operators of ``joined`` whose inputs and output share one grid.
        fused: activation functions that a pair behind them absorbs.
        outputs: operators that run in integers only where a pair stands behind them.
        float_outputs: those of ``outputs`` that need none where only float operators read them.
        half: whether it takes float16.
        tied: whether several layers may read one quantized weight.
        one_branch: a residual Add gets a pair at one of its inputs alone.
    """

    name: str
    runtime: str
    weight_bits: tuple[int, ...] = ()
    activation_bits: tuple[int, ...] = ()
    alone_bits: tuple[int, ...] = ()
    grid: Grid = "any"
    bias: Bias = "add"
    layers: tuple[str, ...] = QUANTIZABLE_OPS
    no_kernel: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    one_grid: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    float_outputs: tuple[str, ...] = ()
    half: bool = True
    tied: bool = True
    one_branch: bool = False

    @property
    def spreads(self) -> bool:
        """Whether pairs stand elsewhere than at the inputs of layers."""
        return bool(self.joined or self.moved or self.outputs or self.one_branch)


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor that gets a pair.

    Attributes:
        uses: by which operators it is read or made in integers.
        shares: all tensors of one grid, this one among them; empty where it is alone.
        everyone: all that read the tensor read the pair, an output of the model among them.
        readers: names of the nodes that read the pair.
    """

    uses: tuple[Use, ...]
    shares: tuple[str, ...]
    everyone: bool
    readers: tuple[str, ...]


def place(
    model: Model,
    target: Target,
    chosen: Mapping[str, list[Use]],
    allowed: Callable[[Use], bool],
) -> dict[str, Placed]:
    """The pairs that ``target`` wants, by tensor, those of layers first.

    Args:
        model: the prepared graph is walked once, in its order.
        target: the table.
        chosen: by tensor, the readings of layers that are quantized.
        allowed: whether another operator may read or make a tensor in integers.
    """
    walk = _Walk(model, target, chosen, allowed)
    if target.one_branch:
        walk.residuals()
    else:
        walk.run()
    return walk.placed()


class _Walk:
    """One pass over a graph, operators before their readers."""

    def __init__(
        self,
        model: Model,
        target: Target,
        chosen: Mapping[str, list[Use]],
        allowed: Callable[[Use], bool],
    ):
        self.graph = model.ir.graph
        self.target = target
        self.allowed = allowed
        self.uses = {name: list(uses) for name, uses in chosen.items()}
        self.everyone: set[str] = set()
        self.grids: dict[str, set[str]] = {}
        read = {(use.node, use.tensor) for uses in chosen.values() for use in uses}
        self.layers = {
            node
            for node in self.graph
            if node.op_type in target.layers
            and node.domain == ""
            and all((node.name, v.name) in read for v in node.inputs[:2] if v is not None)
        }
        self.outputs = set(self.graph.outputs)
        self.wanted = self._wanted()

    def run(self) -> None:
        for node in self.graph:
            if node in self.layers:
                self._behind(node)
            elif node.domain != "":
                continue
            elif node.op_type in self.target.moved:
                self._move(node)
            elif node.op_type in self.target.joined:
                self._join(node)
            elif node.op_type in self.target.fused and self._paired(node.inputs[0]):
                self._behind(node)

    def residuals(self) -> None:
        """Of each Add of two activations, one of which a layer makes for it alone, the other,
        which came first, gets a pair: the layer and the Add become one."""
        order: dict[Any, int] = {node: number for number, node in enumerate(self.graph)}
        for node in self.graph:
            if node.op_type not in ("Add", "Sum") or len(node.inputs) != 2:
                continue
            branches = [v for v in node.inputs if v is not None and v.producer() in self.layers]
            if not branches or any(is_constant(v) for v in node.inputs if v is not None):
                continue
            fused = max(branches, key=lambda v: order[v.producer()])
            other = node.inputs[0] if node.inputs[1] is fused else node.inputs[1]
            alone = len(fused.uses()) == 1 and fused not in self.outputs
            if other is not fused and alone and not _has_default(other):
                self._add(other, node)

    def placed(self) -> dict[str, Placed]:
        found = {}
        for name, uses in self.uses.items():
            everyone = name in self.everyone
            shares = tuple(sorted(self.grids.get(name, ())))
            names = [use.node for use in uses if use.tensor == name and self._reads(use)]
            if everyone:
                names = [str(n.name) for n in self._all_readers(name) if not self._stays_float(n)]
            if not names and not (everyone and any(v.name == name for v in self.outputs)):
                continue  # only layers that stay float read it
            found[name] = Placed(tuple(uses), shares, everyone, tuple(dict.fromkeys(names)))
        return found

    def _reads(self, use: Use) -> bool:
        node = self._nodes[use.node]
        return any(v is not None and v.name == use.tensor for v in node.inputs)

    @property
    def _nodes(self) -> dict[str, Any]:
        return {str(node.name): node for node in self.graph}

    def _all_readers(self, name: str) -> Iterator[Any]:
        for node in self.graph:
            if any(v is not None and v.name == name for v in node.inputs):
                yield node

    def _stays_float(self, node: Any) -> bool:
        """Whether a layer that shall stay float must read floats for that: between two pairs,
        onnxruntime 1.31 quantizes its weight by itself."""
        if node.op_type not in QUANTIZABLE_OPS or node in self.layers:
            return False
        return self._paired(self._carrier(node.outputs[0]))

    def _wanted(self) -> set[Any]:
        """Values that an operator with integer kernels reads, be it behind movements."""
        wanted: set[Any] = set()
        passing = (*self.target.moved, *self.target.fused)
        for node in reversed(list(self.graph)):
            if node.domain != "":
                continue
            if node in self.layers or node.op_type in self.target.joined:
                wanted.update(self._data(node))
            elif node.op_type in passing and any(v in wanted for v in node.outputs):
                wanted.add(node.inputs[0])
        return wanted

    def _data(self, node: Any) -> list[Any]:
        n = _DATA_INPUTS.get(node.op_type, 1)
        if node in self.layers:
            n = 2
        return [v for v in node.inputs[:n] if v is not None]

    def _paired(self, value: Any) -> bool:
        return value is not None and value.name in self.uses

    def _behind(self, node: Any) -> None:
        """A pair behind ``node``, and behind the activation function that follows."""
        op_type, value = node.op_type, node.outputs[0]
        kept_float = op_type in self.target.float_outputs and value not in self.wanted
        if op_type not in (*self.target.outputs, *self.target.fused) or kept_float:
            return
        value = self._carrier(value)
        if self._add(value, node):
            self.everyone.add(str(value.name))

    def _carrier(self, value: Any) -> Any:
        """``value`` behind the activation functions that alone read it."""
        while value not in self.outputs and len(value.uses()) == 1:
            reader = next(iter(value.uses())).node
            if reader.op_type not in self.target.fused or reader.graph is not self.graph:
                break
            value = reader.outputs[0]
        return value

    def _move(self, node: Any) -> None:
        """One grid on both sides, where values come in integers and are wanted in integers."""
        source = node.inputs[0]
        results = [v for v in node.outputs if v.name and v in self.wanted]
        if not self._paired(source) or is_constant(source) or not _moves(node):
            return
        for value in results:
            if self._add(value, node):
                self.everyone.add(str(value.name))
                self._share(source, value)

    def _join(self, node: Any) -> None:
        """All inputs get pairs, where one has, and the output."""
        data = self._data(node)
        if len(data) != len(node.inputs) or not any(self._paired(v) for v in data):
            return
        if not all(self._may(v, node) for v in (*data, node.outputs[0])):
            return
        for value in data:
            self._add(value, node)
        self._behind(node)
        if node.op_type in self.target.one_grid:
            carrier = node.outputs[0] if self._paired(node.outputs[0]) else data[0]
            for value in data:
                self._share(carrier, value)

    def _may(self, value: Any, node: Any) -> bool:
        if value.dtype is None or value.dtype.name != "FLOAT" or _has_default(value):
            return False
        if is_constant(value) and node.op_type not in ("Add", "Mul", "Sum"):
            return False
        maker = None if value is node.outputs[0] else value.producer()
        if maker is not None and maker.op_type in QUANTIZABLE_OPS and maker not in self.layers:
            return False
        return self.allowed(self._use(value, node))

    def _use(self, value: Any, node: Any) -> Use:
        kind: Kind = "weight" if is_constant(value) else "activation"
        return Use(str(value.name), kind, str(node.name), node.op_type, False, PerTensor())

    def _add(self, value: Any, node: Any) -> bool:
        """Whether ``value`` gets a pair now, or has one."""
        use = self._use(value, node)
        if not self.allowed(use):
            return False
        self.uses.setdefault(use.tensor, []).append(use)
        return True

    def _share(self, one: Any, other: Any) -> None:
        names = {str(one.name), str(other.name)}
        together = names.union(*(self.grids.get(name, ()) for name in names))
        for name in together:
            self.grids[name] = together


def _has_default(value: Any) -> bool:
    """Whether it is an input of the model that has a value of its own where none is fed."""
    return bool(value.is_initializer() and value.is_graph_input())


def _moves(node: Any) -> bool:
    """Whether an operator gives no value that was not among its input's, but 0."""
    if node.op_type == "Resize":
        return bool(node.attributes.get_string("mode", "nearest") != "cubic")
    if node.op_type == "Pad" and node.attributes.get_string("mode", "constant") == "constant":
        if node.attributes.get_float("value", 0.0) != 0.0:
            return False
        filling = node.inputs[2] if len(node.inputs) > 2 else None
        if filling is None:
            return True
        tensor = filling.const_value if is_constant(filling) else None
        return tensor is not None and not tensor.numpy().any()
    return True
