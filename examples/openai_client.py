"""Any OpenAI client, unchanged, over `lmcache-rag serve --index examples/.index` (made by `make demo`).

    python examples/openai_client.py http://127.0.0.1:8000/v1

Stored passages are found in the prompt by their tokens; the last chunk of the stream says what was reused.
"""

import sys
from pathlib import Path

from openai import OpenAI

CORPUS = Path(__file__).parent / "corpus"


def main(base_url: str = "http://127.0.0.1:8000/v1") -> None:
    client = OpenAI(base_url=base_url, api_key="none")
    model = client.models.list().data[0].id
    passages = "\n\n".join((CORPUS / name).read_text() for name in ("09-radio-and-network.md", "03-unpacking.md"))
    prompt = f"Passages:\n\n{passages}\n\nQuestion: Where is the pairing code printed?\nAnswer:"
    stream = client.completions.create(
        model=model, prompt=prompt, max_tokens=32, stop=["\n"], temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].text, end="", flush=True)
        report = (chunk.model_extra or {}).get("kv_transfer_params", {}).get("lmcache_rag")
    print()
    kinds = ("reused", "recomputed", "local", "vllm")
    print(
        f"{report['prompt_tokens']} prompt tokens:", ", ".join(f"{report[f'{kind}_tokens']} {kind}" for kind in kinds)
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
