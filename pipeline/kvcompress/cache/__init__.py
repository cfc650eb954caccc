"""The ragged per-head KV cache and the attention that reads it."""
