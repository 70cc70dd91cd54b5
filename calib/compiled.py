"""Kernels compiled by numba where the extra ``fast`` is installed. The only door to numba.

Each has a plain counterpart in NumPy with the same answer. The environment variable
``OCTAV_CALIBRATE_PLAIN=1`` leaves numba alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache, cached_property
from types import FunctionType
from typing import Any, Generic, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

_LOG = logging.getLogger(__name__)

PLAIN = "OCTAV_CALIBRATE_PLAIN"

PACKED = 16  # numbers at a time
_COMPRESS, _LLVM_THAT_PACKS = "llvm.experimental.vector.compress", (19,)

P = ParamSpec("P")
R = TypeVar("R")


@cache
def enabled() -> bool:
    """Whether kernels are compiled; found out once, when it is first asked."""
    if os.environ.get(PLAIN, "") not in ("", "0"):
        return False
    try:
        import numba  # noqa: PLC0415 - half a second
    except ModuleNotFoundError:
        return False
    except Exception as error:  # numba refuses a NumPy that is too new for it
        _LOG.warning("numba cannot be used, NumPy works instead: %s", error)
        return False
    return not getattr(numba.config, "DISABLE_JIT", 0)


class Kernel(Generic[P, R]):
    """A function that is compiled when it is first called; it releases the interpreter lock.

    It may call other kernels of its module, `pack`, `prefetch` and `words_at`. Compiled code is
    kept in numba's cache, so that a process after the first only loads it; a change of another
    module goes unnoticed there.
    """

    def __init__(self, function: Callable[P, R], *, fastmath: bool | set[str]):
        self._function = function
        self._fastmath = fastmath
        self.__doc__ = function.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._compiled(*args, **kwargs)

    @cached_property
    def _compiled(self) -> Callable[P, R]:
        import numba  # noqa: PLC0415

        source = self._function
        assert isinstance(source, FunctionType)
        known = dict(source.__globals__)
        for name in source.__code__.co_names:
            if isinstance(called := known.get(name), Kernel):
                known[name] = called._compiled
            elif isinstance(called, FunctionType) and called in _INTRINSICS:
                known[name] = _INTRINSICS[called]()
        function = FunctionType(source.__code__, known, source.__name__, source.__defaults__)
        function.__qualname__, function.__module__ = source.__qualname__, source.__module__
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
        options["fastmath"] = self._fastmath
        compiled: Callable[P, R]
        try:
            compiled = numba.njit(function, cache=True, **options)
        except RuntimeError:  # no folder that can be written to
            compiled = numba.njit(function, **options)
        return compiled


def kernel(*, fastmath: bool | set[str] = False) -> Callable[[Callable[P, R]], Kernel[P, R]]:
    """Marks a function as a `Kernel`. ``fastmath`` lets sums be reordered, and takes for granted
    that there is no NaN; a set names the liberties that it may take."""

    def mark(function: Callable[P, R]) -> Kernel[P, R]:
        return Kernel(function, fastmath=fastmath)

    return mark


def prefetch(address: int) -> None:
    """For kernels: has the cache read what is at ``address``, while other work goes on. No harm is
    done if nothing is there."""
    raise NotImplementedError("only compiled code can do that")


def words_at(address: int, size: int) -> NDArray[np.uint32]:
    """For kernels: the ``size`` numbers of 32 bits at ``address``, which have to stay there."""
    raise NotImplementedError("only compiled code can do that")


def pack(source: int, target: int) -> int:
    """For kernels: writes those of the `PACKED` numbers of 32 bits at ``source`` that are not 0 to
    ``target``, in their order, and says how many they are. What comes behind them there, up to
    `PACKED` in all, is undefined."""
    raise NotImplementedError("only compiled code can do that")


@cache
def packs() -> bool:
    """Whether `pack` is known to be a few instructions: where numba compiles for the processor
    that is there, and this has AVX-512."""
    if not (enabled() and _llvm_packs()):
        return False
    import numba  # noqa: PLC0415
    from llvmlite import binding  # type: ignore[import-untyped, unused-ignore]  # noqa: PLC0415

    config: Any = numba.config
    if config.CPU_NAME or config.CPU_FEATURES or not config.ENABLE_AVX:
        return False
    try:
        return bool(binding.get_host_cpu_features().get("avx512f"))
    except RuntimeError:  # LLVM cannot tell
        return False


def _llvm_packs() -> bool:
    from llvmlite import binding  # noqa: PLC0415

    return bool(binding.llvm_version_info >= _LLVM_THAT_PACKS)


@cache
def _pack() -> object:
    # Not by `packs`: what is compiled for a processor is kept, whatever was set when it was.
    return _pack_at_once() if _llvm_packs() else _pack_one_by_one()


def _pack_at_once() -> object:
    from llvmlite import ir  # noqa: PLC0415
    from numba import types  # noqa: PLC0415
    from numba.extending import intrinsic  # noqa: PLC0415

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        words, flags = (ir.VectorType(ir.IntType(bits), PACKED) for bits in (32, 1))
        source, target = (builder.inttoptr(arg, words.as_pointer()) for arg in args)
        found = builder.load(source, align=4)
        chosen = builder.icmp_unsigned("!=", found, words(None))
        name, kind = f"{_COMPRESS}.v{PACKED}i32", ir.FunctionType(words, [words, flags, words])
        known = builder.module.globals
        compress = known[name] if name in known else ir.Function(builder.module, kind, name)
        packed = builder.call(compress, [found, chosen, words(ir.Undefined)])
        builder.store(packed, target, align=4)
        n = builder.ctpop(builder.bitcast(chosen, ir.IntType(PACKED)))
        return builder.zext(n, context.get_value_type(signature.return_type))

    def typed(_context: Any, _source: Any, _target: Any) -> Any:
        return types.intp(types.intp, types.intp), generate

    return intrinsic(typed)


def _pack_one_by_one() -> object:
    from numba import njit  # type: ignore[attr-defined, unused-ignore]  # noqa: PLC0415

    view: Any = _words_at()

    def pack_one_by_one(source: int, target: int) -> int:
        values, packed, n = view(source, PACKED), view(target, PACKED), 0
        for value in values:
            packed[n] = value
            n += value != 0
        return n

    return njit(pack_one_by_one)


@cache
def _prefetch() -> object:
    from llvmlite import ir  # type: ignore[import-untyped, unused-ignore]  # noqa: PLC0415
    from numba import types  # noqa: PLC0415
    from numba.extending import intrinsic  # noqa: PLC0415

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        to_read, keep, data = number(0), number(3), number(1)
        builder.call(function, [builder.inttoptr(args[0], pointer), to_read, keep, data])
        return context.get_dummy_value()

    def typed(_context: Any, _address: Any) -> Any:
        return types.void(types.intp), generate

    return intrinsic(typed)


@cache
def _words_at() -> object:
    from numba import carray, njit, types  # type: ignore[attr-defined] # noqa: PLC0415
    from numba.extending import intrinsic  # noqa: PLC0415

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    def typed(_context: Any, _address: Any) -> Any:
        return types.voidptr(types.intp), generate

    pointer: Any = intrinsic(typed)

    def view(address: int, size: int) -> Any:
        return carray(pointer(address), (size,), np.uint32)

    return njit(view)


_INTRINSICS: dict[object, Callable[[], object]] = {
    pack: _pack,
    prefetch: _prefetch,
    words_at: _words_at,
}
