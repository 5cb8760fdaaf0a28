"""Triton's interpreter, made quicker for the tests: it is the largest single part of their time."""

from __future__ import annotations

from types import SimpleNamespace

import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Let a launch patch `triton.language` once, and the device functions that it calls not at all.

    The interpreter replaces the language's builtins at a launch, and looks for builtins to replace again at every call of a
    device function; that search finds nothing new and takes half the time. One difference lies behind it: a function's own
    module may have imported `triton.language.core` where the kernel's has not, so that a launch has to patch both.
    """
    patch = interpreter._patch_lang
    both = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def call(self, *args, **kwargs):
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter._patch_lang = lambda fn: patch(both)
    interpreter.InterpretedFunction.__call__ = call
