// The columns of the table of latents: their values (loaded when first needed), order, and filters.
"use strict";
(() => {
  const f = View.format;

  // align: numbers to the right; wide: hidden on narrow screens; bar: a bar of this share
  View.columnKinds = (dictionary) => [
    { id: "latent", title: "Latent", help: "number in the dictionary", first: 1 },
    { id: "density", title: "Density", help: "share of all tokens on which it is active", first: -1, text: f.share, bar: "log" },
    { id: "mean", title: "Mean", help: "mean activation where active", first: -1, text: f.number, wide: 1 },
    { id: "kind", title: "Kind", help: "token kind it is active on most", first: 1, wide: 1 },
    { id: "entropy", title: "Spread", help: "entropy of the patch position, 0 one place, 1 everywhere", first: 1, text: (x) => f.fixed(x), bar: "unit", wide: 1 },
    { id: "purity", title: "Purity", help: "share of its strongest items that have the same label", first: -1, text: (x) => f.fixed(x), bar: "unit" },
    { id: "label", title: "Label", help: "that label", first: 1, words: true },
    { id: "near", title: "Nearest", help: "latent of the most similar decoder row, with its cosine", first: -1, by: "cosine", wide: 2 },
    ...(dictionary.effect ? [{ id: "class", title: "Raises", help: "class whose logit it raises most", first: -1, by: "effect", words: true, wide: 1 }] : []),
  ];

  const tables = new Map();
  View.table = (d) => {
    if (!tables.has(d)) tables.set(d, new Columns(d));
    return tables.get(d);
  };

  class Columns {
    constructor(d) {
      this.dictionary = View.site.dictionaries[d];
      this.count = this.dictionary.latents;
      this.values = new Map();
      this.pending = new Map();
      this.words = new Map();
    }

    has(id) { return id === "latent" || this.values.has(id); }

    // Load a column (and the names it counts); resolves when it can be read.
    need(id) {
      if (id === "latent") return Promise.resolve();
      if (!this.pending.has(id)) this.pending.set(id, this.read(id).catch((error) => { this.pending.delete(id); throw error; }));
      return this.pending.get(id);
    }

    async read(id) {
      if (id === "label") this.words.set("label", await View.labels());
      if (id === "class") {
        const names = await View.classes();
        this.words.set("class", { length: Infinity, at: (c) => View.className(names, c) });
      }
      this.values.set(id, await View.column(`${this.dictionary.folder}/${id}`));
    }

    number(id, latent) {
      if (id === "latent") return latent;
      const values = this.values.get(id);
      return values ? values[latent] : NaN;
    }

    text(column, latent) {
      if (column.id === "latent") return String(latent);
      if (!this.has(column.id)) return "…";
      const value = this.number(column.id, latent);
      if (!Number.isFinite(value)) return "–";
      if (column.id === "kind") return this.dictionary.kinds[value];
      if (column.words) return this.word(column.id, value);
      return column.text ? column.text(value) : String(value);
    }

    word(id, value) {
      const words = this.words.get(id);
      if (!words || !Number.isFinite(value)) return "";
      return words.at(value) === undefined ? "" : words.at(value);
    }

    // Latents that fit a search text and ranges {id: [low, high]}; kinds is a set of names or null.
    filter(text, ranges, kinds) {
      const wanted = text.trim().toLowerCase();
      const number = /^#?\d+$/.test(wanted) ? Number(wanted.replace("#", "")) : null;
      const fits = this.matchingWords(wanted);
      const out = [];
      for (let i = 0; i < this.count; i++) {
        if (kinds && !kinds.has(this.dictionary.kinds[this.number("kind", i)])) continue;
        if (wanted && !(number !== null ? String(i).startsWith(String(number)) : fits(i))) continue;
        let inside = true;
        for (const [id, [low, high]] of Object.entries(ranges)) {
          const value = this.number(id, i);
          if (!(value >= low && value < high)) { inside = false; break; }
        }
        if (inside) out.push(i);
      }
      return Uint32Array.from(out);
    }

    matchingWords(wanted) {
      const tests = ["label", "class"].filter((id) => this.has(id)).map((id) => {
        const values = this.values.get(id), known = new Map();
        return (i) => {
          const value = values[i];
          if (!Number.isFinite(value)) return false;
          if (!known.has(value)) known.set(value, this.word(id, value).toLowerCase().includes(wanted));
          return known.get(value);
        };
      });
      return (i) => tests.some((test) => test(i));
    }

    // Order by a column; latents without a value stand last whichever way.
    sort(latents, column, direction) {
      const id = column.by || column.id;
      let key = (i) => this.number(id, i);
      if (column.words && !column.by) {
        const names = new Map();
        key = (i) => {
          const value = this.number(id, i);
          if (!Number.isFinite(value)) return NaN;
          if (!names.has(value)) names.set(value, this.word(id, value).toLowerCase());
          return names.get(value);
        };
        return latents.sort((a, b) => {
          const x = key(a), y = key(b), nx = x !== x, ny = y !== y;
          if (nx || ny) return nx - ny || a - b;
          return x < y ? -direction : x > y ? direction : a - b;
        });
      }
      return latents.sort((a, b) => {
        const x = key(a), y = key(b), nx = x !== x, ny = y !== y;
        if (nx || ny) return nx - ny || a - b;
        return direction * (x - y) || a - b;
      });
    }
  }
})();
