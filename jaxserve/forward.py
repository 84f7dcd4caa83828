"""The device programs. One call per step: model, paged attention and sampling over donated pages.

`forward` and `sample` can also be called apart, for a row that needs something late, such as a host's mask;
`step` is the two fused, and gives the hidden states out too, for the log-probabilities of prompts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxserve import sample as sampling
from jaxserve.batch import Batch, Bucket, unpack
from jaxserve.model.config import ModelConfig
from jaxserve.model.sharding import copied, pool_sharding, split_heads
from jaxserve.sample import SlotState
from pallas_kernels.kv_write import kv_write
from pallas_kernels.paged_attention import Backend, ragged_paged_attention

Weights = nnx.State[Any, Any]
"""The model's parameters, split from its structure once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What the programs are compiled for, beside the bucket.

    Attributes:
        max_pages: M, columns of the page table.
        kv_dtype: how the pages' bits are read.
        backend: of paged attention.
        deterministic: attention computes a token alike whatever comes with it.
        mesh: over which pages are split by KV heads, and weights with them; None: one device.
    """

    config: ModelConfig
    page_size: int
    max_pages: int
    kv_dtype: str
    backend: Backend
    deterministic: bool = False
    mesh: Mesh | None = None


def attend_pages(batch: Batch, geometry: Geometry) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The model's `attend`: writes K and V into the batch's pages and attends over them."""
    scale = geometry.config.head_dim**-0.5

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, layer: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        pages = kv_write(
            pages, k, v, batch.token_pages, batch.token_offsets, layer, kv_dtype=geometry.kv_dtype
        )
        out = ragged_paged_attention(
            q,
            pages,
            batch.page_table,
            batch.cu_q_lens,
            batch.kv_lens,
            layer,
            kv_dtype=geometry.kv_dtype,
            scale=scale,
            sliding_window=geometry.config.sliding_window,
            uniform=geometry.deterministic,
            backend=geometry.backend,
        )
        return out, pages

    return attend


def attend_shards(batch: Batch, geometry: Geometry, mesh: Mesh) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The same over a mesh: every device does the work of its own heads, with the code that one device runs
    for all of them. So no page crosses over, whatever a partitioner would make of gathers and loops."""
    heads, pool = split_heads(1), split_heads(3)

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, layer: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        def shard(
            batch: Batch, q: jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            return attend_pages(batch, geometry)(q, k, v, pages, layer)

        split = jax.shard_map(
            shard,
            mesh=mesh,
            in_specs=(PartitionSpec(), heads, heads, heads, pool),
            out_specs=(heads, pool),
            check_vma=False,  # the loops' first values are the same on every device, the next ones are not
        )
        return split(batch, q, k, v, pages)

    return attend


class Programs:
    """The compiled functions of one model. Each bucket compiles once.

    Pages and slot state are donated: what was passed in is gone; what comes back has the same address. Over
    a mesh pages stay split by KV heads, and everything else that comes out is copied to every device.
    """

    def __init__(self, graphdef: nnx.GraphDef[Any], geometry: Geometry) -> None:
        self._graphdef = graphdef
        self._geometry = geometry
        pages = rest = None
        if geometry.mesh is not None:
            pages = pool_sharding(geometry.mesh, geometry.config.num_kv_heads)
            rest = copied(geometry.mesh)
        self.step = jax.jit(
            self._step,
            static_argnames="bucket",
            donate_argnums=(1, 2),
            out_shardings=None if rest is None else (pages, rest, rest, rest),
        )
        self.forward = jax.jit(
            self._forward,
            static_argnames="bucket",
            donate_argnums=1,
            out_shardings=None if rest is None else (pages, rest),
        )
        self.sample = jax.jit(self._sample, static_argnames="bucket", donate_argnums=2, out_shardings=rest)
        self.span = jax.jit(_span, static_argnames="count", out_shardings=rest)
        self.prompt_logprobs = jax.jit(self._prompt_logprobs, out_shardings=rest)
        self.set_slot = jax.jit(sampling.set_slot, donate_argnums=0, out_shardings=rest)

    def _unpack(self, packed: jax.Array, bucket: Bucket) -> Batch:
        geometry = self._geometry
        return unpack(packed, bucket, max_pages=geometry.max_pages, page_size=geometry.page_size)

    def _forward(
        self, weights: Weights, pages: jax.Array, packed: jax.Array, *, bucket: Bucket
    ) -> tuple[jax.Array, jax.Array]:
        """(pages, hidden `[T, E]`). Donates pages."""
        batch = self._unpack(packed, bucket)
        model, geometry = nnx.merge(self._graphdef, weights), self._geometry
        attend = (
            attend_pages(batch, geometry)
            if geometry.mesh is None
            else attend_shards(batch, geometry, geometry.mesh)
        )
        hidden, pages = model.hidden(batch.tokens, batch.positions, pages, attend)
        return pages, hidden

    def _sample(
        self, weights: Weights, hidden: jax.Array, slots: SlotState, packed: jax.Array, *, bucket: Bucket
    ) -> tuple[SlotState, jax.Array]:
        """(slots, int32 `[S, 4 + 2 * MAX_LOGPROBS]`): see `sample.pack_sampled`. Donates slots."""
        batch = self._unpack(packed, bucket)
        model = nnx.merge(self._graphdef, weights)
        logits = self._whole(model.logits(hidden[batch.last_tokens]))
        sampled, slots = sampling.sample(logits, slots, batch.slots, batch.num_outputs, batch.samples)
        return slots, sampling.pack_sampled(sampled)

    def _step(
        self, weights: Weights, pages: jax.Array, slots: SlotState, packed: jax.Array, *, bucket: Bucket
    ) -> tuple[jax.Array, SlotState, jax.Array, jax.Array]:
        """(pages, slots, sampled, hidden `[T, E]`). Donates pages and slots."""
        pages, hidden = self._forward(weights, pages, packed, bucket=bucket)
        slots, sampled = self._sample(weights, hidden, slots, packed, bucket=bucket)
        return pages, slots, sampled, hidden

    def _prompt_logprobs(self, weights: Weights, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        """Log-probabilities of `targets` int32 `[N]`, each after its token of `hidden` `[N, E]`.

        Returns:
            int32 `[N, 4 + 2 * MAX_LOGPROBS]`: see `sample.pack_sampled`.
        """
        logits = self._whole(nnx.merge(self._graphdef, weights).logits(hidden))
        return sampling.prompt_logprobs(logits, targets)

    def _whole(self, logits: jax.Array) -> jax.Array:
        """Logits with the whole vocabulary on every device, which samples as one device does."""
        mesh = self._geometry.mesh
        return logits if mesh is None else jax.lax.with_sharding_constraint(logits, copied(mesh))


def _span(hidden: jax.Array, start: jax.Array, *, count: int) -> jax.Array:
    """`count` rows of `hidden` `[T, E]` from `start`; past the end the last row is repeated."""
    return hidden[jnp.minimum(start + jnp.arange(count), len(hidden) - 1)]
