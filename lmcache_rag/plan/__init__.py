"""From a prompt to a plan: which stored chunks lie where, in which variant, and whether loading them pays.

Knows nothing of vLLM.
"""
