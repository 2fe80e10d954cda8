"""Prompts that are read again and again: continued blends, and exact KV made while nobody waits."""
