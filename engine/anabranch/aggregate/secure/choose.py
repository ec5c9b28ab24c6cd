"""The owner's check: whose vector was shared consistently, and whose word to do without.

For each owner i, client j has told a letter, its masked projection of the share it got from i, or has refused the
share. The letters of an honest owner lie on one polynomial but for clients that lie; at most E do. So an owner is left
out if no polynomial fits all but E letters, and if more than E clients refuse or contradict its word. What remains is a
set of disputes, pairs (i, j). Nobody can tell whether i or j is to blame for one; the clients in most disputes are
suspects, up to E of them, and owners in a dispute with anybody else are left out.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.aggregate.secure.parameters import Parameters
from anabranch.aggregate.secure.proof import agreeing, locate

NO_POLYNOMIAL = "its shares do not lie on one polynomial"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Whose vectors go into the sum; clients not to be listened to; who is left out, and why."""

    accepted: tuple[int, ...]
    suspects: tuple[int, ...]
    excluded: dict[int, str]


def choose_owners(
    letters: Mapping[int, Mapping[int, Tensor]], clients: tuple[int, ...], parameters: Parameters
) -> Choice:
    """letters[i][j]: client j's letter [copies] about owner i. `clients` answered, and number at least K + T + E."""
    excluded: dict[int, str] = {}
    disputes: dict[int, set[int]] = {}
    fast = _without_disputes(letters, clients, parameters)
    for owner, word in letters.items():
        against = set() if owner in fast else _against(word, clients, parameters)
        if against is None:
            excluded[owner] = NO_POLYNOMIAL
        elif len(against) > parameters.errors:
            excluded[owner] = f"{len(against)} clients refuse or contradict its shares"
        else:
            disputes[owner] = against
    counts = Counter(client for against in disputes.values() for client in against)
    suspects = {client for client, _ in counts.most_common(parameters.errors)}
    for owner, against in disputes.items():
        if not against <= suspects:
            excluded[owner] = f"its share is disputed by {', '.join(f'client {j}' for j in sorted(against - suspects))}"
    accepted = tuple(sorted(owner for owner, against in disputes.items() if against <= suspects))
    return Choice(accepted=accepted, suspects=tuple(sorted(suspects)), excluded=excluded)


def _without_disputes(
    letters: Mapping[int, Mapping[int, Tensor]], clients: tuple[int, ...], parameters: Parameters
) -> set[int]:
    """Owners whose letters are all there and agree, by one product for all of them."""
    whole = [owner for owner, word in letters.items() if len(word) == len(clients)]
    if not whole:
        return set()
    words = torch.stack([torch.cat([letters[owner][j] for owner in whole]) for j in clients])
    agree = agreeing(parameters.code, clients, words).view(len(whole), parameters.copies).all(1)
    return {owner for owner, good in zip(whole, agree.tolist(), strict=True) if good}


def _against(word: Mapping[int, Tensor], clients: tuple[int, ...], parameters: Parameters) -> set[int] | None:
    """Clients that have no letter of this owner or one that does not fit; None if no polynomial fits the letters."""
    missing = set(clients) - set(word)
    present = [j for j in clients if j in word]
    spare = len(present) - parameters.code.threshold
    if spare < 0:
        return missing
    wrong = locate(
        parameters.code, present, torch.stack([word[j] for j in present]), min(parameters.errors, spare // 2)
    )
    return None if wrong is None else missing | set(wrong)
