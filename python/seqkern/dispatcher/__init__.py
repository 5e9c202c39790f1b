"""Sends torch's own operators to this package, for the whole process: models whose code cannot be touched.

torch's dispatcher gets a kernel for each of these operators, and keeps the one it had: a call that no kernel of this
package serves goes on to that one.

===================================================================== ==========================================
operator of ``aten``                                                  called by
===================================================================== ==========================================
``lstm``, ``gru``, ``rnn_tanh``, ``rnn_relu`` (``.input``, ``.data``)  torch.nn.LSTM, GRU, RNN, packed input too
``lstm_cell``, ``gru_cell``, ``rnn_tanh_cell``, ``rnn_relu_cell``      torch.nn.LSTMCell, GRUCell, RNNCell
``scaled_dot_product_attention``                                      functional of that name, MultiheadAttention
``_native_multi_head_attention``                                      torch.nn.MultiheadAttention in eval
``_transformer_encoder_layer_fwd``                                    torch.nn.TransformerEncoder(Layer) in eval
===================================================================== ==========================================
"""

import threading
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch._C import DispatchKey, DispatchKeySet
from torch.compiler import config

from seqkern._version import __version__
from seqkern.dispatcher import attention, fast_paths, recurrent
from seqkern.ops import _torchs_own

# A gradient's key stands before the device's, and inference mode skips it: a composite operator needs both.
_FORMS = (
    (("{}", "Autograd{}"), {**recurrent.STAND_INS, **attention.STAND_INS}),
    (("{}", "NestedTensor{}"), fast_paths.STAND_INS),
)

# In the key of torch.compile's caches: a graph on disk that holds our operators must not reach a process without them.
_TAG = f"+seqkern-{__version__}"

_lock = threading.Lock()
_library: torch.library.Library | None = None


class _Enabled:
    """What `enable` returns: a context that undoes, at its end, what this call did."""

    def __init__(self, mine: bool) -> None:
        self._mine = mine

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        if self._mine:
            disable()


def _own(name: str, key: str):
    """torch's kernel for an operator and a key, as a function of its arguments."""
    kernel = torch.library.get_kernel(f"aten::{name}", key)  # type: ignore[arg-type]
    return partial(kernel.call_boxed, DispatchKeySet(getattr(DispatchKey, key)))


def _devices() -> tuple[str, ...]:
    return ("CPU", "CUDA") if torch.backends.cuda.is_built() else ("CPU",)


def _unfollowed(kernel: Callable) -> Callable:
    """Keeps torch.compile out of a kernel of ours. Operators are called inside of graphs, or where one was broken
    already, as before torch.nn.LSTM; there it would compile this package's own Python, anew for all weights."""
    frames = torch._C._dynamo.eval_frame  # type: ignore[attr-defined]
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(
        kernel.__code__, frames._FrameExecStrategy(skip, skip)
    )  # and all that it calls
    return kernel


def _kernels() -> list[tuple[str, str, Callable]]:
    """(operator, key, kernel of this package) of all that stands in, each with torch's own kernel behind it."""
    found = []
    for keys, stand_ins in _FORMS:
        for device in _devices():
            for name, build in stand_ins.items():
                # A composite kernel is the same function under both keys.
                for key in (each.format(device) for each in keys):
                    own = _own(name, device if key.startswith("Autograd") else key)
                    found.append((name, key, _unfollowed(build(own))))
    return found


def enable() -> _Enabled:
    """Lets torch's dispatcher send attention, RNN and cell calls of the whole process to this package.

    What is not served stays torch's own: nested and other subclasses of Tensor, transforms of torch.func and
    forward-mode differentiation, autocast of recurrent layers, what `torch.nn.attention.sdpa_kernel` or
    `seqkern.backend("torch")` asks for, and calls so small that the way here is the cost. `seqkern.explain` names the
    reasons. A second call changes nothing. As a context manager it undoes, at the end, what this call did. Turn it on
    and off while no other thread runs a model.

    A graph that torch.compile or torch.export made keeps the kernels that it was made with: compile after enable.
    Queries without a visible key give 0, where torch's fast paths give NaN.

    Raises:
        RuntimeError: torch refused a kernel; then nothing is enabled.

    >>> import torch, seqkern
    >>> lstm, x = torch.nn.LSTM(3, 4), torch.zeros(5, 2, 3)
    >>> with seqkern.enable():
    ...     output, _ = lstm(x)
    >>> torch.allclose(output, lstm(x)[0])
    True
    """
    global _library
    with _lock:
        if _library is not None:
            return _Enabled(False)
        library = torch.library.Library("aten", "IMPL")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Warning only once for all operators")
                for name, key, kernel in _kernels():
                    library.impl(name, kernel, key, allow_override=True)
        except BaseException:
            library._destroy()
            raise
        _library, _torchs_own.standing_in = library, True
        config.cache_key_tag += _TAG
    return _Enabled(True)


def disable() -> None:
    """Undoes `enable`: every operator of torch has the kernels again that it had before.

    >>> import seqkern
    >>> seqkern.disable()  # nothing to undo is no error
    """
    global _library
    with _lock:
        if _library is None:
            return
        _library._destroy()
        _library, _torchs_own.standing_in = None, False
        config.cache_key_tag = config.cache_key_tag.replace(_TAG, "")
