"""Arithmetic: column by column, carries written out: each token is a small fact or a copy."""

from __future__ import annotations

from random import Random

from vivace.training.corpus import Corpus
from vivace.training.exercises.base import Turn


def arithmetic(random: Random, difficulty: int, num_tokens: int, corpus: Corpus) -> list[Turn]:
    """Difficulty: 1 is one operation on digits; 2 on two digits; d has d - 1 operations, and
    from 5 on three digits."""
    largest = 9 if difficulty == 1 else 99 if difficulty < 5 else 999
    value = random.randint(0, largest)
    start, steps, lines = value, [], []
    for _ in range(max(1, difficulty - 1)):
        operation, operand = draw_operation(random, value, largest)
        steps.append((operation, operand))
        working, value = work_out(operation, value, operand)
        lines.append(working)
    lines.append(f"Answer: {value}")
    question = _ask_arithmetic(random, start, steps)
    return [Turn("user", question), Turn("assistant", "\n".join(lines))]


def draw_operation(random: Random, value: int, largest: int) -> tuple[str, int]:
    operation = random.choices("+-*", weights=(4, 4, 3))[0]
    if operation == "*" and value > 99:
        operation = "-"
    if operation == "*":
        return "*", random.randint(2, 9) if largest > 9 else random.randint(0, 9)
    if operation == "+" and value + largest > 999:
        operation = "-"
    # Half of the operands are small, so that long chains are not all long columns.
    bound = largest if random.random() < 0.5 else min(largest, 20)
    return operation, random.randint(0, min(bound, value) if operation == "-" else bound)


def work_out(operation: str, a: int, b: int) -> tuple[str, int]:
    """One operation as columns from the right: '37+48: 7+8+0=15 3+4+1=8 85'."""
    value = {"+": a + b, "-": a - b, "*": a * b}[operation]
    columns, carry = [], 0
    num_columns = len(str(a)) if operation == "*" else max(len(str(a)), len(str(b)))
    for column in range(num_columns):
        digit_a, digit_b = a // 10**column % 10, b // 10**column % 10
        if operation == "+":
            total = digit_a + digit_b + carry
            columns.append(f"{digit_a}+{digit_b}+{carry}={total}")
            carry = total // 10
        elif operation == "-":
            borrow = int(digit_a < digit_b + carry)
            digit_a += 10 * borrow
            columns.append(f"{digit_a}-{digit_b}-{carry}={digit_a - digit_b - carry}")
            carry = borrow
        else:
            product = digit_a * b
            columns.append(f"{digit_a}*{b}={product}+{carry}={product + carry}")
            carry = (product + carry) // 10
    return f"{a}{operation}{b}: {' '.join(columns)} {value}", value


def _ask_arithmetic(random: Random, start: int, steps: list[tuple[str, int]]) -> str:
    if random.random() < 0.3:
        verbs = {"+": "Add", "-": "Subtract", "*": "Multiply by"}
        return f"Start with {start}. " + " ".join(f"{verbs[o]} {n}." for o, n in steps)
    text, is_sum = str(start), False
    for operation, operand in steps:
        if operation == "*" and is_sum:
            text, is_sum = f"({text})", False
        text = f"{text}{operation}{operand}"
        is_sum = is_sum or operation != "*"
    forms = (
        "Compute {}.",
        "What is {}?",
        "Work out {} step by step.",
        "Calculate {}.",
        "{}=?",
    )
    return random.choice(forms).format(text)
