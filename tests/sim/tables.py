"""A small table of step costs, made up: a bucket's base is its tokens in milliseconds."""

from dataclasses import replace

from jaxserve.batch import decode_buckets, mixed_buckets
from jaxserve.sim.costs import BucketCost, CostTable, EngineShape, HttpCost, Machine, TransferCost

ROWS, TOKENS, PAGE_SIZE, PAGE_BYTES = 4, 64, 16, 1000


def table(**engine: int) -> CostTable:
    """Four rows, 64 tokens per step, contexts of 512. `engine`: fields of EngineShape in place of these."""
    shape = EngineShape(
        model="made up",
        dtype="float32",
        page_size=PAGE_SIZE,
        page_bytes=PAGE_BYTES,
        num_pages=129,
        max_num_seqs=ROWS,
        max_num_batched_tokens=TOKENS,
        max_model_len=512,
    )
    buckets = decode_buckets(ROWS) + mixed_buckets(TOKENS, ROWS)
    return CostTable(
        machine=Machine(processor="none", cores=1, python="3", jax="0"),
        engine=replace(shape, **engine),
        buckets=tuple(
            BucketCost(
                tokens=bucket.tokens,
                rows=bucket.rows,
                base_s=bucket.tokens / 1000,
                by_context_s=1e-5,
                by_pair_s=1e-6,
            )
            for bucket in buckets
        ),
        host_s=0.25,
        host_row_s=0.5,
        transfer=TransferCost(fixed_s=0.001, bytes_per_s=1e6, message_s=0.002),
        http=HttpCost(server_s=0.003, router_s=0.004),
    )
