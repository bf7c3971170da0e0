// The list of items with a page, and the panels of what the model says on one.
"use strict";
(() => {
  const { h } = View;
  const f = View.format;

  View.pages.items = async (main) => {
    main.replaceChildren(h("div.page", null, View.loading(4)));
    const labels = await View.labels();
    const pages = View.site.items.pages;
    const records = await Promise.all(pages.map((p) => View.itemRecord(p)));
    const why = View.site.noPictures ? h("p.note-line", null, `The data set is away: ${View.site.noPictures}`) : null;
    main.replaceChildren(h("div.page", null,
      h("div.heading", null, h("h1", null, "Items"), h("p.facts", null,
        h("span", null, `${f.count(pages.length)} of ${f.count(View.site.store.items)} items have a page`), h("span", null, View.site.store.data))),
      why,
      pages.length ? h("div.cards.items", null, records.map((record, i) => {
        const name = record.label >= 0 ? labels[record.label] : `item ${pages[i]}`;
        return h("a.card", { href: View.route.item(pages[i]), title: record.key },
          h("div.frame", null, record.picture ? View.image(View.thumb(pages[i]), "") : h("span.badge", null, String(pages[i]))),
          h("span.card-line", null, h("span.card-label", null, name)));
      })) : View.empty("No item has a page", "Build the site with --items above 0.")));
    return null;
  };

  const rows = (state, classes) => classes.map(([c, p]) => View.meter(View.className(state.classes, c), p, f.share(p)));

  // Likeliest class when the stream of each layer goes to the head.
  View.lens = (state) => {
    const model = View.site.model;
    if (!state.inside) return View.panel("Logit lens", null, h("p.note-line", null, `Not computed: ${model.reason || "the model was away"}.`));
    if (!model.head) return View.panel("Logit lens", null, h("p.note-line", null, `Not possible: ${model.noHead}.`));
    if (!(state.inside.lens || []).length) return View.panel("Logit lens", null, h("p.note-line", null, "Its layers cannot be read by its head."));
    return View.panel("Logit lens", null, h("table.lens", null,
      h("thead", null, h("tr", null, ["Layer", "Likeliest", ""].map((t) => h("th", { scope: "col" }, t)))),
      h("tbody", null, state.inside.lens.map(({ layer, classes }) => {
        const [c, p] = classes[0];
        const fill = h("span.meter-fill");
        fill.style.width = `${100 * p}%`;
        return h("tr", { title: classes.map(([k, q]) => `${View.className(state.classes, k)} ${f.share(q)}`).join(", ") },
          h("th.num", { scope: "row" }, String(layer)), h("td", null, View.className(state.classes, c)),
          h("td.lens-bar", null, h("span.meter-track", { "aria-hidden": "true" }, fill), h("span.num", null, f.share(p))));
      }))), h("p.note-line", null, "The stream after each layer in place of the last one's, through the model's own norm and head."));
  };

  // What the model says with the dictionary's reconstruction in place.
  View.effects = (state) => {
    const title = "With the reconstruction";
    const found = state.inside && state.inside.effect[state.dictionary.folder];
    if (!found) return View.panel(title, null, h("p.note-line", null, `Not computed: ${View.site.model.reason || "the model was away"}.`));
    if (found.reason) return View.panel(title, null, h("p.note-line", null, `Not possible: ${found.reason}.`));
    if (found.classes) {
      return View.panel(title, h("span.num", null, `KL ${f.number(found.kl)}`),
        h("h3", null, "before"), rows(state, state.inside.clean.classes.slice(0, 3)),
        h("h3", null, "after"), rows(state, found.classes.slice(0, 3)));
    }
    return View.panel(title, null, View.meter("cosine", Math.max(0, found.cosine), f.fixed(found.cosine, 4)),
      View.meter("relative distance", Math.min(1, found.distance), f.fixed(found.distance, 3)),
      h("p.note-line", null, `Output features before against after; ${View.site.model.noHead}.`));
  };
})();
