"""What a compiled program does in a run: products, memory traffic, talk between devices.

XLA's own cost analysis counts the body of a loop once, so that a model whose layers are scanned
looks as if it had one. Here the text of the optimized program is read, and what is inside a loop
counts as often as the loop runs.

The text is that of `jax.stages.Compiled.as_text()`: one program of one device, after partitioning.
"""

import dataclasses
import math
import re
from collections import defaultdict

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
    "f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3": 8, "f8e4m3b11fnuz": 8, "f8e5m2fnuz": 8, "f4e2m1fn": 4,
    "f8e8m0fnu": 8, "s2": 2, "u2": 2, "token": 0, "opaque": 0,
}  # fmt: skip

# Move no data: names for buffers, or parts of them.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "iota", "opt-barrier", "while", "conditional", "call", "custom-call",
    "copy-done", "collective-permute-done", "all-gather-done", "all-reduce-done", "async-done",
    "async-update", "async-start",
}  # fmt: skip

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip

_SHAPE = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")


@dataclasses.dataclass
class Collective:
    """All calls of one kind in a run of the program.

    Attributes:
      count: calls.
      bytes: that one device sends.
    """

    count: float = 0.0
    bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one device does in one run of a program.

    Attributes:
      flops: of matrix products; what is elementwise is not counted.
      bytes: read from and written to the device's memory.
      collectives: by kind; bytes that the device sends, by the algorithms that send least.
      unknown_loops: loops whose number of rounds the text does not tell.
    """

    flops: float
    bytes: float
    collectives: dict[str, Collective]
    unknown_loops: int

    @property
    def sent(self) -> float:
        """Bytes that the device sends, all kinds together."""
        return sum(c.bytes for c in self.collectives.values())


@dataclasses.dataclass(frozen=True)
class _Array:
    dtype: str
    dims: tuple[int, ...]
    on_chip: bool

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """In the device's main memory."""
        return 0.0 if self.on_chip else self.size * _BITS.get(self.dtype, 32) / 8


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    op: str
    arrays: tuple[_Array, ...]  # of the result
    operands: tuple[str, ...]
    rest: str  # attributes
    arguments: str
    is_root: bool

    @property
    def out_bytes(self) -> float:
        return sum(a.bytes for a in self.arrays)

    def called(self, attribute: str) -> str | None:
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return match and match[1]

    def numbers(self, attribute: str) -> list[int]:
        match = re.search(rf"\b{attribute}=\{{([0-9,]*)\}}", self.rest)
        return [int(n) for n in match[1].split(",") if n] if match else []


Computation = dict[str, _Instruction]


def cost(text: str, unknown_rounds: float = 1) -> Cost:
    """Reads the text of a compiled program.

    Args:
      text: `compiled.as_text()`.
      unknown_rounds: how often loops run whose end depends on what they compute.

    Returns:
      The cost of one run on one device.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations, entry = _parse(text)
    flops: dict[str, float] = {}
    total = {"flops": 0.0, "bytes": 0.0}
    collectives: dict[str, Collective] = defaultdict(Collective)
    unknown = 0

    def flops_of(name: str) -> float:
        """Of a fusion and what it calls."""
        if name not in flops:
            body = computations.get(name, {})
            flops[name] = sum(_flops(i, body) for i in body.values()) + sum(
                flops_of(called) for i in body.values() if (called := i.called("calls"))
            )
        return flops[name]

    def visit(name: str, times: float) -> None:
        nonlocal unknown
        body = computations.get(name, {})
        for instruction in body.values():
            op = instruction.op
            total["flops"] += times * _flops(instruction, body)
            if op == "while":
                rounds = _rounds(instruction, body, computations)
                unknown += rounds is None
                rounds = unknown_rounds if rounds is None else rounds
                visit(instruction.called("body"), times * rounds)
                continue
            if op == "conditional":
                branches = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.rest)
                if match := re.search(r"branch_computations=\{([^}]*)\}", instruction.rest):
                    branches = [b.strip().lstrip("%") for b in match[1].split(",")]
                for branch in branches:  # one of them runs
                    visit(branch, times / len(branches))
                continue
            called = instruction.called("calls") or instruction.called("to_apply")
            if op in ("call", "async-start") and called:
                visit(called, times)
                continue
            total["bytes"] += times * _bytes(instruction, body, computations)
            if found := _collective(instruction, body, computations):
                kind, sent = found
                collectives[kind].count += times
                collectives[kind].bytes += times * sent
            if op == "fusion":
                total["flops"] += times * flops_of(called)

    visit(entry, 1.0)
    return Cost(total["flops"], total["bytes"], dict(collectives), unknown)


# --- Parsing --------------------------------------------------------------------------------------


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif current is not None and (instruction := _instruction(line)):
            current[instruction.name] = instruction
    for body in computations.values():
        for name in {n for i in body.values() for n in i.operands if "#" in n}:
            whole, _, index = name.partition("#")  # how jax 0.12 writes get-tuple-element
            if whole in body:
                arrays = body[whole].arrays[int(index) : int(index) + 1]
                body[name] = _Instruction(
                    name, "get-tuple-element", arrays, (whole,), f", index={index}", whole, False
                )
    if not entry:
        raise ValueError("This is not the text of a compiled program: it has no ENTRY computation.")
    return computations, entry


def _instruction(line: str) -> _Instruction | None:
    match = _NAME.match(line)
    if not match:
        return None
    shape_end = _balanced(line, match.end()) if line[match.end()] == "(" else None
    shape_end = shape_end or line.index(" ", match.end())
    shape, call = line[match.end() : shape_end], line[shape_end:].lstrip()
    opening = call.index("(")
    closing = _balanced(call, opening)
    arguments = call[opening + 1 : closing - 1]
    return _Instruction(
        name=match[2],
        op=call[:opening],
        arrays=tuple(_arrays(shape)),
        operands=tuple(re.findall(r"%([\w.\-]+(?:#\d+)?)", arguments)),
        rest=call[closing:],
        arguments=arguments,
        is_root=bool(match[1]),
    )


def _balanced(text: str, start: int) -> int:
    """The index behind the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i + 1
    return len(text)


def _arrays(shape: str) -> list[_Array]:
    """S(n) of a layout is a memory other than the main one: 1 is on the chip."""
    return [
        _Array(dtype, tuple(int(d) for d in dims.split(",") if d), "S(" in (layout or ""))
        for dtype, dims, layout in _SHAPE.findall(shape)
    ]


# --- Loops ----------------------------------------------------------------------------------------


def _rounds(loop: _Instruction, body: Computation, computations) -> int | None:
    """How often a loop runs: what the compiler notes, else `counter < constant` read off it."""
    if match := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(match[1])
    condition = computations.get(loop.called("condition"), {})
    root = next((i for i in condition.values() if i.is_root), None)
    if root is None or root.op != "compare" or "direction=LT" not in root.rest:
        return None
    sides = [condition.get(name) for name in root.operands]
    if len(sides) != 2 or None in sides or sides[0].op != "get-tuple-element":
        return None
    index = _index(sides[0])
    bound = _constant(sides[1])
    inner = computations.get(loop.called("body"), {})
    result = next((i for i in inner.values() if i.is_root), None)
    if bound is None or result is None or result.op != "tuple":
        return None
    step = _increment(inner, result.operands[index], index)
    start = _constant(_element(body, loop.operands[0], index))
    return max(0, -(-(bound - start) // step)) if step and start is not None else None


def _index(get: _Instruction) -> int:
    return int(re.search(r"index=(\d+)", get.rest)[1])


def _constant(instruction: _Instruction | None) -> int | None:
    if instruction is None or instruction.op != "constant":
        return None
    return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments) else None


def _element(body: Computation, name: str, index: int) -> _Instruction | None:
    """The instruction behind an element of a tuple, through copies."""
    made = body.get(name)
    found = body.get(made.operands[index]) if made and made.op == "tuple" else None
    while found is not None and found.op in ("copy", "bitcast"):
        found = body.get(found.operands[0])
    return found


def _increment(inner: Computation, name: str, index: int) -> int | None:
    """What is added in a round to the counter at `index`; None if that cannot be seen."""
    step = 0
    while (instruction := inner.get(name)) is not None:
        if instruction.op == "get-tuple-element":
            return step if _index(instruction) == index else None
        if instruction.op == "copy":
            name = instruction.operands[0]
            continue
        constants = [n for n in instruction.operands if _constant(inner.get(n)) is not None]
        others = [n for n in instruction.operands if n not in constants]
        if instruction.op != "add" or len(constants) != 1 or len(others) != 1:
            return None
        step += _constant(inner[constants[0]])
        name = others[0]
    return None


# --- Products -------------------------------------------------------------------------------------


def _flops(instruction: _Instruction, body: Computation) -> float:
    if instruction.op not in ("dot", "convolution"):
        return 0.0
    operands = [body[name].arrays[0] for name in instruction.operands]
    out = instruction.arrays[0]
    if instruction.op == "dot":
        contracted = instruction.numbers("lhs_contracting_dims")
        return 2.0 * out.size * math.prod(operands[0].dims[d] for d in contracted)
    # A TPU's products are convolutions. A window that is padded all round is how a batch axis is
    # written, so only the positions inside count.
    labels = re.search(r"dim_labels=([^_]+)_([^-]+)->([^,\s]+)", instruction.rest)
    _, kernel, output = labels[1], labels[2], labels[3]
    window = _window(instruction.rest)
    flops = 2.0 * out.dims[output.index("b")] * out.dims[output.index("f")]
    flops *= operands[1].dims[kernel.index("i")]
    for d in range(len(window["size"])):
        flops *= _positions(
            operands[0].dims[labels[1].index(str(d))], out.dims[output.index(str(d))],
            {key: values[d] for key, values in window.items()},
        )  # fmt: skip
    groups = re.search(r"batch_group_count=(\d+)", instruction.rest)
    return flops / int(groups[1]) if groups else flops


def _window(rest: str) -> dict[str, list]:
    match = re.search(r"window=\{([^}]*)\}", rest)
    fields = dict(item.split("=") for item in match[1].split()) if match else {}
    sizes = [int(n) for n in fields.get("size", "").split("x") if n]
    rank = len(sizes)

    def get(name: str, default: int) -> list[int]:
        return [int(n) for n in fields[name].split("x")] if name in fields else [default] * rank

    pads = fields["pad"].split("x") if "pad" in fields else ["0_0"] * rank
    return {
        "size": sizes, "stride": get("stride", 1), "low": [int(p.split("_")[0]) for p in pads],
        "lhs_dilate": get("lhs_dilate", 1), "rhs_dilate": get("rhs_dilate", 1),
    }  # fmt: skip


def _positions(length: int, out: int, window: dict[str, int]) -> int:
    """Pairs of an output and a kernel position that meet a real value of the input."""
    end = (length - 1) * window["lhs_dilate"] + 1
    return sum(
        0 <= (at := o * window["stride"] + k * window["rhs_dilate"] - window["low"]) < end
        and at % window["lhs_dilate"] == 0
        for o in range(out)
        for k in range(window["size"])
    )


# --- Memory ---------------------------------------------------------------------------------------


def _bytes(instruction: _Instruction, body: Computation, computations) -> float:
    op = instruction.op
    if op in _FREE:
        return 0.0
    if op in ("copy-start", "collective-permute-start", "all-gather-start", "all-reduce-start"):
        # (result, operand, flags): of the two ends of a copy those in main memory.
        return sum(a.bytes for a in instruction.arrays[:2])
    if op == "dynamic-slice":
        return 2 * instruction.out_bytes
    if op == "dynamic-update-slice":
        return 2 * body[instruction.operands[1]].out_bytes
    read = [body[name].out_bytes for name in instruction.operands if name in body]
    if op == "gather":
        return 2 * instruction.out_bytes + sum(read[1:])
    if op != "fusion":
        return sum(read) + instruction.out_bytes
    inner = computations.get(instruction.called("calls"), {})
    return _fusion_bytes(instruction, body, inner)


def _fusion_bytes(fusion: _Instruction, body: Computation, inner: Computation) -> float:
    """Inputs and outputs of a fusion; of an array that it only slices, the slice."""
    users = defaultdict(list)
    for instruction in inner.values():
        for name in instruction.operands:
            users[name].append(instruction)
    read, updated = 0.0, 0.0
    for instruction in inner.values():
        if instruction.op != "parameter":
            continue
        number = int(instruction.arguments)
        operand = body.get(fusion.operands[number]) if number < len(fusion.operands) else None
        whole = operand.out_bytes if operand else 0.0
        uses = users[instruction.name]
        if uses and all(u.op == "dynamic-slice" for u in uses):
            read += min(whole, sum(u.arrays[0].size * _width(u.arrays[0]) for u in uses))
        elif uses and all(
            u.op == "dynamic-update-slice" and u.operands[0] == instruction.name for u in uses
        ):
            updated += whole  # in place: the rest is neither read nor written
            read += sum(_update_bytes(u, inner) for u in uses)
        else:
            read += whole
    written = max(0.0, fusion.out_bytes - updated)
    return read + written


def _width(array: _Array) -> float:
    return _BITS.get(array.dtype, 32) / 8


def _update_bytes(update: _Instruction, inner: Computation) -> float:
    source = inner.get(update.operands[1])
    return source.arrays[0].size * _width(source.arrays[0]) if source else 0.0


# --- Talk between devices -------------------------------------------------------------------------


def _collective(instruction: _Instruction, body: Computation, computations):
    """(kind, bytes that a device sends) of a call, or None."""
    op = instruction.op.removesuffix("-start")
    if op == "fusion":  # a TPU's reduce-scatter: all-reduce and slice as one
        name = instruction.called("calls") or ""
        inner = computations.get(name, {})
        for one in inner.values():
            if one.op == "all-reduce" and name.startswith("all-reduce-scatter"):
                n = _group_size(one.rest)
                return "reduce-scatter", _all_bytes(one.arrays) * (n - 1) / n
            if one.op in COLLECTIVES:
                return _collective(one, inner, computations)
        return None
    if op not in COLLECTIVES:
        return None
    arrays = instruction.arrays
    if instruction.op == "collective-permute-start":
        arrays = arrays[:1]
    elif instruction.op == "all-gather-start":
        arrays = arrays[len(arrays) // 2 :]
    out = _all_bytes(arrays)
    n = _group_size(instruction.rest)
    if op == "collective-permute":
        return op, out
    share = (n - 1) / n if n else 1.0
    if op == "all-reduce":
        return op, 2 * out * share
    if op == "reduce-scatter":
        return op, out * n * share
    return op, out * share


def _all_bytes(arrays) -> float:
    """Wherever the arrays lie."""
    return sum(a.size * _width(a) for a in arrays)


def _group_size(rest: str) -> int:
    """Devices that talk to each other in a call."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'?([\w]+)'?=(\d+)", match[1]))
        return math.prod(int(sizes[a.strip(" '")]) for a in match[2].split(",") if a.strip())
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([0-9,]*)\}", rest):
        return len(match[1].split(","))
    return 1
