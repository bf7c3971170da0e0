// The page of one latent.
"use strict";
(() => {
  const { h } = View;
  const f = View.format;
  const QUANTILES = { 4: ["strongest quarter", "third quarter", "second quarter", "weakest quarter"] };

  View.pages.latent = async (main, d, latent) => {
    const dictionary = View.site.dictionaries[d];
    if (!(latent >= 0 && latent < dictionary.latents)) {
      main.replaceChildren(View.empty(`No latent ${latent}`, `${dictionary.name} has latents 0 to ${dictionary.latents - 1}.`));
      return null;
    }
    const page = h("div.page.latent-page", null, head(d, latent, dictionary), View.loading(6));
    main.replaceChildren(page);
    const [record, labels, classes] = await Promise.all([
      View.load(`${dictionary.folder}/latents/${Math.floor(latent / dictionary.shard)}`).then((shard) => shard[latent % dictionary.shard]),
      View.labels(), View.classes()]);
    const data = View.table(d);
    const ids = ["kind", "entropy", "purity", "label"];
    await Promise.all(ids.map((id) => data.need(id)));
    page.replaceChildren(head(d, latent, dictionary), tiles(data, dictionary, record, latent), body(d, latent, dictionary, record, labels, classes));
    return null;
  };

  function head(d, latent, dictionary) {
    const order = View.order && View.order.d === d ? View.order.latents : null;
    const at = order ? order.indexOf(latent) : -1;
    const step = (by) => (at >= 0 ? order[at + by] : latent + by >= 0 && latent + by < dictionary.latents ? latent + by : undefined);
    const link = (by, text, key) => (step(by) === undefined ? h("span.button.off", { "aria-disabled": "true" }, text)
      : h("a.button", { href: View.route.latent(d, step(by)), "data-key": key, rel: by < 0 ? "prev" : "next" }, text));
    return h("div.heading.with-actions", null,
      h("div", null, h("p.crumb", null, h("a", { href: View.route.to([`d${d}`]) }, "Latents"), ` / ${dictionary.name}`),
        h("h1", null, `Latent ${latent}`)),
      h("div.actions", null, link(-1, "← Previous", "ArrowLeft"), link(1, "Next →", "ArrowRight")));
  }

  function tiles(data, dictionary, record, latent) {
    const value = (id) => data.number(id, latent);
    const tile = (name, text, note) => h("div.tile", null, h("dt", null, name), h("dd.num", null, text), note ? h("dd.tile-note", null, note) : null);
    const kinds = Object.keys(dictionary.tokens);
    const label = data.word("label", value("label"));
    return h("dl.tiles", null,
      tile("Density", f.share(record.density), `${f.count(record.fired.reduce((a, b) => a + b, 0))} tokens`),
      tile("Mean", f.number(record.mean ?? NaN), "where active"),
      tile("Max", f.number(record.max ?? NaN), "largest activation"),
      tile("Kind", dictionary.kinds[value("kind")] || "–", kinds.map((k, i) => `${k} ${f.share(record.rate[i])}`).join(", ")),
      tile("Spread", f.fixed(value("entropy")), "0 one place, 1 everywhere"),
      tile("Purity", f.fixed(value("purity")), label ? `label ${label}` : "no labels"));
  }

  function body(d, latent, dictionary, record, labels, classes) {
    const best = record.best.length
      ? h("div.cards", null, record.best.map((entry, i) => View.card(d, latent, entry, labels, i + 1)))
      : View.empty("Never active", "No token of this store activates this latent.");
    const groups = record.random.filter((g) => g.length);
    const names = QUANTILES[groups.length] || groups.map((_, i) => `group ${i + 1}`);
    const random = groups.length ? groups.map((group, i) => h("div.quantile", null,
      h("h3", null, names[i], h("span.num.faint", null, `${f.number(group[group.length - 1][2])} to ${f.number(group[0][2])}`)),
      h("div.cards.small", null, group.map((entry) => View.card(d, latent, entry, labels))))) : View.empty("Nothing to draw from", "It is never active here.");
    const away = View.site.noPictures ? h("p.note-line", null, `The data set is away, so only positions are shown: ${View.site.noPictures}`) : null;
    return h("div.columns", null,
      h("div.column-main", null, away,
        View.panel("Strongest items", View.opacityControl(), best),
        View.panel("Across its range", null, h("p.note-line", null, "Items drawn at random among all it is active in, in groups by its largest activation."), random)),
      h("aside.column-side", null,
        View.panel("Activations", null, View.histogram(dictionary.edges, record.histogram[0], record.histogram[1])),
        View.panel("Where it fires", null, View.positionMap(dictionary, record.place[0], record.place[1], View.site.store.items)),
        effect(dictionary, record, classes),
        View.panel("Fires together with", null, record.together.length
          ? record.together.map(([other, n, score]) => View.meter(`Latent ${other}`, score, `${f.fixed(score)} · ${f.count(n)}`, View.route.latent(d, other)))
          : h("p.note-line", null, "No latent shares two tokens with it in the sample."),
        h("p.note-line", null, `Cosine of firing and shared tokens, on a sample of ${f.count(dictionary.sampled)}.`)),
        View.panel("Nearest decoders", null, record.near.map(([other, cosine]) => View.meter(`Latent ${other}`, cosine, f.fixed(cosine), View.route.latent(d, other))))));
  }

  function effect(dictionary, record, classes) {
    if (!record.effect) return View.panel("Effect on logits", null, h("p.note-line", null, `Not known: ${dictionary.noEffect}.`));
    const most = Math.max(1e-12, ...record.effect.flat().map(([, v]) => Math.abs(v)));
    const rows = (list) => list.map(([c, v]) => View.meter(View.className(classes, c), Math.abs(v) / most, f.signed(v, 3)));
    return View.panel("Effect on logits", null,
      h("h3", null, "raises"), rows(record.effect[0]), h("h3", null, "lowers"), rows(record.effect[1]),
      h("p.note-line", null, "Of one unit, by the direct path through the last norm and the head, against the mean over classes."));
  }
})();
