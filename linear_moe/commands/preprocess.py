"""Turn text into Megatron's .bin/.idx through a Hugging Face tokenizer, or train a byte-level BPE for it first."""

import argparse
import sys

EXAMPLE = """example: a folder of Python files, with a tokenizer of its own
  linear-moe preprocess --input src/ --pattern '*.py' \\
      --train-bpe 8192 --tokenizer-output data/bpe --output-prefix data/train
then train with
  --data-path data/train --tokenizer-type HuggingFaceTokenizer --tokenizer-model data/bpe"""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="linear-moe preprocess",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="text or .jsonl files, plain or .gz, and folders"
    )
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX.bin, PREFIX.idx and PREFIX.json")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", metavar="DIR_OR_NAME", help="Hugging Face tokenizer: a folder or a Hub name")
    tokenizer.add_argument(
        "--train-bpe", type=int, metavar="VOCAB_SIZE", help="train a byte-level BPE on the input first"
    )
    parser.add_argument("--tokenizer-output", metavar="DIR", help="where --train-bpe saves the tokenizer")
    parser.add_argument("--json-key", default="text", help="key of the text in .jsonl lines (default: %(default)s)")
    parser.add_argument(
        "--pattern",
        nargs="+",
        metavar="GLOB",
        help="files to take in folders (default: *.txt, *.jsonl, *.ndjson, *.jsonlines and their .gz); "
        "what a pattern ends in is text, whatever it is called",
    )
    parser.add_argument("--workers", type=int, help="processes (default: every core)")
    args = parser.parse_args(argv)
    if (args.train_bpe is None) != (args.tokenizer_output is None):
        parser.error("--train-bpe and --tokenizer-output go together")

    from linear_moe.data.tokenizer import train_bpe
    from linear_moe.mcore.preprocess import preprocess

    try:
        reading = {"json_key": args.json_key, "patterns": args.pattern}
        if args.train_bpe is not None:
            size = train_bpe(args.input, args.train_bpe, args.tokenizer_output, **reading)
            print(f"trained a BPE of {args.train_bpe} tokens on {size / 1e6:.1f} MB of text: {args.tokenizer_output}")
        tokenizer_name = args.tokenizer or args.tokenizer_output
        corpus = preprocess(args.input, tokenizer_name, args.output_prefix, args.workers, **reading)
    except (ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{args.output_prefix}.bin: {corpus.documents} documents, {corpus.tokens} tokens, "
        f"{corpus.bytes} bytes ({corpus.bytes / corpus.tokens:.2f} bytes a token)"
    )
