"""A token embedding with a low-rank slot, hung on the model's own, or one whose table trains in full.

Beside weights that rest the table is in host memory, and lookups are made there: of it only rows reach the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lisa_kernels.basis import BasisTracker
from lisa_kernels.distributed import is_sharded, is_unit
from lisa_kernels.errors import InputError
from lisa_kernels.layers.accumulating import AccumulatingSlot, keep_where_it_is, put_host_memory_last
from lisa_kernels.layers.slot import SlotModule
from lisa_kernels.ops.lowrank_embedding import capture_embedding, lowrank_embedding, ordered_embedding

# The child under which an embedding carries its slot.
CHILD = "low_rank"
# Rows looked up to see what a model's own class of embedding makes of its table.
PROBED_ROWS = 64


class LowRankEmbedding(SlotModule):
    """The slot B [r, V] and basis P [r, n] of a token embedding's table [V, n]; it is not the embedding itself.

    The embedding stays the model's own and keeps its forward; the slot hangs on it as a child module. The table is
    reached as `weight` and registered there only.
    """

    def __init__(self, embedding: nn.Embedding, rank: int, tracker: BasisTracker) -> None:
        shape = embedding.num_embeddings, embedding.embedding_dim
        super().__init__(shape, embedding.weight.device, rank, tracker=tracker)
        # Past nn.Module, which would register it a second time.
        object.__setattr__(self, "weight", embedding.weight)

    @property
    def stored_weight(self) -> nn.Parameter:
        """The table."""
        return self.weight  # type: ignore[return-value]


class AccumulatingEmbedding(AccumulatingSlot, LowRankEmbedding):
    """The slot of a table that is in host memory, where what the slot has accumulated is put from time to time.

    Lookups wait for their ids: a model whose table is on the host is one wait a forward behind a GPU.
    """

    def __init__(self, embedding: nn.Embedding, rank: int, tracker: BasisTracker) -> None:
        super().__init__(embedding, rank, tracker)
        self._keep_master()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Leave the table where it is when the slot moves."""
        super()._apply(fn, recurse)
        self._follow()
        return self


class EmbeddingTap:
    """A forward hook that takes the gradient of looked-up rows into the slot of `layer`.

    `layer` is the embedding's own slot or, where the table is tied to the output layer's weight, the slot of that
    layer: both uses then add up in one gradient, in one basis. While it rests, the rows pass as they are, and nothing
    below the blocks is in the graph. What an accumulating slot has learnt is added to the rows.
    """

    def __init__(self, embedding: nn.Embedding, layer: SlotModule) -> None:
        self.layer = layer
        self.factor = lookup_factor(embedding)
        self.padding = _padding(embedding)
        self.rests = False

    def __call__(self, embedding: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor) -> Tensor:
        """Return the rows with the slot in their graph, as a forward hook is called."""
        layer = self.layer
        if isinstance(layer, AccumulatingSlot):
            y = y.to(layer.device)
        if not layer.active:
            return y
        ids = _ids(args, kwargs).to(y.device)
        # Before a basis is found beside it a slot is settled.
        live = layer.is_adapter and not layer.capturing
        if self.rests or not torch.is_grad_enabled():
            if not live:
                return y
            return lowrank_embedding(y, ids, layer.slot.detach(), layer.basis, self.factor, self.padding, False)
        if layer.capturing and layer.shares_basis:
            return capture_embedding(y, ids, layer.slot, layer.refresh_from_rows, self.factor, self.padding, None)
        if layer.capturing:
            return capture_embedding(y, ids, layer.slot, layer.refresh_basis, self.factor, self.padding, layer.rank)
        return lowrank_embedding(y, ids, layer.slot, layer.basis, self.factor, self.padding, not live)


class HostTable:
    """Hooks on an embedding whose table is the master of an accumulating slot, and in host memory.

    Ids go to the table; the table stays where it is when the model moves, and is saved and loaded as what was learnt.
    around: the modules that the embedding is in, of which it is no longer the first parameter.
    """

    def __init__(self, embedding: nn.Embedding, layer: AccumulatingSlot, around: Sequence[nn.Module]) -> None:
        self.embedding, self.layer, self.around = embedding, layer, around
        # What a class of the model's own multiplies its rows by is where the rows are.
        for name, buffer in embedding._buffers.items():
            embedding._buffers[name] = None if buffer is None else buffer.to(embedding.weight.device)
        keep_where_it_is(embedding)
        for module in around:
            put_host_memory_last(module)
        self._handles = [
            embedding.register_forward_pre_hook(self._bring_ids, with_kwargs=True),
            embedding.register_state_dict_post_hook(partial(self._save)),
            embedding.register_load_state_dict_pre_hook(self._load),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        del self.embedding._apply
        for module in self.around:
            del module.parameters

    def _bring_ids(self, embedding: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        ids, device = _ids(args, kwargs), self.layer.stored_weight.device
        if ids.device == device:
            return args, kwargs
        # The host waits for the ids here, as it would for any number of a GPU.
        return ((ids.to(device), *args[1:]), kwargs) if args else (args, {**kwargs, "input": ids.to(device)})

    def _save(self, embedding: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if self.layer.home is not None:
            self.layer.home.check()
        if self.layer.is_adapter:
            state[f"{prefix}weight"] = self.layer.saved_in(state)

    def _load(self, embedding: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
        """Hand over what is here where that is what is loaded; else the slot begins anew."""
        layer = self.layer
        if layer.load_master(state, f"{prefix}weight"):
            layer.begin_anew()
            return
        given = state.get(f"{prefix}weight")
        if not layer.is_adapter or not isinstance(given, Tensor) or given.shape != layer.stored_weight.shape:
            return
        if layer.holds(given):
            state[f"{prefix}weight"] = layer.stored_weight
        else:
            layer.begin_anew()


class OrderedLookup:
    """A forward hook with which the gradient of an embedding's table adds its tokens in their order."""

    def __init__(self, embedding: nn.Embedding) -> None:
        self.factor, self.padding = lookup_factor(embedding), _padding(embedding)

    def __call__(self, embedding: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor) -> Tensor:
        """Return the rows with the table in their graph, as a forward hook is called."""
        table: Tensor = embedding.weight  # type: ignore[assignment]
        # The model may have been on the host when it was attached.
        if not table.is_cuda or not table.requires_grad or not torch.is_grad_enabled():
            return y
        return ordered_embedding(y.detach(), _ids(args, kwargs), table, self.factor, self.padding)


class OrderedTables:
    """Has the gradients of tables that train in full added in one order on GPUs, where torch's own has none.

    torch adds many tokens of few ids with atomics there, and equal runs would have other bits. Embeddings that return
    more than their rows, or change their table or its gradient, keep torch's gradient.
    """

    def __init__(self, model: nn.Module, trained: Iterable[Tensor]) -> None:
        tables = {id(param) for param in trained}
        get = getattr(model, "get_input_embeddings", None)
        token_embedding = get() if callable(get) else None
        self._handles: list[RemovableHandle] = []
        for module in model.modules():
            if not isinstance(module, nn.Embedding) or id(module.weight) not in tables:
                continue
            if module.sparse:
                continue
            # What a class of the model's own takes is known of its tokens' embedding only: positions have no ids.
            if type(module).forward is not nn.Embedding.forward and module is not token_embedding:
                continue
            try:
                hook = OrderedLookup(module)
            except InputError:
                continue
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Give the tables torch's gradient back."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


@dataclass
class TappedEmbedding:
    """An embedding that was given a slot: where it sits, the layer that holds the slot, the hook and its handle."""

    path: str
    embedding: nn.Embedding
    layer: SlotModule
    tap: EmbeddingTap
    handle: RemovableHandle
    host_table: HostTable | None = None

    def rest(self, rests: bool) -> None:
        """Leave the lookups out of the slot's gradient, or take them in again."""
        self.tap.rests = rests

    def undo(self) -> None:
        """Take hook and slot off; the embedding is as it was, with its table as it is now."""
        self.handle.remove()
        if self.host_table is not None:
            self.host_table.remove()
        self.embedding._modules.pop(CHILD, None)


def _ids(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    ids: Tensor = args[0] if args else kwargs["input"]
    return ids


def _padding(embedding: nn.Embedding) -> int:
    return -1 if embedding.padding_idx is None else embedding.padding_idx


@torch.no_grad()
def lookup_factor(embedding: nn.Embedding) -> float:
    """Return the constant f with which the module returns f · E[ids]: not 1 where a model scales its embedding.

    Raises InputError for modules that return anything else, or change their table or its gradient.
    """
    if embedding.max_norm is not None or embedding.scale_grad_by_freq:
        raise InputError(
            "an embedding with max_norm or scale_grad_by_freq cannot carry a low-rank slot; use "
            'embeddings="always", "frozen" or "sampled".'
        )
    if is_unit(embedding):
        raise InputError(
            "the token embedding is under fully_shard by itself, where it can carry no slot; share it out with what is "
            "around the blocks: fully_shard(model)."
        )
    table = embedding.weight
    if table.is_meta:  # a plan's: no values, and the factor decides no bytes
        return 1.0
    ids = torch.arange(min(PROBED_ROWS, len(table)), device=table.device)
    if is_sharded(table):
        # The factor is one of the class: any rows tell it, and nothing has to be gathered.
        probed = torch.randn(len(ids), table.shape[1], generator=torch.Generator().manual_seed(0))
        rows = probed.to(table.device, table.dtype)
        looked_up = torch.func.functional_call(embedding, {"weight": rows}, (ids,))
    else:
        rows, looked_up = table[ids], embedding(ids)
    rows, found = rows.to(torch.float32), looked_up.to(torch.float32)
    squares = float((rows * rows).sum())
    factor = float((rows * found).sum()) / squares if squares else 1.0
    # Wide enough for products rounded to bfloat16.
    if not torch.allclose(found, factor * rows, rtol=1e-2, atol=1e-2 * float(rows.abs().max())):
        raise InputError(
            f'{type(embedding).__name__} returns more than its rows; use embeddings="always", "frozen" or "sampled".'
        )
    return 1.0 if abs(factor - 1.0) < 1e-3 else factor


def tap_embedding(
    path: str, embedding: nn.Embedding, layer: SlotModule, around: Sequence[nn.Module] = ()
) -> TappedEmbedding:
    """Lead the gradient of `embedding`'s rows into the slot of `layer`, which it carries if it is its own.

    around: the modules that the embedding is in.
    """
    host_table = HostTable(embedding, layer, around) if isinstance(layer, AccumulatingSlot) else None
    tap = EmbeddingTap(embedding, layer)
    handle = embedding.register_forward_hook(tap, with_kwargs=True)
    if isinstance(layer, LowRankEmbedding):
        embedding.add_module(CHILD, layer)
    return TappedEmbedding(path, embedding, layer, tap, handle, host_table)
