// Addresses: everything after # says which page is shown, with which choices.
//   #/d0?q=dog&sort=-purity   #/d0/1234   #/items   #/item/12?layer=3&head=1   #/graph/0?node=...
"use strict";
(() => {
  View.route = {
    parse(hash = location.hash) {
      const [path, query] = hash.replace(/^#/, "").split("?");
      let parts = path.split("/").filter(Boolean);
      try { parts = parts.map(decodeURIComponent); } catch { parts = ["?"]; }
      return { parts, query: new URLSearchParams(query || "") };
    },
    to(parts, query = {}) {
      const pairs = Object.entries(query).filter(([, v]) => v !== null && v !== undefined && v !== "");
      const tail = new URLSearchParams(pairs.map(([k, v]) => [k, String(v)])).toString();
      return `#/${parts.map(encodeURIComponent).join("/")}${tail ? `?${tail}` : ""}`;
    },
    latent: (d, latent) => View.route.to([`d${d}`, latent]),
    item: (position, query) => View.route.to(["item", position], query),
    // Keep the choices of a page in its address without another step in the history.
    note(changes) {
      const { parts, query } = View.route.parse();
      for (const [name, value] of Object.entries(changes)) {
        if (value === null || value === undefined || value === "") query.delete(name);
        else query.set(name, String(value));
      }
      history.replaceState(history.state, "", View.route.to(parts, Object.fromEntries(query)));
    },
    go(hash) { location.hash = hash; },
  };
})();
