// The frame: the bar at the top, and which page an address shows.
"use strict";
(() => {
  const { h, s } = View;
  const main = document.getElementById("main");
  const bar = document.getElementById("bar");
  let leave = null;
  let turn = 0;

  function drawBar(d, section) {
    const site = View.site;
    const link = (id, text, href) => h("a.nav", { href, "aria-current": section === id ? "page" : null }, text);
    const choose = site.dictionaries.length > 1
      ? h("select.dictionary", { "aria-label": "Dictionary", onchange: (e) => View.route.go(View.route.to([`d${e.target.value}`])) },
        site.dictionaries.map((one, i) => h("option", { value: i, selected: i === d }, one.name)))
      : h("span.dictionary-name", { title: site.dictionaries[0].name }, site.dictionaries[0].name);
    bar.replaceChildren(
      h("a.brand", { href: View.route.to([`d${d}`]), "aria-label": "All latents" }, mark()), choose,
      h("nav.navs", { "aria-label": "Pages" }, link("latents", "Latents", View.route.to([`d${d}`])), link("items", "Items", View.route.to(["items"])),
        site.graphs.length ? link("graphs", "Graphs", View.route.to(["graphs"])) : null),
      h("div.bar-end", null,
        h("button.icon-button", { type: "button", title: "Keys (?)", "aria-label": "Keyboard shortcuts", onclick: View.help }, "?"),
        h("button.icon-button", { type: "button", title: "Light or dark (t)", "aria-label": "Switch between light and dark", onclick: View.theme.toggle }, halfMoon())));
  }
  const mark = () => s("svg.mark", { viewBox: "0 0 20 20", "aria-hidden": "true" }, [[1, 1, 0.35], [7.5, 1, 0.6], [14, 1, 0.2], [1, 7.5, 0.6], [7.5, 7.5, 1], [14, 7.5, 0.45], [1, 14, 0.15], [7.5, 14, 0.5], [14, 14, 0.8]]
    .map(([x, y, o]) => s("rect", { x, y, width: 5, height: 5, rx: 1, opacity: o })));
  const halfMoon = () => s("svg.icon", { viewBox: "0 0 16 16", "aria-hidden": "true" }, s("circle", { cx: 8, cy: 8, r: 6 }), s("path.solid", { d: "M8 2a6 6 0 0 1 0 12z" }));

  async function show() {
    const mine = ++turn;
    const { parts, query } = View.route.parse();
    if (leave) { leave(); leave = null; }
    const [first = "d0", second] = parts;
    const found = /^d(\d+)$/.exec(first);
    const d = found ? Number(found[1]) : Math.min(Number(query.get("d")) || 0, View.site.dictionaries.length - 1);
    const section = found ? "latents" : first.startsWith("item") ? "items" : "graphs";
    const guarded = Math.max(0, Math.min(d, View.site.dictionaries.length - 1));
    drawBar(guarded, section);
    let page = null, title = "Latents";
    if (found && guarded === d && second === undefined) page = () => View.pages.latents(main, d, query);
    else if (found && guarded === d && /^\d+$/.test(second)) { page = () => View.pages.latent(main, d, Number(second)); title = `Latent ${second}`; }
    else if (first === "items") { page = () => View.pages.items(main); title = "Items"; }
    else if (first === "item" && /^\d+$/.test(second || "")) { page = () => View.pages.item(main, Number(second), query); title = `Item ${second}`; }
    else if (first === "graphs" && View.pages.graphs) { page = () => View.pages.graphs(main); title = "Graphs"; }
    else if (first === "graph" && /^\d+$/.test(second || "") && View.pages.graph) { page = () => View.pages.graph(main, Number(second), query); title = "Graph"; }
    document.title = `${title} · ${View.site.dictionaries[guarded].name}`;
    if (!page) {
      main.replaceChildren(h("div.page", null, View.empty("No such page", `Nothing is at ${location.hash}. `, h("a", { href: View.route.to(["d0"]) }, "All latents"))));
      return;
    }
    try {
      const end = await page();
      if (mine !== turn) { if (end) end(); return; }
      leave = end;
    } catch (error) {
      if (mine === turn) main.replaceChildren(h("div.page", null, View.failure(error, show)));
      return;
    }
    if (View.focusSearch && document.getElementById("search")) { View.focusSearch = false; document.getElementById("search").focus(); }
    View.say(title);
  }

  window.addEventListener("hashchange", () => { window.scrollTo(0, 0); show(); });
  View.start().then(show).catch((error) => main.replaceChildren(h("div.page", null, View.failure(error, () => location.reload()))));
})();
