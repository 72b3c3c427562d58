"""The field's conventions in one place: every one that an audit knows, with who follows it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from ddim_lab.config.job import Config
from ddim_lab.conventions.factors import SCORING, of_network
from ddim_lab.conventions.protocol import Factor
from ddim_lab.conventions.sampling import CONVENTIONS
from ddim_lab.data.base import without_images
from ddim_lab.metrics.features import feature_network
from ddim_lab.store import Store

__all__ = ["known", "listed"]

WIDTH = 118
OFTEN = {3: "often", 2: "sometimes", 1: "rarely"}


def known(config: Config, store: Store) -> Mapping[str, Sequence[Factor]]:
    """Every convention by what it is of; nothing is loaded, trained or downloaded."""
    found: dict[str, list[Factor]] = {}
    for factor in SCORING:
        found.setdefault(factor.part, []).append(factor)
    data = without_images(config.data)
    for network in map(feature_network, config.metrics.known_networks):
        if factors := of_network(network.variants(data, store), "split"):
            found[f"feature network: {network.name}"] = factors
    found["sampling"] = [convention.factor() for convention in CONVENTIONS]
    return found


def listed(conventions: Mapping[str, Sequence[Factor]]) -> str:
    """Each with its name, one sentence, who does it so, how often, and where that can be read."""
    lines: list[str] = []
    for part, factors in conventions.items():
        lines += ["", part.upper(), ""]
        for factor in factors:
            effect = "" if factor.effect is None else f", {factor.effect:+.0f} % of FID where it was published"
            lines.append(f"{factor.name}: {factor.label} ({OFTEN[factor.common]}{effect})")
            for text in (factor.says, f"Who: {'; '.join(factor.who)}.", f"Source: {factor.source}."):
                lines += textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines[1:])
