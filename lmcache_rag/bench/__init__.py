"""What `lmcache-rag bench` runs. Plain vLLM and blending are measured in the same process, alternating."""
