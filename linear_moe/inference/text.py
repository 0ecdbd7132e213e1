"""`linear-moe generate`: text in, text out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from linear_moe.data.tokenizer import Encoder, load_tokenizer
from linear_moe.inference.generation import Session, check_prompts, stop_lists
from linear_moe.inference.sampling import Sampling
from linear_moe.mcore.load import find_checkpoint, load_model, saved_limits

LONGEST_CHAT = 2**17  # tokens, of a model whose layers set no limit


class Text:
    """A tokenizer in both directions: text is only text, as in the training data."""

    def __init__(self, name: str):
        """name: a Hugging Face tokenizer's folder or name.

        Raises:
            ValueError: no such tokenizer.
        """
        self.tokenizer = load_tokenizer(name)
        self.encoder = Encoder(self.tokenizer)
        self.eod = self.encoder.eod

    def encode(self, text: str) -> list[int]:
        """Without the end of the document, which `Encoder` adds."""
        return self.encoder.encode([text]).tokens[:-1].tolist()

    def decode(self, tokens: Sequence[int]) -> str:
        """Without the end of the document."""
        kept = [token for token in tokens if token != self.eod]
        return self.tokenizer.decode(kept, clean_up_tokenization_spaces=False)


class Printer:
    """Prints a text token by token: a character of several tokens when it is whole."""

    def __init__(self, text: Text):
        self.text, self.tokens, self.shown = text, [], 0

    def __call__(self, n: int, token: int) -> None:
        self.tokens.append(token)
        text = self.text.decode(self.tokens)
        if not text.endswith("\ufffd"):
            self._show(text)
        if text.endswith("\n"):
            self.tokens, self.shown = [], 0  # so that a long text is not decoded anew for each of its tokens

    def end(self) -> None:
        self._show(self.text.decode(self.tokens))
        print(flush=True)

    def _show(self, text: str) -> None:
        print(text[self.shown :], end="", flush=True)
        self.shown = len(text)


def write(options: argparse.Namespace) -> None:
    """What the command line asks for; its values are those of `linear-moe generate --help`.

    Raises:
        ValueError: whatever cannot work, before the model is loaded.
    """
    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
    )
    for name in ("max_new_tokens", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, but is {getattr(options, name)}")
    path, common = find_checkpoint(options.load, options.ckpt_step)
    limits = saved_limits(common["args"])
    text = _tokenizer(options.tokenizer, common["args"])
    stop = stop_lists([text.eod, *map(text.encode, options.stop)])
    lines = [{"prompt": prompt} for prompt in options.prompt or []]
    if options.input:
        lines = _read(options.input)
        options.output.parent.mkdir(parents=True, exist_ok=True)
    prompts = [text.encode(line["prompt"]) for line in lines]
    check_prompts(prompts, limits)
    model = load_model(path)
    model.vocabulary = text.encoder.vocab_size  # the rest is padding
    common_options = {"sampling": sampling, "stop": stop, "seed": options.seed}
    if options.input:
        sessions = _write_file(options, model, text, lines, prompts, common_options)
    elif options.prompt:
        length = max(map(len, prompts)) + options.max_new_tokens
        sessions = [Session(model, len(prompts), length, **common_options)]
        _write_prompts(sessions[0], text, options.prompt, prompts, options.max_new_tokens)
    else:
        sessions = [Session(model, 1, limits.positions or LONGEST_CHAT, **common_options)]
        chat(sessions[0], text, options.max_new_tokens)
    print(summary(sessions), file=sys.stderr)


def _tokenizer(given: str | None, saved: argparse.Namespace) -> Text:
    name = given or saved.tokenizer_model
    if given is None and (saved.tokenizer_type != "HuggingFaceTokenizer" or name is None):
        raise ValueError(f"the checkpoint was trained with {saved.tokenizer_type}, which has no text: give --tokenizer")
    try:
        text = Text(name)
    except ValueError as error:
        raise ValueError(f"{error}: give --tokenizer" if given is None else str(error)) from error
    size, trained = text.encoder.vocab_size, getattr(saved, "vocabulary", None)
    if size != trained if trained else size > saved.padded_vocab_size:  # another program may not have noted it
        raise ValueError(
            f"tokenizer {name} does not fit: it has {size} tokens, and the checkpoint's model was trained with "
            f"{trained or f'at most {saved.padded_vocab_size}'}"
        )
    return text


def _read(path: Path) -> list[dict]:
    lines = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
            raise ValueError(f'{path}, line {number}: must be an object with a text "prompt"')
        lines.append(value)
    if not lines:
        raise ValueError(f"{path} has no prompts")
    return lines


def _write_file(options, model, text: Text, lines: list[dict], prompts: list[list[int]], settings: dict):
    from tqdm import tqdm  # comes with the tokenizers

    sessions = []
    with open(options.output, "w") as file, tqdm(total=len(lines), unit=" prompts") as bar:
        for start in range(0, len(lines), options.batch_size):
            batch = prompts[start : start + options.batch_size]
            sessions.append(Session(model, len(batch), max(map(len, batch)) + options.max_new_tokens, **settings))
            for line, tokens in zip(lines[start:], sessions[-1].reply(batch, options.max_new_tokens)):
                file.write(json.dumps(line | {"completion": text.decode(tokens)}, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(batch))
    return sessions


def _write_prompts(session: Session, text: Text, shown: list[str], prompts: list[list[int]], new: int) -> None:
    if len(prompts) == 1:
        print(shown[0], end="", flush=True)
        printer = Printer(text)
        session.reply(prompts, new, printer)
        printer.end()
        return
    for prompt, tokens in zip(shown, session.reply(prompts, new)):
        print(f"{prompt}{text.decode(tokens)}\n")


def chat(session: Session, text: Text, max_new_tokens: int) -> None:
    """What is typed is said to the model, which goes on; its state stays from turn to turn."""
    print("Say something; /new starts anew, an empty line ends.")
    while True:
        try:
            said = input("> ")
        except EOFError:
            said = ""
        if not said:
            return
        if said == "/new":
            session.reset()
            continue
        printer = Printer(text)
        try:
            session.reply([text.encode(said)], max_new_tokens, printer)
        except ValueError as error:  # the model's positions, or the session's, are full
            print(f"{error}; /new starts anew")
            continue
        printer.end()


def summary(sessions: Sequence[Session]) -> str:
    """How fast, and how large the states were."""
    parts = []
    for kind, name in (("prefill", "prefill"), ("decode", "decoding")):
        tokens = sum(getattr(session, f"{kind}_tokens") for session in sessions)
        seconds = sum(getattr(session, f"{kind}_seconds") for session in sessions)
        rate = f" at {tokens / seconds:.0f} tokens/s" if tokens else ""
        parts.append(f"{name}: {tokens} tokens{rate}")
    largest = max(sessions, key=lambda session: sum(session.nbytes.values()))
    sizes = {"linear layers": largest.nbytes["states"], "softmax layers": largest.nbytes["kv"]}
    held = ", ".join(f"{size / 2**20:.2f} MiB of {name}" for name, size in sizes.items())
    return " | ".join([*parts, f"state of {largest.N} sequence{'s' * (largest.N > 1)}: {held}"])
