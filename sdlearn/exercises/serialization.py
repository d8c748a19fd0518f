"""Functions and classes out of a notebook, carried to another process by value.

`pickle` writes a function as its module and its name, and what a notebook defines has neither a file
nor a module that another process could import. Here such a function travels as its code, with the
globals that the code names, its defaults and its closure, and a class as its bases and its attributes.
What is installed (the standard library, site-packages, this package) still travels by name.

All functions of one notebook share one dictionary of globals on arrival, as they did at home. A global
that cannot be carried (an open file, a widget) becomes a `Missing`, which says so when it is used. Both
ends must be the same Python: code objects differ between versions.
"""

import builtins
import dataclasses
import dis
import functools
import importlib
import io
import marshal
import pickle
import sys
import types
from pathlib import Path
from typing import Any

LARGEST = 512 * 2**20       # bytes: more than any model of the course
PACKAGE = __name__.split(".")[0]
# Attributes that a class gets anew where it is made, or that nothing needs once it is made.
NOT_CARRIED = {"__dict__", "__weakref__", "__slots__", "_abc_impl", "__annotations__", "__annotate_func__",
               "__annotations_cache__", "__module__", "__qualname__", "__name__"}
SENTINELS = {id(getattr(dataclasses, name)): name
             for name in ("MISSING", "KW_ONLY", "_FIELD", "_FIELD_CLASSVAR", "_FIELD_INITVAR",
                          "_HAS_DEFAULT_FACTORY") if hasattr(dataclasses, name)}    # compared by identity
# Types that call themselves built in and are not: pickle does not find them.
UNFOUND = {value: name for name, value in vars(types).items()
           if isinstance(value, type) and value.__module__ == "builtins" and not hasattr(builtins, value.__name__)}


class Missing:
    """Stands where a global of the notebook stood that could not be carried."""

    def __init__(self, name: str, kind: str):
        self.__dict__.update(_name=name, _kind=kind)

    def __reduce__(self):
        return Missing, (self.__dict__["_name"], self.__dict__["_kind"])

    def _refuse(self, *_, **__):
        raise NameError(f"`{self.__dict__['_name']}` of the notebook ({self.__dict__['_kind']}) cannot be brought "
                        "into the check: hand it over as an argument, or make it inside the function")

    __getattr__ = __setattr__ = __call__ = __getitem__ = __setitem__ = __iter__ = __len__ = __bool__ = _refuse
    __enter__ = __exit__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __matmul__ = _refuse


def serialize(objects: tuple) -> bytes:
    """The objects as bytes, for `deserialize` in another process of this Python.

    Raises ValueError where something that they cannot do without cannot be carried, or is too large.
    """
    file = io.BytesIO()
    try:
        _Carrier(file).dump(objects)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"it cannot be brought into the check ({error})") from error
    if file.tell() > LARGEST:
        raise ValueError(f"with what it uses of the notebook it takes {file.tell() / 2**20:.0f} MB: "
                         "hand large things over as arguments")
    return file.getvalue()


def deserialize(data: bytes) -> tuple:
    """What `serialize` packed, made anew."""
    return _Receiver(io.BytesIO(data)).load()


@functools.cache
def installed(module: str | None) -> bool:
    """Whether the module is one that another process imports as it is, not a notebook or a file beside it."""
    root = (module or "__main__").split(".")[0]
    if root in (PACKAGE, *sys.builtin_module_names) or root in sys.stdlib_module_names:
        return root != "__main__"
    file = getattr(sys.modules.get(root), "__file__", None)
    return file is not None and not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def names_in(code: types.CodeType) -> set[str]:
    """Names of the globals that the code reads or writes, and the functions inside of it."""
    found = {step.argval for step in dis.get_instructions(code) if step.opname.endswith(("_GLOBAL", "_NAME"))}
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            found |= names_in(inner)
    return found


class _Carrier(pickle.Pickler):

    def __init__(self, file: io.BytesIO, probing: frozenset[int] = frozenset()):
        super().__init__(file, protocol=5)
        self.probing = probing              # ids of values that are being tried, so that cycles end
        self.spaces: dict[int, dict] = {}   # dictionaries of globals, by id

    def persistent_id(self, obj: Any) -> int | None:
        if type(obj) is dict and id(obj) in self.spaces:
            return list(self.spaces).index(id(obj))
        return None

    def reducer_override(self, obj: Any):
        match obj:
            case types.FunctionType():
                return NotImplemented if _named(obj) else self.function(obj)
            case type() if obj in UNFOUND:
                return getattr, (types, UNFOUND[obj])
            case type():
                return NotImplemented if obj.__module__ == "builtins" or _named(obj) else self.of_class(obj)
            case types.ModuleType():
                return importlib.import_module, (obj.__name__,)
            case types.CellType():
                return types.CellType, ()           # its contents come with the function, which may be in them
            case property():
                return property, (obj.fget, obj.fset, obj.fdel, obj.__doc__)
            case staticmethod() | classmethod():
                return type(obj), (obj.__func__,)
            case types.MappingProxyType():
                return types.MappingProxyType, (dict(obj),)
            case functools._lru_cache_wrapper():
                return _cached, (obj.__wrapped__, obj.cache_parameters())
        if id(obj) in SENTINELS:
            return getattr, (dataclasses, SENTINELS[id(obj)])
        return NotImplemented

    def function(self, f: types.FunctionType):
        self.spaces[id(f.__globals__)] = f.__globals__
        cells = f.__closure__ or ()
        values = {name: self.tried(name, f.__globals__[name]) for name in sorted(names_in(f.__code__))
                  if name in f.__globals__}
        for name in ("exit", "quit"):       # IPython's own, which cannot be carried, hide Python's
            if isinstance(values.get(name), Missing):
                del values[name]
        contents = [self.tried(name, cell.cell_contents) if _filled(cell) else cell
                    for name, cell in zip(f.__code__.co_freevars, cells, strict=True)]
        state = {"values": values, "cells": cells, "contents": contents, "attributes": vars(f), "set": {
            "__defaults__": f.__defaults__, "__kwdefaults__": f.__kwdefaults__, "__doc__": f.__doc__,
            "__qualname__": f.__qualname__, "__module__": f.__module__}}
        return _make_function, (marshal.dumps(f.__code__), f.__globals__, f.__name__, cells), state, None, None, _fill

    def of_class(self, cls: type):
        attributes = {name: value for name, value in vars(cls).items() if name not in NOT_CARRIED
                      and not isinstance(value, (types.GetSetDescriptorType, types.MemberDescriptorType))}
        start = {name: vars(cls)[name] for name in ("__slots__", "__module__") if name in vars(cls)}
        start["__qualname__"] = cls.__qualname__
        return _make_class, (type(cls), cls.__name__, cls.__bases__, start), attributes, None, None, _fill_class

    def tried(self, name: str, value: Any) -> Any:
        """The value, or a `Missing` where it cannot be carried."""
        if isinstance(value, (types.FunctionType, types.ModuleType, type)) or id(value) in self.probing:
            return value
        try:
            _Carrier(io.BytesIO(), self.probing | {id(value)}).dump(value)
        except Exception:           # whatever its own way of pickling raises
            return Missing(name, type(value).__name__)
        return value


class _Receiver(pickle.Unpickler):

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.spaces: dict[int, dict] = {}

    def persistent_load(self, pid: int) -> dict:
        return self.spaces.setdefault(pid, {"__name__": "__main__", "__builtins__": builtins})


def _named(obj: Any) -> bool:
    """Whether importing its module and looking up its name finds this very object."""
    if not installed(obj.__module__):
        return False
    found = sys.modules.get(obj.__module__)
    for part in obj.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is obj


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents      # noqa: B018  (an empty cell raises)
    except ValueError:
        return False
    return True


def _cached(function, parameters: dict):
    return functools.lru_cache(**parameters)(function)


def _make_function(code: bytes, space: dict, name: str, cells: tuple) -> types.FunctionType:
    return types.FunctionType(marshal.loads(code), space, name, closure=cells)


def _fill(function: types.FunctionType, state: dict):
    function.__globals__.update(state["values"])
    for cell, contents in zip(state["cells"], state["contents"], strict=True):
        if contents is not cell:
            cell.cell_contents = contents
    vars(function).update(state["attributes"])
    for name, value in state["set"].items():
        setattr(function, name, value)


def _make_class(kind: type, name: str, bases: tuple, start: dict) -> type:
    return kind(name, bases, dict(start))


def _fill_class(cls: type, attributes: dict):
    for name, value in attributes.items():
        setattr(cls, name, value)
