# SPDX-License-Identifier: MIT
"""What we build on in vLLM, read off our sources and held against a release's, without importing either.

    python -m tests.serving.contract            the installed vLLM against tests/serving/contract.json
    python -m tests.serving.contract --others   the other supported releases, too; their wheels are not installed
    python -m tests.serving.contract --write    after a look at the differences: record them (with --others for all)

Two kinds of findings. A fault is wrong whatever was recorded: a name that is not there, a call that does not fit,
an override that vLLM's callers do not fit or that nobody calls. A difference is anything that is not as recorded:
a person looks at it, changes our code or not, and records it.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.serving.contract_derivation import Contract, Derivation
from tests.serving.contract_releases import fetch, installed, releases

RECORD = Path(__file__).with_name("contract.json")
NOTHING = "nothing"


@dataclass(frozen=True)
class Finding:
    """Something that is not as we need it or as it was recorded."""

    release: str
    symbol: str
    recorded: str
    found: str
    faults: tuple[str, ...]
    users: tuple[str, ...]

    def __str__(self) -> str:
        if self.recorded == NOTHING and not self.faults:
            return f"vLLM {self.release}: {self.symbol}\n    not recorded yet; found: {self.found}"
        lines = [f"vLLM {self.release}: {self.symbol}", f"    recorded: {self.recorded}", f"    found:    {self.found}"]
        lines += [f"    fault:    {fault}" for fault in self.faults]
        return "\n".join([*lines, f"    used by:  {', '.join(self.users) or 'nothing of ours'}"])


def recorded_for(release: str, record: Mapping[str, str | dict[str, str]]) -> dict[str, str]:
    """The record of one release: a symbol's text, or one text for each release where they differ."""
    texts = {symbol: text if isinstance(text, str) else text.get(release) for symbol, text in record.items()}
    return {symbol: text for symbol, text in texts.items() if text is not None}


def findings(release: str, contract: Contract, record: Mapping[str, str | dict[str, str]]) -> list[Finding]:
    """All that is wrong or different in a release, by symbol."""
    known, found = recorded_for(release, record), []
    for symbol in sorted({*known, *contract.symbols, *contract.faults}):
        old, new = known.get(symbol, NOTHING), contract.symbols.get(symbol, "nothing that we build on")
        if old != new or symbol in contract.faults:
            users = tuple(sorted(contract.users.get(symbol, ())))
            found.append(Finding(release, symbol, old, new, tuple(contract.faults.get(symbol, ())), users))
    return found


def read_record() -> dict[str, str | dict[str, str]]:
    """tests/serving/contract.json."""
    return dict(json.loads(RECORD.read_text(encoding="utf-8"))) if RECORD.exists() else {}


def write_record(contracts: Mapping[str, Contract]) -> None:
    """Record the contracts. A release that is not among them keeps its own text of a symbol where it has one, and is
    taken to agree with the others where it has none: `make compat` looks."""
    old, new = read_record(), {}
    for symbol in sorted(set().union(*(contract.symbols for contract in contracts.values()))):
        texts = {
            release: contracts[release].symbols.get(symbol) if release in contracts else known.get(symbol)
            for release, known in ((release, recorded_for(release, old)) for release in releases())
        }
        present = {release: text for release, text in texts.items() if text is not None}
        everywhere = len(set(present.values())) == 1 and all(texts[release] for release in contracts)
        new[symbol] = next(iter(present.values())) if everywhere else present
    RECORD.write_text(json.dumps(new, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def hold(contracts: Mapping[str, Contract], record: Mapping[str, str | dict[str, str]], unchecked: bool = False) -> int:
    """Print what is wrong or different in each release; how much it is."""
    count = 0
    for release, contract in sorted(contracts.items()):
        found = findings(release, contract, record)
        print(*found, f"vLLM {release}: {len(contract.symbols)} symbols, {len(found)} findings", sep="\n", flush=True)
        count += len(found)
        if unchecked:
            print(*(f"    {path}: {', '.join(sorted(names))}" for path, names in contract.unchecked.items()), sep="\n")
    return count


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", action="store_true", help="the other supported releases too")
    parser.add_argument("--write", action="store_true", help="record what is found")
    parser.add_argument("--unchecked", action="store_true", help="list what hangs on things of an unknown type")
    options = parser.parse_args()
    places = installed()
    if options.others:
        places |= {release: fetch(release) for release in releases() if release not in places}
    contracts = {release: Derivation(vllm).contract for release, vllm in places.items()}
    faulty = any(contract.faults for contract in contracts.values())
    if options.write and not faulty:
        write_record(contracts)
    count = hold(contracts, read_record(), options.unchecked)
    if options.write and faulty:
        print(f"{RECORD.name} left as it was: a fault is not a difference to record")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
