"""PTX, as Triton writes it, to C++ that `machine.cpp` runs: registers become variables, labels stay labels.

An instruction without memory is a call of the function in `instructions.h` that has its name. What is known neither here nor
there is an error: at the latest the C++ compiler's.
"""

import re
from typing import NamedTuple

_TYPES = {"pred": "bool", "b16": "u16", "b32": "u32", "b64": "u64"}
_SPECIAL = {"%tid.x": "t.tid", "%ntid.x": "t.ntid", "%ctaid.x": "t.ctaid", "%nctaid.x": "t.nctaid"}
_ORDERS = ("relaxed", "acquire", "release", "acq_rel")
_CACHE = re.compile(r"\.L[12]::\w+")


class Kernel(NamedTuple):
    """A kernel in C++, and what a launch of it takes."""

    code: str
    threads: int
    parameters: int


class _Instruction(NamedTuple):
    line: int
    opcode: str
    operands: list[str]


def translate(ptx: str) -> Kernel:
    header, body = ptx.split("\n{", 1)
    body = body[:body.index("\n}")]
    parameters = re.findall(r"^\s*\.param \S+ (?:\.ptr \S+ \.align \d+ )?(\w+)", header, re.M)
    threads = re.search(r"\.reqntid (\d+)", header)
    if not threads or ".shared" in header.replace(".extern .shared .align 16 .b8 global_smem[];", ""):
        raise NotImplementedError("expected the number of threads, and no shared memory but global_smem")
    names = {name: i for i, name in enumerate(parameters)}
    statements = list(_statements(body, header.count("\n") + 2, names))
    code = ['#include "machine.h"', 'extern "C" void ptx_kernel(Thread& t) {', *_registers(body), *statements, "}", ""]
    return Kernel("\n".join(code), int(threads[1]), len(parameters))


def _registers(body: str) -> list[str]:
    """A declaration of every register that occurs."""
    found = []
    for kind, prefix in re.findall(r"\.reg \.(\w+)\s+%(\w+)<\d+>;", body):
        names = sorted(set(re.findall(rf"%({prefix}\d+)\b", body)))
        if names:
            found.append(f"{_TYPES[kind]} " + ", ".join(f"{name} = {_TYPES[kind]}(POISON)" for name in names) + ";")
    return found


def _statements(body: str, first_line: int, parameters: dict[str, int]):
    for number, text in enumerate(body.splitlines(), first_line):
        text = text.partition("//")[0].strip()
        if label := re.fullmatch(r"\$(\w+):", text):
            yield f"{label[1]}:;"
        elif text and text[0] != ".":
            match = re.fullmatch(r"(?:@(!?)%(\w+)\s+)?([\w.:]+)\s*(.*);", text)
            if not match:
                raise NotImplementedError(f"line {number}: {text}")
            negated, predicate, opcode, operands = match.groups()
            code = _code(_Instruction(number, opcode, _split(operands)), parameters)
            yield f"if ({negated}{predicate}) {{ {code} }}" if predicate else code


def _split(operands: str) -> list[str]:
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", operands)]


def _code(instruction: _Instruction, parameters: dict[str, int]) -> str:
    line, opcode, operands = instruction
    kind = opcode.split(".")[0]
    if opcode in ("bra", "bra.uni"):
        return f"goto {operands[0].removeprefix('$')};"
    if opcode == "ret":
        return "return;"
    if opcode == "bar.sync" and operands == ["0"]:
        return f"t.barrier({line});"
    if opcode == "shfl.sync.bfly.b32" and operands[3:] == ["31", "-1"]:
        return f"{_value(operands[0])} = t.shuffle_xor({_value(operands[1])}, {_value(operands[2])}, {line});"
    if opcode.startswith("ld.param."):
        return f"{_value(operands[0])} = t.params[{parameters[operands[1].strip('[]')]}];"
    if kind == "ldmatrix":
        return _load_matrices(instruction)
    if kind in ("ld", "st"):
        return _access(instruction)
    if kind == "atom":
        return _atomic(instruction)
    if kind == "createpolicy":
        return f"{_value(operands[0])} = 0;"
    if kind == "mov":
        return _move(instruction)
    target, *sources = map(_value, operands)
    return f"{target} = {opcode.replace('.', '_')}({', '.join(sources)});"


def _value(operand: str) -> str:
    if operand in _SPECIAL:
        return _SPECIAL[operand]
    if operand == "global_smem":
        return "SHARED"
    if re.fullmatch(r"%\w+", operand):
        return operand[1:]
    if number := re.fullmatch(r"0[fFdD]([0-9A-Fa-f]{8}|[0-9A-Fa-f]{16})", operand):
        return f"0x{number[1]}" + "ull" * (len(number[1]) == 16)
    if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", operand):
        return operand if "U" in operand else f"{operand}ll"
    raise NotImplementedError(f"operand {operand}")


def _address(operand: str) -> str:
    match = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+)\s*)?\]", operand)
    if not match:
        raise NotImplementedError(f"address {operand}")
    return f"{_value(match[1])} + {match[2] or 0}"


def _order(modifiers: list[str]) -> str:
    """The memory order of an access, with its modifiers taken out of the list."""
    order = "weak"
    for modifier in list(modifiers):
        if modifier in _ORDERS or modifier == "volatile":
            order = "relaxed" if modifier == "volatile" else modifier
        elif modifier not in ("gpu", "sys"):
            continue
        modifiers.remove(modifier)
    return f"Order::{order}"


def _access(instruction: _Instruction) -> str:
    line, opcode, operands = instruction
    if "L2::cache_hint" in opcode:
        operands = operands[:-1]  # the policy
    kind, *modifiers = _CACHE.sub("", opcode).split(".")
    order = _order(modifiers)
    space = modifiers.pop(0).removesuffix("::cta")
    lanes = int(modifiers.pop(0)[1:]) if modifiers[0][0] == "v" else 1
    (bits,) = [int(modifier[1:]) for modifier in modifiers if modifier in ("b8", "b16", "b32", "b64")]
    order_is_known = order == "Order::weak" or (kind, space) == ("ld", "global")
    if space not in ("global", "shared") or len(modifiers) > 1 or not order_is_known:
        raise NotImplementedError(f"line {line}: {opcode}")
    data, address = operands if kind == "ld" else operands[::-1]
    registers = [_value(name.strip()) for name in data.strip("{ }").split(",")]
    assert len(registers) == lanes
    size = lanes * bits // 8
    if kind == "st":
        values = ", ".join(f"u{bits}({name})" for name in registers)
        return f"{{ const u{bits} v[] = {{{values}}}; t.store_{space}({_address(address)}, v, {size}, {line}); }}"
    last = f", {order}, {line}" if space == "global" else f", {line}"
    loads = " ".join(f"{name} = v[{i}];" for i, name in enumerate(registers))
    return (f"{{ const auto v = static_cast<const u{bits}*>(t.load_{space}({_address(address)}, {size}{last})); {loads} }}")


def _atomic(instruction: _Instruction) -> str:
    line, opcode, (target, address, value) = instruction
    space, *modifiers = opcode.split(".")[1:]
    order = _order(modifiers)
    operation = {("add", "u32"): "add", ("exch", "b32"): "exchange"}.get(tuple(modifiers))
    if space != "global" or not operation or order == "Order::weak":
        raise NotImplementedError(f"line {line}: {opcode}")
    return f"{_value(target)} = t.atomic_{operation}({_address(address)}, {_value(value)}, {order}, {line});"


def _load_matrices(instruction: _Instruction) -> str:
    line, opcode, (targets, address) = instruction
    if opcode != "ldmatrix.sync.aligned.m8n8.x4.shared.b16":
        raise NotImplementedError(f"line {line}: {opcode}")
    names = [_value(name.strip()) for name in targets.strip("{ }").split(",")]
    loads = " ".join(f"{name} = v[{i}];" for i, name in enumerate(names))
    return f"{{ u32 v[4]; t.load_matrices({_address(address)}, v, {line}); {loads} }}"


def _move(instruction: _Instruction) -> str:
    """A copy, or one of a register's halves or of two registers into one."""
    _, opcode, (target, source) = instruction
    bits = int(re.fullmatch(r"mov\.[bu](\d+)", opcode)[1])
    half = bits // 2
    if target[0] == "{":
        low, high = (name.strip() for name in target.strip("{}").split(","))
        return " ".join(f"{_value(name)} = u{half}({_value(source)} >> {shift});"
                        for name, shift in ((low, 0), (high, half)) if name != "_")
    if source[0] == "{":
        low, high = (_value(name.strip()) for name in source.strip("{}").split(","))
        return f"{_value(target)} = u{bits}({high}) << {half} | u{half}({low});"
    return f"{_value(target)} = {_value(source)};"
