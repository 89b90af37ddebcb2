"""Break the scheduler, pool and stream code in a hundred ways and see what the simulation catches.

    python tools/mutate.py [--count 100] [--seeds 400] [--only INDEX] [--output tools/mutants.json]

Mutants are drawn from all candidates by a fixed seed. Each runs the simulation in a process of its
own until a schedule fails, an import fails or time is up: then it is caught. Survivors are listed.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src" / "vivace"
TARGETS = (
    "engine/scheduler.py",
    "engine/block_pool.py",
    "engine/prefix_cache.py",
    "engine/request.py",
    "engine/text.py",
    "engine/batch.py",
    "engine/jobs.py",
    "techniques/schedulers/chunked.py",
)
TIMEOUT_SECONDS = 40
FLIPS: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """One change: the `change`th way to alter node number `node` of a file."""

    file: str
    line: int
    node: int
    kind: str
    before: str
    after: str


def _skipped(tree: ast.Module) -> set[ast.AST]:
    """What no schedule can show: assertions, error texts, annotations, self-checks, names."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        is_check = isinstance(node, ast.FunctionDef) and node.name in ("check", "__len__")
        if is_check or isinstance(node, ast.Assert | ast.Raise | ast.JoinedStr):
            skipped |= set(ast.walk(node))
        elif isinstance(node, ast.AnnAssign):
            skipped |= set(ast.walk(node.annotation))
        elif isinstance(node, ast.FunctionDef):
            for part in (*node.args.args, *node.args.kwonlyargs):
                skipped |= set(ast.walk(part))
            if node.returns:
                skipped |= set(ast.walk(node.returns))
            skipped |= {item for top in node.decorator_list for item in ast.walk(top)}
        elif isinstance(node, ast.ClassDef):
            skipped |= {item for top in node.decorator_list for item in ast.walk(top)}
        elif isinstance(node, ast.keyword) and node.arg == "strict":
            skipped.add(node.value)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped |= {node, node.value}
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            skipped |= set(ast.walk(node))
    return skipped


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The ways to alter a node: (kind, altered copy)."""
    new = copy.deepcopy(node)
    match new:
        case ast.Compare(ops=[op]) if type(op) in FLIPS:
            new.ops = [FLIPS[type(op)]()]
            yield "comparison", new
        case ast.BinOp() | ast.AugAssign() if type(new.op) in FLIPS:
            new.op = FLIPS[type(new.op)]()
            yield "arithmetic", new
        case ast.BoolOp():
            new.op = FLIPS[type(new.op)]()
            yield "and/or", new
        case ast.UnaryOp(op=ast.Not()):
            yield "dropped not", new.operand
        case ast.UnaryOp(op=ast.USub()):
            yield "dropped minus", new.operand
        case ast.Constant(value=bool()):
            new.value = not new.value
            yield "constant", new
        case ast.Constant(value=int() as value):
            new.value = value + 1
            yield "off by one", new
        case ast.Call(func=ast.Name(id=name)) if name in CALLS:
            new.func = ast.Name(CALLS[name], ast.Load())
            yield "call", new
        case ast.If() | ast.IfExp():
            new.test = ast.UnaryOp(ast.Not(), new.test)
            yield "swapped branch", new
        case ast.Break():
            yield "break to continue", ast.Continue()
        case ast.Continue():
            yield "continue to break", ast.Break()
    if isinstance(node, ast.Expr | ast.Assign | ast.AugAssign | ast.Delete):
        yield "deleted statement", ast.Pass()


def candidates() -> list[Mutant]:
    found = []
    for file in TARGETS:
        tree = ast.parse((SOURCES / file).read_text(encoding="utf-8"))
        skipped = _skipped(tree)
        for number, node in enumerate(ast.walk(tree)):
            if node in skipped:
                continue
            for kind, new in _changes(node):
                line = getattr(node, "lineno", 0)
                texts = (ast.unparse(item).splitlines()[0][:100] for item in (node, new))
                found.append(Mutant(file, line, number, kind, *texts))
    return found


def mutated_source(mutant: Mutant) -> str:
    tree = ast.parse((SOURCES / mutant.file).read_text(encoding="utf-8"))
    target = list(ast.walk(tree))[mutant.node]
    (new,) = (new for kind, new in _changes(target) if kind == mutant.kind)

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return new if node is target else self.generic_visit(node)

    return ast.unparse(ast.fix_missing_locations(Replace().visit(tree)))


# Runs in the mutant's process: the file is replaced as it is imported.
_RUNNER = """
import importlib.machinery, sys
path, source, seeds = sys.argv[1], sys.stdin.read(), int(sys.argv[2])
original = importlib.machinery.SourceFileLoader.get_code
def get_code(self, name):
    if self.path == path:
        return compile(source, path, "exec", dont_inherit=True)
    return original(self, name)
importlib.machinery.SourceFileLoader.get_code = get_code
from simulate import run_seed
for seed in range(seeds):
    try:
        run_seed(seed)
    except BaseException as error:
        print(seed, type(error).__name__, str(error)[:100].replace(chr(10), " "))
        sys.exit(1)
"""


def outcome(file: str, source: str, num_seeds: int) -> tuple[str, str]:
    """("caught", by what) or ("survived", "")."""
    path = SOURCES / file
    try:
        done = subprocess.run(
            [sys.executable, "-c", _RUNNER, str(path), str(num_seeds)],
            input=source,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            cwd=ROOT / "tests" / "simulation",
            env={"PYTHONPATH": f"{SOURCES.parent}:{ROOT / 'tests' / 'simulation'}"},
        )
    except subprocess.TimeoutExpired:
        return "caught", "no end in sight"
    if done.returncode == 0:
        return "survived", ""
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return "caught", lines[-1][:120] if lines else "crashed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=400, help="schedules per mutant")
    parser.add_argument("--only", type=int, help="run one mutant and show it")
    parser.add_argument("--output", type=Path, default=ROOT / "tools" / "mutants.json")
    options = parser.parse_args()
    every = candidates()
    chosen = random.Random(0).sample(every, min(options.count, len(every)))
    chosen.sort(key=lambda mutant: (mutant.file, mutant.line, mutant.node))
    for file in TARGETS:
        source = (SOURCES / file).read_text(encoding="utf-8")
        if outcome(file, source, 20)[0] == "caught":
            sys.exit(f"the simulation fails with {file} as it is: nothing to learn from mutants")
    results = []
    for index, mutant in enumerate(chosen):
        if options.only not in (None, index):
            continue
        what, how = outcome(mutant.file, mutated_source(mutant), options.seeds)
        results.append(asdict(mutant) | {"outcome": what, "by": how})
        print(
            f"{index:3} {what:8} {mutant.file}:{mutant.line} {mutant.kind}: {mutant.before}"
            f"  ->  {mutant.after}  {how}",
            flush=True,
        )
    num_caught = sum(result["outcome"] == "caught" for result in results)
    print(f"{num_caught} of {len(results)} caught, {len(every)} candidates")
    if options.only is None:
        summary = {
            "num_candidates": len(every),
            "num_caught": num_caught,
            "num_mutants": len(results),
            "schedules_per_mutant": options.seeds,
        }
        text = json.dumps(summary | {"mutants": results}, indent=1, ensure_ascii=False)
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
