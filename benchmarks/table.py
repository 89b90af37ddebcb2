"""`python -m benchmarks.table`: writes the tables of README and docs from benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT
from benchmarks.peer_table import peers_table


def table(core: dict[str, Any]) -> str:
    """The table in Markdown, with the machine and the command it came from."""
    rates, memory = core["tokens_per_second"], core["memory"]
    ours, peer = rates["vivace"], rates["transformers"]

    def spread(values: dict[str, Any], digits: int = 1) -> str:
        low, middle, high = (f"{values[k]:.{digits}f}" for k in ("min", "median", "max"))
        return f"{middle} ({low} to {high})"

    share = core["decode_share_of_read_floor"]
    rows = [
        (
            "decode, 1 sequence",
            f"{spread(ours['decode'])} tokens/s",
            f"transformers {spread(peer['decode'])}",
            f"{core['decode_ratio_to_transformers']:.2f} ×",
        ),
        (
            "decode, share of the read floor (mean of a read before and after)",
            f"{share['median']:.0%} ({share['min']:.0%} to {share['max']:.0%})",
            f"{core['read_bandwidth_bytes_per_second']['median'] / 1e9:.1f} GB/s read",
            "",
        ),
        (
            "prefill, 512 tokens",
            f"{spread(ours['prefill'])} tokens/s",
            f"transformers {spread(peer['prefill'])}",
            f"{core['prefill_ratio_to_transformers']:.2f} ×",
        ),
        (
            "peak memory beyond weights and cache",
            f"{memory['beyond_weights_and_cache_mb']:.0f} MB",
            f"transformers {(memory['transformers_peak_bytes'] - memory['weight_bytes']) / 1e6:.0f}"
            " MB beyond weights",
            "",
        ),
        (
            "`vivace run tiny`, process start to first token",
            f"{spread(core['run_tiny_to_first_token_seconds'], 2)} s",
            "",
            "",
        ),
        ("`vivace --help`", f"{spread(core['help_seconds'], 2)} s", "", ""),
    ]
    machine = core["machine"]
    lines = [
        "| what | Vivace | beside it | ratio |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        f"{core['shape']}, {core['threads']} threads, medians (smallest to largest) of "
        f"{len(share['raw'])} rounds in which both took turns; {machine['cpu']}, "
        f"{machine['cores']} cores, best instruction set {machine['instruction_sets'][-1]}; "
        f"transformers {machine['versions']['transformers']}, torch "
        f"{machine['versions']['torch']}; {machine['date']}. `make bench` measures it again.",
    ]
    return "\n".join(lines)


def agreement_table(agreement: dict[str, Any]) -> str:
    """How far our logits are from llama.cpp's, per type of file."""
    head = [
        "| file | KL, exercises | top-1, answers | top-1, exercises | KL, text | top-1, text | "
        "logits, mean difference | decoded to F32: KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = []
    for name, parts in agreement["types"].items():
        exercises, text = parts["exercises"], parts["text"]
        decoded = parts.get("decoded")
        cells = (
            name,
            f"{exercises['kl_mean']:.1e}",
            f"{parts['answers']['top1']:.2%}",
            f"{exercises['top1']:.2%}",
            f"{text['kl_mean']:.1e}",
            f"{text['top1']:.2%}",
            f"{text['mean_difference']:.1e}",
            f"{decoded['kl_mean']:.0e}" if decoded else "",
        )
        rows.append(f"| {' | '.join(cells)} |")
    counts, machine = agreement["rows"], agreement["machine"]
    note = (
        f"`tiny` on {counts['exercises']} rows of held-out exercises, of which {counts['answers']} "
        f"are answers, and {counts['text']} of text; {machine['date']}, `{agreement['command']}`."
    )
    return "\n".join([*head, *rows, "", note])


def formats_table(results: dict[str, Any]) -> str:
    """What weight formats cost in quality, by bits per weight."""
    rows = [
        "| format | bits per weight | perplexity, text | KL, text | KL, exercises "
        "| top-1, answers |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in results["formats"].items():
        cells = (
            name,
            f"{values['bits_per_weight']:.3f}",
            f"{values['perplexity']:.3f}",
            f"{values['text']['kl_mean']:.1e}",
            f"{values['exercises']['kl_mean']:.1e}",
            f"{values['answers']['top1']:.2%}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    counts = results["rows"]
    note = (
        f"{counts['text']} rows of held-out text, {counts['exercises']} of exercises, of which "
        f"{counts['answers']} are answers; {results['machine']['date']}, `{results['command']}`."
    )
    return "\n".join([*rows, "", note])


def insert(page: Path, name: str, text: str) -> None:
    """Replace what stands between a page's marks `<!-- name -->` and `<!-- /name -->`."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, _, rest = page.read_text().partition(begin)
    _, _, tail = rest.partition(end)
    page.write_text(f"{head}{begin}\n{text}\n{end}{tail}")


def main() -> None:
    pages = (
        (ROOT / "README.md", "results", "core", table),
        (ROOT / "README.md", "peers", "peers", peers_table),
        (ROOT / "docs" / "models.md", "agreement", "agreement", agreement_table),
        (ROOT / "docs" / "formats.md", "formats", "formats", formats_table),
    )
    for page, mark, name, make in pages:
        results = RESULTS / f"{name}.json"
        if results.exists():  # that benchmark has been run
            insert(page, mark, make(json.loads(results.read_text())))


if __name__ == "__main__":
    main()
