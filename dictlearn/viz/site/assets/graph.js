// The attribution graph: what made the logits of one input, node by node.
"use strict";
(() => {
  const { h, s } = View;
  const f = View.format;
  const DRAWN = 400;

  View.pages.graphs = async (main) => {
    const cards = View.site.graphs.map((g, i) => h("a.graph-card", { href: View.route.to(["graph", i]) },
      h("strong", null, g.name), h("span", null, g.item.label_name || g.item.key || ""),
      h("span.num", null, `${f.count(g.nodes)} nodes, ${f.count(g.edges)} edges`)));
    main.replaceChildren(h("div.page", null, h("div.heading", null, h("h1", null, "Attribution graphs")),
      cards.length ? h("div.graph-cards", null, cards) : View.empty("No graph", "Give some to dictlearn view by --graph FILE; dictlearn trace makes them.")));
    return null;
  };

  View.pages.graph = async (main, number, query) => {
    if (number >= View.site.graphs.length) throw new Error(`This site has ${View.site.graphs.length} graphs, numbered from 0.`);
    main.replaceChildren(h("div.page", null, View.loading(6)));
    const graph = await View.load(`graphs/${number}`);
    const title = View.site.graphs[number];
    const layout = View.layout(graph);
    const order = graph.edges.map((_, i) => i).sort((a, b) => Math.abs(graph.edges[b][2]) - Math.abs(graph.edges[a][2]));
    const strongest = Math.max(1e-12, ...graph.edges.map((e) => Math.abs(e[2])));
    const selected = { node: graph.nodes.findIndex((n) => n.id === query.get("node")) };
    let drawn = Math.min(DRAWN, order.length);
    const lines = s("g.edges"), dots = s("g.nodes");
    const svg = s("svg.graph", { tabindex: 0, role: "application", preserveAspectRatio: "xMidYMid meet",
      "aria-label": `Attribution graph of ${graph.nodes.length} nodes. Plus and minus zoom, arrows move, Tab goes through the nodes.` },
    layout.layers.map((l) => s("text.layer-name", { x: 8, y: l.y + 4 }, l.name)), lines, dots,
    layout.columns.map((c) => s("text.column-name", { x: c.x + c.width / 2, y: layout.height - 8 }, c.name)));
    svg.style.fontSize = `${Math.max(11, layout.width / 80).toFixed(1)}px`;
    const zoom = new View.Zoom(svg, layout.width, layout.height);
    const side = h("div.graph-side");
    const marks = graph.nodes.map((node, i) => mark(node, layout.places[i], () => choose(i)));
    dots.append(...marks);

    function drawEdges() {
      const shown = order.slice(0, drawn);
      const mine = selected.node >= 0 ? order.filter((i) => graph.edges[i][0] === selected.node || graph.edges[i][1] === selected.node) : [];
      lines.replaceChildren(...[...shown.filter((i) => !mine.includes(i)), ...mine].map((i) => {
        const [a, b, w] = graph.edges[i];
        const p = layout.places[a], q = layout.places[b], lift = (p.y - q.y) * 0.45;
        const near = a === selected.node || b === selected.node;
        return s(`path.edge.${w < 0 ? "less" : "more"}${near ? ".near" : ""}`, {
          d: `M${p.x} ${p.y}C${p.x} ${p.y - lift} ${q.x} ${q.y + lift} ${q.x} ${q.y}`,
          "stroke-width": (0.4 + 3.2 * Math.sqrt(Math.abs(w) / strongest)).toFixed(2),
          "stroke-opacity": near ? 0.95 : selected.node >= 0 ? 0.08 : (0.12 + 0.6 * Math.sqrt(Math.abs(w) / strongest)).toFixed(2),
        });
      }));
    }

    function choose(i) {
      if (zoom.moved) { zoom.moved = false; return; }
      selected.node = selected.node === i ? -1 : i;
      View.route.note({ node: selected.node < 0 ? null : graph.nodes[i].id });
      update();
    }
    function update() {
      const touching = new Set([selected.node]);
      for (const [a, b] of graph.edges) {
        if (a === selected.node) touching.add(b);
        if (b === selected.node) touching.add(a);
      }
      marks.forEach((m, i) => {
        m.classList.toggle("selected", i === selected.node);
        m.classList.toggle("dim", selected.node >= 0 && !touching.has(i));
        m.setAttribute("aria-pressed", i === selected.node ? "true" : "false");
      });
      drawEdges();
      side.replaceChildren(...(selected.node < 0 ? overview() : details(selected.node)));
    }

    const name = (i) => nodeName(graph, i);
    const edgeList = (text, edges, end) => [h("h3", null, text), edges.length ? edges.slice(0, 12).map((e) => {
      const row = View.meter(name(e[end]), Math.abs(e[2]) / strongest, f.signed(e[2], 3), "#");
      row.addEventListener("click", (event) => { event.preventDefault(); zoom.moved = false; if (selected.node !== e[end]) choose(e[end]); });
      return row;
    }) : h("p.note-line", null, "None in this graph.")];
    function details(i) {
      const node = graph.nodes[i];
      const link = node.kind === "latent" ? graph.links[node.layer] ?? -1 : -1;
      const by = (list) => list.sort((a, b) => Math.abs(b[2]) - Math.abs(a[2]));
      return [View.panel(name(i), null,
        h("dl.pairs", null, [["value", f.number(node.value)], ["influence", f.share(node.influence)], ["bias", f.number(node.bias)],
          ...(node.kind === "logit" ? [["probability", f.share(node.probability)]] : [])].map(([k, v]) => [h("dt", null, k), h("dd.num", null, v)])),
        link >= 0 ? h("a.button.primary", { href: View.route.latent(link, node.latent), id: "open-latent" }, `Open latent ${node.latent}`)
          : node.kind === "latent" ? h("p.note-line", null, "The dictionary of this layer is not in this site.") : null,
        edgeList("comes from", by(graph.edges.filter((e) => e[1] === i)), 0), edgeList("goes to", by(graph.edges.filter((e) => e[0] === i)), 1))];
    }
    function overview() {
      const scores = Object.entries(graph.scores);
      const best = graph.nodes.map((n, i) => i).filter((i) => graph.nodes[i].kind === "latent").sort((a, b) => graph.nodes[b].influence - graph.nodes[a].influence);
      return [View.panel("This graph", null, h("p.note-line", null, "Choose a node to see what it comes from and goes to."),
        scores.length ? h("dl.pairs", null, scores.map(([k, v]) => [h("dt", null, k.replaceAll("_", " ")), h("dd.num", null, f.number(v))])) : null),
      View.panel("Most influential latents", null, best.slice(0, 12).map((i) => {
        const row = View.meter(name(i), graph.nodes[i].influence, f.share(graph.nodes[i].influence), "#");
        row.addEventListener("click", (event) => { event.preventDefault(); zoom.moved = false; choose(i); });
        return row;
      }))];
    }
    svg.addEventListener("keydown", (event) => {
      const keys = { "+": () => zoom.by(0.8), "=": () => zoom.by(0.8), "-": () => zoom.by(1.25), 0: () => zoom.reset(),
        ArrowLeft: () => zoom.pan(-0.08, 0), ArrowRight: () => zoom.pan(0.08, 0), ArrowUp: () => zoom.pan(0, -0.08), ArrowDown: () => zoom.pan(0, 0.08) };
      if (keys[event.key] && !event.ctrlKey && !event.metaKey) { event.preventDefault(); event.stopPropagation(); keys[event.key](); }
    });
    const button = (text, label, act) => h("button.icon-button", { type: "button", "aria-label": label, title: label, onclick: act }, text);
    const slider = h("label.range", null, "Edges", h("input", { type: "range", min: 0, max: order.length, value: drawn, oninput: (e) => { drawn = Number(e.target.value); drawEdges(); } }));
    const what = [title.item.label_name, title.item.key].filter(Boolean).join(", ");
    main.replaceChildren(h("div.page.graph-page", null,
      h("div.heading.with-actions", null,
        h("div", null, h("p.crumb", null, h("a", { href: View.route.to(["graphs"]) }, "Graphs"), ` / ${title.name}`),
          h("h1", null, "Attribution graph"), h("p.facts", null, [what, graph.model.id, `${f.count(graph.nodes.length)} nodes`, `${f.count(graph.edges.length)} edges`].filter(Boolean).map((t) => h("span", null, t)))),
        h("div.actions", null, slider, button("+", "Zoom in", () => zoom.by(0.75)), button("−", "Zoom out", () => zoom.by(1.33)), button("⤢", "Show all", () => zoom.reset()))),
      h("div.columns", null, h("div.column-main", null, h("div.graph-box", null, svg), legend()), h("aside.column-side", null, side))));
    update();
    return null;
  };

  function nodeName(graph, i) {
    const n = graph.nodes[i];
    if (n.kind === "logit") return n.name || `class ${n.id.split("/").pop()}`;
    const where = n.token_kind === "patch" && n.place.length ? `patch ${n.place.join(",")}` : (n.token_kind || "").toUpperCase();
    if (n.kind === "latent") return `${n.layer}/${n.latent}${n.name ? ` ${n.name}` : ""} at ${where}`;
    return `${n.kind}${n.kind === "error" ? ` ${n.layer}` : ""} at ${where}`;
  }

  const SHAPES = {
    latent: (r) => s("circle", { r }),
    embed: (r) => s("rect", { x: -r, y: -r, width: 2 * r, height: 2 * r, rx: 1.5 }),
    position: (r) => s("path", { d: `M0 ${-r}L${r} ${r}L${-r} ${r}Z` }),
    error: (r) => s("path", { d: `M0 ${-r}L${r} 0L0 ${r}L${-r} 0Z` }),
    logit: (r) => s("rect", { x: -r - 3, y: -r, width: 2 * r + 6, height: 2 * r, rx: r }),
  };
  function mark(node, place, choose) {
    const r = node.kind === "logit" ? 10 : 4.5 + 7 * Math.sqrt(Math.min(1, Math.max(0, node.influence)));
    const g = s(`g.node.${node.kind}`, { transform: `translate(${place.x} ${place.y})`, tabindex: 0, role: "button",
      "data-id": node.id, onclick: choose, onkeydown: (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); e.stopPropagation(); choose(); } } },
    SHAPES[node.kind](r), node.kind === "logit" ? s("text.logit-name", { y: -15 }, node.name || node.id) : null);
    const label = `${node.kind} ${node.id}, value ${f.number(node.value)}, influence ${f.share(node.influence)}`;
    g.setAttribute("aria-label", label);
    g.append(s("title", null, label));
    return g;
  }
  const legend = () => h("p.graph-legend", null, Object.entries({ latent: "latent", embed: "patch", position: "position", error: "error", logit: "logit" }).map(([kind, text]) => h("span", null,
    s("svg", { viewBox: "-9 -7 18 14", "aria-hidden": "true" }, s(`g.node.${kind}`, null, SHAPES[kind](5))), text)),
  h("span", null, h("span.edge-more"), "raises"), h("span", null, h("span.edge-less"), "lowers"));
})();
