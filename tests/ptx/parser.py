"""PTX text to kernels: declarations, labels, and instructions with their operands told apart.

What an instruction *means* is not known here; what cannot be told apart is a `PtxError` that names the line.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from dataclasses import dataclass, field

from .types import TYPES, PtxError, Type


@dataclass(frozen=True)
class Register:
    name: str
    index: int
    type: Type


@dataclass(frozen=True)
class Immediate:
    """A literal: an int, or a float with the bits that were written (None for a decimal literal)."""

    value: int | float
    bits: int | None = None
    size: int = 0


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(frozen=True)
class Symbol:
    """A variable or a parameter by name: its address."""

    name: str


@dataclass(frozen=True)
class Label:
    name: str
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """`[base + offset]`, and for a tensor map its coordinates: `[map, {c0, c1}]`."""

    base: Register | Symbol | Immediate
    offset: int
    coordinates: Vector | None = None


@dataclass(frozen=True)
class Pair:
    """`d|p`: two destinations."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Negated:
    """`!p`"""

    operand: Register


@dataclass(frozen=True)
class Sink:
    """`_`: a result nobody wants."""


Operand = Register | Immediate | Special | Symbol | Label | Vector | Address | Pair | Negated | Sink


@dataclass(frozen=True)
class Instruction:
    opcode: str
    parts: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    guard_negated: bool
    line: int
    text: str


@dataclass(frozen=True)
class Variable:
    name: str
    space: str
    align: int
    size: int
    data: bytes | None = None
    dynamic: bool = False


@dataclass(frozen=True)
class Parameter:
    name: str
    type: Type
    offset: int
    size: int


@dataclass(repr=False)
class Kernel:
    name: str
    parameters: list[Parameter]
    module: Module
    instructions: list[Instruction] = field(default_factory=list)
    registers: list[Register] = field(default_factory=list)
    variables: dict[str, Variable] = field(default_factory=dict)
    steps: list | None = None
    """The decoded instructions; the interpreter fills this in once."""

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters), default=0)


@dataclass(repr=False)
class Module:
    text: str
    target: str
    variables: dict[str, Variable]
    entries: dict[str, tuple[str, int, int]]
    """Mangled name -> (parameter text, where the body begins and ends in `text`)."""
    _parsed: dict[str, Kernel] = field(default_factory=dict)

    def names(self) -> list[str]:
        """The mangled names of all kernels."""
        return list(self.entries)

    def kernel(self, pattern: str = "") -> Kernel:
        """The one kernel whose mangled or demangled name matches the regular expression."""
        found = [name for name in self.entries if re.search(pattern, name)]
        if not found:
            found = [name for name in self.entries if re.search(pattern, demangle(name))]
        if len(found) != 1:
            have = ", ".join(demangle(name) for name in found or self.entries)
            raise LookupError(f"{len(found)} kernels match {pattern!r}: {have}")
        name = found[0]
        if name not in self._parsed:
            self._parsed[name] = _Body(self, name).parse()
        return self._parsed[name]


def demangle(name: str) -> str:
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    return subprocess.run([tool, name], capture_output=True, text=True).stdout.strip() if tool else name


def parse(text: str) -> Module:
    """Finds the kernels and the module's variables; a kernel's body is read when it is asked for."""
    text = _inlined(_without_comments(text))
    target = re.search(r"^\s*\.target\s+(\w+)", text, re.M)
    module = Module(text, target[1] if target else "", {}, {})
    at = 0
    while (found := re.compile(r"[^\s;]").search(text, at)) is not None:
        at = found.start()
        if directive := re.compile(r"\.(version|target|address_size|file|loc)\b[^\n]*").match(text, at):
            at = directive.end()
            continue
        end = re.compile(r"[;{=]").search(text, at)
        if end is None:
            raise PtxError(f"line {_line(text, at)}: not understood: {text[at : at + 60]!r}")
        header = text[at : end.start()]
        if re.search(r"\.(entry|func)\b", header):
            opening = end.start()
            stop = _closing(text, opening) if text[opening] == "{" else opening + 1
            if entry := re.search(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?", header, re.S):
                module.entries[entry[1]] = (entry[2] or "", opening, stop)
            at = stop
        elif header.startswith(".section"):
            at = _closing(text, end.start())
        else:
            stop = text.index(";", at)
            variable = _variable(text[at:stop], _line(text, at))
            module.variables[variable.name] = variable
            at = stop + 1
    return module


def _without_comments(text: str) -> str:
    """Blanks comments, keeping lines; `// implicit-def: %r1`, the compiler's own "any value", becomes a statement."""
    text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S)
    text = re.sub(r"//\s*implicit-def:\s*(%\w+)[^\n]*", r"implicit_def \1;", text)
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r"^[ \t]*\.loc\b[^\n]*", "", text, flags=re.M)


_FUNCTION = re.compile(r"\.func\s*(?:\(\s*\.param[^()]*?([\w$]+)(?:\[\d+\])?\s*\)\s*)?([\w$]+)\s*\(([^()]*)\)\s*\{")
_PLAIN = r"(?:[^{}]|\{[^{};]*\})*"  # statements without a block among them, but with {registers}
_CALL = re.compile(
    rf"\{{(\s*\.(?:reg|param)\b{_PLAIN}?)call(?:\.uni)?\s*(?:\(\s*([\w$]+)\s*\)\s*,)?\s*([\w$]+)\s*"
    rf"(?:,\s*\(([^()]*)\)\s*)?;({_PLAIN})\}}"
)


def _inlined(text: str) -> str:
    """Calls, as nvcc writes them, of functions whose bodies are here become those bodies, their parameters local
    variables; on one line, so that lines keep their numbers. What such a body calls itself remains a call."""
    functions = {}
    for found in _FUNCTION.finditer(text):
        body = text[found.end() : _closing(text, found.end() - 1) - 1]
        functions[found[2]] = (found[1], re.findall(r"([\w$]+)(?:\[\d+\])?\s*(?:,|$)", found[3]), body)
    calls = 0

    def inline(call: re.Match) -> str:
        nonlocal calls
        before, result, name, given, after = call.groups()
        if name not in functions:
            return call[0]
        calls += 1
        returned, parameters, body = functions[name]
        given = [word.strip() for word in given.split(",")] if given else []
        around = given if result is None else [*given, result]
        names = {word: f"$call{calls}_{word}" for word in around}
        body = re.sub(r"\bret\s*;", f"bra $call{calls}_end;", " ".join(body.split()))
        for word, value in zip([*parameters, returned], [*given, result], strict=False):
            if value is not None:
                body = re.sub(rf"(?<![\w$]){re.escape(word)}(?![\w$])", lambda _, to=names[value]: to, body)
        before, after = (
            re.sub(r"[\w$]+", lambda word: names.get(word[0], word[0]), part).replace(".param", ".local")
            for part in (before, after)
        )
        lines = "\n" * (call[0].count("\n") - before.count("\n") - after.count("\n"))
        return f"{{{before}{{{body.replace('.param', '.local')} $call{calls}_end: }}{lines}{after}}}"

    return _CALL.sub(inline, text)


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _closing(text: str, opening: int) -> int:
    depth = 0
    for brace in re.compile(r'[{}]|"[^"\n]*"').finditer(text, opening):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.end()
    raise PtxError(f"line {_line(text, opening)}: this brace is never closed")


_VARIABLE = re.compile(
    r"^(?:\.(?:visible|extern|weak|common)\s+)*\.(shared|local|const|global)\s+(?:\.attribute\([^)]*\)\s*)?"
    r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$%]+)\s*((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
    re.S,
)


def _variable(text: str, line: int) -> Variable:
    match = _VARIABLE.match(text.strip())
    if match is None or match[3] not in TYPES:
        raise PtxError(f"line {line}: not understood: {' '.join(text.split())!r}")
    space, align, kind, name, dimensions, initial = match.groups()
    type = TYPES[kind]
    count, dynamic = 1, False
    for dimension in re.findall(r"\[(\d*)\]", dimensions):
        dynamic |= not dimension
        count *= int(dimension or 0)
    data = _initial(initial, type, count, line) if initial else None
    return Variable(name, space, int(align or type.size), count * type.size, data, dynamic)


def _initial(text: str, type: Type, count: int, line: int) -> bytes:
    """The bytes of `{0, 0f3F800000, ...}`: numbers only, short lists are filled with zeros."""
    out = b""
    for item in re.sub(r"[{}]", "", text).split(","):
        value = _number(item.strip())
        if value is None:
            raise PtxError(f"line {line}: an initial value that is no number: {item.strip()!r}")
        if isinstance(value.value, float):
            exact = value.bits is not None
            raw = value.bits.to_bytes(value.size, "little") if exact else struct.pack("<d", value.value)
            if len(raw) != type.size:
                raise PtxError(f"line {line}: {item.strip()} does not have the size of .{type.name}")
            out += raw
        else:
            out += (value.value % (1 << 8 * type.size)).to_bytes(type.size, "little")
    return out.ljust(count * type.size, b"\0")


_INTEGER = re.compile(r"^(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")


def _number(text: str) -> Immediate | None:
    if match := re.match(r"^0[fF]([0-9a-fA-F]{8})$", text):
        return Immediate(struct.unpack(">f", bytes.fromhex(match[1]))[0], int(match[1], 16), 4)
    if match := re.match(r"^0[dD]([0-9a-fA-F]{16})$", text):
        return Immediate(struct.unpack(">d", bytes.fromhex(match[1]))[0], int(match[1], 16), 8)
    if match := _INTEGER.match(text):
        digits = match[2]
        octal = len(digits) > 1 and digits.isdigit() and digits[0] == "0"
        value = int(digits, 8) if octal else int(digits, 0)
        return Immediate(-value if match[1] else value)
    if re.match(r"^-?\d+\.\d*([eE][+-]?\d+)?$", text):
        return Immediate(float(text))
    return None


def split(text: str) -> list[str]:
    """Splits at the commas that no bracket encloses."""
    out, depth, start = [], 0, 0
    for at, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            out.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return [*out, last] if last or out else []


class _Scope:
    """A pair of braces: registers and labels declared inside are known inside."""

    def __init__(self, parent: _Scope | None = None) -> None:
        self.parent = parent
        self.registers: dict[str, Register] = {}
        self.labels: dict[str, tuple[int, ...]] = {}
        self.tables: dict[str, list[str]] = {}

    def find(self, table: str, name: str):
        scope: _Scope | None = self
        while scope is not None:
            if name in getattr(scope, table):
                return getattr(scope, table)[name]
            scope = scope.parent
        return None


class _Body:
    """Reads one kernel: first all declarations and labels, then, knowing those, every operand."""

    def __init__(self, module: Module, name: str) -> None:
        parameters, self.begin, self.end = module.entries[name]
        self.text, self.module = module.text, module
        self.kernel = Kernel(name, _parameters(parameters, _line(module.text, self.begin)), module)
        self.symbols = {p.name for p in self.kernel.parameters} | set(module.variables)
        self.pending: list[tuple[str, int, _Scope]] = []

    def parse(self) -> Kernel:
        scope = _Scope()
        at, line, counted = self.begin + 1, _line(self.text, self.begin), self.begin
        something, label = re.compile(r"[^\s;]"), re.compile(r"([\w$%]+)\s*:(?!:)")
        while (found := something.search(self.text, at, self.end - 1)) is not None:
            at = found.start()
            line += self.text.count("\n", counted, at)
            counted = at
            if found[0] == "{":
                scope = _Scope(scope)
                at += 1
            elif found[0] == "}":
                if scope.parent is None:
                    raise PtxError(f"line {line}: a brace too many")
                scope = scope.parent
                at += 1
            elif match := label.match(self.text, at):
                scope.labels[match[1]] = (len(self.pending),)
                at = match.end()
                if prototype := re.compile(r"\s*\.callprototype[^;]*;").match(self.text, at):
                    at = prototype.end()
                elif table := re.compile(r"\s*\.branchtargets\s+([^;]*);").match(self.text, at):
                    scope.tables[match[1]] = split(table[1])
                    at = table.end()
            else:
                stop = self.text.index(";", at)
                statement = " ".join(self.text[at:stop].split())
                if statement.startswith("."):
                    self.declare(statement, line, scope)
                else:
                    self.pending.append((statement, line, scope))
                at = stop + 1
        self.kernel.instructions = [self.instruction(*statement) for statement in self.pending]
        return self.kernel

    def declare(self, statement: str, line: int, scope: _Scope) -> None:
        if match := re.match(r"^\.reg ?\.(\w+) (.*)$", statement):
            if match[1] not in TYPES:
                raise PtxError(f"line {line}: a register of unknown type: {statement}")
            for item in split(match[2]):
                many = re.match(r"^([\w$%]+)<(\d+)>$", item)
                for name in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [item]:
                    register = Register(name, len(self.kernel.registers), TYPES[match[1]])
                    scope.registers[name] = register
                    self.kernel.registers.append(register)
        elif re.match(r"^\.(shared|local)\b", statement):
            variable = _variable(statement, line)
            self.kernel.variables[variable.name] = variable
            self.symbols.add(variable.name)
        elif not re.match(r"^\.(pragma|param)\b", statement):
            raise PtxError(f"line {line}: not understood: {statement}")

    def instruction(self, statement: str, line: int, scope: _Scope) -> Instruction:
        guard, negated, rest = None, False, statement
        if match := re.match(r"^@(!?)([\w$%]+) ", statement):
            guard, negated = scope.find("registers", match[2]), bool(match[1])
            if guard is None:
                raise PtxError(f"line {line}: an undeclared predicate: {statement}")
            rest = statement[match.end() :]
        opcode, _, operands = rest.partition(" ")
        try:
            parsed = tuple(self.operand(o, scope) for o in split(operands))
        except PtxError as error:
            raise PtxError(f"line {line}: {statement}: {error}") from None
        return Instruction(opcode, tuple(opcode.split(".")), parsed, guard, negated, line, statement)

    def operand(self, text: str, scope: _Scope) -> Operand:
        if text == "_":
            return Sink()
        if text.startswith("{"):
            return Vector(tuple(self.operand(item, scope) for item in split(text[1:-1])))
        if text.startswith("["):
            items = split(text[1:-1])
            base, _, offset = items[0].partition("+")
            if not offset and re.search(r"\w\s*-\s*\d", base):
                base, _, offset = base.partition("-")
                offset = "-" + offset.strip()
            coordinates = self.operand(items[1], scope) if len(items) == 2 else None
            return Address(self.operand(base.strip(), scope), int(offset or "0", 0), coordinates)
        if text.startswith("("):
            return Symbol(text)  # of a call, which is refused when it is reached
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.operand(first.strip(), scope), self.operand(second.strip(), scope))
        if text.startswith("!"):
            return Negated(self.operand(text[1:].strip(), scope))
        if (register := scope.find("registers", text)) is not None:
            return register
        if (number := _number(text)) is not None:
            return number
        if (table := scope.find("tables", text)) is not None:
            return Label(text, tuple(scope.find("labels", name)[0] for name in table))
        if (target := scope.find("labels", text)) is not None:
            return Label(text, target)
        if text in self.symbols or text in self.kernel.variables:
            return Symbol(text)
        if text.startswith("%"):
            return Special(text)
        if text == "WARP_SZ":
            return Immediate(32)
        if (match := re.match(r"^([\w$]+)\s*\+\s*(\d+)$", text)) and match[1] in self.symbols:
            return Address(Symbol(match[1]), int(match[2]))
        return Symbol(text)


def _parameters(text: str, line: int) -> list[Parameter]:
    out: list[Parameter] = []
    offset = 0
    for item in split(" ".join(text.split())):
        match = re.match(r"^\.param (?:\.align (\d+) )?\.(\w+) (.*?)([\w$]+)(?:\[(\d+)\])?$", item)
        if match is None or match[2] not in TYPES:
            raise PtxError(f"line {line}: a parameter that is not understood: {item}")
        type = TYPES[match[2]]
        pointer_align = re.search(r"\.align (\d+)", match[3])
        if match[3].strip() and not re.match(r"^(\.ptr )?(\.\w+ )?(\.align \d+ )?$", match[3]):
            raise PtxError(f"line {line}: a parameter that is not understood: {item}")
        align = int(match[1] or type.size) if pointer_align is None else type.size
        size = type.size * int(match[5] or 1)
        offset = -(-offset // align) * align
        out.append(Parameter(match[4], type, offset, size))
        offset += size
    return out
