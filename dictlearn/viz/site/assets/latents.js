// The first page: all latents of one dictionary, with their distributions, search and order.
"use strict";
(() => {
  const { h, s } = View;
  const memory = new Map();

  View.pages.latents = async (main, d, query) => {
    const dictionary = View.site.dictionaries[d];
    const columns = View.columnKinds(dictionary);
    const data = View.table(d);
    const ask = query.get("sort") || "-density";
    let sort = columns.find((c) => c.id === ask.replace(/^-/, "")) || columns[1];
    let direction = ask.startsWith("-") ? -1 : 1;
    let kinds = query.get("kind") ? new Set(query.get("kind").split(",")) : null;
    const ranges = readRanges(query);
    let closed = false;

    const search = h("input.search", { type: "search", id: "search", placeholder: "Latent number, label or class", autocomplete: "off",
      "aria-label": "Search latents by number, label or class", value: query.get("q") || "" });
    const count = h("span.count", { "aria-live": "polite" });
    const chips = h("div.chips", { role: "group", "aria-label": "Token kind" });
    const minis = h("div.minis");
    const slot = h("div.grid-slot");
    const grid = new View.Grid(d, columns, {
      onsort(column) {
        direction = column === sort ? -direction : column.first;
        sort = column;
        View.route.note({ sort: `${direction < 0 ? "-" : ""}${sort.id}` });
        refresh(true);
      },
      open: (latent) => View.route.go(View.route.latent(d, latent)),
    });
    slot.append(grid.node);
    main.replaceChildren(
      h(`div.page.latents-page${dictionary.effect ? ".has-effect" : ""}`, null, heading(dictionary), minis,
        h("div.toolbar", null, h("label.search-box", null, icon(), search), chips, count), slot));

    const needed = () => [...new Set(["kind", sort.by || sort.id, ...Object.keys(ranges), ...(search.value ? ["label", ...(dictionary.effect ? ["class"] : [])] : [])])];
    async function refresh(top) {
      try { await Promise.all(needed().map((id) => data.need(id))); } catch (error) {
        if (!closed) slot.replaceChildren(View.failure(error, () => { slot.replaceChildren(grid.node); refresh(top); }));
        return;
      }
      if (closed) return;
      const order = data.sort(data.filter(search.value, ranges, kinds), sort, direction);
      if (top) { grid.body.scrollTop = 0; grid.active = 0; }
      grid.show(order, sort.id, direction);
      memory.set(d, order);
      View.order = { d, latents: order };
      count.textContent = order.length === data.count ? `${View.format.count(order.length)} latents` : `${View.format.count(order.length)} of ${View.format.count(data.count)} latents`;
      let none = slot.querySelector(".empty");
      if (none) none.remove();
      if (!order.length) {
        slot.append(View.empty("No latent fits", search.value ? `Nothing matches “${search.value}” with these filters. ` : "No latent is in this range. ",
          h("button.button", { type: "button", onclick: reset }, "Clear search and filters")));
      }
      drawChips();
      drawMinis();
    }
    function reset() {
      search.value = "";
      kinds = null;
      for (const id of Object.keys(ranges)) delete ranges[id];
      noteFilters();
      refresh(true);
      search.focus();
    }
    function noteFilters() {
      const range = Object.entries(ranges).map(([id, [a, b]]) => `${id}:${a}:${b}`).join(",");
      View.route.note({ q: search.value, kind: kinds ? [...kinds].join(",") : null, range });
    }
    function drawChips() {
      const counts = dictionary.kinds.map(() => 0);
      for (let i = 0; i < data.count; i++) counts[data.number("kind", i)]++;
      chips.replaceChildren(...dictionary.kinds.map((kind, i) => (counts[i] ? h("button.chip", {
        type: "button", "aria-pressed": kinds && kinds.has(kind) ? "true" : "false",
        onclick: () => {
          kinds = new Set(kinds || []);
          if (kinds.has(kind)) kinds.delete(kind); else kinds.add(kind);
          if (!kinds.size) kinds = null;
          noteFilters();
          refresh(true);
        },
      }, kind, h("span.num.faint", null, View.format.count(counts[i]))) : null)).filter(Boolean));
    }
    function drawMinis() {
      const shown = [["density", "Density", logBins()], ["purity", "Label purity", unitBins(Math.min(20, dictionary.top))], ["entropy", "Spread", unitBins(20)]];
      minis.replaceChildren(...shown.filter(([id]) => data.has(id)).map(([id, title, bins]) => {
        const counts = bins.map(() => 0);
        for (let i = 0; i < data.count; i++) {
          const x = data.number(id, i), at = bins.findIndex(([a, b]) => x >= a && x < b);
          if (at >= 0) counts[at]++;
        }
        const words = (x) => (id === "density" ? View.format.share(Math.min(1, x)).replace(/\.?0+ %/, " %") : View.format.fixed(Math.min(1, x)));
        return View.bars(title, bins.map(([a, b], i) => ({
          count: counts[i], on: !!ranges[id] && ranges[id][0] === a && ranges[id][1] === b,
          title: `${title} ${words(a)} to ${words(b)}: ${View.format.count(counts[i])} latents`,
        })), (i) => {
          const [a, b] = bins[i];
          if (ranges[id] && ranges[id][0] === a) delete ranges[id]; else ranges[id] = [a, b];
          noteFilters();
          refresh(true);
        }, words(bins[0][0]), words(bins[bins.length - 1][1]));
      }));
    }
    let timer = 0;
    search.addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(() => { noteFilters(); refresh(true); }, 80);
    });
    search.addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown" || event.key === "Enter") { event.preventDefault(); grid.focus(); grid.draw(); }
      if (event.key === "Escape" && search.value) { event.stopPropagation(); search.value = ""; noteFilters(); refresh(true); }
    });
    await refresh(false);
    // the other columns follow after the first paint, and fill their cells as they arrive
    requestAnimationFrame(() => setTimeout(async () => {
      for (const id of ["best", ...columns.flatMap((c) => (c.by ? [c.id, c.by] : [c.id]))]) {
        if (closed) return;
        if (data.has(id)) continue;
        try { await data.need(id); } catch { continue; }
        if (!closed) { grid.clear(); grid.draw(); if (["purity", "entropy"].includes(id)) drawMinis(); }
      }
    }, 0));
    return () => { closed = true; grid.close(); clearTimeout(timer); };
  };

  function heading(dictionary) {
    const parts = [
      `${dictionary.what} of ${dictionary.reads.join(", ")}${String(dictionary.writes) === String(dictionary.reads) ? "" : ` to ${dictionary.writes.join(", ")}`}`,
      View.site.model.id,
      `${View.format.count(View.site.store.items)} items`,
      `L0 ${Object.entries(dictionary.l0).map(([k, v]) => `${View.format.number(v)} ${k}`).join(", ")}`,
      `${View.format.share(dictionary.dead)} never active`,
    ];
    return h("div.heading", null, h("h1", null, "Latents"),
      h("p.facts", null, parts.map((p) => h("span", null, p))));
  }
  const icon = () => s("svg.icon", { viewBox: "0 0 16 16", "aria-hidden": "true" }, s("circle", { cx: 7, cy: 7, r: 4.5 }), s("path", { d: "M10.5 10.5 14 14" }));
  // edges a hair low, so that shares such as 5/16 fall into their own bin after packing
  const unitBins = (n) => Array.from({ length: n }, (_, i) => [i ? i / n - 1e-4 : 0, i === n - 1 ? 1.0001 : (i + 1) / n - 1e-4]);
  const logBins = () => Array.from({ length: 20 }, (_, i) => [10 ** (-5 + i / 4), i === 19 ? 1.0001 : 10 ** (-5 + (i + 1) / 4)]);
  function readRanges(query) {
    const out = {};
    for (const part of (query.get("range") || "").split(",")) {
      const [id, a, b] = part.split(":");
      if (["density", "purity", "entropy"].includes(id) && Number.isFinite(+a) && Number.isFinite(+b)) out[id] = [+a, +b];
    }
    return out;
  }
})();
