"""Chunk KV: saved, opened and deleted over records and blobs."""
