"""Every Triton kernel compiles on a CPU for six GPU generations and fits their shared memory.

THE CONVENTION for op files (sloth/kernels/ops/<op>.py):

1. A function launched from Python is decorated `@jit` and its name ends in `_kernel`
   (`_glu_fwd_kernel`). A `@jit` helper that only kernels call ends otherwise and needs nothing.
2. After its kernels the module exports one dict, kernel name -> signatures to compile:

       COMPILE_SIGNATURES: dict[str, list[dict[str, Any]]] = {
           "_glu_fwd_kernel": [
               {
                   # every argument that is no constexpr
                   "signature": {"gate_ptr": "*bf16", "y_ptr": "*bf16", "gate_stride": "i32:16",
                                 "eps": "fp32", "num_cols": "i32"},
                   "constexprs": {"ACTIVATION": "silu", "BLOCK_F": 1024},  # every constexpr
                   "options": {"num_warps": 4, "num_stages": 2},      # optional; as the launcher's
               },
           ],
       }

   Types are Triton's: `*fp16 *bf16 *fp32 *i64 *u8 i32 i64 fp32 u1`. `:16` after an integer type
   says that its value is divisible by 16, as Triton infers at a real launch (strides, mostly);
   pointers count as 16-byte aligned. An optional pointer that is passed as None belongs into
   `constexprs` with the value None, and a stride that is always 1 with the value 1.
   List the launcher's largest configuration (it bounds shared memory) and few others: a signature
   is compiled six times. A kernel without an entry, or an entry without a kernel, fails here.
3. An op that picks its tile by GPU gives one entry per choice, with "capabilities": (80, 90) in it;
   without that key an entry is compiled for all six.
4. Row and block offsets are 64-bit: `tl.program_id(0).to(tl.int64)`, always in one expression.
   A test below reads the source and fails on a bare `tl.program_id(...)`.

Imports in tests: the repository root is on `sys.path`, so `from tests.kernels.common import ...`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

import pytest

import sloth.kernels.ops as ops_package

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

# Compute capability -> shared memory that one block may use, in KiB (CUDA programming guide,
# technical specifications per compute capability; 1 KiB of each is the system's).
SHARED_MEMORY_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


def op_modules() -> list[ModuleType]:
    names = (info.name for info in pkgutil.iter_modules(ops_package.__path__))
    return [importlib.import_module(f"{ops_package.__name__}.{name}") for name in names]


def jit_functions(module: ModuleType) -> dict[str, Any]:
    """The module's own @jit functions; those it imports belong to their home module."""
    return {
        name: value
        for name, value in vars(module).items()
        if hasattr(value, "arg_names") and value.fn.__module__ == module.__name__
    }


def kernels_of(module: ModuleType) -> dict[str, Any]:
    return {name: f for name, f in jit_functions(module).items() if name.endswith("_kernel")}


def compile_cases() -> list[Any]:
    cases = []
    for module in op_modules():
        short = module.__name__.rpartition(".")[2]
        for kernel, entries in getattr(module, "COMPILE_SIGNATURES", {}).items():
            for index, entry in enumerate(entries):
                for capability in entry.get("capabilities", SHARED_MEMORY_KIB):
                    name = f"{short}-{kernel}-{index}-sm_{capability}"
                    cases.append(pytest.param(module, kernel, entry, capability, id=name))
    return cases


def ast_source(kernel: Any, entry: dict[str, Any]) -> Any:
    """What a launch with these arguments would compile: types, constants, divisibility."""
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in entry["constexprs"]:
            signature[name] = "constexpr"
            continue
        type_name, _, divisor = entry["signature"][name].partition(":")
        signature[name] = type_name
        if divisor == "16" or type_name.startswith("*"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs=entry["constexprs"], attrs=attributes)


@pytest.mark.parametrize("module", op_modules(), ids=lambda module: module.__name__)
def test_every_kernel_has_compile_signatures(module: ModuleType) -> None:
    kernels = kernels_of(module)
    signatures = getattr(module, "COMPILE_SIGNATURES", {})
    assert set(signatures) == set(kernels), "COMPILE_SIGNATURES must name exactly the kernels"
    for name, kernel in kernels.items():
        assert signatures[name], f"{name} has no signature"
        for entry in signatures[name]:
            given = set(entry["signature"]) | set(entry["constexprs"])
            assert given == set(kernel.arg_names), f"{name}: arguments differ from the kernel's"


@pytest.mark.parametrize("module", op_modules(), ids=lambda module: module.__name__)
def test_program_ids_are_64_bit(module: ModuleType) -> None:
    tree = ast.parse(inspect.getsource(module))
    widened = {
        id(node.func.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "to"
        and ast.unparse(node.args[0]) == "tl.int64"
    }
    bare = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "tl.program_id"
        and id(node) not in widened
    ]
    assert not bare, f"{module.__name__} lines {bare}: write tl.program_id(n).to(tl.int64)"


@pytest.mark.parametrize(("module", "kernel", "entry", "capability"), compile_cases())
def test_kernel_compiles_within_shared_memory(
    module: ModuleType, kernel: str, entry: dict[str, Any], capability: int
) -> None:
    function = getattr(module, kernel)
    if not isinstance(function, JITFunction):
        pytest.skip("TRITON_INTERPRET=1 replaces the compiler")
    compiled = triton.compile(
        ast_source(function, entry),
        target=GPUTarget("cuda", capability, 32),
        options=entry.get("options", {}),
    )
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED_MEMORY_KIB[capability] * 1024
