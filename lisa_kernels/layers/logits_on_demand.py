"""A model's output whose logits are formed when someone reads them, and which is the model's own from then on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

from torch import Tensor

from lisa_kernels.uncompiled import uncompiled

LOGITS = "logits"


def can_form_on_demand(output: Any) -> bool:
    """Return whether this is one of transformers' outputs, with logits in it."""
    from transformers.utils import ModelOutput

    return isinstance(output, ModelOutput) and LOGITS in output


@uncompiled
def form_logits_on_demand(output: Any, form: Callable[[], Tensor]) -> Any:
    """Return the same output, its logits taken out and formed by `form` once they are read, in whatever way.

    Attribute, key, position, slice, `get`, views of the values, a tuple, pickles and copies read them; the loss, keys
    and lengths do not. The output is then of its own class again, of which it is an instance all the time.
    """
    # Its place among the keys stays.
    output[LOGITS] = None
    vars(output)["form_logits"] = form
    output.__class__ = _on_demand(type(output))  # type: ignore[arg-type]
    return output


class _OnDemand:
    """What comes before a model's class of outputs: every reader forms the logits and leaves the rest to that class."""

    __slots__ = ()
    plain: ClassVar[type]

    def __post_init__(self) -> None:
        """Make an ordinary output of one that someone else makes of this class: it is given its logits."""
        self._settle()
        self.__post_init__()

    def _settle(self) -> Callable[[], Tensor] | None:
        """Make this an output of its own class; returns what forms its logits."""
        form: Callable[[], Tensor] | None = vars(self).pop("form_logits", None)
        self.__class__ = self.plain  # type: ignore[assignment]
        return form

    def _form(self) -> Any:
        form = self._settle()
        if form is not None:
            self[LOGITS] = form()  # type: ignore[index]
        return self

    @property
    def logits(self) -> Tensor:
        """The logits, formed now."""
        formed: Tensor = self._form().logits
        return formed

    def __getitem__(self, key: Any) -> Any:
        names: Any = list(self) if isinstance(key, (int, slice)) else {key: key}  # type: ignore[call-overload]
        read = names[key]
        if LOGITS in (read if isinstance(read, list) else [read]):
            return self._form()[key]
        held = dict(zip(self, super().values()))  # type: ignore[call-overload,misc]
        return tuple(held[name] for name in read) if isinstance(read, list) else held[read]

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the value of a key, as a mapping does."""
        try:
            return self[key]
        except KeyError:
            return default

    def __setitem__(self, key: Any, value: Any) -> None:
        if key == LOGITS:
            self._settle()
            self[key] = value  # type: ignore[index]
        else:
            super().__setitem__(key, value)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == LOGITS:
            self._settle()
            setattr(self, name, value)
        else:
            super().__setattr__(name, value)


def _after_forming(name: str) -> Callable[..., Any]:
    def read(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._form(), name)(*args, **kwargs)

    return read


# What reads all values.
for _name in (
    "items", "values", "to_tuple", "popitem", "copy", "__reduce__", "__reduce_ex__", "__repr__", "__eq__", "__ne__",
    "__or__", "__ror__",
):  # fmt: skip
    setattr(_OnDemand, _name, _after_forming(_name))


@cache
def _on_demand(cls: type) -> type:
    """Return the subclass of a model's class of outputs that forms logits on demand."""
    return type(cls.__name__, (_OnDemand, cls), {"plain": cls, "__module__": __name__})
