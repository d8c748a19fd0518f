"""Functions and classes of a notebook as bytes for another process: cloudpickle, with what it lacks for answers.

`pickle` writes a function as its module and its name, and no other process can import a notebook. cloudpickle
writes its code, with the globals that it names, its defaults and its closure. Functions are written here in
place of cloudpickle's way, so that

- a global that cannot be pickled (a lock, a widget) becomes a `Missing`, which raises an error only when it is used;
- the globals named by the body of a class inside a function are found, too;
- a variable that two closures share is still shared after loading;
- their code keeps the name of its file, from which the line of an error is read.

Functions behind `functools.lru_cache` are written by value as well, and so is all code that is not installed
(a file next to the notebook). Each loading makes new classes. Both processes must run the same Python.
"""

import builtins
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

import cloudpickle

LARGEST = 512 * 2**20       # bytes: more than any model of the course
PACKAGE = __name__.split(".")[0]


class Missing:
    """Placeholder for a global of the notebook that cannot be pickled: any use raises NameError."""

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

    Raises ValueError where a part that they need cannot be pickled, or where they take more than LARGEST bytes.
    """
    file = io.BytesIO()
    try:
        _Pickler(file).dump(objects)
    except Exception as error:      # whatever an object's own way of pickling raises
        raise ValueError(f"it cannot be brought into the check ({error})") from error
    if file.tell() > LARGEST:
        raise ValueError(f"with the globals that it uses it takes {file.tell() / 2**20:.0f} MB: "
                         "pass large objects as arguments")
    return file.getvalue()


def deserialize(data: bytes) -> tuple:
    """New copies of the objects that `serialize` has written."""
    return pickle.loads(data)


@functools.cache
def installed(module: str | None) -> bool:
    """Whether any process can import the module: standard library, site-packages, this package."""
    root = (module or "__main__").split(".")[0]
    if root in (PACKAGE, *sys.builtin_module_names) or root in sys.stdlib_module_names:
        return root != "__main__"
    file = getattr(sys.modules.get(root), "__file__", None)
    return file is not None and not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def global_names(code: types.CodeType) -> set[str]:
    """Names of the globals that the code reads or writes, and the functions and classes inside it."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname.endswith(("_GLOBAL", "_NAME"))}
    return names.union(*(global_names(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


class _Pickler(cloudpickle.Pickler):

    def __init__(self, file: io.BytesIO, tried: frozenset[int] = frozenset()):
        super().__init__(file, protocol=5)
        self.tried = tried                          # ids of values that are being tried, so that cycles end
        self.namespaces: dict[int, dict] = {}       # the new globals, by id of the old: one for each notebook

    def reducer_override(self, obj: Any):
        match obj:
            case types.FunctionType() if not _importable(obj):
                return self.reduce_function(obj)
            case types.CodeType():
                return marshal.loads, (marshal.dumps(obj),)     # keeps the file's name, which errors' lines are read by
            case types.ModuleType():
                return importlib.import_module, (obj.__name__,)
            case types.CellType():
                return types.CellType, ()           # its contents come with the function, which may be in them
            case functools._lru_cache_wrapper() if not _importable(obj):
                return _cached, (obj.__wrapped__, obj.cache_parameters())
            case type() if obj.__module__ in sys.modules and not installed(obj.__module__):
                cloudpickle.register_pickle_by_value(sys.modules[obj.__module__])
        reduced = super().reducer_override(obj)
        if isinstance(obj, type) and isinstance(reduced, tuple) and len(reduced) == 6:
            make, (*args, _, extra), *state = reduced       # the id by which cloudpickle finds a class again
            return make, (*args, None, extra), *state
        return reduced

    def reduce_function(self, f: types.FunctionType):
        namespace = self.namespaces.setdefault(id(f.__globals__), {"__name__": "__main__"})
        values = {name: self.value_or_missing(name, f.__globals__[name])
                  for name in sorted(global_names(f.__code__)) if name in f.__globals__}
        for name in ("exit", "quit"):       # IPython's own, which cannot be pickled, hide Python's
            if isinstance(values.get(name), Missing):
                del values[name]
        cells = f.__closure__ or ()
        contents = [self.value_or_missing(name, cell.cell_contents) if _filled(cell) else cell
                    for name, cell in zip(f.__code__.co_freevars, cells, strict=True)]
        attributes = {name: getattr(f, name) for name in ("__defaults__", "__kwdefaults__", "__doc__", "__qualname__",
                                                          "__module__")}
        return (_make_function, (f.__code__, namespace, f.__name__, cells),
                (values, cells, contents, vars(f) | attributes), None, None, _set_function_state)

    def value_or_missing(self, name: str, value: Any) -> Any:
        """The value, or a `Missing` where it cannot be pickled."""
        if isinstance(value, (types.FunctionType, types.ModuleType, type)) or id(value) in self.tried:
            return value
        try:
            _Pickler(io.BytesIO(), self.tried | {id(value)}).dump(value)
        except Exception:           # whatever its own way of pickling raises
            return Missing(name, type(value).__name__)
        return value


def _importable(obj: Any) -> bool:
    """Whether importing its module and looking up its name finds this very object."""
    module = getattr(obj, "__module__", None)
    if not installed(module):
        return False
    found = sys.modules.get(module)
    for part in getattr(obj, "__qualname__", "").split("."):
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


def _make_function(code: types.CodeType, namespace: dict, name: str, cells: tuple) -> types.FunctionType:
    namespace["__builtins__"] = builtins
    return types.FunctionType(code, namespace, name, closure=cells)


def _set_function_state(function: types.FunctionType, state: tuple):
    values, cells, contents, attributes = state
    function.__globals__.update(values)
    for cell, value in zip(cells, contents, strict=True):
        if value is not cell:
            cell.cell_contents = value
    for name, value in attributes.items():
        setattr(function, name, value)
