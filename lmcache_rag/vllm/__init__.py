"""The binding to vLLM: worker class, connector (both halves) and the parameters of a request.

Only `request` may be imported where vllm is not installed, so this file imports nothing.
"""
