"""Moves the sequence modules of a torch model onto seqkern's kernels, in place, and back.

A swap changes a module's class and nothing else: parameters, buffers, hooks, the training flag, optimizers
that hold the parameters and the ``state_dict`` stay the very objects they were.
"""

import sys
from collections.abc import Iterator
from types import FunctionType
from typing import NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from seqkern.nn._modules import has_own_forward

NAMES = (
    "RNN",
    "LSTM",
    "GRU",
    "RNNCell",
    "LSTMCell",
    "GRUCell",
    "MultiheadAttention",
    "TransformerEncoderLayer",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerDecoder",
    "Transformer",
    "Linear",
)
# What a module is an instance of if it is one of these or a subclass; seqkern's recurrent layers are no nn.LSTM.
BASES = (nn.RNNBase, nn.RNNCellBase, *(getattr(nn, name) for name in NAMES[6:]))
# In the module's __dict__: it travels with a deep copy or a pickle, not with the state_dict.
MARK = "_seqkern_swapped"
ALREADY = "already a seqkern module"

M = TypeVar("M", bound=nn.Module)

# What torch's classes define; where somebody has replaced a method of one, its twin would pass the new one by.
_METHODS = {
    cls: {name: value for name, value in vars(cls).items() if callable(value)}
    for cls in (getattr(nn, name) for name in NAMES)
}


class Swap(NamedTuple):
    """One module of a model that has a twin in seqkern.nn, or a subclass of one, as `swaps` lists it."""

    name: str  #: qualified name in the model, "" for the model itself
    before: str  #: the class it had or has, such as ``torch.nn.LSTM``
    after: str | None  #: the seqkern class that it has now; None where it was left alone
    reason: str  #: why it was left alone; empty where it was swapped


def _pairs() -> dict[type[nn.Module], type[nn.Module]]:
    from seqkern import nn as ours

    return {getattr(nn, name): getattr(ours, name) for name in NAMES}


def _class(module: nn.Module) -> type[nn.Module]:
    """The class of a module; of one that was swapped and given a class of its own since, as by
    torch.nn.utils.parametrize or fully_shard, the one that it was swapped for."""
    if MARK in vars(module):
        ours = set(_pairs().values())
        return next((cls for cls in type(module).__mro__ if cls in ours), type(module))
    return parametrize.type_before_parametrizations(module)


def _title(cls: type[nn.Module]) -> str:
    room = cls.__module__
    for package in ("torch.nn", "seqkern.nn"):
        if room.startswith(f"{package}.") and cls.__name__ in NAMES:
            return f"{package}.{cls.__name__}"
    return f"{room}.{cls.__qualname__}"


def _is_known(module: nn.Module) -> bool:
    if isinstance(module, BASES):
        return not isinstance(module, NonDynamicallyQuantizableLinear)  # a part of attention
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", "") in NAMES
    return type(module).__name__ in NAMES and type(module).__module__.startswith("torch.ao.")


def _objection(module: nn.Module, pairs: dict[type[nn.Module], type[nn.Module]]) -> str:
    """Why a module cannot be swapped; empty if it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted or traced: its code is frozen; accelerate the module it was made from"
    if type(module).__module__.startswith("torch.ao.") or getattr(module, "qconfig", None) is not None:
        return "quantized, or prepared for it by torch.ao"
    if isinstance(module, tuple(pairs.values())):
        return ALREADY
    if parametrize.is_parametrized(module):
        return (
            "parametrized (torch.nn.utils.parametrize): its class computes the weights; "
            "remove_parametrizations first"
        )
    if isinstance(module, nn.LazyLinear):
        return "its sizes are not known yet: run the model once, then accelerate"
    if type(module) not in pairs:
        own = "with its own forward" if _overrides_forward(type(module)) else "whose class would be lost"
        return f"a subclass of torch's {own}; write it on seqkern.nn instead"
    if has_own_forward(module):
        return "its forward was replaced on the instance"
    if replaced := _replaced(type(module)):
        return f"torch.nn.{type(module).__name__}.{replaced} was replaced on the class"
    return ""


def _replaced(cls: type[nn.Module]) -> str:
    """A method of one of torch's classes that is not the one that it was when this module was imported."""
    for name, method in _METHODS[cls].items():
        if vars(cls).get(name) is not method:
            return name
    for name, value in vars(cls).items():  # `__call__`, say
        if callable(value) and name not in _METHODS[cls] and hasattr(nn.Module, name):
            return name
    return ""


def _overrides_forward(cls: type[nn.Module]) -> bool:
    return not cls.forward.__module__.startswith("torch.nn.")


def _known(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have a twin, but for linear layers that one with a twin runs itself."""
    pairs = _pairs()
    layers = {theirs: ours for theirs, ours in pairs.items() if theirs.__name__.endswith("coderLayer")}

    def runs_its_own(module: nn.Module) -> bool:
        if isinstance(module, tuple(layers.values())):
            return True
        return type(module) in layers and not _objection(module, pairs)

    own = ("linear1", "linear2")
    parts = {id(m._modules.get(part)) for m in model.modules() if runs_its_own(m) for part in own}
    for name, module in model.named_modules():
        if _is_known(module) and (id(module) not in parts or MARK in vars(module)):
            yield name, module


def check_module(model: object, verb: str) -> None:
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise TypeError(
            f"{verb} takes a torch.nn.Module, got the class {model.__name__}: pass an instance of it"
        )
    raise TypeError(
        f"{verb} takes a torch.nn.Module, got {type(model).__name__}: pass the module that holds the "
        "layers, or call seqkern.functional where there is none"
    )


def _assign(changes: list[tuple[nn.Module, type[nn.Module], bool]]) -> None:
    """Gives each module its new class and sets or removes the mark; all of them, or after an error none."""
    done: list[tuple[nn.Module, type[nn.Module], bool]] = []
    try:
        for module, cls, mark in changes:
            done.append((module, type(module), MARK in vars(module)))
            _become(module, cls, mark)
    except BaseException:
        for module, cls, mark in reversed(done):
            _become(module, cls, mark)
        raise


def _become(module: nn.Module, cls: type[nn.Module], mark: bool) -> None:
    object.__setattr__(module, "__class__", cls)
    vars(module).pop("forward", None)  # the old class's, if any
    if mark:
        vars(module)[MARK] = True
    else:
        vars(module).pop(MARK, None)


def accelerate(model: M) -> M:
    """Swaps each module of the model whose class has a twin in `seqkern.nn` for it, in place.

    These are ``torch.nn.{RNN,LSTM,GRU,RNNCell,LSTMCell,GRUCell,MultiheadAttention,TransformerEncoderLayer,
    TransformerDecoderLayer,TransformerEncoder,TransformerDecoder,Transformer,Linear}``; the linear layers within a
    transformer's layer stay torch's, since the layer runs them itself.
    Modules that cannot be swapped without changing what they compute (parametrized, scripted or traced,
    quantized, subclassed, with a forward or a class that was patched) stay as they are; `swaps` says which and
    why. A module used in several places is swapped once; a second call changes nothing; after an error nothing
    has changed.

    Args:
        model: any module, a bare ``torch.nn.LSTM`` included.

    Returns:
        The same object.

    Raises:
        TypeError: ``model`` is not a module.

    >>> import torch, seqkern
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GRU(8, 8))
    >>> seqkern.accelerate(model) is model
    True
    >>> type(model[1]) is seqkern.nn.GRU
    True
    """
    check_module(model, "accelerate")
    pairs = _pairs()
    found = [module for _, module in _known(model) if not _objection(module, pairs)]
    _assign([(module, pairs[type(module)], True) for module in found])
    return model


def restore(model: M) -> M:
    """Undoes `accelerate`, in place: what it swapped is torch's again, in a deep copy or an unpickled model
    too.

    Modules that were written with ``seqkern.nn`` stay. Returns the same object; raises TypeError where ``model`` is not
    a module, or where one has been given a forward of its own since, or a class that cannot be made anew.

    >>> import torch, seqkern
    >>> model = seqkern.accelerate(torch.nn.LSTM(4, 8))
    >>> type(seqkern.restore(model)) is torch.nn.LSTM
    True
    """
    check_module(model, "restore")
    back = {ours: theirs for theirs, ours in _pairs().items()}
    found = [module for _, module in _known(model) if _is_swapped(module, back)]
    for module in found:
        if has_own_forward(module):
            raise TypeError(
                "restore cannot undo what was done to a module after accelerate: the forward of a "
                f"{_title(type(module))} was replaced on the instance, by what may call seqkern's; undo that first"
            )
    _assign([(module, _undone(module, back), False) for module in found])
    return model


def _is_swapped(module: nn.Module, back: dict[type[nn.Module], type[nn.Module]]) -> bool:
    return MARK in vars(module) and _class(module) in back


def _undone(module: nn.Module, back: dict[type[nn.Module], type[nn.Module]]) -> type[nn.Module]:
    """torch's class for a module of ours; if it was given one of its own since, that class once more with torch's for
    ours among its bases."""
    cls = type(module)
    if cls in back:
        return back[cls]
    if why := _not_anew(cls, _class(module)):
        raise TypeError(
            f"restore cannot undo what was done to the class of a module after accelerate: {_title(cls)} {why}; undo "
            "that first"
        )
    body = {
        key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__", "__doc__")
    }
    make: type = type(cls)
    return make(cls.__name__, tuple(back.get(base, base) for base in cls.__bases__), body)


def _not_anew(cls: type[nn.Module], ours: type[nn.Module]) -> str:
    """Why a class that derives from ours cannot be made once more with another base; empty if it can."""
    if ours not in cls.__bases__:
        return f"derives from {_title(ours)} by way of others"
    if getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls:
        return (
            f"is written in {cls.__module__}, and objects of another class by its name could not be pickled"
        )
    for value in vars(cls).values():
        parts = (
            (value.fget, value.fset) if isinstance(value, property) else (getattr(value, "__func__", value),)
        )
        codes = [each.__code__ for each in parts if isinstance(each, FunctionType)]
        if any("__class__" in code.co_freevars for code in codes):
            return "has methods that call super()"
    return ""


def swaps(model: nn.Module) -> list[Swap]:
    """Lists the model's modules that `accelerate` knows: what was swapped for what, what was left alone and why.

    A module that was parametrized after the swap still runs on seqkern, and is listed so.

    >>> import torch, seqkern
    >>> model = torch.nn.Sequential(torch.nn.RNN(4, 8), seqkern.nn.GRU(8, 8))
    >>> for row in seqkern.swaps(seqkern.accelerate(model)):
    ...     print(row.name, row.before, row.after, row.reason or "swapped")
    0 torch.nn.RNN seqkern.nn.RNN swapped
    1 seqkern.nn.GRU None already a seqkern module
    """
    check_module(model, "swaps")
    pairs = _pairs()
    back = {ours: theirs for theirs, ours in pairs.items()}
    rows = []
    for name, module in _known(model):
        if _is_swapped(module, back):
            rows.append(Swap(name, _title(back[_class(module)]), _title(_class(module)), ""))
        else:
            reason = _objection(module, pairs) or "not accelerated yet: call seqkern.accelerate(model)"
            rows.append(Swap(name, _title(type(module)), None, reason))
    return rows
