"""How good embeddings and predictions are. numpy and scipy only."""
