"""Pure functions of embeddings; the gather across ranks is a thin layer beside them."""
