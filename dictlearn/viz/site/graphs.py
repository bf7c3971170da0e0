"""Attribution graphs for the page: checked, and their latents tied to the dictionaries shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dictlearn.dictionary import Dictionary
from dictlearn.runfile import digest


@dataclass(kw_only=True)
class Graphs:
    """The graphs of a site."""

    content: list[dict[str, Any]] = field(default_factory=list)
    """Of the data files."""
    titles: list[dict[str, Any]] = field(default_factory=list)
    """What the list of graphs says of each."""

    @staticmethod
    def read(
        paths: Sequence[str | Path], dictionaries: Mapping[str, tuple[Dictionary, Path]]
    ) -> Graphs:
        """Read the files; a latent links to the dictionary with the digest its layer names.

        Raises
        ------
        FileNotFoundError, FormatError
            No such file, or no graph.
        """
        graphs = Graphs()
        if not paths:
            return graphs
        from dictlearn.circuits.graph import load

        here = {digest(d): n for n, (d, _) in enumerate(dictionaries.values())}
        for path in paths:
            graph = load(path)
            content = graph.to_json()
            content["links"] = [
                here.get(str(one.get("digest")), -1) for one in content["dictionaries"]
            ]
            graphs.content.append(content)
            graphs.titles.append(
                {
                    "name": Path(path).stem,
                    "item": graph.item,
                    "nodes": len(graph.nodes),
                    "edges": graph.n_edges,
                    "scores": content["scores"],
                }
            )
        return graphs
