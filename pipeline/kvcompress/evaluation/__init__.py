"""Quality, retrieval, speed and memory of compressed caches, compared at equal bytes."""
