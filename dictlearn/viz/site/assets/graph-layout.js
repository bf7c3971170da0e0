// Where the nodes of an attribution graph stand: tokens from left to right, layers from below.
"use strict";
(() => {
  const GAP = 30, ROW = 92;

  // Returns {nodes: [{x, y, ...node}], width, height, columns: [{x, name}], layers: [{y, name}]}.
  View.layout = (graph) => {
    const tokens = [...new Set(graph.nodes.filter((n) => n.kind !== "logit").map((n) => n.token))].sort((a, b) => a - b);
    const cells = new Map();
    graph.nodes.forEach((node, i) => {
      if (node.kind === "logit") return;
      const key = `${node.layer}/${node.token}`;
      if (!cells.has(key)) cells.set(key, []);
      cells.get(key).push(i);
    });
    const perRow = 4;
    const wide = new Map(tokens.map((t) => [t, 1]));
    for (const [key, inside] of cells) {
      const token = Number(key.split("/")[1]);
      wide.set(token, Math.max(wide.get(token), Math.min(perRow, inside.length)));
    }
    let x = 60;
    const columns = tokens.map((token) => {
      const start = x;
      x += wide.get(token) * GAP + 18;
      const some = graph.nodes.find((n) => n.token === token);
      const name = some.token_kind === "patch" && some.place.length ? some.place.join(",") : some.token_kind.toUpperCase() || String(token);
      return { token, x: start, width: wide.get(token) * GAP, name };
    });
    const byToken = new Map(columns.map((c) => [c.token, c]));
    const layers = [...new Set(graph.nodes.map((n) => n.layer))].sort((a, b) => a - b);
    const depth = new Map();
    for (const layer of layers) {
      let most = 1;
      for (const [key, inside] of cells) if (Number(key.split("/")[0]) === layer) most = Math.max(most, Math.ceil(inside.length / perRow));
      depth.set(layer, most);
    }
    let y = 40;
    const top = [...layers].reverse();
    const rows = new Map();
    for (const layer of top) {
      rows.set(layer, y);
      y += ROW + (depth.get(layer) - 1) * GAP;
    }
    const width = Math.max(x + 40, 420);
    const places = new Array(graph.nodes.length);
    for (const [key, inside] of cells) {
      const [layer, token] = key.split("/").map(Number);
      const column = byToken.get(token);
      inside.forEach((i, n) => {
        const line = Math.floor(n / perRow), inLine = Math.min(perRow, inside.length - line * perRow);
        places[i] = { x: column.x + column.width / 2 + ((n % perRow) - (inLine - 1) / 2) * GAP, y: rows.get(layer) + line * GAP };
      });
    }
    const logits = graph.nodes.map((n, i) => i).filter((i) => graph.nodes[i].kind === "logit");
    logits.forEach((i, n) => {
      places[i] = { x: (width / (logits.length + 1)) * (n + 1), y: rows.get(graph.nodes[i].layer) };
    });
    const last = graph.model.n_layers;
    return {
      places, columns, width, height: y - ROW + 70,
      layers: top.map((layer) => ({ y: rows.get(layer), name: layer < 0 ? "input" : layer >= last ? "logits" : `layer ${layer}` })),
    };
  };
})();
