"""Forward hooks: around each stack (a pass opens and closes), and at the FFN, input and output sites."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import DataError, StateError
from .head import Head, note_autocast
from .interface import DEPTH_KEYWORD, PASS_KEYWORD
from .passes import Pass, drop_pooled, drop_tokens
from .prepared import PreparedPass
from .sites import Site, SiteDrop, Stack

if TYPE_CHECKING:
    from .session import Session

# All hooks are closures: a closure survives deepcopy of a hooked module by reference, a bound method would copy us.


def install(session: Session, stacks: list[Stack], output: Site | None, head: Head | None) -> list[RemovableHandle]:
    """Register every hook that the plan needs; returns their removal handles."""
    removers: list[RemovableHandle] = []
    for number, stack in enumerate(stacks):
        removers += _install_stack(session, stack, number)
        for site in stack.sites:
            if site.kind == "ffn" and site.drops:
                removers.append(site.module.register_forward_hook(_ffn_hook(session, site, number)))
            if site.kind == "input" and site.drops:
                removers.append(site.module.register_forward_hook(_input_hook(session, site, number)))
    if output is not None:
        removers.append(output.module.register_forward_pre_hook(_output_hook(session, output), with_kwargs=True))
    if head is not None:  # after the output position: it hands over what that leaves
        removers.append(head.module.register_forward_pre_hook(_head_hook(session, head)))
    return removers


def _install_stack(session: Session, stack: Stack, number: int) -> list[RemovableHandle]:
    signature = inspect.signature(stack.module.forward)
    names = list(signature.parameters)
    place = names.index("inputs_embeds") if "inputs_embeds" in names else len(names)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if module is not stack.module:  # a deep copy of the attached model, which is not attached
            return args, kwargs
        stack_pass: Pass | None = session.prepared_pass(number)
        if stack_pass is None and not torch.compiler.is_compiling():
            inputs = signature.bind_partial(*args, **kwargs).arguments
            inputs |= inputs.pop("kwargs", {})
            stack_pass = session.new_pass(stack, inputs)
        session.open(stack, number, stack_pass)
        if stack_pass is None:
            return args, kwargs
        if isinstance(stack_pass, PreparedPass):
            stack_pass.hold()
        if kwargs.get("inputs_embeds") is not None or (len(args) > place and args[place] is not None):
            args, kwargs = _drop_inputs(stack, stack_pass, place, args, kwargs)
        return args, {**kwargs, PASS_KEYWORD: stack_pass}

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module is stack.module:
            session.close(stack, number, kwargs.get(PASS_KEYWORD), failed=output is None)

    removers = [
        stack.module.register_forward_pre_hook(before, with_kwargs=True),
        stack.module.register_forward_hook(after, with_kwargs=True, always_call=True),
    ]
    return removers + [group.register_forward_pre_hook(_depth_hook(stack), with_kwargs=True) for group in stack.groups]


def _depth_hook(stack: Stack) -> Callable[..., Any]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        stack_pass: Pass | None = kwargs.get(PASS_KEYWORD)
        if stack_pass is None or DEPTH_KEYWORD in kwargs:
            return args, kwargs
        if not stack_pass.running:
            raise StateError(
                f"a shared layer was run again outside its forward pass (got {type(module).__name__}), so its depth is "
                "unknown; checkpoint the layers inside the group, not the group"
            )
        call, stack_pass.group_calls = stack_pass.group_calls, stack_pass.group_calls + 1
        return args, {**kwargs, DEPTH_KEYWORD: call}

    return before


def _ffn_hook(session: Session, site: Site, number: int) -> Callable[..., Any]:
    shared = site.stack is not None and bool(site.stack.groups)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if module is not site.module:  # a deep copy's
            return None
        stack_pass: Pass | None = session.prepared_pass(number) if torch.compiler.is_compiling() else None
        if stack_pass is not None:  # a graph replays by itself, so it needs no pass of its own layer's
            depth = site.layer.depth if shared else site.layer.index
        else:
            stack_pass, depth = site.layer.current, site.layer.depth
        if stack_pass is None or not module.training or depth not in site.drops:
            return None
        if isinstance(output, tuple):  # GPT-OSS returns (hidden states, router scores)
            return (_cut(stack_pass, site, depth, output[0]), *output[1:])
        return _cut(stack_pass, site, depth, output)

    return after


def _cut(stack_pass: Pass, site: Site, depth: int, hidden: Tensor) -> Tensor:
    drop = site.drops[depth]
    shape = stack_pass.tokens.document.shape
    # OPT flattens batch and length before its FFN. A graph compares no sizes that it may leave open.
    as_it_is = not torch.compiler.is_compiling() and hidden.shape[:-1] == shape
    states = hidden if as_it_is else hidden.reshape(*shape, hidden.shape[-1])
    output, kept = drop_tokens(stack_pass, site, drop, depth, states)
    total = stack_pass.tokens.real_count
    _note(stack_pass, site, depth, kept, total * hidden.shape[-1] if drop.pattern == "element" else total)
    return output if as_it_is else output.view(hidden.shape)


def _note(stack_pass: Pass, site: Site, depth: int, kept: Tensor, total: Any) -> None:
    """Count what was kept of what is real."""
    stack_pass.visit(site)
    stack_pass.count(site, depth, kept, total)


def _input_hook(session: Session, site: Site, number: int) -> Callable[..., Any]:
    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        stack_pass = session.running(number)
        return None if stack_pass is None or not module.training else _cut(stack_pass, site, 0, output)

    return after


def _drop_inputs(
    stack: Stack, stack_pass: Pass, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The input position for callers that pass embeddings instead of ids: the embedding module never runs then."""
    site = next(site for site in stack.sites if site.kind == "input")
    if not site.drops:
        return args, kwargs
    if kwargs.get("inputs_embeds") is not None:
        return args, {**kwargs, "inputs_embeds": _cut(stack_pass, site, 0, kwargs["inputs_embeds"])}
    return (*args[:place], _cut(stack_pass, site, 0, args[place]), *args[place + 1 :]), kwargs


def _head_hook(session: Session, head: Head) -> Callable[..., Any]:
    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        receive = session.head_receives
        if receive is None or module is not head.module:
            return None
        note_autocast(head, args[0])
        receive.append(args[0])
        return (args[0][:, :0], *args[1:])

    return before


def _output_hook(session: Session, site: Site) -> Callable[..., Any]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if module is not site.module or not args or not isinstance(args[0], Tensor):
            return None
        hidden = args[0]
        stack_pass = session.last_pass
        if stack_pass is not None and module.training and 0 in site.drops:
            hidden = _drop_output(stack_pass, site, site.drops[0], hidden)
        session.see_features(hidden)
        return (hidden, *args[1:]), kwargs

    return before


def _drop_output(stack_pass: Pass, site: Site, drop: SiteDrop, hidden: Tensor) -> Tensor:
    if hidden.dim() == 3:
        if hidden.shape[:2] != stack_pass.tokens.document.shape:
            raise DataError(
                f"the head receives other tokens than the batch holds (got {tuple(hidden.shape[:2])} for "
                f"{tuple(stack_pass.tokens.document.shape)}); the output position needs every token's hidden state"
            )
        return _cut(stack_pass, site, 0, hidden)
    output, kept = drop_pooled(stack_pass, site, drop, hidden)
    _note(stack_pass, site, 0, kept, kept.new_full((), hidden.numel()))
    return output
