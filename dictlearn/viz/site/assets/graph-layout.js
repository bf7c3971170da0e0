// Where the nodes of an attribution graph stand: tokens from left to right, layers from below.
"use strict";
(() => {
  const GAP = 24, SHAPE = 0.66;

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
    const most = Math.max(1, ...[...cells.values()].map((inside) => inside.length));
    const broad = most > 24 ? 6 : most > 6 ? 4 : 3;
    const across = (key) => (key.startsWith("-1/") ? 1 : broad);
    const wide = new Map(tokens.map((t) => [t, 1]));
    for (const [key, inside] of cells) {
      const token = Number(key.split("/")[1]);
      wide.set(token, Math.max(wide.get(token), Math.min(across(key), inside.length)));
    }
    let x = 60;
    const columns = tokens.map((token) => {
      const start = x;
      x += wide.get(token) * GAP + 10;
      const some = graph.nodes.find((n) => n.token === token);
      const name = some.token_kind === "patch" && some.place.length ? some.place.join(",") : some.token_kind.toUpperCase() || String(token);
      return { token, x: start, width: wide.get(token) * GAP, name };
    });
    const byToken = new Map(columns.map((c) => [c.token, c]));
    const layers = [...new Set(graph.nodes.map((n) => n.layer))].sort((a, b) => a - b);
    const depth = new Map();
    for (const layer of layers) {
      let deep = 1;
      for (const [key, inside] of cells) if (Number(key.split("/")[0]) === layer) deep = Math.max(deep, Math.ceil(inside.length / across(key)));
      depth.set(layer, deep);
    }
    const width = Math.max(x + 20, 420);
    const inRows = layers.reduce((sum, layer) => sum + (depth.get(layer) - 1) * GAP, 0);
    const step = Math.max(80, (width * SHAPE - inRows - 110) / Math.max(1, layers.length - 1));
    let y = 50;
    const top = [...layers].reverse();
    const rows = new Map();
    for (const layer of top) {
      rows.set(layer, y);
      y += step + (depth.get(layer) - 1) * GAP;
    }
    const places = new Array(graph.nodes.length);
    for (const [key, inside] of cells) {
      const [layer, token] = key.split("/").map(Number);
      const column = byToken.get(token);
      const n0 = across(key);
      inside.forEach((i, n) => {
        const line = Math.floor(n / n0), inLine = Math.min(n0, inside.length - line * n0);
        places[i] = { x: column.x + column.width / 2 + ((n % n0) - (inLine - 1) / 2) * GAP, y: rows.get(layer) + line * GAP };
      });
    }
    const logits = graph.nodes.map((n, i) => i).filter((i) => graph.nodes[i].kind === "logit");
    logits.forEach((i, n) => {
      places[i] = { x: (width / (logits.length + 1)) * (n + 1), y: rows.get(graph.nodes[i].layer) };
    });
    const last = graph.model.n_layers;
    return {
      places, columns, width, height: y - step + 60,
      layers: top.map((layer) => ({ y: rows.get(layer), name: layer < 0 ? "input" : layer >= last ? "logits" : `layer ${layer}` })),
    };
  };
})();
