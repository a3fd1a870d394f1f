# SPDX-License-Identifier: MIT
"""The command line: flashvid tune DATA --base-url URL | --model NAME."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import __version__
from ...core.config import AUTO
from ...core.settings import CONSECUTIVE, ORIGINAL
from ...serving.cli import json_object, number
from ..command import Parser, count
from ..errors import UserError
from .client import Gone
from .data import Data, load
from .grid import RATIOS, Setting, settings

HELP = """
usage: flashvid tune DATA (--base-url URL [--model NAME] | --model NAME) [...]

Which retention ratio do my videos allow? Asks the plain model and each setting,
holds the answers against each other, and says what to serve with.
DATA: JSONL of video, question[, choices, answer], or a folder of videos.
  --base-url URL   a server with --plugin flashvid; OPENAI_API_KEY is its key
  --model NAME     start vllm serve NAME; its options behind --
  --ratios R ..    0.5 0.25 0.15 0.1     --budgets B ..  at most B tokens
  --methods M ..   the server's          --config JSON   beside each setting
  --positions P .. consecutive original: with --model, a server for each
  --encoder-ratios F ..  shares of its patches that are encoded; auto
  --keep 0.98      the share to keep     --by agreement|likelihood
  --concurrency N  items at a time, 4    --limit N       the first N videos
  --choices letters|words  ask for   --max-tokens N 64, --same-tokens N 16
  --timed N        items timed, 5        --no-likelihood leave it out
  --timeout S      of a request, 600     --body JSON     in every request
  --results FILE   of answers; the same command goes on where it was (--fresh)
  -o, --output FILE.html   a report, and FILE.json     -h, --help  this text
examples:
  flashvid tune clips/ --base-url http://localhost:8000/v1 -o report.html
  flashvid tune qa.jsonl --model Qwen/Qwen2.5-VL-3B-Instruct -- --dtype float16
"""
RESULTS = Path("flashvid-tune.jsonl")
LONGEST_TIMEOUT = 86400  # seconds


@dataclass(frozen=True)
class Variant:
    """A server to ask: the settings that it is asked in, and the positions that it is started with, if it is."""

    settings: list[Setting]
    positions: str | None


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 2 where the user can put it right, 1 if single requests failed, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else argv
    at = arguments.index("--") if "--" in arguments else len(arguments)
    parser = _make_parser()
    options = parser.parse_args(arguments[:at])
    try:
        _check(options, arguments[at + 1 :])
        return run(options, arguments[at + 1 :])
    except Gone as error:
        if options.results.exists():
            parser.error(f"{error} What was answered is kept in {options.results}: the same command goes on there")
        parser.error(str(error))
    except UserError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command goes on where it was ({options.results})", file=sys.stderr)
        return 130


def run(options: argparse.Namespace, server_options: Sequence[str]) -> int:
    """Ask, and tell what was found. Raises UserError."""
    data = load(options.data, options.limit, options.choices == "words")
    variants = _variants(options)
    videos = len({item.video.digest for item in data.items})
    tried = sum(len(variant.settings) for variant in variants)
    print(f"{len(data.items)} questions about {videos} videos, plain and in {tried} settings", file=sys.stderr)

    from .summary import summarize

    results, asking, failures, served = _ask(options, server_options, data, variants)
    grid = [setting for variant in variants for setting in variant.settings]
    summary = summarize(results, data.items, grid, asking, options.same_tokens, options.by)
    return _tell(options, server_options, summary, served, [*data.refused, *failures])


def _ask(
    options: argparse.Namespace, server_options: Sequence[str], data: Data, variants: Sequence[Variant]
) -> tuple[Any, ...]:
    """Everything that is missing; returns the results, how was asked, the failures, and what the server is."""
    from .client import Asking, Client
    from .collect import Collector
    from .probe import probe
    from .results import Results

    asking = Asking(options.choices, options.max_tokens, options.body)
    collector: Collector | None = None
    served: dict[str, Any] = {}
    for variant in variants:
        named, key = options.model if options.base_url else None, os.environ.get("OPENAI_API_KEY")
        with (
            _server(options, server_options, variant) as url,
            contextlib.closing(Client(url, named, key, options.timeout)) as client,
        ):
            probe(client, variant.settings)
            if collector is None:
                name = options.model if not options.base_url else client.model
                served = {"model": name, "vllm": client.version(), "plugin": __version__}
                run = served | {
                    "max_model_len": client.card.get("max_model_len"),
                    "root": client.card.get("root"),
                    "server options": list(server_options),
                    "choices": asking.choices,
                    "max_tokens": asking.max_tokens,
                    "body": dict(asking.body),
                }
                results = Results(options.results, run, options.fresh)
                likelihood = not options.no_likelihood
                collector = Collector(results, data.items, asking, options.concurrency, likelihood)
            collector.answers(client, variant.settings)
            if options.timed:
                collector.times(client, variant.settings, options.timed)
    assert collector is not None
    return collector.results, asking, collector.failures, served


@contextlib.contextmanager
def _server(options: argparse.Namespace, server_options: Sequence[str], variant: Variant) -> Iterator[str]:
    """The base URL of the server of a variant: the user's, or one of our own."""
    if options.base_url:
        yield options.base_url
        return
    from ..serving import serving

    given = ["--flashvid-config", json.dumps({"positions": variant.positions})] if variant.positions else []
    with serving(options.model, [*server_options, *given]) as url:
        yield url


def _tell(
    options: argparse.Namespace, server_options: Sequence[str], summary: Any, served: dict[str, Any], failed: list[str]
) -> int:
    """Print the table and the advice, write the report."""
    from .advice import advise
    from .table import as_text, notes

    name = served["model"]
    shown = Path(name).name if os.path.isabs(name) else name  # a report is shown to others
    advice = advise(summary.rows[1:], options.keep, summary.by, shown, None if options.base_url else server_options)
    print("\n".join([as_text(summary), "", *notes(summary), "", advice.sentence]))
    for line in failed[:20]:
        print(f"failed: {line}", file=sys.stderr)
    if len(failed) > 20:
        print(f"failed: {len(failed) - 20} more; they are in the report", file=sys.stderr)
    if options.output:
        from .report import write_report

        for path in write_report(options.output, summary, advice, {**served, "model": shown}, options.keep, failed):
            print(f"{path} written", file=sys.stderr)
    return 1 if failed else 0


def _variants(options: argparse.Namespace) -> list[Variant]:
    ratios = options.ratios if options.ratios is not None else () if options.budgets else RATIOS
    sizes = (ratios, options.budgets or ())
    positions = options.positions or [None]
    return [
        Variant(settings(*sizes, options.methods or (), options.config, chosen, options.encoder_ratios or ()), chosen)
        for chosen in dict.fromkeys(positions)
    ]


def _check(options: argparse.Namespace, server_options: Sequence[str]) -> None:
    if not options.base_url and not options.model:
        raise UserError("give --base-url URL of a server with --plugin flashvid, or --model NAME to start one")
    if options.base_url and server_options:
        raise UserError(
            f"{server_options[0]} behind -- is for a server that --model starts, and --base-url has its own"
        )
    if options.base_url and options.positions:
        raise UserError(
            "--positions is the server's alone: a request cannot choose them. With --model a server is started for "
            "each; with --base-url run this against one server after the other, with --results of their own"
        )
    if not 0 < options.keep < 1:
        raise UserError(f"--keep must be a share between 0 and 1, such as 0.98, got {options.keep:g}")
    if not 0 < options.timeout <= LONGEST_TIMEOUT:
        raise UserError(f"--timeout must be seconds above 0, up to {LONGEST_TIMEOUT} (a day), got {options.timeout:g}")
    if options.no_likelihood and options.by == "likelihood":
        raise UserError("--by likelihood and --no-likelihood exclude each other; leave one of them out")
    if options.output and options.output.suffix.lower() != ".html":
        raise UserError(f"-o must end in .html, got {options.output}; the figures for programs go beside it, in .json")
    for path in (options.output, options.results):
        if path and not path.parent.is_dir():
            raise UserError(f"no such folder: {path.parent}")
    for name in ("messages", "model", "stream", "temperature"):
        if name in options.body:
            raise UserError(f"--body cannot give {name!r}: every request has its own, and is greedy")
    kwargs = options.body.get("mm_processor_kwargs", {})
    if not isinstance(kwargs, dict):
        raise UserError(f"--body: mm_processor_kwargs must be an object, got {json.dumps(kwargs)[:80]}")
    try:
        json.dumps(options.body, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:  # UnicodeEncodeError among them
        raise UserError("--body cannot be sent: it has NaN, Infinity or half of a surrogate pair") from None


def _data(text: str) -> Path:
    if not text:  # Path("") is the folder that one is in
        raise argparse.ArgumentTypeError("expected a JSONL file or a folder of videos, got ''")
    return Path(text)


def _make_parser() -> Parser:
    parser = Parser("flashvid tune", HELP)
    add = parser.add_argument
    add("data", type=_data, metavar="DATA")
    add("--base-url")
    add("--model")
    add("--ratios", type=number(float), nargs="+")
    add("--budgets", type=number(int), nargs="+")
    add("--methods", nargs="+")
    add("--encoder-ratios", type=number(float, AUTO), nargs="+")
    add("--positions", nargs="+", choices=(CONSECUTIVE, ORIGINAL))
    add("--config", type=json_object, default={})
    add("--keep", type=number(float), default=0.98)
    add("--by", choices=("agreement", "likelihood"))
    add("--concurrency", type=count, default=4)
    add("--limit", type=count)
    add("--choices", choices=("letters", "words"), default="letters")
    add("--max-tokens", type=count, default=64)
    add("--same-tokens", type=count, default=16)
    add("--timed", type=lambda text: count(text, 0), default=5)
    add("--no-likelihood", action="store_true")
    add("--timeout", type=number(float), default=600.0)
    add("--body", type=json_object, default={})
    add("--results", type=Path, default=RESULTS)
    add("--fresh", action="store_true")
    add("-o", "--output", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
