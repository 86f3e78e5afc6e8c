"""How large the KV cache is, and what it costs: pure arithmetic over a model's geometry.

    token_bytes = layers * 2 * kv_heads * head_dim * itemsize            the cache itself
                + masks * batch_tokens * itemsize                        its column of the masks
                + (2 * heads + kv_heads) * head_dim * itemsize + 8       its copy while it is read
    n_tokens    = min(max_num_seqs * max_model_len, budget_bytes // token_bytes)

The masks are [batch_tokens, n_tokens + batch_tokens], one for each kind of attention, and none with
flash attention. At least one request of full length always fits; when several grow beyond the
cache, the youngest is put back in the queue and prefilled again later.
"""

from dataclasses import dataclass
from typing import Any

from faasmoe_router.errors import RouterConfigError

TOKENS_PER_PAGE = 32
DEFAULT_KV_CACHE_BYTES = 2 << 30
# A hybrid model's cache is handed out in sectors of several pages; these cover what rounding loses.
SPARE_PAGES = 8


@dataclass(frozen=True, slots=True)
class KVCacheGeometry:
    """What a model's cache is made of."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    itemsize: int
    n_attention_masks: int

    @classmethod
    def from_model(cls, model: Any) -> "KVCacheGeometry":
        """Read a transformers model's geometry."""
        config = model.config.get_text_config()
        n_heads = config.num_attention_heads
        return cls(
            n_layers=config.num_hidden_layers,
            n_heads=n_heads,
            n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // n_heads,
            itemsize=model.dtype.itemsize,
            n_attention_masks=_n_attention_masks(config),
        )

    def bytes_per_token(self, batch_tokens: int) -> int:
        """Return what one token of the cache costs, with all that grows with the cache."""
        cache_bytes = self.n_layers * 2 * self.n_kv_heads * self.head_dim * self.itemsize
        mask_bytes = self.n_attention_masks * batch_tokens * self.itemsize
        copy_bytes = (2 * self.n_heads + self.n_kv_heads) * self.head_dim * self.itemsize + 8
        return cache_bytes + mask_bytes + copy_bytes


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the engine may hold.

    Attributes:
        max_model_len: tokens of one request, prompt and output together.
        max_num_seqs: requests computed in one batch.
        max_num_batched_tokens: tokens computed in one batch; longer prompts are prefilled in parts.
        max_waiting: requests that may wait beyond those computed; more are refused.
        kv_cache_bytes: what the KV cache and all that grows with it may take; by default 2 GiB, or
            what one request of full length needs if that is more.
    """

    max_model_len: int
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_waiting: int = 1024
    kv_cache_bytes: int | None = None

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could run."""
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise RouterConfigError(
                f"max_num_batched_tokens: got {self.max_num_batched_tokens}, expected at least "
                f"max_num_seqs, {self.max_num_seqs}: each running request decodes one token a batch"
            )

    @property
    def max_requests(self) -> int:
        """Requests that may be held at once, those that wait included."""
        return self.max_num_seqs + self.max_waiting

    def n_pages(self, geometry: KVCacheGeometry) -> int:
        """Return the pages of the cache; raises ConfigError if one request cannot fit."""
        bytes_per_token = geometry.bytes_per_token(self.max_num_batched_tokens)
        required_pages = -(-self.max_model_len // TOKENS_PER_PAGE) + SPARE_PAGES
        required_bytes = required_pages * bytes_per_token * TOKENS_PER_PAGE
        budget_bytes = self.kv_cache_bytes or max(DEFAULT_KV_CACHE_BYTES, required_bytes)
        if budget_bytes < required_bytes:
            raise RouterConfigError(
                f"kv_cache_bytes: got {budget_bytes}, expected at least {required_bytes} "
                f"for one request of max_model_len {self.max_model_len} tokens"
            )
        affordable_pages = budget_bytes // (bytes_per_token * TOKENS_PER_PAGE)
        max_pages = self.max_num_seqs * -(-self.max_model_len // TOKENS_PER_PAGE) + SPARE_PAGES
        return min(max_pages, affordable_pages)


def _n_attention_masks(config: Any) -> int:
    if "flash" in str(config._attn_implementation):
        return 0
    attention_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    return len(attention_types)
