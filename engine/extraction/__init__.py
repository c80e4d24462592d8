"""Dataset or slides to embeddings: what is read, what embeds it, and the work between. Import its modules."""
