"""Tensors in, tensors out: the ranker, its inner loop and its outer loop."""
