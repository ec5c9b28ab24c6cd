"""The code: which points, which matrices, which shares are wrong. Python integers; nothing here is long or secret.

A vector is cut in K blocks X_k; T blocks of noise Z_t join them. U = K + T values at the points beta make a polynomial
whose value at alpha_j is the share of client j:

    u(z) = sum_k X_k l_k(z) + sum_t Z_t l_{K+t}(z)        share_j = u(alpha_j) = sum_k G_jk [X; Z]_k
    G_jk = r_j c_k / (alpha_j - beta_k),   r_j = prod_m (alpha_j - beta_m),   c_k = 1 / prod_{m != k} (beta_k - beta_m)

G is a Cauchy matrix with scaled rows and columns: each of its square minors is non-zero. So any T shares are uniform
whatever X is (T-privacy), and any K + T shares determine everything (recovery). The alphas must not meet the betas:
alpha_j = beta_k would hand block k to client j.

Fields with a transform take powers of two of points: beta the subgroup of order `order` >= K + T, of which the first
K + T carry values and the others zeros; alpha the first N points of the coset g H, |H| = `coset_order`. The products in
r_j and c_k go over all `order` points; then u = V w, V(z) the product of (z - beta) over the unused betas, and w has
degree at most K + T - 1. Other fields take beta = 0, 1, ... and alpha behind them; there V = 1.

Lagrange coded computing (arXiv 1806.00939) and packed Shamir sharing are this code.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import mul

from .fields import Field

Row = tuple[int, ...]
Matrix = tuple[Row, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """Shares for `clients` N of vectors in `blocks` K pieces, any `privacy` T of which say nothing.

    Raises ValueError if the field has too few elements for so many points, or K + T shares could never come together.
    """

    field: Field
    clients: int
    blocks: int
    privacy: int

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.privacy < 1 or self.clients < self.threshold:
            raise ValueError(
                f"need K >= 1 blocks, T >= 1 and N >= K + T clients, got N={self.clients}, K={self.blocks}, "
                f"T={self.privacy}"
            )
        if self.clients + self.threshold > self.field.p:
            raise ValueError(f"field {self.field.name} has too few elements for N={self.clients}, U={self.threshold}")

    @property
    def threshold(self) -> int:
        """Shares that suffice: K + T."""
        return self.blocks + self.privacy

    @property
    def order(self) -> int:
        """Points beta, with those that carry zeros."""
        return _power_of_two(self.threshold) if self.has_transform else self.threshold

    @property
    def coset_order(self) -> int:
        """Points from which alpha is taken, where there is a transform."""
        return max(_power_of_two(self.clients), self.order)

    @property
    def has_transform(self) -> bool:
        """M31 and F50, with subgroups of at most 4 points, never have one: their points follow one rule for all N."""
        longest = 1 << self.field.two_adicity
        return longest > 4 and longest >= max(_power_of_two(self.clients), _power_of_two(self.threshold))

    @property
    def beta(self) -> list[int]:
        """All `order` points of values; the first K are of data, the next T of noise, the rest unused."""
        return _powers(1, self.order, self.order, self.field) if self.has_transform else list(range(self.threshold))

    @property
    def alpha(self) -> list[int]:
        """The point of each client."""
        if self.has_transform:
            return _powers(self.field.generator, self.clients, self.coset_order, self.field)
        return list(range(self.threshold, self.threshold + self.clients))


@lru_cache(maxsize=16)
def encoding_matrix(code: Code) -> Matrix:
    """G [N][K + T]: a client's share is its row times the K blocks of data and the T of noise."""
    p, points = code.field.p, _points(code)
    beta, U = points.beta, code.threshold
    c = _inverses([_product((b - other for other in beta if other != b), p) for b in beta[:U]], p)
    rows = []
    for a in points.alpha:
        r = _product((a - b for b in beta), p)
        rows.append(tuple(r * c[k] * inverse % p for k, inverse in enumerate(_inverses([a - b for b in beta[:U]], p))))
    return tuple(rows)


def decoding_matrix(code: Code, clients: Sequence[int]) -> Matrix:
    """D [K][K + T]: the blocks of data are D times the shares of these K + T clients, in this order.

    Raises ValueError if these are not K + T different clients.
    """
    if len(clients) != code.threshold:
        raise ValueError(f"decoding takes the shares of K + T = {code.threshold} clients, got {len(clients)}")
    _check_clients(code, clients)
    return _decoding_matrix(code, tuple(clients))


@lru_cache(maxsize=16)
def _decoding_matrix(code: Code, clients: tuple[int, ...]) -> Matrix:
    p, points = code.field.p, _points(code)
    alpha = [points.alpha[j] for j in clients]
    scale = _inverses([_product((a - other for other in alpha if other != a), p) for a in alpha], p)
    scale = [x * points.unused_inverse[j] % p for x, j in zip(scale, clients, strict=True)]
    rows = []
    for b, unused in zip(points.beta[: code.blocks], points.unused, strict=True):
        r = _product((b - a for a in alpha), p) * unused % p
        rows.append(tuple(r * x * y % p for x, y in zip(scale, _inverses([b - a for a in alpha], p), strict=True)))
    return tuple(rows)


def correct(code: Code, word: Mapping[int, int], *, most_errors: int) -> tuple[list[int], list[int]] | None:
    """The K data values that a word of one number per client stands for, and the clients whose number is wrong.

    word          client -> its value of one polynomial of the code, some of them maybe wrong, some clients absent
    most_errors   at most so many may be wrong: K + T + 2 * most_errors values are needed to be sure
    returns       (values [K], wrong clients in rising order), or None if no polynomial agrees with all but so many

    A word without errors is told by its syndromes, n (n - K - T) products. For others Gao's decoder (Bell Labs, 2003):
    interpolate, then stop Euclid's algorithm half way; n^2 products.
    Raises ValueError for an unknown client, for too few values, and for values that are not canonical.
    """
    clients = tuple(sorted(word))
    _check_clients(code, clients)
    n, U, p = len(clients), code.threshold, code.field.p
    if most_errors < 0 or n < U + 2 * most_errors:
        raise ValueError(f"{most_errors} errors need K + T + 2 * errors = {U + 2 * most_errors} values, got {n}")
    if not all(0 <= word[j] < p for j in clients):
        raise ValueError(f"values must be in 0..{p - 1}, got {next(x for x in word.values() if not 0 <= x < p)}")
    values = [word[j] for j in clients]
    wrong: list[int] = []
    if any(sum(map(mul, row, values)) % p for row in _checks(code, clients)):
        found = _errors(code, clients, values)
        if found is None or len(found) > most_errors:
            return None
        wrong = found
    right = [j for j in clients if j not in wrong][:U]
    return [sum(map(mul, row, (word[j] for j in right))) % p for row in decoding_matrix(code, right)], wrong


def checking_matrix(code: Code, clients: Sequence[int]) -> Matrix:
    """[n - K - T][n]: its product with the values of these n clients is zero if they lie on one polynomial of the code.

    Raises ValueError if these are not different clients.
    """
    _check_clients(code, clients)
    return _checks(code, tuple(clients))


@lru_cache(maxsize=16)
def _checks(code: Code, clients: tuple[int, ...]) -> Matrix:
    """[n - K - T][n]: rows that are orthogonal to the words of the code at these clients, and only to them."""
    p, points = code.field.p, _points(code)
    alpha = [points.alpha[j] for j in clients]
    row = _inverses([_product((a - other for other in alpha if other != a), p) for a in alpha], p)
    row = [x * points.unused_inverse[j] % p for x, j in zip(row, clients, strict=True)]
    rows: list[Row] = []
    for _ in range(len(clients) - code.threshold):
        rows.append(tuple(row))
        row = [x * a % p for x, a in zip(row, alpha, strict=True)]
    return tuple(rows)


def _errors(code: Code, clients: tuple[int, ...], word: list[int]) -> list[int] | None:
    """The clients whose values are off the polynomial that Gao's decoder finds; None if it finds none."""
    n, U, p = len(clients), code.threshold, code.field.p
    points = _points(code)
    alpha = [points.alpha[j] for j in clients]
    values = [x * points.unused_inverse[j] % p for x, j in zip(word, clients, strict=True)]
    before = _from_roots(alpha, p)
    now = _interpolate(before, alpha, values, p)
    v_before, v_now = [], [1]
    while 2 * len(now) > n + U + 1:  # degree of `now` at least (n + U) / 2
        quotient, rest = _divide(before, now, p)
        before, now = now, rest
        v_before, v_now = v_now, _minus(v_before, _times(quotient, v_now, p), p)
    polynomial, rest = _divide(now, v_now, p)
    if rest or len(polynomial) > U:
        return None
    return [j for j, a, y in zip(clients, alpha, values, strict=True) if _value(polynomial, a, p) != y]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Points:
    """What all matrices of a code share: its points, and V at those of data and inverted at those of clients."""

    alpha: Row
    beta: Row
    unused: Row
    unused_inverse: Row


@lru_cache(maxsize=16)
def _points(code: Code) -> _Points:
    p, beta = code.field.p, code.beta
    rest = beta[code.threshold :]
    return _Points(
        alpha=tuple(code.alpha),
        beta=tuple(beta),
        unused=tuple(_product((b - other for other in rest), p) for b in beta[: code.blocks]),
        unused_inverse=tuple(_inverses([_product((a - other for other in rest), p) for a in code.alpha], p)),
    )


def _power_of_two(n: int) -> int:
    """The next one from n on."""
    return 1 << (n - 1).bit_length()


def _powers(first: int, count: int, order: int, field: Field) -> list[int]:
    root = pow(field.generator, (field.p - 1) // order, field.p)
    return [first * pow(root, k, field.p) % field.p for k in range(count)]


def _check_clients(code: Code, clients: Sequence[int]) -> None:
    if len(set(clients)) != len(clients) or not all(0 <= j < code.clients for j in clients):
        raise ValueError(f"need different clients of 0..{code.clients - 1}, got {list(clients)}")


def _product(factors: Iterable[int], p: int) -> int:
    product = 1
    for factor in factors:
        product = product * factor % p
    return product


def _inverses(values: list[int], p: int) -> list[int]:
    """One inversion for all of them (Montgomery's trick)."""
    before, product = [], 1
    for value in values:
        before.append(product)
        product = product * value % p
    inverse = pow(product, -1, p)
    out = []
    for value, prefix in zip(reversed(values), reversed(before), strict=True):
        out.append(inverse * prefix % p)
        inverse = inverse * value % p
    return out[::-1]


# Polynomials: coefficients from the constant one up, without zeros at the end; [] is zero.


def _trimmed(a: list[int]) -> list[int]:
    while a and a[-1] == 0:
        a.pop()
    return a


def _value(a: list[int], z: int, p: int) -> int:
    value = 0
    for coefficient in reversed(a):
        value = (value * z + coefficient) % p
    return value


def _times(a: list[int], b: list[int], p: int) -> list[int]:
    out = [0] * (len(a) + len(b) - 1) if a and b else []
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            out[i + j] += x * y
    return _trimmed([x % p for x in out])


def _minus(a: list[int], b: list[int], p: int) -> list[int]:
    longer = max(len(a), len(b))
    padded = zip(a + [0] * (longer - len(a)), b + [0] * (longer - len(b)), strict=True)
    return _trimmed([(x - y) % p for x, y in padded])


def _divide(a: list[int], b: list[int], p: int) -> tuple[list[int], list[int]]:
    rest, lead = list(a), pow(b[-1], -1, p)
    quotient = [0] * max(0, len(a) - len(b) + 1)
    for i in reversed(range(len(quotient))):
        factor = quotient[i] = rest[i + len(b) - 1] * lead % p
        for j, y in enumerate(b):
            rest[i + j] = (rest[i + j] - factor * y) % p
    return quotient, _trimmed(rest)


def _from_roots(roots: Sequence[int], p: int) -> list[int]:
    out = [1]
    for root in roots:
        out = [(low - root * high) % p for low, high in zip([0, *out], [*out, 0], strict=True)]
    return out


def _interpolate(master: list[int], points: Sequence[int], values: Sequence[int], p: int) -> list[int]:
    """Lagrange's sum of master / (z - point), master being the product of all (z - point)."""
    weights = _inverses([_product((a - other for other in points if other != a), p) for a in points], p)
    out = [0] * len(points)
    for point, value, weight in zip(points, values, weights, strict=True):
        factor, high = value * weight % p, 0
        for i in reversed(range(len(points))):  # division from the highest coefficient down
            high = (master[i + 1] + high * point) % p
            out[i] += factor * high
    return _trimmed([x % p for x in out])
