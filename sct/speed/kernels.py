"""Read a program that XLA compiled for a GPU: operations, bytes and an estimate of the time of each kernel.

The estimate needs no GPU. Each kernel takes as long as its operations at an assumed rate, or as long as its bytes at an
assumed memory bandwidth, whichever is longer. The estimate is not a bound. The real time can be longer, because the
operations of elementwise functions and the time to start a kernel are not counted. It can also be shorter, because
caches keep data between kernels, or because a kernel is faster than the assumed rate.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from sct.errors import SctError

_SIZES = {
    "f64": 8, "s64": 8, "u64": 8, "c64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
}  # fmt: skip
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|\w+_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
# Instructions that do no work: they rename an array or a part of it.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "opt-barrier", "partition-id",
    "copy-done", "copy-update", "async-done", "async-update", "replica-id",
}  # fmt: skip
# Instructions that run other computations, whose instructions are counted instead.
_RUNS_OTHERS = {"while", "conditional", "call", "async-start"}
# Library calls without matrix products.
_NO_PRODUCTS = ("TopK", "DeviceRadixSort", "AllocateBuffer", "Sharding", "annotate_device_placement")
# Instructions with products that cannot be counted here. Usually, XLA replaces them by library calls or fusions.
_NOT_COUNTED = {"cholesky", "triangular-solve", "fft", "ragged-dot", "scaled-dot"}
# Instructions that read their operands completely, even if only a part of the result is needed.
_READ_WHOLE = {"reduce", "reduce-window", "dot", "convolution", "sort", "scatter", "dynamic-update-slice"}
_SLICES = ("dynamic-slice", "slice", "gather")


def arrays_of(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return the dtypes and shapes of the arrays in the text of a type."""
    return [
        (kind, tuple(int(size) for size in shape.split(",") if size)) for kind, shape in _ARRAY.findall(type_)
    ]


def _elements(type_: str) -> int:
    """Return the number of elements of all arrays in the text of a type."""
    return sum(math.prod(shape) for _, shape in arrays_of(type_))


def bytes_of(type_: str) -> int:
    """Return the size in bytes of all arrays in the text of a type."""
    return sum(_SIZES.get(kind, 1) * math.prod(shape) for kind, shape in arrays_of(type_))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a compiled program.

    Attributes
    ----------
    name, kind, type
        Name, operation ("fusion", "dot", ...), and the text of the type of the result.
    operands
        Names of the operands.
    rest
        Text of the operands and the attributes.
    root
        Whether the instruction is the result of its computation.
    """

    name: str
    kind: str
    type: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def called(self) -> list[str]:
        """Names of the computations that the instruction runs."""
        names = _CALLED.findall(self.rest)
        for many in _BRANCHES.findall(self.rest):
            names += [name.strip().lstrip("%") for name in many.split(",")]
        return names

    @property
    def trips(self) -> int:
        """Number of iterations of a loop; 0 if it is not known."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.rest)
        return int(found[1]) if found else 0

    @property
    def source(self) -> str:
        """Path of the operation in the traced code, such as "jit(step)/.../conv"; "" if XLA recorded none."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


class Program:
    """The computations of a compiled program.

    Attributes
    ----------
    computations
        Instructions of each computation, by name.
    entry
        Name of the computation that a call of the program runs.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = name = ""
        for line in text.splitlines():
            if head := _HEAD.match(line):
                name = head[2]
                self.computations[name] = []
                self.entry = name if head[1] else self.entry
            elif (found := _INSTRUCTION.match(line)) and name:
                operands = tuple(re.findall(r"%([\w.-]+)", _up_to_closing(found[5])))
                self.computations[name].append(
                    Instruction(found[2], found[4], found[3], operands, found[5], bool(found[1]))
                )

    @functools.cached_property
    def types(self) -> dict[tuple[str, str], str]:
        """Type of each instruction, by computation and name."""
        return {(name, one.name): one.type for name, body in self.computations.items() for one in body}

    def walk(
        self, enter: Callable[[Instruction], bool] = lambda _: True
    ) -> Iterator[tuple[int, str, Instruction]]:
        """Yield the instructions that a call runs: how often (0: not known), computation, instruction.

        `enter` decides whether the computations that an instruction runs are walked too.
        """

        def inside(name: str, times: int) -> Iterator[tuple[int, str, Instruction]]:
            for one in self.computations[name]:
                yield times, name, one
                if enter(one):
                    for called in one.called:
                        yield from inside(called, times * one.trips if one.kind == "while" else times)

        yield from inside(self.entry, 1)


def _up_to_closing(text: str) -> str:
    """Return the text up to the closing parenthesis of the operands."""
    depth = 1
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:at]
    return text


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of a GPU program.

    Attributes
    ----------
    name, group, source
        Name in the program, kind of work (see `group_of`), and path of the operation in the traced code.
    times
        How often a call of the program runs the kernel.
    flops, bytes
        Operations of matrix products and convolutions, and bytes that one run reads and writes.
    """

    name: str
    group: str
    source: str
    times: int
    flops: float
    bytes: float

    def seconds(self, device: Rates) -> float:
        """Return the estimated time of all runs of the kernel."""
        rate = device.convolution_flops if self.group.startswith("convolution") else device.product_flops
        return self.times * max(self.flops / rate, self.bytes / device.bandwidth)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rates that an estimate assumes: operations per second, and bytes per second."""

    product_flops: float
    convolution_flops: float
    bandwidth: float


def kernels(program: Program) -> list[Kernel]:
    """Return the kernels that a call of a GPU program runs.

    Raises
    ------
    SctError
        A loop has an unknown number of iterations, or an instruction is unknown and may contain matrix products.
    """
    found = []
    for times, computation, one in program.walk(lambda one: one.kind in _RUNS_OTHERS):
        if one.kind in _FREE or one.kind in _RUNS_OTHERS:
            continue
        if not times:
            raise SctError(
                f"the kernel {one.name} is in a loop with an unknown number of iterations, so its runs cannot be "
                "counted: compile a program whose loops have a fixed length."
            )
        operations, moved = _work(program, computation, one)
        found.append(
            Kernel(one.name, group_of(program, one), _source_of(program, one), times, operations, moved)
        )
    return found


def _source_of(program: Program, one: Instruction) -> str:
    """Return the path of a kernel in the traced code: its own, or that of the last operation inside that has one."""
    inner = [each.source for name in one.called for each in program.computations.get(name, [])]
    return one.source or next((source for source in reversed(inner) if source), "")


def _inside(program: Program, one: Instruction) -> Iterator[tuple[str, Instruction]]:
    """Yield the instructions of the computations that an instruction runs, with the names of the computations."""
    for name in one.called:
        for inner in program.computations.get(name, []):
            yield name, inner
            yield from _inside(program, inner)


def _target(one: Instruction) -> str:
    """Return the name of the library function that an instruction calls; "" for other instructions."""
    found = re.search(r'custom_call_target="([^"]*)"', one.rest)
    return found[1] if found else ""


def group_of(program: Program, one: Instruction) -> str:
    """Return the kind of work of a kernel."""
    if target := _target(one):
        for part, group in (
            ("convForward", "convolution, forward"), ("convBiasActivation", "convolution, forward"),
            ("convBackwardInput", "convolution, gradient of the input"),
            ("convBackwardFilter", "convolution, gradient of the weights"),
            ("fmha", "attention"), ("cublas", "matrix product"), ("TopK", "sort, scatter, gather"),
            ("RadixSort", "sort, scatter, gather"),
        ):  # fmt: skip
            if part in target:
                return group
        return f"library call {target}"
    kinds = {one.kind, *(inner.kind for _, inner in _inside(program, one))}
    if "dot" in kinds:
        return "attention" if "attention" in one.source and one.source.count("dot") > 1 else "matrix product"
    for group, among in (
        ("sort, scatter, gather", {"sort", "scatter", "gather"}), ("convolution, forward", {"convolution"}),
        ("elementwise with sums", {"reduce", "reduce-window"}),
        ("transposition", {"transpose"}),
    ):  # fmt: skip
        if kinds & among:
            return group
    inner = (
        kinds - _FREE - {"fusion", "copy", "copy-start", "broadcast", "convert", "reshape", "pad", "slice"}
    )
    inner -= {"concatenate", "dynamic-slice", "dynamic-update-slice", "iota"}
    return "elementwise" if inner else "copy or conversion"


def _work(program: Program, computation: str, one: Instruction) -> tuple[float, float]:
    """Return the operations of a kernel, and the bytes that it reads and writes."""
    types = program.types
    operands = [types.get((computation, name), "") for name in one.operands]
    if one.kind == "fusion":
        (called,) = one.called
        flops = sum(_flops(types, name, inner) for name, inner in _inside(program, one))
        return flops, _fusion_bytes(program, called)
    flops = _flops(types, computation, one)
    if one.kind in _SLICES:
        return flops, 2.0 * bytes_of(one.type)
    if one.kind == "dynamic-update-slice":
        return flops, 2.0 * bytes_of(operands[1])
    if one.kind == "copy-start":
        return flops, 2.0 * bytes_of(operands[0])
    return flops, float(sum(map(bytes_of, operands)) + bytes_of(one.type))


def _flops(types: dict[tuple[str, str], str], computation: str, one: Instruction) -> float:
    """Return the operations of the matrix products in an instruction, 0 if it has none."""
    operands = [types.get((computation, name), "") for name in one.operands]
    if one.kind == "dot":
        return _product_flops(one, operands, r"lhs_contracting_dims=\{([\d,]*)\}")
    if one.kind == "convolution":
        return _convolution_flops(one, operands)
    target = _target(one)
    if "$conv" in target:
        return _convolution_flops(one, operands)
    if "fmha" in target:
        return _attention_flops(one, operands)
    if "cublas" in target:
        return _product_flops(one, operands, r'"lhs_contracting_dimensions":\[([\d,"]*)\]')
    asynchronous = one.kind.endswith("-start") and one.kind != "copy-start"
    unknown = one.kind == "custom-call" and not any(name in target for name in _NO_PRODUCTS)
    if asynchronous or unknown or one.kind in _NOT_COUNTED:
        raise SctError(
            f"the kernel {one.name} ({target or one.kind}) is not known, but may contain matrix products: add this "
            "kind of kernel to sct/speed/kernels.py."
        )
    return 0.0


def _product_flops(one: Instruction, operands: Sequence[str], contracting: str) -> float:
    """Count 2 x elements of the result x length of the summed axes of the first operand."""
    ((_, left),) = arrays_of(operands[0])[:1]
    found = re.search(contracting, one.rest)
    if found is None:
        raise SctError(
            f"the matrix product {one.name} does not name the axes that it sums over, so its operations cannot be "
            "counted: add its form to sct/speed/kernels.py."
        )
    summed = math.prod(left[int(axis)] for axis in found[1].replace('"', "").split(",") if axis)
    return 2.0 * math.prod(arrays_of(one.type)[0][1]) * summed


def _convolution_flops(one: Instruction, operands: Sequence[str]) -> float:
    """Count 2 x positions of the output x number of weights.

    In a gradient of the input, the output of the convolution is the first operand. In a gradient of the weights, it is
    the second operand, and the weights are the result.
    """
    first, second, result = (arrays_of(text)[0][1] for text in (*operands[:2], one.type))
    if "convBackwardFilter" in one.rest:
        output, kernel = second, result
    elif "convBackwardInput" in one.rest:
        output, kernel = first, second
    else:
        output, kernel = result, second
    labels = re.search(r"dim_labels=\w+_\w+->(\w+)", one.rest)
    channels = output[labels[1].index("f") if labels else -1]
    return 2.0 * math.prod(output) / channels * math.prod(kernel)


def _attention_flops(one: Instruction, operands: Sequence[str]) -> float:
    """Count two products of all queries with all keys in the forward pass, and five in the backward pass."""
    shapes = [arrays_of(text)[0][1] for text in operands[:3]]
    batch, queries, heads, width = shapes[0]
    keys = max(shapes[1][1:3])
    return (5 if "Backward" in one.rest else 2) * 2.0 * batch * heads * queries * keys * width


def _fusion_bytes(program: Program, called: str) -> float:
    """Return the bytes that a fusion reads and writes.

    If a fusion reads only slices of a parameter, only the slices count. If a fusion updates a part of a parameter, only
    the update counts.
    """
    body = program.computations[called]
    types = program.types
    by_name = {one.name: one for one in body}
    size = {one.name: _elements(one.type) for one in body}
    # Number of elements of each array that the results need, from the results back to the parameters. Slices of an
    # array are different parts of it; other users of the array need the same part.
    sliced, shared = dict.fromkeys(size, 0), dict.fromkeys(size, 0)
    needed: dict[str, int] = {}
    for one in reversed(body):
        need = size[one.name] if one.root else min(sliced[one.name] + shared[one.name], size[one.name])
        needed[one.name] = need
        for at, name in enumerate(one.operands):
            if name not in size or (one.kind == "dynamic-update-slice" and not at):
                continue
            if one.kind in _SLICES and not at:
                sliced[name] += need
            else:
                whole = one.kind in _READ_WHOLE or one.kind in _SLICES
                shared[name] = max(shared[name], size[name] if whole else min(need, size[name]))
    total = sum(
        needed[one.name] / max(size[one.name], 1) * bytes_of(one.type)
        for one in body
        if one.kind == "parameter"
    )

    def written(one: Instruction) -> float:
        if one.kind == "tuple":
            return sum(written(by_name[name]) for name in one.operands)
        if one.kind == "bitcast" and one.operands[0] in by_name:
            return written(by_name[one.operands[0]])
        if one.kind == "dynamic-update-slice":
            return float(bytes_of(types[called, one.operands[1]]))
        return float(bytes_of(one.type))

    return total + sum(written(one) for one in body if one.root)


def by_group(found: Iterable[Kernel], device: Rates) -> list[tuple[str, int, float, float, float]]:
    """Sum kernels by group: (group, number of runs, operations, bytes, estimated seconds), slowest group first."""
    sums: dict[str, list[float]] = {}
    for one in found:
        row = sums.setdefault(one.group, [0, 0.0, 0.0, 0.0])
        for at, value in enumerate(
            (one.times, one.times * one.flops, one.times * one.bytes, one.seconds(device))
        ):
            row[at] += value
    rows = [(name, int(row[0]), row[1], row[2], row[3]) for name, row in sums.items()]
    return sorted(rows, key=lambda row: -row[-1])
