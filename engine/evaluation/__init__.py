"""How good embeddings and predictions are. Only `encoder`, `pcam` and the probe of vittm-hmr need torch."""
