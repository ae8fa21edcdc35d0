"""Confidence intervals for shares and for paired changes of shares, with the sample count a claim would take.

Not the textbook p +- z sqrt(p(1-p)/n): at an agreement of 1, which is what a good export shows, it has width zero and
would claim certainty from one sample.
"""

from __future__ import annotations

import math
from statistics import NormalDist


def normal_quantile(confidence: float) -> float:
    """z with P(|N(0, 1)| <= z) = confidence."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson_interval(successes: float, n: int, confidence: float) -> tuple[float, float]:
    """Wilson's score interval for a share of successes in n trials; (0, 1) for n = 0.

    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), p = successes / n.
    Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927.

    >>> [round(bound, 4) for bound in wilson_interval(797, 797, 0.95)]
    [0.9952, 1.0]
    """
    if n == 0:
        return 0.0, 1.0
    z, p = normal_quantile(confidence), successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def samples_for_share(share: float, wanted: float, confidence: float) -> int | None:
    """The least n at which an observed `share` puts Wilson's lower bound at `wanted` or above; None if none does."""
    if share < wanted or wanted >= 1 or share == wanted:
        return None
    high = 1
    while wilson_interval(share * high, high, confidence)[0] < wanted:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if wilson_interval(share * middle, middle, confidence)[0] < wanted:
            low = middle
        else:
            high = middle
    return high


def paired_drop_interval(lost: int, gained: int, n: int, confidence: float) -> tuple[float, float]:
    """Interval for the drop (lost - gained) / n of a share measured twice on the same n samples; (-1, 1) for n = 0.

    Wald's interval after half an observation is added to each of the four cells:
    d = (lost - gained) / (n + 2), half = z sqrt(lost + gained + 1 - (lost - gained)^2 / (n + 2)) / (n + 2).
    Source: Agresti and Min, Simple improved confidence intervals for comparing matched proportions, 2005.
    """
    if n == 0:
        return -1.0, 1.0
    z, total, change = normal_quantile(confidence), n + 2, lost - gained
    half = z * math.sqrt(lost + gained + 1 - change * change / total) / total
    return change / total - half, change / total + half


def samples_for_margin(lost: int, gained: int, n: int, margin: float, confidence: float) -> int | None:
    """About how many samples, at the same rates of lost and gained, put the drop's upper bound at `margin` or below."""
    if n == 0 or (lost - gained) / n >= margin:
        return None
    wanted = n
    while paired_drop_interval(round(lost * wanted / n), round(gained * wanted / n), wanted, confidence)[1] > margin:
        wanted = math.ceil(wanted * 1.1) + 1
    return wanted
