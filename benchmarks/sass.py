"""What a kernel's machine code says of a step: its loop, how much of it others wait for, and what it consists of.

A text is what `cuobjdump --dump-sass` says of one kernel. Its loop of steps is the smallest that both multiplies and
waits. The way of a step begins where the states of the step before are waited for and ends where those of the step are
sent or signalled. Of ways that branch the longest counts, and nothing twice: of code for several numbers of sequences
that for the most, and of a loop within a single turn.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

PRODUCTS = re.compile(r"HMMA"), re.compile(r"FFMA")
# From what says most to what is left: what passes between CTAs, between halves of a barrier, by a whole barrier.
WAITS = re.compile(r"SYNCS\.PHASECHK|LDG?\.\S*STRONG"), re.compile(r"BAR\.SYNC")
SIGNALS = re.compile(r"STAS|UBLKCP|STG?\.\S*STRONG"), re.compile(r"SYNCS\.ARRIVE|BAR\.ARV"), re.compile(r"BAR\.SYNC")
STORES = re.compile(r"STAS|UBLKCP|STG?\.\S*STRONG"), re.compile(r"STS")
# Products and sums of 64 bits, and their upper halves; a sum of 32 bits that keeps its carry is the lower half of one.
ADDRESS = re.compile(r"U?IMAD\.(WIDE|HI|X)|U?LEA|U?IADD3\.X|U?SHF\.\S*64|U?IADD3 \w+, U?P\d")


class Instruction(NamedTuple):
    address: int
    text: str  # without its predicate: "IADD3 R24, P0, R30, -UR18, RZ"
    conditional: bool

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.match(r"BRA\b.*?(0x[0-9a-f]+)$", self.text)
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        return self.conditional or not re.match(r"BRA (?!\.|U?P\d)|EXIT|RET", self.text)


class StepCode(NamedTuple):
    """Of a step: instructions in its loop, and where things stand on its way, the first instruction being 0."""

    loop: int
    way: int  # all of it
    addresses: int  # in the loop, computations of 64 bits
    products: int  # in the loop
    first_product: int
    state_store: int  # the last store of states


def instructions(sass: str) -> list[Instruction]:
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([^;]*?)\s*;", sass)
    return [Instruction(int(address, 16), text, bool(predicate)) for address, predicate, text in found]


class Flow:
    """Which instruction may follow which."""

    def __init__(self, code: list[Instruction]):
        self.code = code
        place = {one.address: i for i, one in enumerate(code)}
        self.after: list[list[int]] = [[] for _ in code]
        self.before: list[list[int]] = [[] for _ in code]
        for i, one in enumerate(code):
            following = [i + 1] if one.falls_through and i + 1 < len(code) else []
            for to in [*following, *([place[one.target]] if one.target in place else [])]:
                self.after[i].append(to)
                self.before[to].append(i)

    def find(self, patterns: Iterable[re.Pattern], among: Iterable[int]) -> list[int]:
        """Those that match the first of the patterns that any matches."""
        among = list(among)
        for pattern in patterns:
            if found := [i for i in among if pattern.match(self.code[i].text)]:
                return found
        return []

    def loops(self) -> list[set[int]]:
        """For every branch backwards, what can reach it without passing where it goes."""
        found = []
        for last, following in enumerate(self.after):
            for first in following:
                if first > last:
                    continue
                loop, left = {first}, [last]
                while left:
                    if (i := left.pop()) not in loop:
                        loop.add(i)
                        left += self.before[i]
                found.append(loop)
        return found

    def way(self, begin: int, among: set[int]) -> dict[int, int]:
        """How many instructions the longest way behind `begin` has before each, without a branch backwards; of `begin`
        itself, where it is come upon again."""
        order: list[int] = []  # what follows stands before
        seen, left = {begin}, [(to, False) for to in self.after[begin] if to in among]
        entries = [to for to, _ in left]
        while left:
            i, done = left.pop()
            if done:
                order.append(i)
            elif i not in seen:
                seen.add(i)
                left += [(i, True), *((to, False) for to in self.after[i] if to in among)]
        rank = {i: -place for place, i in enumerate(order)} | {begin: 1}
        longest = dict.fromkeys(entries, 0)
        for i in reversed(order):
            for to in self.after[i]:
                if to in rank and rank[to] > rank[i]:
                    longest[to] = max(longest.get(to, 0), longest[i] + 1)
        return longest


def step_code(sass: str) -> StepCode | None:
    """None: the kernel has no loop of steps."""
    flow = Flow(instructions(sass))
    loops = [loop for loop in flow.loops() if flow.find(PRODUCTS, loop) and flow.find(WAITS, loop)]
    if not loops:
        return None
    loop = min(loops, key=len)
    way = flow.way(flow.find(WAITS, sorted(loop))[0], loop)
    products = flow.find(PRODUCTS, way)
    return StepCode(
        loop=len(loop),
        way=max(way[i] for i in flow.find(SIGNALS, way)) + 1,
        addresses=len(flow.find([ADDRESS], loop)),
        products=len(products),
        first_product=min(way[i] for i in products),
        state_store=max(way[i] for i in flow.find(STORES, way)),
    )
