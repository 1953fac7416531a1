# SPDX-License-Identifier: Apache-2.0
"""The Python side of the layout is derived from the C side, and agrees with it to the byte."""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from netpol_loader import abi
from netpol_loader.kernel.hook import Hook
from netpol_loader.tables import seal

ROOT = Path(__file__).resolve().parents[2]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_abi", ROOT / "scripts" / "generate_abi.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["generate_abi"] = module
    spec.loader.exec_module(module)
    return module


def test_generated_file_is_fresh() -> None:
    """abi.py is exactly what the generator makes of the headers."""
    assert generator().main(["--check"]) == 0


def test_stale_file_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--check fails, and shows the difference, when a header changed."""
    module = generator()
    header = tmp_path / "np_abi.h"
    header.write_text(module.ABI_HEADER.read_text().replace("NP_CONN_UDP = 4", "NP_CONN_UDP = 9"))
    monkeypatch.setattr(module, "ABI_HEADER", header)
    assert module.main(["--check"]) == 1
    assert "+NP_CONN_UDP = 9" in capsys.readouterr().out


def test_page_of_reasons_is_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reason of the registry has a line; advice by hand names known reasons; a changed sentence makes the page stale."""
    module = generator()
    page = module.REASONS_PAGE.read_text()
    lines = re.findall(r"^\| (\d+) \| `([a-z0-9-]+)` \| ([a-z ]+) \| (.+) \|$", page, re.MULTILINE)
    assert [(int(one[0]), one[1], one[3]) for one in lines] == [
        (reason.number, reason.slug, reason.text) for reason in abi.REASONS.values()
    ]
    assert {one[1] for one in lines if one[2] == "was dropped"} == {
        reason.slug for reason in abi.REASONS.values() if reason.dropped
    }
    advised = re.findall(r"^\| (`[a-z0-9-]+`(?:, `[a-z0-9-]+`)*) \|", page, re.MULTILINE)
    assert advised
    assert {slug for cell in advised for slug in re.findall(r"`([^`]+)`", cell)} <= {one[1] for one in lines}
    stale = tmp_path / "reasons.md"
    stale.write_text(page.replace("| policy denies the flow |", "| an old sentence |"))
    monkeypatch.setattr(module, "REASONS_PAGE", stale)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert module.main(["--check"]) == 1


@pytest.mark.parametrize(
    "line", ["    int x;", "    __u32 x : 3;", "    __u32 *x;", "    long x;", "    struct np_y x;"]
)
def test_unknown_c_is_refused(line: str) -> None:
    """What the generator does not understand is an error with its line, never skipped."""
    module = generator()
    text = f"struct np_x {{\n{line}\n}};\n"
    with pytest.raises(module.HeaderError, match="np_abi.h:2: not understood inside np_x"):
        module.parse_header(text)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("", "the comment of np_x does not end in a line with its role"),
        ("// Role: nothing.\n", "np_x has the unknown role nothing"),
        ("// Role: table, odd.\n", "not understood for np_x: odd"),
        ("// Role: table, overflow of np_y, np_z.\n", "not understood for np_x: overflow of np_y, np_z"),
    ],
)
def test_map_without_a_known_role_is_refused(line: str, problem: str) -> None:
    """Every map has a role, traits and relations out of the lists at the head of np_maps.h."""
    module = generator()
    head = "// Role: one.\n//   table: rows\n//\n// Trait: any.\n//   cached: copies\n\n"
    text = head + f'// What it maps.\n{line}NP_MAP("hash", np_x, __u32, __u32, 4, 0);\n'
    with pytest.raises(module.HeaderError, match=problem):
        module.parse_roles(text)


def test_relations_lead_to_maps() -> None:
    """What a map says that it belongs to is a map; a view is none."""
    assert set(abi.OVERFLOW_MAPS) | set(abi.TAG_MAPS) | set(abi.UNREPLIED_VIEWS) <= abi.MAP_SPECS.keys()
    assert abi.TAG_MAPS.keys() == abi.UNREPLIED_VIEWS.keys()
    assert not set(abi.UNREPLIED_VIEWS.values()) & abi.MAP_SPECS.keys()


def test_which_maps_are_which_is_said_once() -> None:
    """No module lists maps of different tables: it derives them from the roles (maps_of, maps_with_rows, maps_with)."""
    found = []
    for path in (path for room in ("loader", "netpol_ebpf", "bench") for path in sorted((ROOT / room).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path.name != "abi.py" else ():
            if isinstance(node, ast.Set | ast.Tuple | ast.List):
                texts = [one.value for one in node.elts if isinstance(one, ast.Constant)]
                stems = {str(text).rstrip("46") for text in texts if text in abi.MAP_SPECS}
                found += [f"{path.relative_to(ROOT)}:{node.lineno}"] if len(stems) > 1 else []
    assert found == []


NUMBER = re.compile(r"^#define NP_(\w+) \(?(-?\d+|0x[0-9a-f]+|1u?l?l? << \d+)(?:u|ull)?\)?(?:\s|$)", re.MULTILINE)
PROTOCOLS = {"np_parse.h", "np_link.h"}
"""Headers whose numbers are those of protocols, which both sides have from the same specifications."""


def numbers_of_c() -> dict[tuple[str, ...], int]:
    """The numbers of bpf/ that abi.py has not, by the words of their names."""
    found = {}
    for path in sorted((ROOT / "bpf").glob("*.[hc]")):
        if path.name not in {"np_abi.h", *PROTOCOLS}:
            for name, text in NUMBER.findall(path.read_text(encoding="utf-8")):
                base, _, shift = text.partition(" << ")
                found[tuple(name.split("_"))] = 1 << int(shift) if shift else int(base, 0)
    return found


def numbers_of_python(text: str) -> Iterator[tuple[int, tuple[str, ...], int]]:
    """(line, words of the name, value) of the constants of a module that are numbers."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Assign):
            continue
        targets, values = [node.targets[0]], [node.value]
        if isinstance(targets[0], ast.Tuple) and isinstance(values[0], ast.Tuple):
            targets, values = targets[0].elts, values[0].elts
        for target, value in zip(targets, values, strict=True):
            if (
                isinstance(target, ast.Name)
                and target.id.isupper()
                and not any(
                    isinstance(one, ast.Name | ast.Attribute | ast.Call | ast.Subscript) for one in ast.walk(value)
                )
            ):
                number = eval(ast.unparse(value))  # noqa: S307  # literals and operators of this repository
                if isinstance(number, int):
                    yield node.lineno, tuple(target.id.strip("_").split("_")), number


def copies(text: str) -> list[int]:
    """Lines of a module that say a number of bpf/ again: the same value, and a name that ends one of the C side."""
    known = numbers_of_c()
    return [
        line
        for line, words, number in numbers_of_python(text)
        if any(value == number and name[-len(words) :] == words for name, value in known.items())
    ]


def test_no_number_is_copied_by_hand() -> None:
    """A number that both sides need is in np_abi.h, so that Python has it from abi.py."""
    assert len(numbers_of_c()) > 10
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for room in ("loader", "netpol_ebpf", "bench")
        for path in sorted((ROOT / room).rglob("*.py"))
        if path.name != "abi.py"
        for line in copies(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_copied_number_is_noticed() -> None:
    """The same number under the end of the name is a copy; another number, or another name, is none."""
    assert copies("_STEP_BITS = 4\n") == [1]
    assert copies("A, JUDGE_CALLS = 1, 10\n") == [1]
    assert copies("STEP_BITS = 5\nBITS_OF_STEP = 4\n") == []


def test_sizes_are_those_the_c_side_asserts() -> None:
    """Every struct of the header asserts its size, and ctypes agrees."""
    text = (ROOT / "bpf" / "np_abi.h").read_text()
    asserted = {name: int(size) for name, size in re.findall(r"sizeof\(struct (\w+)\) == (\d+)", text)}
    declared = set(re.findall(r"^struct (\w+) \{", text, re.MULTILINE))
    assert declared == asserted.keys()
    assert {name: ctypes.sizeof(getattr(abi, name)) for name in declared} == asserted


@pytest.mark.skipif(shutil.which("clang") is None, reason="clang is not installed")
def test_offsets_are_those_of_clang(tmp_path: Path) -> None:
    """Every member is where clang puts it."""
    lines = ['#include "np_abi.h"']
    structs = [one for one in vars(abi).values() if isinstance(one, type) and issubclass(one, ctypes.Structure)]
    structs = [one for one in structs if one is not ctypes.Structure]
    assert len(structs) > 20
    for one in structs:
        for name, *_ in one._fields_:
            offset, size = getattr(one, name).offset, getattr(one, name).size
            lines.append(f'_Static_assert(__builtin_offsetof(struct {one.__name__}, {name}) == {offset}, "");')
            lines.append(f'_Static_assert(sizeof(((struct {one.__name__} *)0)->{name}) == {size}, "");')
    source = tmp_path / "offsets.c"
    source.write_text("\n".join(lines) + "\n")
    subprocess.run(["clang", "-fsyntax-only", "-I", str(ROOT / "bpf"), str(source)], check=True)


@pytest.mark.skipif(shutil.which("clang-format") is None, reason="clang-format is not installed")
@pytest.mark.skipif(shutil.which("clang") is None, reason="clang is not installed")
def test_packet_path_is_clean_c() -> None:
    """All of bpf/ passes clang with warnings as errors, and is formatted."""
    done = subprocess.run([str(ROOT / "scripts" / "check_c.sh")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_maps() -> None:
    """Map names fit the kernel's 15 characters, and every struct of a map is declared."""
    for spec in abi.MAP_SPECS.values():
        assert spec.name.startswith("np_")
        assert len(spec.name) <= 15
        assert spec.kind in {"hash", "lru_hash", "lpm_trie", "array", "percpu_array", "ringbuf"}


def test_reasons() -> None:
    """Reasons have unique slugs and a text; passing, dropping and remarks have their ranges."""
    slugs = [reason.slug for reason in abi.REASONS.values()]
    assert len(set(slugs)) == len(slugs)
    assert all(reason.text for reason in abi.REASONS.values())
    assert not abi.REASONS[abi.NP_REASON_ESTABLISHED].dropped
    assert abi.REASONS[abi.NP_REASON_POLICY_DENY].dropped
    assert not abi.REASONS[abi.NP_REASON_EVENT_LOST].dropped
    assert max(abi.REASONS) < abi.NP_REASON_COUNT


def test_fold_is_fnv() -> None:
    """The check word is FNV-1a over words: its published offset basis for no word, one step for one."""
    assert seal.fold([]) == 0x811C9DC5
    assert seal.fold([0]) == (0x811C9DC5 * 0x01000193) & 0xFFFF_FFFF


def test_seal_covers_every_word() -> None:
    """A change of any word of a row changes a check word."""
    plain = seal.seal_endpoint(abi.np_endpoint(number=7, ifindex=3))
    before = (plain.ingress.check, plain.egress.check)
    for name in ("number", "ifindex", "flags"):
        changed = abi.np_endpoint(number=7, ifindex=3)
        setattr(changed, name, 99)
        seal.seal_endpoint(changed)
        assert before[0] != changed.ingress.check
        assert before[1] != changed.egress.check
    for name, *_ in abi.np_set._fields_:
        if name != "check":
            changed = abi.np_endpoint(number=7, ifindex=3)
            setattr(changed.egress, name, 99)
            assert seal.seal_endpoint(changed).egress.check != before[1]


def test_hooks_and_directions() -> None:
    """For a workload hook and direction are opposite, for a host they agree."""
    assert Hook.TC_INGRESS.direction() == abi.NP_DIRECTION_EGRESS
    assert Hook.TC_EGRESS.direction() == abi.NP_DIRECTION_INGRESS
    assert Hook.TC_INGRESS.direction(host=True) == abi.NP_DIRECTION_INGRESS
    assert Hook.TC_EGRESS.direction(host=True) == abi.NP_DIRECTION_EGRESS
