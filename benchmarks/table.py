"""`python -m benchmarks.table`: writes the tables of README and docs from benchmarks/results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT
from benchmarks.markdown import lines_of_table, machine, made_by, spread
from benchmarks.peer_table import comparison_table, peers_table

Results = dict[str, Any]


# ------------------------------------------------------------------ pages


def startup_table(results: Results) -> str:
    rows = [
        (
            "`vivace run tiny`, process start to first token",
            spread(results["run_tiny_to_first_token_seconds"], 2),
        ),
        ("`vivace --help`", spread(results["help_seconds"], 2)),
    ]
    note = f"Medians (smallest to largest); {machine(results)}; {made_by(results)}."
    return "\n".join([*lines_of_table(("what", "seconds"), rows), "", note])


def packing_table(results: Results) -> str:
    starts = results["start_seconds"]
    rows = [
        ("all matrices packed, in memory", spread(results["pack_seconds"], 2)),
        ("`vivace quantize`, with the disk", spread(results["quantize_seconds"], 2)),
        ("import", spread(starts["import"], 2)),
        ("`LLM()` of the packed directory", spread(starts["load"], 2)),
        ("the first token after that, of a prompt of 8", spread(starts["first_token"], 2)),
    ]
    one, other = results["two_processes"]
    note = (
        f"{results['shape']}, {results['weight_bytes'] / 1e6:.0f} MB; {results['threads']} "
        f"threads; `vivace quantize` needs {results['quantize_peak_bytes'] / 1e6:.0f} MB of memory "
        f"at most. Of two processes at once, with {one['rss_bytes'] / 1e6:.0f} and "
        f"{other['rss_bytes'] / 1e6:.0f} MB in memory, "
        f"{one['shared_clean_bytes'] / 1e6:.0f} MB are the same. "
        f"{machine(results)}; {made_by(results)}."
    )
    return "\n".join([*lines_of_table(("what", "seconds"), rows), "", note])


def attention_table(results: Results) -> str:
    """Shares of the floors, then the sampler's time per token."""
    shares = [
        (f"{kind}, {name}", f"{result[share]['median']:.0%}", spread(seconds, 2, 1e3))
        for kind, share in (("decode", "share_of_read_floor"), ("prefill", "share_of_peak"))
        for name, result in results[kind].items()
        for seconds in (result["layer_seconds"],)
    ]
    sampler = [
        (
            name,
            f"{values['token_seconds']['median'] * 1e6:.0f}",
            f"{values['share_of_step']['median']:.1%}",
        )
        for name, values in results["sampler"].items()
    ]
    return "\n".join(
        [
            *lines_of_table(("one layer's attention", "of the floor", "ms"), shares),
            "",
            *lines_of_table(("sampler", "µs for a token", "of a step of 6 ms"), sampler),
            "",
            f"{results['threads']} threads; {machine(results)}; {made_by(results)}.",
        ]
    )


def agreement_table(results: Results) -> str:
    """How far our logits are from llama.cpp's, per type of file."""
    head = (
        "file",
        "KL, exercises",
        "top-1, answers",
        "top-1, exercises",
        "KL, text",
        "top-1, text",
        "logits, mean difference",
        "decoded to F32: KL",
    )
    rows = [
        (
            name,
            f"{parts['exercises']['kl_mean']:.1e}",
            f"{parts['answers']['top1']:.2%}",
            f"{parts['exercises']['top1']:.2%}",
            f"{parts['text']['kl_mean']:.1e}",
            f"{parts['text']['top1']:.2%}",
            f"{parts['text']['mean_difference']:.1e}",
            f"{parts['decoded']['kl_mean']:.0e}" if "decoded" in parts else "",
        )
        for name, parts in results["types"].items()
    ]
    counts = results["rows"]
    note = (
        f"`tiny` on {counts['exercises']} rows of held-out exercises, of which {counts['answers']} "
        f"are answers, and {counts['text']} of text; {made_by(results)}."
    )
    return "\n".join([*lines_of_table(head, rows), "", note])


def formats_table(results: Results) -> str:
    """What weight formats cost in quality, by bits per weight."""
    head = (
        "format",
        "bits per weight",
        "perplexity, text",
        "KL, text",
        "KL, exercises",
        "top-1, answers",
    )
    rows = [
        (
            name,
            f"{values['bits_per_weight']:.3f}",
            f"{values['perplexity']:.3f}",
            f"{values['text']['kl_mean']:.1e}",
            f"{values['exercises']['kl_mean']:.1e}",
            f"{values['answers']['top1']:.2%}",
        )
        for name, values in results["formats"].items()
    ]
    counts = results["rows"]
    note = (
        f"{counts['text']} rows of held-out text, {counts['exercises']} of exercises, of which "
        f"{counts['answers']} are answers; {made_by(results)}."
    )
    return "\n".join([*lines_of_table(head, rows), "", note])


def tokenization_table(results: Results) -> str:
    """Tokens with merges and without, and what the others cost `tiny`."""
    head = ("vocabulary, text", "tokens by merges", "greedy", "shortest")
    tokens = [
        (f"{vocabulary}, {text}", f"{counts['merges']:,}", *map(_fewer, counts["saved"].values()))
        for vocabulary, texts in results["tokens"].items()
        for text, counts in texts.items()
    ]
    bits = [
        (
            f"bits per character, tiny, {text}",
            *(f"{values['bits_per_character']:.2f}" for values in modes.values()),
        )
        for text, modes in results["tiny"].items()
    ]
    counts = " and ".join(f"{count:,} of {name}" for name, count in results["characters"].items())
    note = f"Characters: {counts} of Python's own library; {made_by(results)}."
    return "\n".join([*lines_of_table(head, [*tokens, *bits]), "", note])


def _fewer(share: float) -> str:
    return f"{abs(share):.1%} {'fewer' if share > 0 else 'more'}"


PAGES: tuple[tuple[str, str, str, Callable[[Results], str]], ...] = (  # page, mark, results
    ("README.md", "peers", "peers", comparison_table),
    ("docs/benchmarks.md", "peers", "peers", peers_table),
    ("docs/benchmarks.md", "startup", "startup", startup_table),
    ("docs/benchmarks.md", "packing", "packing", packing_table),
    ("docs/benchmarks.md", "attention", "attention", attention_table),
    ("docs/models.md", "agreement", "agreement", agreement_table),
    ("docs/models.md", "tokenization", "tokenization", tokenization_table),
    ("docs/formats.md", "formats", "formats", formats_table),
)


def insert(page: str, name: str, text: str) -> str:
    """`page` with `text` between its marks `<!-- name -->` and `<!-- /name -->`.

    Raises `ValueError` where they are missing.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, found, rest = page.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page has no {begin} before {end}")
    return f"{head}{begin}\n{text}\n{end}{tail}"


def pages() -> Iterator[tuple[Path, str]]:
    """Every page as the results that are there make it."""
    for name in dict.fromkeys(page for page, *_ in PAGES):
        text = (ROOT / name).read_text(encoding="utf-8")
        for page, mark, results, make in PAGES:
            path = RESULTS / f"{results}.json"
            if page == name and path.exists():
                text = insert(text, mark, make(json.loads(path.read_text(encoding="utf-8"))))
        yield ROOT / name, text


def main() -> None:
    for path, text in pages():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
