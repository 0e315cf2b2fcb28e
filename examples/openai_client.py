"""Talk to a running `splitrun serve` with OpenAI's own client.

pip install openai
splitrun serve demo &
python examples/openai_client.py [http://127.0.0.1:8000/v1]
"""

import sys

from openai import OpenAI


def main() -> None:
    address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
    client = OpenAI(base_url=address, api_key="none")
    model = client.models.list().data[0].id
    question = {"role": "user", "content": "What day is 10 days after Monday?"}
    answer = client.chat.completions.create(model=model, messages=[question], temperature=0)
    print(answer.choices[0].message.content)
    for chunk in client.chat.completions.create(model=model, messages=[question], temperature=0, stream=True):
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
