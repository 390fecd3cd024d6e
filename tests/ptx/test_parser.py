"""PTX text becomes instructions with operands, predicates, labels and places in the source."""

from __future__ import annotations

import pytest

from .assembly import HEADER, assemble
from .faults import PtxError
from .parser import parse, split_operands


def test_operands_split_at_outer_commas_only() -> None:
    """Vector operands and addresses stay whole."""
    assert split_operands("{%r1, %r2}, [%rd1 + 16], 0x10") == ["{%r1, %r2}", "[%rd1 + 16]", "0x10"]


def test_a_statement_keeps_its_predicate_modifiers_and_types() -> None:
    """`@!%q0 mad.wide.u32` reads as an opcode, two modifiers, one type and a negated predicate."""
    program = assemble("@!%q0 mad.wide.u32 %rd1, %r1, 4, %rd2;", 1)
    instruction = program.module.instructions[-2]
    assert (instruction.opcode, instruction.modifiers, instruction.types) == ("mad", ("wide", "u32"), ("u32",))
    assert (instruction.predicate, instruction.negated) == ("%q0", True)
    assert instruction.operands == ("%rd1", "%r1", "4", "%rd2")


def test_labels_point_at_the_next_instruction() -> None:
    """A label names the instruction behind it, also at the end of a line."""
    module = assemble("bra $L_1;\n$L_1: mov.b32 %r1, 0;\n$L_2:\n", 1).module
    assert module.instructions[module.labels["$L_1"]].opcode == "mov"
    assert module.instructions[module.labels["$L_2"]].opcode == "ret"


def test_a_register_of_inline_assembly_hides_an_outer_one() -> None:
    """The same name inside braces is another register, of another type."""
    module = assemble("{ .reg .b64 %r1; mov.b64 %r1, 5; }\nmov.b32 %r1, 6;", 1).module
    inner, outer = (instruction.operands[0] for instruction in module.instructions[-3:-1])
    assert (module.registers[inner], module.registers[outer]) == ("b64", "b32")


def test_places_in_the_source_name_the_whole_chain_of_calls() -> None:
    """An inlined line is told with its callers, outermost first; lines counted inside assembly are ignored."""
    body = """
    .loc 2 20 3, function_name $L__info_string0, inlined_at 1 5 7 // standard.py:20:3
    mov.b32 %r1, 0;
    .loc 2 9 1, function_name $L__info_string0, inlined_at 2 20 3 // standard.py:9:1
    mov.b32 %r2, 0;
    .loc 1 6 2 // kernel.py:6:2
    // begin inline asm
    .loc 1 6 2 // kernel.py:6:2
    mov.b32 %r3, 0;
    .loc 1 7 2 // kernel.py:7:2
    mov.b32 %r4, 0;
    // end inline asm
    """
    text = assemble(body, 1).ptx + '\t.file\t1 "/a/kernel.py"\n\t.file\t2 "/b/standard.py"\n'
    places = [instruction.location for instruction in parse(text).instructions[-5:-1]]
    inlined = "kernel.py:5:7 > standard.py:20:3"
    assert places == [inlined, f"{inlined} > standard.py:9:1", "kernel.py:6:2", "kernel.py:6:2"]


def test_shared_symbols_lie_behind_each_other_and_the_open_one_last() -> None:
    """Sized arrays come first, aligned; the array whose size the launch gives begins behind them."""
    text = assemble("", 1).ptx.replace(
        HEADER, f"{HEADER}.shared .align 4 .b8 first[6];\n.shared .align 8 .b32 second[3];\n"
    )
    module = parse(text)
    assert module.shared == {"first": 0, "second": 8, "global_smem": 32}
    assert module.static_shared_bytes == 32


def test_a_stack_that_nothing_names_is_no_stack() -> None:
    text = assemble("", 1).ptx
    assert (
        parse(text.replace("\tret;", "\t.local .align 4 .b8 depot[8];\n\tret;")).instructions
        == parse(text).instructions
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace(".entry", ".func"), "one kernel"),
        (
            lambda text: text.replace("\tret;", "\t.local .align 4 .b8 depot[8];\n\tmov.b64 %rd1, depot;\n\tret;"),
            "local memory",
        ),
        (lambda text: text.replace("\tret;", "here: ret;\nhere: ret;"), "defined twice"),
    ],
    ids=["no kernel", "stack", "label twice"],
)
def test_what_cannot_be_read_is_refused(change: object, message: str) -> None:
    """A text without one kernel, with a stack or with an ambiguous label raises one clear error."""
    with pytest.raises(PtxError, match=message):
        parse(change(assemble("", 1).ptx))  # type: ignore[operator]
