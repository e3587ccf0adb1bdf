"""A conversation on the terminal."""
import argparse

from decoding import Generator
from tokenizer import StreamDecoder, Tokenizer


def chat(generator: Generator, tokenizer: Tokenizer, args: argparse.Namespace, request: dict) -> None:
    """A conversation on the terminal: what was said stays in the KV cache; Ctrl-C stops the answer."""
    system = [{"role": "system", "content": args.system}] if args.system else []
    messages, ranks = list(system), generator.model.ranks
    print("Ctrl-C stops an answer, an empty line or Ctrl-D ends, /reset begins anew." if args.chat else "An empty line or Ctrl-D ends.")
    while True:
        try:
            text = input("> ").strip() if not ranks or ranks.first else ""
        except (EOFError, KeyboardInterrupt):
            print()
            text = ""
        text = ranks.from_first(text) if ranks else text
        if not text:
            return
        if text == "/reset":
            messages = list(system)
            continue
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.render_chat(messages, enable_thinking=not args.no_thinking) if args.chat else tokenizer.encode(text)
        room = request["max_seq_length"] - len(prompt)
        if room < 1:
            messages.pop()
            print(f"The conversation and this message are {len(prompt)} tokens, and --max_seq_length is {request['max_seq_length']}: /reset begins anew.")
            continue
        answer: list[int] = []
        decoder = StreamDecoder(tokenizer, skip_special=True, after=prompt)
        try:
            for (i,) in generator.generate([prompt], **{**request, "max_new_tokens": min(room, request["max_new_tokens"])}, keep_cache=True):
                answer.append(i)
                print(decoder.push(i), end="", flush=True)
        except KeyboardInterrupt:
            pass
        print(decoder.flush(), flush=True)
        messages.append({"role": "assistant", "content": tokenizer.decode(answer)})
