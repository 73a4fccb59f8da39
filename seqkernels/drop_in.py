"""What lets our modules be used as torch.nn's by code that asks for classes, weights, pickles or graphs."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import ClassVar, NoReturn

from torch import Tensor, fx, nn
from torch.fx import Proxy
from torch.utils import _pytree as pytree

from seqkernels import kept_weights


class DropIn(type):
    """The class of our classes. Inside `patch_torch`, where torch.nn.GRU is ours, `isinstance` and `issubclass` of
    it are true of torch.nn's own modules as well, as there code that asks for nn.GRU means either."""

    counting: ClassVar[dict[type, type]] = {}  # ours -> the torch.nn class whose instances count as its own

    def __instancecheck__(cls, instance) -> bool:
        return super().__instancecheck__(instance) or isinstance(instance, DropIn.counting.get(cls, ()))

    def __subclasscheck__(cls, subclass) -> bool:
        return super().__subclasscheck__(subclass) or issubclass(subclass, DropIn.counting.get(cls, ()))


@contextlib.contextmanager
def counting_as(torchs: dict[type, type]) -> Iterator[None]:
    """Inside, instances of torch.nn's classes count as instances of ours."""
    before, DropIn.counting = DropIn.counting, torchs
    try:
        yield
    finally:
        DropIn.counting = before


def check_module(value: object, sentence: str) -> None:
    """
    Raises:
        TypeError: `sentence`, and what was given, where that is no module.
    """
    if not isinstance(value, nn.Module):
        what = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
        raise TypeError(f"{sentence}, got {what}")


def parameters(module: nn.Module, names: Sequence[str]) -> list:
    # A parametrized weight is no parameter but an attribute; nn.Module's own lookup would take twice the time.
    parameters = module._parameters
    return [parameters[name] if name in parameters else getattr(module, name) for name in names]


class FlatWeights(list):
    """A layer's weights in torch.nn's order. One put in place of another is used from then on, as in torch.nn."""

    def __init__(self, module: "Layer", weights: Sequence[Tensor]) -> None:
        super().__init__(weights)
        self._module = module

    def __setitem__(self, index, value) -> None:
        super().__setitem__(index, value)
        self._module._flat_weights = self

    def _fail(self, *_):
        raise TypeError("of _flat_weights only items can be put in place of others; or assign a whole list to it")

    # Each would change this list and not the layer.
    append = extend = insert = pop = remove = clear = sort = reverse = _fail  # type: ignore[assignment]
    __delitem__ = __iadd__ = __imul__ = _fail

    def __reduce__(self):
        return list, (list(self),)


# What goes through nested lists, as call_for_per_sample_grads does, knows a class of lists only if told.
pytree.register_pytree_node(FlatWeights, lambda weights: (list(weights), None), lambda weights, _: list(weights))


def tracer_of(input, hx, lengths=None, reset=None, reset_to=None) -> fx.Tracer | None:
    """What traces a call with these arguments, if torch.fx does: any of them may be the one that stands for a value."""
    if hx is None and lengths is None and reset is None:  # most calls, and fast in every one
        return input.tracer if isinstance(input, Proxy) else None  # type: ignore[return-value]
    states = (state for given in (hx, reset_to) for state in (given if isinstance(given, tuple) else (given,)))
    for argument in (input, lengths, reset, *states):
        if isinstance(argument, Proxy):
            return argument.tracer  # type: ignore[return-value]
    return None


def traced(tracer: fx.Tracer, module: nn.Module, input, hx, **options) -> Proxy:
    """A call of `module` in a graph that torch.fx traces, where torch.nn's modules are leaves and ours become one."""
    if module is tracer.root:
        raise fx.proxy.TraceError(f"{type(module).__name__} is one node of a graph: trace a model that it is part of")
    args = (input,) if hx is None else (input, hx)
    given = {name: value for name, value in options.items() if value is not None}
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, given)


def fail_on_script(module: nn.Module) -> NoReturn:
    """torch.jit.script asks a module for `__prepare_scriptable__` before it looks at its code."""
    ours = f"seqkernels.{type(module).__name__}"
    raise RuntimeError(f"TorchScript has no {ours}: take torch.export, or script the model after swap_out(model)")


def fail_on_opacus(module: nn.Module) -> NoReturn:
    """Opacus calls `allow_grad_accumulation` on what it wraps, before it takes samples' gradients from a first output
    alone: it would fail on a tuple, and without a word leave out what went through the final states."""
    raise RuntimeError(
        f"Opacus' hooks cannot take the gradients of each sample from seqkernels.{type(module).__name__}: use "
        'grad_sample_mode="ew" (layers alone), or Opacus\' own layers after swap_out(model)'
    )


class Layer(nn.RNNBase, metaclass=DropIn):
    """A layer whose parameters are read by name in every call: there is no second list of them to go stale."""

    __prepare_scriptable__ = fail_on_script
    allow_grad_accumulation = fail_on_opacus

    def flatten_parameters(self) -> None:
        """Does nothing: parameters are used where they lie."""

    # nn.RNNBase keeps a second list of its parameters up to date in the methods below. Here they are looked up
    # whenever they are asked for. Only a weight that was put into that list in place of a parameter is kept, by name.

    def _weights(self) -> list[Tensor]:
        assigned = self.__dict__.get("_assigned_weights")
        if not assigned:
            return parameters(self, self._flat_weights_names)
        return [assigned[n] if n in assigned else parameters(self, (n,))[0] for n in self._flat_weights_names]

    @property
    def _flat_weights(self) -> list:
        return FlatWeights(self, self._weights())

    @_flat_weights.setter  # type: ignore[override]
    def _flat_weights(self, weights: Sequence[Tensor]) -> None:
        names = self._flat_weights_names
        if len(weights) != len(names):
            raise ValueError(f"_flat_weights are {', '.join(names)}, got {len(weights)} weights")
        self.__dict__["_assigned_weights"] = {
            name: weight for name, weight in zip(names, weights, strict=True) if weight is not getattr(self, name, None)
        }

    def _init_flat_weights(self) -> None:
        self.__dict__.pop("_assigned_weights", None)

    def _update_flat_weights(self) -> None:
        pass

    def _weights_have_changed(self) -> bool:
        return False

    def __setattr__(self, name: str, value) -> None:
        if name == "_flat_weights":  # nn.Module's own does not ask properties where the value is no parameter
            return object.__setattr__(self, name, value)
        if "_assigned_weights" in self.__dict__ and name in self._flat_weights_names:
            self._init_flat_weights()  # a new parameter counts, and in torch.nn puts the others back as well
        nn.Module.__setattr__(self, name, value)

    def _apply(self, fn, recurse: bool = True):
        self._init_flat_weights()
        kept_weights.release(self)
        return nn.Module._apply(self, fn, recurse)

    def _replicate_for_data_parallel(self):
        replica = nn.Module._replicate_for_data_parallel(self)
        if assigned := self.__dict__.get("_assigned_weights"):
            replica.__dict__["_assigned_weights"] = assigned.copy()
        return replica

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        state.pop("_flat_weight_refs", None)  # torch.nn's, which cannot be pickled
        return state

    def __setstate__(self, state: dict) -> None:
        nn.Module.__setstate__(self, state)
