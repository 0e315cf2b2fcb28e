"""Plan, explain, and generate from Python.

python examples/generate.py                  # the bundled demo
python examples/generate.py MODEL            # a directory or a Hub id
"""

import sys

import splitrun


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "demo"
    placement = splitrun.plan(model, context=512, sessions=2)
    print(placement.explain(), end="\n\n")
    greedy = splitrun.SamplingParams(max_tokens=24, temperature=0)
    with splitrun.Engine(placement) as engine:
        questions = ["What is 27 + 15?", "Write 207 in words."]
        prompts = [engine.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in questions]
        for question, answer in zip(questions, engine.generate(prompts, greedy), strict=True):
            print(f"{question}  ->  {answer.text}")
        for event in engine.stream(prompts[0], greedy):
            print(event.text, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
