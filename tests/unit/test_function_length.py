"""No function has more lines than CONTRIBUTING allows."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("data_store", "state", "launcher", "benchmarks", "tests")
MAX_LINES = 60

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(text: str) -> Iterator[Function]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, Function):
            yield node


def count_lines(function: Function) -> int:
    """Count from the first statement on: neither the signature nor the docstring."""
    first, *_ = body = function.body
    if ast.get_docstring(function) is not None:
        body = body[1:]
    if not body:
        return 0
    # Comments before the first statement belong to it, where a docstring tells where they begin.
    begin = first.end_lineno + 1 if body[0] is not first else first.lineno
    return function.end_lineno - begin + 1


def is_triton_kernel(function: Function) -> bool:
    return any("triton.jit" in ast.unparse(each) for each in function.decorator_list)


def too_long(text: str) -> dict[str, int]:
    return {
        function.name: count_lines(function)
        for function in functions(text)
        if count_lines(function) > MAX_LINES and not is_triton_kernel(function)
    }


@pytest.mark.parametrize("folder", FOLDERS)
def test_functions_are_short(folder: str):
    paths = sorted((REPO_ROOT / folder).rglob("*.py"))
    assert paths
    found = {path: too_long(path.read_text(encoding="utf-8")) for path in paths}
    assert {str(path): names for path, names in found.items() if names} == {}


def write_function(num_lines: int, *, decorator: str = "", docstring: str = "") -> str:
    signature = [decorator, "def f(", *(f"    a{number}=0," for number in range(70)), "):"]
    return "\n".join([*signature, f'    """{docstring}"""', *["    pass"] * num_lines])


def test_the_rule_catches_a_long_function_and_counts_its_body_alone():
    docstring = "\n".join(["Long."] * 100)
    assert too_long(write_function(MAX_LINES, docstring=docstring)) == {}
    assert too_long(write_function(MAX_LINES + 1)) == {"f": MAX_LINES + 1}
    assert too_long(write_function(MAX_LINES + 1, decorator="@triton.jit")) == {}
    inner = write_function(MAX_LINES + 1).replace("\n", "\n    ")
    assert too_long(f"class C:\n    {inner}") == {"f": MAX_LINES + 1}
