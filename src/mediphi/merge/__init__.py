"""Merging Hugging Face folders, tensor by tensor, and searching for the best way to."""
