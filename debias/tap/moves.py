"""The operations of torch whose effect on rows is known: moves, what computes each element in its place, reductions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ALONG",
    "BY_PLACE",
    "CASTS",
    "CHANGING",
    "DIVISION",
    "ELEMENTWISE",
    "INPLACE",
    "JOINING",
    "LIKE",
    "MAY_CHANGE",
    "MEAN",
    "MOVES",
    "PRODUCT",
    "PUTTING",
    "RECORDED",
    "REDUCTIONS",
    "REORDERING",
    "SORTING",
    "SUM",
    "among",
    "apply_move",
    "axes_of",
    "effect_of",
    "functions",
    "is_irregular",
    "keeps_rows",
    "kind_of",
    "looked_up",
    "named",
    "pooled_rows",
    "read_arguments",
    "sorts_rows",
    "tensors_in",
    "thinned",
    "values_read",
]

_T = torch.Tensor


def named(names: str, forms: str = "{}") -> frozenset[Any]:
    """The functions of torch, of ``torch.nn.functional`` and of tensors by these names, each in these forms."""
    spaces: tuple[Any, ...] = (_T, torch, F)
    every = [form.format(name) for name in names.split() for form in forms.split()]
    return frozenset(getattr(space, name) for space in spaces for name in every if hasattr(space, name))


def functions(names: str) -> frozenset[Any]:
    """The same, in place and as operators, too."""
    return named(names, "{} {}_ __{}__ __i{}__ __r{}__")


def among(functions: Iterable[Any]) -> Callable[[Any], bool]:
    """Whether a function is one of these, for what Dynamo traces with every operation.

    With ``function in functions`` it would wrap, and guard, all of them each time.
    """
    found = frozenset(functions)

    @torch.compiler.assume_constant_result
    def is_one(function: Any) -> bool:
        return function in found

    return is_one


# Change neither order nor number of elements nor shape.
CASTS = frozenset(
    {_T.float, _T.double, _T.half, _T.bfloat16, _T.long, _T.int, _T.bool, _T.to, _T.type, _T.contiguous, _T.clone}
    | {_T.detach, _T.type_as, torch.clone, torch.detach, _T.cuda, _T.cpu, _T.requires_grad_, _T.__deepcopy__}
)
# Read of another tensor its shape, dtype and device; of their first argument, its values.
_reads_the_first = among(CASTS | {_T.expand_as, _T.view_as, _T.reshape_as})
# Make a tensor like the first argument, of which they read no value.
LIKE = named(
    "zeros_like ones_like empty_like full_like rand_like randn_like randint_like"
    " new_zeros new_ones new_empty new_full new_tensor"
)
_reads_no_first = among(LIKE)


def read_arguments(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments whose values an operation reads: of ``mask.to(losses)`` the mask, of ``zeros_like(x)`` none."""
    return args[:1] if _reads_the_first(func) else args[1:] if _reads_no_first(func) else args


def values_read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among these arguments."""
    by_name = () if args and _reads_the_first(func) else kwargs.values()
    return [x for x in (*read_arguments(func, args), *by_name) if isinstance(x, Tensor)]


def is_irregular(x: Any) -> bool:
    """Whether it is a sparse, nested or quantised tensor, of which little can be asked."""
    return isinstance(x, Tensor) and (x.layout is not torch.strided or x.is_nested or x.is_quantized)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in lists, tuples and dictionaries, but for irregular ones."""
    if isinstance(value, Tensor):
        return [] if is_irregular(value) else [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for part in value for x in tensors_in(part)] if isinstance(value, tuple | list) else []


JOINING = named("cat concat concatenate")
# Leave every row in its place whenever they keep the number of rows.
_ROW_KEEPING = named(
    "reshape flatten squeeze unsqueeze unflatten view expand view_as reshape_as expand_as narrow chunk split"
    " tensor_split hsplit vsplit dsplit cat concat concatenate"
)
# Leave all elements in their order, or repeat them: the last axes stay, where they are as long as before.
_IN_ORDER = named("reshape flatten unflatten view_as reshape_as ravel repeat_interleave repeat tile")
# Take what lies at some places of an axis.
_PICKING = named("select unbind index_select gather")
# Unless they put axes in front of the rows.
_SPREADING = named("expand expand_as")
# Move whole rows, unless told of another axis than the first.
_ROW_WISE = JOINING | named("index_select")
_TURNING = named("flip fliplr flipud roll __reversed__") | {torch.fft.fftshift, torch.fft.ifftshift}
_TRANSPOSING = frozenset({_T.T.__get__, _T.mT.__get__, _T.H.__get__, _T.mH.__get__})  # type: ignore[attr-defined]
# Move, drop or repeat elements; only the first argument (or its list) holds data.
MOVES = (_ROW_KEEPING | _ROW_WISE | _TURNING | _TRANSPOSING) | named(
    "permute transpose t repeat_interleave unbind movedim swapaxes swapdims select masked_select take take_along_dim"
    " gather tile repeat moveaxis diagonal rot90 stack hstack vstack __getitem__ adjoint ravel"
)
# Compute each element from those at the same place; targets and masks are often made with them.
_IN_PLACES = (
    "gt ge lt le eq ne add sub subtract mul multiply div divide true_divide floor_divide remainder fmod clamp"
    " clamp_min clamp_max clip abs absolute neg negative round floor ceil sign square pow float_power sqrt rsqrt exp"
    " expm1 log log1p log2 reciprocal sigmoid tanh cosh sinh logical_not logical_and logical_or logical_xor"
    " bitwise_and bitwise_or where masked_fill minimum maximum isnan isfinite isinf nan_to_num relu relu6 leaky_relu"
    " erf erfc erfinv sin cos tan asin acos atan atan2 hypot lgamma digamma logit xlogy logaddexp heaviside trunc frac"
    " lerp addcmul addcdiv isclose bernoulli poisson"
    " elu selu silu gelu mish hardtanh hardswish hardsigmoid softplus logsigmoid dropout threshold"
    " pos truediv floordiv mod invert and or xor"  # as operators
)
ELEMENTWISE = named(_IN_PLACES, "{} __{}__ __r{}__")
# The same, in place; so are the above where they return what they were given.
INPLACE = named(_IN_PLACES, "{}_ __i{}__") | named("zero_ fill_ __setitem__")
# Everything that changes a tensor in place.
CHANGING = frozenset(
    getattr(_T, name)
    for name in dir(_T)
    if name in ("__setitem__", "set_data") or re.fullmatch("[a-z].*[^_]_|__i(add|sub|mul|truediv|and|or|pow)__", name)
) - {_T.requires_grad_}
_changes = among(CHANGING)
# And functions that change what they are given, some only with `inplace=True`.
_arguments = {x: getattr(getattr(x, "__code__", None), "co_varnames", ()) for x in vars(F).values() if callable(x)}
MAY_CHANGE = (
    CHANGING
    | {x for x, names in _arguments.items() if "inplace" in names}
    | {x for name, x in (*vars(torch).items(), *vars(F).items()) if re.fullmatch("[a-z].*[^_]_", name)}
)
# Put elements elsewhere along an axis: to each row by itself, if that is not the first one.
_PUTTING_ALONG = named(
    "scatter scatter_add scatter_reduce index_copy index_add index_reduce select_scatter slice_scatter", "{} {}_"
)
_puts_along = among(_PUTTING_ALONG)
_pools = among(named("scatter_add scatter_reduce index_add index_reduce", "{} {}_"))
# Put elements elsewhere: after them nobody knows where a row is.
PUTTING = _PUTTING_ALONG | named(
    "put index_put masked_scatter diagonal_scatter put_ index_put_ masked_scatter_ transpose_ t_ swapaxes_ swapdims_"
    " resize_"
)
SUM, MEAN = named("sum"), named("mean")
PRODUCT = functions("mul multiply")
DIVISION = named("div divide true_divide truediv", "{} {}_ __{}__ __i{}__")
# Make one value of all along some axes.
REDUCTIONS = named("sum mean argmax argmin max min amax amin any all prod count_nonzero nansum nanmean median")
# Make each value of all along an axis.
ALONG = named("softmax log_softmax softmin cumsum cumprod logcumsumexp cummax cummin")
# After these nobody knows where a row is.
SORTING = named("sort topk msort argsort")
# Take the rows of sequences apart, or put them together.
_PACKING = frozenset({torch._VF._pack_padded_sequence, torch._VF._pad_packed_sequence})  # type: ignore[attr-defined]
# Make a value, or a row of values, of each element of integers.
_LOOKUPS = frozenset({F.one_hot, F.embedding})
_looks_up = among(named("index_select gather take __getitem__"))
_CHOOSING = named(
    "__getitem__ index_select gather take take_along_dim masked_select narrow select unbind chunk split tensor_split"
    " vsplit"
)
# Take what lies at some places of an axis, unless they are told these by a mask or a tensor of places.
BY_PLACE = named("__getitem__ narrow select unbind chunk split tensor_split vsplit")
# What steps and networks put rows in another order by, or choose some, and not merely axes.
REORDERING = SORTING | PUTTING | _TURNING | _CHOOSING | JOINING | named("rot90")

_BY_KIND = {
    "move": MOVES,
    "cast": CASTS,
    "elementwise": ELEMENTWISE,
    "in place": INPLACE | {_T.copy_},
    "putting": PUTTING,
    "packing": _PACKING,
    "reduction": REDUCTIONS,
    "along": ALONG,
    "sorting": SORTING,
    "lookup": _LOOKUPS,
}
_KINDS = {function: kind for kind, functions in _BY_KIND.items() for function in functions}
RECORDED = frozenset(_KINDS)


@torch.compiler.assume_constant_result
def kind_of(func: Any) -> str | None:
    """What a function does to rows, as named above; None where nobody knows."""
    return _KINDS.get(func)


def effect_of(kind: str | None, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> str | None:
    """The kind of an operation, with what its arguments say of that; None where it leaves rows unsorted."""
    if kind == "sorting":
        return kind if sorts_rows(func, args, kwargs) else None
    if kind == "putting" and _puts_rows(func, args, kwargs):
        return kind
    if out is args[0] or (kind == "putting" and _changes(func)):  # also y.long(), which may be y itself
        return "in place"
    of_two = kind == "reduction" and len(values_read(func, args[:2], kwargs)) > 1  # their maximum
    return "elementwise" if of_two or kind == "putting" else kind


def thinned(tensors: Sequence[Tensor], first: int = 0) -> list[Tensor]:
    """Of each axis, from the first on, along which no element of any of these tensors changes, one element."""
    axes = range(tensors[0].ndim)
    still = [axis >= first and all(x.stride(axis) == 0 for x in tensors) for axis in axes]
    return [x[tuple(slice(0, 1) if s else slice(None) for s in still)] for x in tensors]


def apply_move(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], data: Any, part: int | None
) -> Any:
    """Run a recorded move on other data of the same shape."""
    if func is _T.view:  # of data that is expanded, where the original was not
        shape = (*args[1:], *kwargs.values())
        return data if isinstance(shape[0], torch.dtype) else _still(data, data.reshape(*shape))
    given = data if isinstance(data, tuple | list) else [data]
    turns = func in _TURNING and (func.__name__ != "roll" or len(args) > 2 or "dims" in kwargs)
    if (turns or _takes_rows(func, args, kwargs)) and len({x.ndim for x in given}) == 1:
        # They change nothing along axes in which every element is the same, so none is made for every pixel.
        small = thinned(given, first=0 if turns else 1)
        out = func(small if given is data else small[0], *args[1:], **kwargs)
        return out.expand(given[0].shape if turns else (len(out), *given[0].shape[1:]))
    out = func(data, *args[1:], **kwargs)
    out = out if part is None else out[part]
    return _still(data, out) if func in _IN_ORDER else out


def _still(before: Tensor, after: Tensor) -> Tensor:
    """What an operation that leaves the last axes as they are has made of data which do not change along them."""
    sizes = zip(reversed(before.shape), reversed(before.stride()), reversed(after.shape), strict=False)
    still = [stride == 0 and size == now for size, stride, now in sizes]
    first: Any = (..., *[slice(0, 1)] * [*still, False].index(False))
    return after[first].expand(after.shape)


def keeps_rows(move: Callable[..., Any], args: tuple[Any, ...], out: Any) -> bool:
    """Whether a move of one tensor has left every row in its place."""
    data = args[0]
    if not isinstance(data, Tensor) or not isinstance(out, Tensor) or 0 in (data.ndim, out.ndim):
        return False
    if data.shape[0] != out.shape[0]:
        return False
    if move in _PICKING:
        return len(args) > 1 and args[1] % data.ndim != 0
    if move is _T.__getitem__ and isinstance(args[1], tuple) and args[1]:
        first, *others = args[1]
        keys = [key for key in others if key is not None and key is not Ellipsis]
        # Several arrays may put their axis in front, and `...` may stand for no axis at all.
        plain = all(isinstance(key, slice | int) for key in keys) or (len(keys) == 1 and _is_index(keys[0]))
        at_first = first is Ellipsis and len(keys) < data.ndim
        return plain and (at_first or (isinstance(first, slice) and first == slice(None)))
    return move in _ROW_KEEPING and (move not in _SPREADING or data.ndim == out.ndim)


def _is_index(key: Any) -> bool:
    return isinstance(key, Tensor) and key.dtype != torch.bool


def looked_up(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The integers by which values are looked up in a tensor, where these are the rows of what is made."""
    if not _looks_up(func) or not isinstance(args[0], Tensor):
        return None
    key = kwargs.get("index", args[-1])
    if not _is_index(key) or not key.ndim or key.is_floating_point():
        return None
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    return None if func.__name__ == "index_select" and dim != 0 else key


def _takes_rows(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a move takes whole rows, so that it does the same to a tensor without the other axes."""
    if func is _T.__getitem__:
        key = args[1]
        return isinstance(key, slice) or (isinstance(key, Tensor) and key.ndim == 1)
    return func in _ROW_WISE and all(type(x) is not int or x == 0 for x in (*args[1:2], *kwargs.values()))


def axes_of(args: tuple[Any, ...], kwargs: dict[str, Any], ndim: int) -> list[int]:
    """The axes that a reduction runs over."""
    dims = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
    if not ndim or dims is None or isinstance(dims, Tensor | float | str):
        return list(range(ndim))
    return sorted({d % ndim for d in ([dims] if isinstance(dims, int) else dims)})


def _puts_rows(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether what puts elements elsewhere may put them into other rows; a number is of no row."""
    if func.__name__ in ("index_put", "index_put_") and len(args) > 2 and not args[2].ndim:
        return False
    place = 2 if func.__name__ in ("select_scatter", "slice_scatter") else 1
    dim = args[place] if len(args) > place else kwargs.get("dim", 0)
    return not (_puts_along(func) and isinstance(dim, int) and dim % max(args[0].ndim, 1))


def pooled_rows(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], n: int) -> list[Tensor] | None:
    """Rows, not those of the ``n`` samples, that are added up for each of these, as the nodes of graphs, and the index
    that says for which; None where an operation does something else.
    """
    if not (_pools(func) and len(args[0]) == n):
        return None
    index = args[2] if len(args) > 2 else kwargs["index"]
    rows = args[3] if len(args) > 3 else kwargs["source" if "source" in kwargs else "src"]
    return None if (n,) in (rows.shape[:1], index.shape[:1]) else [rows, index]


def sorts_rows(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a sort runs over the first axis."""
    name = func.__name__
    place = 2 if name == "topk" else 1
    dim = 0 if name == "msort" else args[place] if len(args) > place else kwargs.get("dim", -1)
    return args[0].ndim > 0 and isinstance(dim, int) and dim % args[0].ndim == 0
