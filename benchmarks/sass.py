"""What a kernel's machine code says of a step: its loop, how much of it others wait for, and what it consists of.

A text is what `cuobjdump --dump-sass` says of one kernel. Its loops of steps, one or several for different tiles, are
those that both multiply and wait, and have no such loop within. The way of a step begins where the states of the step
before are waited for and ends where those of the step are sent or signalled. Of ways that branch the longest counts,
and nothing twice: of a loop within a single turn. Code for several numbers of sequences, of which a step runs through
one, counts as so many steps.
"""

import re
from collections.abc import Collection, Iterable
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
        """For every place that branches go back to, what can reach one of these without passing the place."""
        found: dict[int, set[int]] = {}
        for last, following in enumerate(self.after):
            for first in following:
                if first > last:
                    continue
                loop, left = found.setdefault(first, {first}), [last]
                while left:
                    if (i := left.pop()) not in loop:
                        loop.add(i)
                        left += self.before[i]
        return [loop for loop in found.values() if 0 not in loop]  # else the place is passed by: no loop begins there

    def first_of(self, wanted: set[int], begin: int, among: set[int]) -> list[int]:
        """Those that may come behind `begin` before all others."""
        found: list[int] = []
        seen, left = {begin}, [begin]
        while left:
            for i in self.after[left.pop()]:
                if i in among and i not in seen:
                    seen.add(i)
                    (found if i in wanted else left).append(i)
        return found

    def beside(self, i: int, end: int, among: set[int]) -> set[int]:
        """What may come before or after an instruction, without passing `end`."""
        found = {end}
        for following in (self.before, self.after):
            seen, left = set[int](), [i]
            while left:
                one = left.pop()
                if one in among and one != end and one not in seen:
                    seen.add(one)
                    left += following[one]
            found |= seen
        return found

    def way(self, begin: int, among: Collection[int]) -> dict[int, int]:
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


def step_codes(sass: str) -> list[list[StepCode]]:
    """Of all loops of steps, the shortest first; of each for every number of sequences that it has code for."""
    flow = Flow(instructions(sass))
    loops = [loop for loop in flow.loops() if flow.find(PRODUCTS, loop) and flow.find(WAITS, loop)]
    innermost = [loop for loop in loops if not any(other < loop for other in loops)]
    return [of_sequences(flow, loop) for loop in sorted(innermost, key=len)]


def of_sequences(flow: Flow, loop: set[int]) -> list[StepCode]:
    """Code for a number of sequences is what goes with a product that may be the first of a step; where none of all is
    multiplied, the first is one behind the code for each number."""
    begin = flow.find(WAITS, sorted(loop))[0]
    all_products = set(flow.find(PRODUCTS, loop))
    own = {i: flow.beside(i, begin, loop) for i in flow.first_of(all_products, begin, loop)}
    with_others = {i: frozenset(own.keys() & with_i) for i, with_i in own.items()}
    alone = {same: own[i] for i, same in with_others.items() if all(same <= own[other] | {i} for other in same)}
    codes = {step_code(flow, begin, one) for one in alone.values()}  # of two copies one
    return sorted(codes, key=lambda code: code.products)


def step_code(flow: Flow, begin: int, loop: Collection[int]) -> StepCode:
    way = flow.way(begin, loop)
    products = flow.find(PRODUCTS, way)
    return StepCode(
        loop=len(loop),
        way=max(way[i] for i in flow.find(SIGNALS, way)) + 1,
        addresses=len(flow.find([ADDRESS], loop)),
        products=len(products),
        first_product=min(way[i] for i in products),
        state_store=max(way[i] for i in flow.find(STORES, way)),
    )
