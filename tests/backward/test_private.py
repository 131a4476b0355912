"""Private names of torch still behave as the library expects: one probe per name."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

import brevitas_bp
from brevitas_bp import private
from brevitas_bp.private import set_callback


def test_what_is_missing_is_named() -> None:
    for path in ("torch._C._autograd._no_such_hooks", "torch._no_such_room.name", "no_such_package.x"):
        with pytest.raises(ImportError, match=re.escape(f"torch {torch.__version__} has no {path}")):
            private.private(path)


def test_hooks_are_a_stack_of_pairs() -> None:
    assert private.top_hooks(True) is None
    with saved_tensors_hooks(str, repr):
        private.push_hooks(abs, len)
        assert private.top_hooks(True)[:2] == (abs, len)
        private.pop_hooks()
        assert private.top_hooks(True)[:2] == (str, repr)
    assert private.top_hooks(True) is None


def test_function_modes_are_a_stack() -> None:
    class Mode(TorchFunctionMode):
        pass

    before = private.function_modes()
    mode = Mode()
    mode.__enter__()
    assert private.function_modes() == [*before, mode]
    assert private.pop_function_mode() is mode and private.function_modes() == before


def test_a_running_backward_pass_has_a_number() -> None:
    seen: list[int] = []
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: seen.append(private.running_backward()))
    y.sum().backward()
    assert seen[0] >= 0 and private.running_backward() == -1


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_running_transforms_are_counted() -> None:
    seen: list[tuple[int, int]] = []

    def note(x: Tensor) -> Tensor:
        seen.append((private.transforms("Grad"), private.transforms("Jvp")))
        return x.sum()

    x = torch.ones(3)
    note(x)
    torch.func.grad(note)(x)
    torch.func.grad(lambda x: torch.func.grad(note)(x).sum())(x)
    torch.func.jvp(note, (x,), (x,))
    assert seen == [(0, 0), (1, 0), (2, 0), (0, 1)]


def test_tensors_of_transforms_are_told() -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append((private.is_functorch_wrapped(x), private.is_legacy_batched(x)))
        return x.sum()

    x = torch.randn(3)
    function(x)
    torch.func.grad(function)(x)
    torch.func.vmap(function)(x[None])
    torch._vmap_internals._vmap(function)(x[None])  # pyright: ignore
    assert seen == [(False, False), (True, False), (True, False), (False, True)]


def test_forward_mode_is_told() -> None:
    assert not private.in_forward_ad()
    with forward_ad.dual_level():
        assert private.in_forward_ad()
    assert not private.in_forward_ad()


def test_subclasses_are_not_asked() -> None:
    class Refusing(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError

    x = torch.randn(3).as_subclass(Refusing)
    with private.DisableTorchFunctionSubclass():
        assert type(x.as_subclass(Tensor)) is Tensor


def test_dynamo_is_switched_off_and_on() -> None:
    before = set_callback(None)
    try:
        assert set_callback(None) is None
    finally:
        set_callback(before)
    assert private.wrap_inline(lambda x: x + 1)(1) == 2
    private.skip_frames((lambda: None).__code__)


def test_graphs_of_a_function_are_counted() -> None:
    def double(x: Tensor) -> Tensor:
        return x * 2

    torch._dynamo.reset()
    assert private.graphs_of(double.__code__) == 0
    compiled = torch.compile(double, backend="eager", dynamic=False)
    for size in range(2, private.recompile_limit() + 4):
        compiled(torch.randn(size))
    assert private.graphs_of(double.__code__) == private.recompile_limit()
    torch._dynamo.reset()


def test_leaves_of_containers() -> None:
    assert private.tree_leaves([1, {"a": (2, 3)}]) == [1, 2, 3]


def test_nodes_are_numbered_in_order() -> None:
    x = torch.ones(2, requires_grad=True)
    first = x.exp()
    second = first * 2
    (below, _), *_ = second.grad_fn.next_functions  # pyright: ignore[reportOptionalMemberAccess]
    assert private.node_number(below) == private.node_number(first.grad_fn)
    assert private.node_number(first.grad_fn) < private.node_number(second.grad_fn)


def test_what_is_known_while_graphs_are_made() -> None:
    assert private.saved_tensor_hook_context() is None and private.TracingContext.try_get() is None
    assert "static_input_indices" in private.inlining_code().co_varnames
    with private.functorch_config.patch(saved_tensors_hooks_filtering_mode="no_static"):
        assert private.functorch_config.saved_tensors_hooks_filtering_mode == "no_static"
    assert len(private.aot_compilation_context()) == 3


def private_imports(path: Path) -> list[str]:
    """Returns torch names with an underscore that a file imports, or reaches through ``torch._C``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in names if "._" in name]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [f"torch.{node.attr}"] * (
                node.value.id == "torch" and node.attr.startswith("_") and node.attr[1] != "_")
    return found


def test_no_other_file_names_them() -> None:
    room = Path(brevitas_bp.__file__).parent
    files = [p for p in room.rglob("*.py") if p.name != "private.py"]
    assert {str(p.relative_to(room)): names for p in files if (names := private_imports(p))} == {}
