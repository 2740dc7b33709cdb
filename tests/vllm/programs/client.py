"""Runs in vLLM's environment, which has the OpenAI client: asks a server {"url", "model"} through it."""

import json
import sys

from openai import OpenAI

if __name__ == "__main__":
    place = json.loads(sys.argv[1])
    client = OpenAI(base_url=place["url"] + "/v1", api_key="none")
    common = {"model": place["model"], "max_tokens": 8, "temperature": 0}
    messages = [{"role": "user", "content": "Say hello."}]
    whole = client.chat.completions.create(messages=messages, **common)
    stream = client.chat.completions.create(messages=messages, stream=True, **common)
    pieces = [part.choices[0].delta for part in stream]
    result = {
        "models": [model.id for model in client.models.list()],
        "whole": whole.choices[0].message.content,
        "streamed": "".join(piece.content or "" for piece in pieces),
        "tokens": whole.usage.completion_tokens,
    }
    print("RESULT " + json.dumps(result))
