// The page of one item: what is active where, where heads look, what each layer would say.
"use strict";
(() => {
  const { h } = View;
  const f = View.format;

  View.pages.item = async (main, position, query) => {
    main.replaceChildren(h("div.page", null, View.loading(6)));
    const [record, labels] = await Promise.all([View.itemRecord(position), View.labels()]);
    const title = record.label >= 0 ? labels[record.label] : `Item ${position}`;
    const head = h("div.heading", null,
      h("p.crumb", { title: record.key }, h("a", { href: View.route.to(["items"]) }, "Items"), ` / ${View.shortKey(record.key)}`),
      h("h1", null, title), h("p.facts", null, h("span", null, `store position ${position}`), h("span", null, `data set position ${record.source}`)));
    const d = Math.min(View.site.dictionaries.length - 1, Math.max(0, Number(query.get("d")) || 0));
    const state = {
      position, record, d, dictionary: View.site.dictionaries[d],
      layer: query.get("layer"), head: query.get("head") || "mean",
      latent: query.has("latent") ? Number(query.get("latent")) : null,
      map: query.get("map") || (query.has("latent") ? "latent" : "attention"),
    };
    if (!record.page) {
      main.replaceChildren(h("div.page", null, head, plain(state, labels)));
      return null;
    }
    const inside = View.site.model.loaded ? await View.load(`model/${position}`) : null;
    const [codes, classes] = await Promise.all([View.load(`${state.dictionary.folder}/codes/${position}`), View.classes()]);
    Object.assign(state, { codes, inside, classes });
    const page = h("div.page.item-page", null, head);
    main.replaceChildren(page);
    build(page, state, query, labels);
    return null;
  };

  // An item without a page of its own.
  function plain(state, labels) {
    const picture = state.record.picture ? h("div.stage-box", null, h("div.stage", null, View.image(View.thumb(state.position), ""))) : null;
    return h("div.columns", null, h("div.column-main", null, picture || View.empty("No picture", View.site.noPictures || "No picture was written of this item."),
      h("p.note-line", null, "This site holds attention, logits and active latents of ",
        h("a", { href: View.route.to(["items"]) }, `${View.site.items.pages.length} items`), ", not of this one. ",
        h("code", null, "dictlearn view --items N"), " builds more.")),
    h("aside.column-side", null, among(state)));
  }

  function among(state) {
    const lists = View.site.dictionaries.map((dictionary, d) => {
      const seen = state.record.best[dictionary.folder] || [];
      return seen.length ? [View.site.dictionaries.length > 1 ? h("h3", null, dictionary.name) : null,
        h("div.links", null, seen.map(([latent, value]) => h("a.pill", { href: View.route.latent(d, latent) }, `${latent}`, h("span.num.faint", null, f.number(value)))))] : null;
    }).filter(Boolean);
    return View.panel("Among the strongest items of", null, lists.length ? lists : h("p.note-line", null, "No latent."));
  }

  function build(page, state, query, labels) {
    const model = View.site.model;
    const layers = model.layers || [];
    if (!layers.includes(Number(state.layer)) || state.layer === null) state.layer = layers.length ? layers[layers.length - 1] : null;
    else state.layer = Number(state.layer);
    if (!layers.length) state.map = "latent";
    const caption = h("p.stage-caption", { "aria-live": "off" });
    const list = h("div.active-list");
    const where = h("span.num");
    const asked = Number(query.get("token"));
    const start = query.has("token") && Number.isInteger(asked) ? asked : middle(state.dictionary);
    const stage = new View.Stage({ dictionary: state.dictionary, position: state.position, frames: state.record.frames, token: start,
      onmove: (token) => { View.route.note({ token }); draw(); listActive(); } });
    let turn = 0;

    async function draw(preview = null) {
      const mine = ++turn;
      const latent = preview === null ? state.latent : preview;
      if (state.map === "latent" || preview !== null) {
        if (latent === null) { stage.paint(() => 0); caption.textContent = "Choose a latent in the list to see where it is active."; return; }
        const values = latentMap(state.codes, latent);
        const most = stage.paint((t) => values.get(t));
        caption.replaceChildren("Latent ", h("a", { href: View.route.latent(state.d, latent) }, String(latent)), values.size ? `, up to ${f.number(most)} here` : ", not active on this item");
        return;
      }
      let attention;
      try { attention = await View.attention(state.position, state.layer); } catch (error) {
        caption.textContent = error.message;
        return;
      }
      if (mine !== turn) return;
      if (stage.token >= attention.queries) return;
      const row = attention.row(state.head, stage.token);
      const most = stage.paint((t) => row[t]);
      const cls = state.dictionary.first.cls;
      const kept = cls ? `, ${f.share(row[cls[0]])} to CLS` : "";
      caption.textContent = `Layer ${state.layer}, ${state.head === "mean" ? "mean of heads" : `head ${state.head}`}, from ${View.placeName(state.dictionary, stage.token)}: up to ${f.share(most)} to a patch${kept}`;
    }

    function listActive() {
      const [latents, values] = state.codes[stage.token] || [[], []];
      where.textContent = View.placeName(state.dictionary, stage.token);
      const most = Math.max(1e-12, ...values.map(Math.abs));
      list.replaceChildren(...(latents.length ? latents.slice(0, 40).map((latent, i) => {
        const row = h("div.active-row", { "data-latent": latent, "aria-current": latent === state.latent ? "true" : null },
          h("button.map-button", { type: "button", title: "Show its map on this picture", "aria-label": `Map of latent ${latent}`,
            onclick: () => choose(latent) }, "◫"),
          View.meter(`Latent ${latent}`, Math.abs(values[i]) / most, f.number(values[i]), View.route.latent(state.d, latent)));
        row.addEventListener("pointerenter", () => draw(latent));
        row.addEventListener("pointerleave", () => draw());
        return row;
      }) : [h("p.note-line", null, state.codes[stage.token] ? "No latent is active at this token." : "This site does not look at the dictionary on this token.")]));
    }

    function choose(latent) {
      state.latent = latent;
      setMap("latent");
      View.route.note({ latent });
      listActive();
    }
    function setMap(map) {
      state.map = map;
      View.route.note({ map });
      for (const b of modes.children) b.setAttribute("aria-pressed", b.dataset.map === map ? "true" : "false");
      choices.hidden = map !== "attention";
      draw();
    }
    const mode = (map, text, off) => h("button.chip", { type: "button", "data-map": map, disabled: off, onclick: () => setMap(map) }, text);
    const modes = h("div.chips", { role: "group", "aria-label": "What the map shows" },
      mode("attention", "Attention", !layers.length), mode("latent", "Latent", false));
    const layer = h("select", { id: "layer", onchange: (e) => { state.layer = Number(e.target.value); View.route.note({ layer: state.layer }); draw(); } },
      layers.map((l) => h("option", { value: l, selected: l === state.layer }, String(l))));
    const head = h("select", { id: "head", onchange: (e) => { state.head = e.target.value; View.route.note({ head: state.head }); draw(); } },
      h("option", { value: "mean" }, "mean"), Array.from({ length: model.heads || 0 }, (_, i) => h("option", { value: i }, String(i))));
    head.value = state.head;
    if (head.selectedIndex < 0) { state.head = "mean"; head.value = "mean"; }
    const choices = h("div.choices", null, h("label", null, "Layer ", layer), h("label", null, "Head ", head));
    const cls = state.dictionary.first.cls;
    const toCls = cls ? h("button.chip", { type: "button", onclick: () => { stage.pinned = true; stage.set(cls[0]); } }, "CLS") : null;
    const why = !model.loaded ? `Nothing of the model is on this page: ${model.reason}.` : model.noAttention ? `No attention: ${model.noAttention}.` : "";
    const other = View.site.dictionaries.length > 1 ? h("label", null, "Dictionary ", h("select", { onchange: (e) => View.route.go(View.route.item(state.position, { d: e.target.value, token: stage.token })) },
      View.site.dictionaries.map((one, i) => h("option", { value: i, selected: i === state.d }, one.name)))) : null;
    page.append(h("div.columns.item-columns", null,
      h("div.column-main", null,
        h("div.stage-tools", null, modes, choices, toCls, other),
        stage.node, caption, why ? h("p.note-line", null, why) : null,
        View.site.noPictures ? h("p.note-line", null, `The data set is away, so only positions are shown: ${View.site.noPictures}`) : null),
      h("aside.column-side", null,
        View.panel("Active at the patch", where, list),
        View.lens(state), View.effects(state), among(state))));
    setMap(state.map);
    listActive();
  }

  const middle = (dictionary) => {
    if (!dictionary.first.patch) return Object.values(dictionary.first)[0][0];
    const [first, end] = dictionary.first.patch;
    if (dictionary.grid.length < 2) return first;
    const [height, width] = dictionary.grid.slice(-2);
    return Math.min(end - 1, first + Math.floor(height / 2) * width + Math.floor(width / 2));
  };
  function latentMap(codes, latent) {
    const out = new Map();
    for (const [token, [latents, values]] of Object.entries(codes)) {
      const at = latents.indexOf(latent);
      if (at >= 0) out.set(Number(token), values[at]);
    }
    return out;
  }
})();
